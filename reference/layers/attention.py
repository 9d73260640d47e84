"""The routed attention layers: self-attention of a sequence, and cross-attention to a long context."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from reference._arguments import check_counts, check_tokens, require
from reference._attention import RotaryEmbedding, Rotations
from reference._operations import choose, path
from reference.combine import combine, join
from reference.layers.router import CoordinateDescentRouter, RouterReturn
from reference.routed_attention import Attention
from reference.windowed_attention import WindowedAttention


class RoutedBranch(nn.Module):
    """What the routed attention layers have in common: two routers, the dense attention between what they route, and
    an output for the tokens that are not routed.

    Args:
        dim: size of a token.
        num_routed_kv: sets of keys and values, each with a routing token and its share of the heads.
        dim_head, heads: of the dense attention.
        router_straight_through: weights of routed tokens are 1 in value and keep their gradient.
        router_kwargs: further arguments of both routers; `kv_router_kwargs`: of the one for keys and values.
        multiply_keys_by_score, multiply_queries_by_score: beside the values, which always are.
        use_triton: as in `CoordinateDescentRouter`, for all operations that there are kernels for.
        use_null_q_tokens: tokens that are not routed get a learned output, else 0.
        use_flash_attn: PyTorch's scaled_dot_product_attention, where there is no kernel.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_routed_kv: int,
        dim_head: int,
        heads: int,
        router_straight_through: bool,
        router_kwargs: Mapping[str, Any] | None,
        multiply_keys_by_score: bool,
        multiply_queries_by_score: bool,
        use_triton: bool | None,
        use_null_q_tokens: bool,
        use_flash_attn: bool,
        kv_router_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_counts(dim=dim, dim_head=dim_head, heads=heads, num_routed_kv=num_routed_kv)
        require(heads % num_routed_kv == 0, "heads", heads, "a multiple of the {} key/value routes", num_routed_kv)
        self.multiply_queries_by_score = multiply_queries_by_score
        options = {"straight_through": router_straight_through, "use_triton": use_triton, **(router_kwargs or {})}
        self.null_q_token = nn.Parameter(torch.randn(dim)) if use_null_q_tokens else None
        self.q_router = CoordinateDescentRouter(dim, num_routing_tokens=1, **options)
        kv_options = {**options, **(kv_router_kwargs or {})}
        self.kv_router = CoordinateDescentRouter(dim, num_routing_tokens=num_routed_kv, **kv_options)
        self.heavy_attn = Attention(dim, dim_head, heads, multiply_keys_by_score, use_flash_attn, use_triton)
        self.use_triton = use_triton
        self._combine = choose("combine", combine, use_triton)

    def extra_repr(self) -> str:
        return path("combine", self.use_triton)

    def route_context(
        self, context: Tensor, num_tokens: int, mask: Tensor | None, routing_tokens: Tensor | None
    ) -> RouterReturn:
        """What is routed of a context `b m d`, as keys and values, with a dimension of routes even if there is one."""
        routed = self.kv_router(
            context, num_tokens=num_tokens, mask=mask, routing_tokens=routing_tokens, keep_one_route_dim=True
        )
        key_value = self.heavy_attn.project(routed.routed_tokens, self.kv_router.num_routing_tokens)
        return routed._replace(routed_tokens=key_value)

    def attend_routed(
        self,
        x: Tensor,
        q: RouterReturn,
        kv: RouterReturn,
        rotations: Rotations | None = None,
        light: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The heavy branch for tokens `b n d`, of which q are routed, to kv as `route_context` makes them; with light
        and residual, `b n d`, added if there are any: `b n d`."""
        out = self.heavy_attn(
            q.routed_tokens,
            key_value=kv.routed_tokens,
            scores_kv=kv.scores,
            mask=kv.routed_mask,
            scores_q=q.scores if self.multiply_queries_by_score else None,
            rotations=rotations,
        )
        branches = {"null": self.null_q_token, "light": light, "residual": residual}
        return join(self._combine, out, q.scores, q.indices, x, **branches)


class ConditionalRoutedAttention(RoutedBranch):
    """Attention within a radius for all tokens, and dense attention from routed to routed ones (2303.09752, 3.2).

    Args:
        dim: size of a token.
        num_heavy_tokens_q, num_heavy_tokens_kv: how many tokens are routed as queries, and as keys and values.
        has_light_attn: whether there is the first of the two.
        light_dim_head, light_heads: of that.
        light_window_size: a token attends to those at most half as far away; at least 2.
        heavy_dim_head, heavy_heads: of the dense attention.
        rotary_emb: rotary position embedding in the dense attention.
        num_routed_kv, router_straight_through, router_kwargs, multiply_keys_by_score, multiply_queries_by_score,
            use_triton, use_null_q_tokens, use_flash_attn: as in `RoutedBranch`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_tokens_q: int,
        num_heavy_tokens_kv: int,
        num_routed_kv: int = 1,
        has_light_attn: bool = True,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: bool | None = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        rotary_emb: bool = False,
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
        )
        check_counts(num_heavy_tokens_q=num_heavy_tokens_q, num_heavy_tokens_kv=num_heavy_tokens_kv)
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = num_heavy_tokens_q, num_heavy_tokens_kv
        self.light_attn = None
        if has_light_attn:
            check_counts(light_window_size=light_window_size)
            require(light_window_size >= 2, "light_window_size", light_window_size, ">= 2")
            radius = light_window_size // 2
            self.light_attn = WindowedAttention(dim, radius, light_dim_head, light_heads, use_triton=use_triton)
        self.rotary_emb = RotaryEmbedding(heavy_dim_head) if rotary_emb else None

    def forward(
        self,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | None = None,
        num_heavy_tokens_kv: int | None = None,
        mask: Tensor | None = None,
        routing_tokens_q: Tensor | None = None,
        routing_tokens_kv: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Tokens `b n d` to `b n d`.

        Args:
            num_heavy_tokens_q, num_heavy_tokens_kv: instead of those of the layer.
            mask: `b n`, False for tokens that nothing attends to and that are not routed.
            routing_tokens_q, routing_tokens_kv: `b d` and `b r d`, instead of those of the routers.
            residual: `b n d`, added to the result.

        Raises:
            ValueError: an argument is out of its range, or shapes do not match.
        """
        num_q = self.num_heavy_tokens_q if num_heavy_tokens_q is None else num_heavy_tokens_q
        num_kv = self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        check_counts(num_heavy_tokens_q=num_q, num_heavy_tokens_kv=num_kv)
        q = self.q_router(x, num_tokens=num_q, mask=mask, routing_tokens=routing_tokens_q)
        kv = self.route_context(x, num_kv, mask, routing_tokens_kv)
        rotations = None
        if self.rotary_emb is not None:
            angles = self.rotary_emb(x.shape[1])
            rotations = Rotations(angles_at(angles, q.indices), angles_at(angles, kv.indices))
        light = None if self.light_attn is None else self.light_attn(x, mask=mask)
        return self.attend_routed(x, q, kv, rotations, light, residual)


def angles_at(angles: Tensor, indices: Tensor | None) -> Tensor:
    """Angles `n d` at indices `... k`, with a dimension for heads: `... 1 k d`. Past the end, those of the last."""
    return (
        angles if indices is None else rearrange(angles[indices.clamp(max=angles.shape[0] - 1)], "... k d -> ... 1 k d")
    )


class ConditionalRoutedCrossAttention(RoutedBranch):
    """Dense attention from routed tokens to the routed tokens of a context.

    Args:
        dim: size of a token.
        num_tokens_q, num_tokens_kv: how many tokens are routed, of the sequence and of the context.
        num_sets_kv: 1 or kv_routing_tokens, which says the same.
        dim_head, heads: of the attention.
        kv_routing_tokens: sets of keys and values, each with a routing token and its share of the heads.
        route_block_size: select keys and values from blocks of so many tokens.
        router_straight_through, router_kwargs, multiply_keys_by_score, use_triton, use_null_q_tokens, use_flash_attn:
            as in `RoutedBranch`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tokens_q: int,
        num_tokens_kv: int,
        num_sets_kv: int = 1,
        dim_head: int = 64,
        heads: int = 8,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        kv_routing_tokens: int = 1,
        multiply_keys_by_score: bool = False,
        use_triton: bool | None = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        route_block_size: int | None = None,
    ) -> None:
        check_counts(num_sets_kv=num_sets_kv, kv_routing_tokens=kv_routing_tokens)
        fits = num_sets_kv in (1, kv_routing_tokens)
        require(fits, "num_sets_kv", num_sets_kv, "1 or kv_routing_tokens = {}", kv_routing_tokens)
        super().__init__(
            dim,
            num_routed_kv=kv_routing_tokens,
            dim_head=dim_head,
            heads=heads,
            router_straight_through=router_straight_through,
            router_kwargs=router_kwargs,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=False,
            use_triton=use_triton,
            use_null_q_tokens=use_null_q_tokens,
            use_flash_attn=use_flash_attn,
            kv_router_kwargs={"route_block_size": route_block_size} if route_block_size is not None else None,
        )
        check_counts(num_tokens_q=num_tokens_q, num_tokens_kv=num_tokens_kv)
        self.num_tokens_q, self.num_tokens_kv = num_tokens_q, num_tokens_kv

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        num_tokens_q: int | None = None,
        num_tokens_kv: int | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        routing_tokens_q: Tensor | None = None,
        routing_tokens_kv: Tensor | None = None,
    ) -> Tensor:
        """Tokens `b n d` and a context `b m d` to `b n d`.

        Args:
            num_tokens_q, num_tokens_kv: instead of those of the layer.
            mask: `b n`, False for tokens that are not routed.
            context_mask: `b m`, False for tokens that nothing attends to.
            routing_tokens_q, routing_tokens_kv: `b d` and `b r d`, instead of those of the routers.

        Raises:
            ValueError: an argument is out of its range, or shapes do not match.
        """
        check_tokens(context, x.shape[-1], context_mask, "context", "context_mask")
        num_q = self.num_tokens_q if num_tokens_q is None else num_tokens_q
        num_kv = self.num_tokens_kv if num_tokens_kv is None else num_tokens_kv
        check_counts(num_tokens_q=num_q, num_tokens_kv=num_kv)
        q = self.q_router(x, num_tokens=num_q, mask=mask, routing_tokens=routing_tokens_q)
        kv = self.route_context(context, num_kv, context_mask, routing_tokens_kv)
        return self.attend_routed(x, q, kv)
