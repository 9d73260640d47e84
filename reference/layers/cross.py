"""The routed attention layer for a long context."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reference._shared.arguments import check_counts, check_tokens, require
from reference._shared.rotary import places
from reference.layers.operations import UseTriton
from reference.layers.replayed import replayed
from reference.layers.rotary import check_even
from reference.layers.routed_branch import RoutedBranch
from reference.layers.start import Start


class ConditionalRoutedCrossAttention(RoutedBranch):
    """Dense attention from routed tokens to the routed tokens of a context.

    Args:
        dim: size of a token.
        num_tokens_q, num_tokens_kv: number of routed tokens of the sequence and of the context.
        num_sets_kv: 1, or the same as kv_routing_tokens; it has no further effect.
        dim_head, heads: of the attention.
        rotary_emb: rotary position embedding, for aligned sequences: positions of tokens and of the context both count
            from 0.
        kv_routing_tokens: number of sets of keys and values, each with its routing token and its share of the heads.
        route_block_size: number of tokens per block, if keys and values are selected from each block.
        router_straight_through, router_kwargs, multiply_keys_by_score: as in `RoutedBranch`.
        use_triton, use_null_q_tokens, use_flash_attn, init: as in `RoutedBranch`.
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
        use_triton: UseTriton = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        init: Start = "published",
        route_block_size: int | None = None,
        rotary_emb: bool = False,
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
            init=init,
            kv_router_kwargs={"route_block_size": route_block_size} if route_block_size is not None else None,
        )
        check_counts(num_tokens_q=num_tokens_q, num_tokens_kv=num_tokens_kv)
        self.num_tokens_q, self.num_tokens_kv = num_tokens_q, num_tokens_kv
        if rotary_emb:
            check_even(dim_head=dim_head)
        self.rotary_emb = rotary_emb

    @replayed
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
            num_tokens_q, num_tokens_kv: override those of the layer.
            mask: `b n`, False for tokens that are not routed.
            context_mask: `b m`, False for masked tokens, which are not attended to.
            routing_tokens_q, routing_tokens_kv: `b d` and `b r d`, override those of the routers.

        Raises:
            ValueError: an argument is out of its range, or shapes do not match.
        """
        check_tokens(context, x.shape[-1], context_mask, "context", "context_mask")
        num_q = self.num_tokens_q if num_tokens_q is None else num_tokens_q
        num_kv = self.num_tokens_kv if num_tokens_kv is None else num_tokens_kv
        check_counts(num_tokens_q=num_q, num_tokens_kv=num_kv)
        q = self.q_router(x, num_tokens=num_q, mask=mask, routing_tokens=routing_tokens_q)
        rounded = self.round_weights(x)
        kv = self.route_context(context, num_kv, context_mask, routing_tokens_kv, rounded)
        rotations = None
        if self.rotary_emb:
            of_tokens, of_context = (
                places(each.shape[1], x.device, self.operations.start(each)) for each in (x, context)
            )
            rotations = self.rotations(q, kv, of_tokens, of_context)
        return self.attend_routed(x, q, kv, rounded, rotations)
