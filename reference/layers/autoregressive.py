"""The routed attention layer for autoregressive models."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from reference._kernels import Operation
from reference._shared.arguments import check_counts, check_tokens
from reference._shared.returns import PrefixSelection
from reference._shared.sizes import ceil_div, is_certain, missing
from reference.layers.join import join
from reference.layers.light_attention import WindowedAttention
from reference.layers.linear import Rounded
from reference.layers.operations import UseTriton
from reference.layers.replayed import replayed
from reference.layers.rotary import RotaryEmbedding, Rotations, angles_at
from reference.layers.routed_branch import RoutedBranch
from reference.layers.router import RouterReturn, Selection
from reference.layers.start import Start
from reference.route import gather_tokens


class ConditionalRoutedAutoregressiveAttention(RoutedBranch):
    """Windowed causal attention for all tokens, and dense attention for routed tokens. Routed queries of each window
    attend to tokens that are routed from all windows before it.

    By default the choice of the queries of a window depends on all its tokens, as published: a later token may displace
    an earlier one, whose output then changes. With `causal_query_routing` the choice does not depend on later tokens. A
    token is routed if its score is above the smallest of the `num_heavy_tokens_q` largest scores of the window before,
    and if fewer than `num_heavy_tokens_q` tokens of its own window were routed before it. Its weight is that of its
    score among the scores of the window before. A `route_block_size` of the routers then applies only to keys and
    values.

    Args:
        dim: size of a token.
        num_heavy_tokens_q: number of tokens per window that are routed as queries.
        num_heavy_tokens_kv: number of tokens before a window that are routed as its keys and values.
        light_dim_head, light_heads: of the windowed attention.
        light_window_size: size of its windows: a token attends to its own window, up to itself, and to the window
            before.
        heavy_window_size: size of the windows of the routed attention, by default the same. If it is larger, some
            tokens are out of reach of both.
        heavy_dim_head, heavy_heads: of the routed attention.
        rotary_emb: rotary position embedding in the routed attention.
        light_rotary_emb: the same in the windowed attention.
        position_bias: T5's relative position bias instead of `light_rotary_emb`, learned per head and bucket of
            distances.
        causal_query_routing: whether the choice of a query is independent of later tokens.
        num_routed_kv, router_straight_through, router_kwargs: as in `RoutedBranch`.
        multiply_keys_by_score, multiply_queries_by_score: as in `RoutedBranch`.
        use_triton, use_null_q_tokens, use_flash_attn, init: as in `RoutedBranch`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: int,
        num_heavy_tokens_kv: int,
        num_routed_kv: int = 1,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_window_size: int | None = None,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: UseTriton = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        init: Start = "published",
        rotary_emb: bool = False,
        light_rotary_emb: bool = False,
        position_bias: bool = False,
        causal_query_routing: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_routed_kv=num_routed_kv,
            dim_head=heavy_dim_head,
            heads=heavy_heads,
            router_straight_through=router_straight_through,
            router_kwargs=router_kwargs,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score,
            use_triton=use_triton,
            use_null_q_tokens=use_null_q_tokens,
            use_flash_attn=use_flash_attn,
            init=init,
        )
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = num_heavy_tokens_q, num_heavy_tokens_kv
        self.heavy_window_size = light_window_size if heavy_window_size is None else heavy_window_size
        check_counts(
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            light_window_size=light_window_size,
            heavy_window_size=self.heavy_window_size,
        )
        self.causal_query_routing = causal_query_routing
        options: dict[str, Any] = {"rotary_emb": light_rotary_emb, "position_bias": position_bias}
        options |= {"causal": True, "use_triton": self.operations}
        self.light_attn = WindowedAttention(dim, light_window_size, light_dim_head, light_heads, **options)
        self.rotary_emb = RotaryEmbedding(heavy_dim_head) if rotary_emb else None

        router, segments = self.kv_router, (router_kwargs or {}).get("triton_checkpoint_segments")
        self._has_prefixes = router.solver == "coor_descent" and router.route_block_size is None and segments is None

    @property
    def _route_prefixes(self) -> Operation | None:
        """The operation that routes prefixes of a row without copies; None if this layer has none."""
        return self.kv_router.operations.route_prefixes if self._has_prefixes else None

    def extra_repr(self) -> str:
        path = "rows with a mask" if self._route_prefixes is None else "kernels.route_prefixes unless random_route"
        return f"{super().extra_repr()}, heavy_window_size={self.heavy_window_size}, kv_routing={path!r}"

    @replayed
    def forward(
        self,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | None = None,
        num_heavy_tokens_kv: int | None = None,
        random_route: bool = False,
        routing_tokens_q: Tensor | None = None,
        routing_tokens_kv: Tensor | None = None,
    ) -> Tensor:
        """Tokens `b n d` to `b n d`. A window without tokens before it has no heavy branch.

        Args:
            num_heavy_tokens_q, num_heavy_tokens_kv: override those of the layer.
            random_route: select at random, as a control.
            routing_tokens_q, routing_tokens_kv: `b d` and `b r d`, override those of the routers.

        Raises:
            ValueError: an argument is out of its range, or shapes do not match.
        """
        check_tokens(x, self.q_router.dim)
        num_q = self.num_heavy_tokens_q if num_heavy_tokens_q is None else num_heavy_tokens_q
        num_kv = self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        check_counts(num_heavy_tokens_q=num_q, num_heavy_tokens_kv=num_kv)
        self.q_router.check_random(random_route)
        size = self.heavy_window_size
        if self.operations.length(x) <= size:
            return self.light_attn(x)

        rounded = self.round_weights(x, self.light_attn)
        light = self.light_attn(x, rounded=rounded)
        x_from = self.operations.with_window_before(x, size)
        n, before = x_from.shape[1], x_from.shape[1] - x.shape[1]
        more = missing(n, size)
        padded = x_from if is_certain(more == 0) else F.pad(x_from, (0, 0, 0, more))
        q = self._route_queries(padded, n, num_q, routing_tokens_q, random_route)
        kv = self._route_windows(padded[:, before:], before, num_kv, routing_tokens_kv, random_route)
        return self._attend_windows(x, before, q, kv, rounded, light)

    def _attend_windows(
        self, x: Tensor, before: int, q: RouterReturn, kv: Selection, rounded: Rounded, light: Tensor
    ) -> Tensor:
        """The heavy branch for tokens `b n d`, from the second window on, added to the light one. Tokens are those of
        the routers. q is `b w i` for each window, with places that count from `before` tokens ahead of x; kv are lists
        `b w r s` of tokens of the sequence. Keys and values are projected once for all windows."""
        attention, size, n = self.heavy_attn, self.heavy_window_size, x.shape[1]
        key_value = attention.project(rearrange(x, "b n d -> b 1 n d"), self.kv_router.num_routing_tokens, rounded)
        rotations = None
        if self.rotary_emb is not None:
            angles = self.rotary_emb(before + n, self.operations.start(x) - before)
            rotations = Rotations(angles_at(angles, q.indices), angles[before:])
        out = attention(
            q.routed_tokens,
            key_value=key_value,
            scores_kv=kv.weights,
            rounded=rounded,
            mask=kv.mask,
            scores_q=q.scores if self.multiply_queries_by_score else None,
            rotations=rotations,
            indices=kv.indices,
        )
        assert q.indices is not None
        branches: dict[str, Any] = {"null": self.null_q_token, "light": light, "start": size - before}
        out, indices = out.flatten(1, 2), q.indices.flatten(1)
        indices = indices - before if before else indices
        return join(self.operations.combine, out, q.scores.flatten(1), indices, x, **branches)

    def _route_queries(
        self, padded: Tensor, n: int, num_tokens: int, routing_tokens: Tensor | None, random_route: bool
    ) -> RouterReturn:
        """Queries `b w i` of each window except the first, of the first n tokens. Indices are places in the sequence; n
        or more means no place."""
        size, router = self.heavy_window_size, self.q_router
        if size <= num_tokens:
            tokens = rearrange(padded[:, size:], "b (w i) d -> b w i d", i=size)
            places = torch.arange(size, padded.shape[1], device=padded.device).view(-1, size)
            return RouterReturn(places.expand(tokens.shape[:3]), tokens.new_ones(tokens.shape[:3]), tokens, None)

        takes_windows = router.takes_windows(size) and self.operations.shards_of is None
        if not self.causal_query_routing and not random_route and takes_windows:
            routed = router.route_windows(padded[:, size:n], size, num_tokens, routing_tokens)
            windows = padded.shape[1] // size - 1
            indices, weights, tokens = (rearrange(each, "b 1 (w i) ... -> b w i ...", w=windows) for each in routed)
            return RouterReturn(indices + size, weights.to(padded.dtype), tokens, None)

        scores = rearrange(router.score(padded, routing_tokens), "b 1 (w i) -> b w i", i=size)
        starts = self._starts(ceil_div(n, size) - 1, padded.device)
        exists = starts + torch.arange(size, device=padded.device) < n
        if self.causal_query_routing:
            selection = self._select_causally(scores[:, :-1], scores[:, 1:], exists, num_tokens, random_route)
        else:
            selection = router.select(scores[:, 1:], num_tokens, exists, random_route)
        # An index past the end of a window is no place; it must not be one in the next window.
        places = (selection.indices + starts).masked_fill(selection.indices >= size, n)
        return RouterReturn(places, selection.weights.to(padded.dtype), gather_tokens(padded, places), None)

    def _select_causally(
        self, before: Tensor, scores: Tensor, exists: Tensor, num_tokens: int, random_route: bool
    ) -> Selection:
        """Scores of each window `b w i` above the smallest selected score of the window before, in order."""
        count = self.q_router.num_selected(num_tokens, scores.shape[-1])
        ranks_before, ranks = before.detach(), scores.detach()
        if random_route:
            ranks_before, ranks = torch.rand_like(before), torch.rand_like(scores)
        accepted = (ranks > ranks_before.topk(count, dim=-1).values[..., -1:]) & exists
        accepted &= accepted.cumsum(dim=-1) <= count
        # Accepted tokens first, in their order. The indices of all others are past the end, because their number
        # depends on later tokens.
        order = accepted.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :count]
        chosen = accepted.gather(-1, order)
        among = torch.cat((repeat(before, "b w j -> b w k j", k=count), scores.gather(-1, order).unsqueeze(-1)), dim=-1)
        weights = self.q_router.relax(among, num_tokens)[..., -1]
        return self.q_router.weighed(order.masked_fill(~chosen, scores.shape[-1]), weights, chosen)

    def _route_windows(
        self, padded: Tensor, before: int, num_tokens: int, routing_tokens: Tensor | None, random_route: bool
    ) -> Selection:
        """Keys and values `b w r s` of each window except the sequence's first, from the tokens before it.

        With kernels, scores are not copied for each window. The kernels support neither the exact solver nor blocks.
        """
        operations = self.operations
        n, first = operations.length(padded), operations.start(padded) - before
        windows = (before + padded.shape[1]) // self.heavy_window_size - 1
        if n <= num_tokens:
            is_before = self._before_windows(n, windows, padded.device, first)
            mask = is_before.expand(padded.shape[0], windows, self.kv_router.num_routing_tokens, n)
            indices = torch.arange(n, device=padded.device).expand(mask.shape)
            return Selection(indices, padded.new_ones(mask.shape), mask)
        scores = operations.whole_rows(self.kv_router.score(padded, routing_tokens), padded)
        selection = self._select_before(scores, windows, first, num_tokens, random_route)
        return selection._replace(weights=selection.weights.to(padded.dtype))

    def _starts(self, windows: int, device: torch.device, first: int = 0) -> Tensor:
        """Starts `w 1` of windows, after one earlier window that starts at `first`."""
        size = self.heavy_window_size
        return torch.arange(first + size, first + (windows + 1) * size, size, device=device)[:, None]

    def _before_windows(self, n: int, windows: int, device: torch.device, first: int) -> Tensor:
        """A mask `w 1 n` of the tokens, among n, that are before each of these windows."""
        return (torch.arange(n, device=device) < self._starts(windows, device, first)).unsqueeze(1)

    def _select_before(
        self, scores: Tensor, windows: int, first: int, num_tokens: int, random_route: bool
    ) -> Selection:
        """Selections `b w r s` of windows, from the tokens before each, by scores `b r n` of the sequence. The window
        before these starts at `first`."""
        router, n = self.kv_router, scores.shape[-1]
        if random_route or self._route_prefixes is None or not router.operations.are_fused_for(scores):
            before = self._before_windows(n, windows, scores.device, first)
            rows = repeat(scores, "b r n -> b w r n", w=windows)
            return router.select(rows, num_tokens, before, random_route)
        routed: PrefixSelection = self._route_prefixes(
            scores,
            window_size=self.heavy_window_size,
            num_selected=router.num_selected(num_tokens, n),
            n_iters=router.n_iters,
            **router.relaxation(num_tokens, n),
            straight_through=router.straight_through,
        )
        if self.operations.shards_of is None:
            return Selection(*routed)
        own = slice(first // self.heavy_window_size, first // self.heavy_window_size + windows)
        mask = None if routed.mask is None else routed.mask[:, own]
        return Selection(routed.indices[:, own], routed.weights[:, own], mask)
