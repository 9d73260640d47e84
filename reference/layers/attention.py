"""The routed self-attention layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reference._shared.arguments import check_counts, require
from reference.layers.heavy_attention import Attention
from reference.layers.light_attention import WindowedAttention
from reference.layers.linear import Rounded, is_plain
from reference.layers.norms import RMSNorm
from reference.layers.operations import UseTriton
from reference.layers.replayed import replayed
from reference.layers.rotary import RotaryEmbedding, Rotations, angles_at
from reference.layers.routed_branch import RoutedBranch
from reference.layers.router import RouterReturn
from reference.layers.start import Start
from reference.layers.together import Together, route_together


class ConditionalRoutedAttention(RoutedBranch):
    """Attention within a radius for all tokens, and dense attention between routed tokens (2303.09752, 3.2).

    Args:
        dim: size of a token.
        num_heavy_tokens_q, num_heavy_tokens_kv: number of tokens that are routed as queries, and as keys and values.
        has_light_attn: whether the layer has attention within a radius.
        light_dim_head, light_heads: of the attention within a radius.
        light_window_size: at least 2; a token attends to tokens at a distance of at most half of this.
        heavy_dim_head, heavy_heads: of the dense attention.
        rotary_emb: rotary position embedding in the dense attention.
        light_rotary_emb: the same in the attention within a radius.
        position_bias: T5's relative position bias instead of `light_rotary_emb`, learned per head and bucket of
            distances.
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
        use_triton: UseTriton = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        init: Start = "published",
        rotary_emb: bool = False,
        light_rotary_emb: bool = False,
        position_bias: bool = False,
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
        check_counts(num_heavy_tokens_q=num_heavy_tokens_q, num_heavy_tokens_kv=num_heavy_tokens_kv)
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = num_heavy_tokens_q, num_heavy_tokens_kv
        self.light_attn = None
        if has_light_attn:
            check_counts(light_window_size=light_window_size)
            require(light_window_size >= 2, "light_window_size", light_window_size, ">= 2")
            self.light_attn = WindowedAttention(
                dim,
                light_window_size // 2,
                light_dim_head,
                light_heads,
                rotary_emb=light_rotary_emb,
                position_bias=position_bias,
                use_triton=self.operations,
            )
        self.rotary_emb = RotaryEmbedding(heavy_dim_head) if rotary_emb else None

    @replayed
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
            num_heavy_tokens_q, num_heavy_tokens_kv: override those of the layer.
            mask: `b n`, False for masked tokens: they are not attended to and not routed.
            routing_tokens_q, routing_tokens_kv: `b d` and `b r d`, override those of the routers.
            residual: `b n d`, added to the result.

        Raises:
            ValueError: an argument is out of its range, or shapes do not match.
        """
        return self.forward_rounded(
            self.round_weights(x, self.light_attn),
            x,
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            mask=mask,
            routing_tokens_q=routing_tokens_q,
            routing_tokens_kv=routing_tokens_kv,
            residual=residual,
        )

    def forward_rounded(
        self,
        rounded: Rounded,
        x: Tensor,
        *,
        num_heavy_tokens_q: int | None,
        num_heavy_tokens_kv: int | None,
        mask: Tensor | None,
        routing_tokens_q: Tensor | None,
        routing_tokens_kv: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """The forward pass with weights that are rounded already, as those of a block are."""
        num_q = self.num_heavy_tokens_q if num_heavy_tokens_q is None else num_heavy_tokens_q
        num_kv = self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        check_counts(num_heavy_tokens_q=num_q, num_heavy_tokens_kv=num_kv)
        together = self._route_together(x, num_q, num_kv, mask, routing_tokens_q, routing_tokens_kv)
        if together is None:
            q = self.q_router(x, num_tokens=num_q, mask=mask, routing_tokens=routing_tokens_q)
            kv = self.route_context(x, num_kv, mask, routing_tokens_kv, rounded)
        else:
            q, kv = self._split_routes(together, rounded)
            # The same tokens, from the operation that computes their whole gradient.
            residual = together.x if residual is x else residual
        rotations = None
        if self.rotary_emb is not None:
            angles = self.rotary_emb(x.shape[1], self.operations.start(x))
            rotations = Rotations(angles_at(angles, q.indices), angles_at(angles, kv.indices))
        light = None
        if self.light_attn is not None and together is not None:
            light = self.light_attn(together.normalized, mask=mask, rounded=rounded, normalized=True)
        elif self.light_attn is not None:
            # A module that replaces it may not take `normalized`.
            light = self.light_attn(x, mask=mask, rounded=rounded)
        return self.attend_routed(x, q, kv, rounded, rotations, light, residual, normalized=together is not None)

    def _route_together(
        self,
        x: Tensor,
        num_q: int,
        num_kv: int,
        mask: Tensor | None,
        routing_tokens_q: Tensor | None,
        routing_tokens_kv: Tensor | None,
    ) -> Together | None:
        """Tokens of the light branch, and those that both routers route. None if a hook or a replaced module has to
        see the calls."""
        light = self.light_attn
        if light is None or not is_plain(light, WindowedAttention) or not is_plain(self.heavy_attn, Attention):
            return None
        if not is_plain(self.heavy_attn.norm, RMSNorm):
            return None
        routers, counts = (self.q_router, self.kv_router), (num_q, num_kv)
        return route_together(x, light.norm, routers, counts, mask, (routing_tokens_q, routing_tokens_kv))

    def _split_routes(self, together: Together, rounded: Rounded) -> tuple[RouterReturn, RouterReturn]:
        """Normalized queries, and keys and values as from `route_context`."""
        routes = self.kv_router.num_routing_tokens
        indices, indices_kv = together.indices.split((1, routes))
        scores, scores_kv = together.scores.split((1, routes))
        tokens, tokens_kv = self.heavy_attn.norm(together.tokens).split((1, routes))
        mask_kv = None if together.mask is None else together.mask[1:].transpose(0, 1)
        key_value = self.heavy_attn.project(tokens_kv.transpose(0, 1), routes, rounded, normalized=True)
        q = RouterReturn(indices.squeeze(0), scores.squeeze(0), tokens.squeeze(0), None)
        return q, RouterReturn(indices_kv.transpose(0, 1), scores_kv.transpose(0, 1), key_value, mask_kv)
