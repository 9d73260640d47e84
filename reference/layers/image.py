"""The routed attention layer for the feature maps of images."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from reference._shared.arguments import check_counts, require
from reference._shared.rotary import places_of_map
from reference._shared.sizes import is_certain, missing, window_for, without_padding
from reference.layers.light_attention import SelfAttention
from reference.layers.linear import Rounded
from reference.layers.operations import UseTriton
from reference.layers.rotary import check_fourfold
from reference.layers.routed_branch import RoutedBranch
from reference.layers.start import Start


class ConditionalRoutedImageAttention(RoutedBranch):
    """Dense attention within square windows for all positions, and between routed positions of the whole map.

    Args:
        dim: number of features of a position.
        num_heavy_tokens_q, num_heavy_tokens_kv: number of positions that are routed as queries, and as keys and values.
        light_dim_head, light_heads: of the attention within windows.
        light_window_size: height and width of a window. Windows at the lower and right edge may be smaller.
        heavy_dim_head, heavy_heads: of the attention between routed positions.
        rotary_emb: rotary position embedding of rows and columns in the attention between routed positions.
        light_rotary_emb: the same in the attention within windows.
        channel_first: maps are `b d h w` instead of `b h w d`.
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
        channel_first: bool = False,
        rotary_emb: bool = False,
        light_rotary_emb: bool = False,
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
        check_counts(
            num_heavy_tokens_q=num_heavy_tokens_q,
            num_heavy_tokens_kv=num_heavy_tokens_kv,
            light_window_size=light_window_size,
        )
        self.num_heavy_tokens_q, self.num_heavy_tokens_kv = num_heavy_tokens_q, num_heavy_tokens_kv
        self.light_window_size = light_window_size
        self.channel_first = channel_first
        self.light_attn = SelfAttention(dim, light_dim_head, light_heads, self.operations)
        if rotary_emb:
            check_fourfold(heavy_dim_head=heavy_dim_head)
        if light_rotary_emb:
            check_fourfold(light_dim_head=light_dim_head)
        self.rotary_emb, self.light_rotary_emb = rotary_emb, light_rotary_emb

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
        """A feature map `b h w d`, or `b d h w` if channel_first, to one of that shape.

        Args:
            num_heavy_tokens_q, num_heavy_tokens_kv: override those of the layer.
            mask: `b h w`, False for masked positions: they are not attended to and not routed.
            routing_tokens_q, routing_tokens_kv: `b d` and `b r d`, override those of the routers.
            residual: of the shape of the map, added to the result.

        Raises:
            ValueError: an argument is out of its range, or shapes do not match.
        """
        dim = self.q_router.dim
        fits = x.dim() == 4 and x.shape[1 if self.channel_first else 3] == dim
        shape = "(b, {}, h, w)" if self.channel_first else "(b, h, w, {})"
        require(fits, "x", x.shape, f"a feature map of shape {shape}", dim)
        if residual is not None:
            fits = residual.shape == x.shape
            require(fits, "residual", residual.shape, "of shape {}, the shape of x", x.shape)
        if self.channel_first:
            x = rearrange(x, "b d h w -> b h w d")
            residual = None if residual is None else rearrange(residual, "b d h w -> b h w d")
        tokens = rearrange(x, "b h w d -> b (h w) d")
        if mask is not None:
            fits = mask.shape == x.shape[:3]
            require(fits, "mask", mask.shape, "of shape {}, one entry per position", x.shape[:3])
        token_mask = None if mask is None else rearrange(mask, "b h w -> b (h w)")
        num_q = self.num_heavy_tokens_q if num_heavy_tokens_q is None else num_heavy_tokens_q
        num_kv = self.num_heavy_tokens_kv if num_heavy_tokens_kv is None else num_heavy_tokens_kv
        check_counts(num_heavy_tokens_q=num_q, num_heavy_tokens_kv=num_kv)
        q = self.q_router(tokens, num_tokens=num_q, mask=token_mask, routing_tokens=routing_tokens_q)
        rounded = self.round_weights(x, self.light_attn)
        kv = self.route_context(tokens, num_kv, token_mask, routing_tokens_kv, rounded)
        light = rearrange(self._within_windows(x, mask, rounded), "b h w d -> b (h w) d")
        residual = None if residual is None else rearrange(residual, "b h w d -> b (h w) d")
        rotations = self.rotations(q, kv, places_of_map(x.shape[1], x.shape[2], x.device)) if self.rotary_emb else None
        out = self.attend_routed(tokens, q, kv, rounded, rotations, light, residual).view(x.shape)
        return rearrange(out, "b h w d -> b d h w") if self.channel_first else out

    def _within_windows(self, x: Tensor, mask: Tensor | None, rounded: Rounded) -> Tensor:
        """The light branch of a map `b h w d`, padded to whole windows."""
        batch, height, width, _ = x.shape
        p, q = (window_for(each, self.light_window_size) for each in (height, width))
        down, right = missing(height, p), missing(width, q)
        if not is_certain(down == 0) or not is_certain(right == 0):
            mask = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) if mask is None else mask
            x, mask = F.pad(x, (0, 0, 0, right, 0, down)), F.pad(mask, (0, right, 0, down))
        windows = rearrange(x, "b (h p) (w q) d -> (b h w) (p q) d", p=p, q=q)
        if mask is not None:
            mask = rearrange(mask, "b (h p) (w q) -> (b h w) (p q)", p=p, q=q)
        places = places_of_map(p, q, x.device) if self.light_rotary_emb else None
        out = self.light_attn(windows, mask, rounded, places)
        rows, columns = (height + down) // p, (width + right) // q
        out = rearrange(out, "(b h w) (p q) d -> b (h p) (w q) d", b=batch, h=rows, w=columns, p=p)
        return without_padding(out, height, width)
