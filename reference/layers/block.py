"""The block of an encoder: routed attention, then a routed feed-forward layer, both with a residual."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from reference.layers.attention import ConditionalRoutedAttention
from reference.layers.feedforward import ConditionalRoutedFeedForward
from reference.layers.linear import is_plain, round_weights
from reference.layers.operations import Operations, UseTriton
from reference.layers.replayed import replayed
from reference.layers.start import Start


class ConditionalRoutedTransformerBlock(nn.Module):
    """`ConditionalRoutedAttention` and `ConditionalRoutedFeedForward`; it takes the arguments of both."""

    def __init__(
        self,
        dim: int,
        *,
        num_heavy_attn_tokens_q: int,
        num_heavy_attn_tokens_kv: int,
        num_routed_kv: int = 1,
        num_heavy_ff_tokens: int,
        light_dim_head: int = 64,
        light_heads: int = 8,
        light_window_size: int = 128,
        heavy_dim_head: int = 64,
        heavy_heads: int = 8,
        light_ff_mult: float = 0.5,
        heavy_ff_mult: float = 4,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        multiply_keys_by_score: bool = False,
        multiply_queries_by_score: bool = False,
        use_triton: UseTriton = False,
        use_null_q_tokens: bool = True,
        use_flash_attn: bool = False,
        init: Start = "published",
        light_rotary_emb: bool = False,
        position_bias: bool = False,
    ) -> None:
        super().__init__()
        self.operations = Operations.of(use_triton)
        self.conditional_ff = ConditionalRoutedFeedForward(
            dim,
            num_heavy_tokens=num_heavy_ff_tokens,
            light_ff_mult=light_ff_mult,
            heavy_ff_mult=heavy_ff_mult,
            router_straight_through=router_straight_through,
            router_kwargs=router_kwargs,
            use_triton=self.operations,
            init=init,
        )
        self.conditional_attn = ConditionalRoutedAttention(
            dim,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            num_routed_kv=num_routed_kv,
            light_dim_head=light_dim_head,
            light_heads=light_heads,
            light_window_size=light_window_size,
            heavy_dim_head=heavy_dim_head,
            heavy_heads=heavy_heads,
            router_straight_through=router_straight_through,
            router_kwargs=router_kwargs,
            multiply_keys_by_score=multiply_keys_by_score,
            multiply_queries_by_score=multiply_queries_by_score,
            use_triton=self.operations,
            use_null_q_tokens=use_null_q_tokens,
            use_flash_attn=use_flash_attn,
            init=init,
            light_rotary_emb=light_rotary_emb,
            position_bias=position_bias,
        )

    @replayed
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        num_heavy_attn_tokens_q: int | None = None,
        num_heavy_attn_tokens_kv: int | None = None,
        num_heavy_ff_tokens: int | None = None,
        attn_routing_tokens_q: Tensor | None = None,
        attn_routing_tokens_kv: Tensor | None = None,
        ff_routing_tokens: Tensor | None = None,
    ) -> Tensor:
        """Tokens `b n d` to `b n d`; the other arguments are those of the two layers.

        Raises:
            ValueError: an argument is out of its range, or shapes do not match.
        """
        attend, feed_forward = self._passes(x)
        x = attend(
            x,
            mask=mask,
            num_heavy_tokens_q=num_heavy_attn_tokens_q,
            num_heavy_tokens_kv=num_heavy_attn_tokens_kv,
            routing_tokens_q=attn_routing_tokens_q,
            routing_tokens_kv=attn_routing_tokens_kv,
            residual=x,
        )
        return feed_forward(
            x, mask=mask, num_heavy_tokens=num_heavy_ff_tokens, routing_tokens=ff_routing_tokens, residual=x
        )

    def _passes(self, x: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """Forward passes of both layers. Unless an observer needs to see them, one kernel rounds the weights of
        both."""
        attention, feed_forward = self.conditional_attn, self.conditional_ff
        if is_plain(attention, ConditionalRoutedAttention) and is_plain(feed_forward, ConditionalRoutedFeedForward):
            rounded = round_weights(x, *attention.rounding(attention.light_attn), *feed_forward.rounding())
            if rounded:
                return partial(attention.forward_rounded, rounded), partial(feed_forward.forward_rounded, rounded)
        return attention, feed_forward
