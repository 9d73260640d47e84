"""A vision transformer of routed layers, after Simple ViT (Beyer et al., 2205.01580)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn

from reference._shared.arguments import check_counts, require
from reference.layers.feedforward import ConditionalRoutedFeedForward
from reference.layers.image import ConditionalRoutedImageAttention
from reference.layers.operations import Operations, UseTriton
from reference.layers.start import Start


class ConditionalRoutedViT(nn.Module):
    """Classifies images with `ConditionalRoutedImageAttention` and `ConditionalRoutedFeedForward` over patches.

    Args:
        image_size, patch_size: height and width, one number for both or a pair. Patches divide an image.
        num_classes: number of logits.
        dim: number of features of a patch, a multiple of 4.
        depth: number of pairs of layers.
        channels: number of channels of the images.
        default_coor_descent_eps: temperature of the routers, unless `router_kwargs` has one.
        attn_*, ff_*, router_*, flash_attn, init: arguments of the two layers.

    Raises:
        ValueError: patches do not divide images, or dim is not a multiple of 4.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        attn_num_heavy_tokens_q: int,
        attn_num_heavy_tokens_kv: int,
        attn_heavy_dim_head: int,
        attn_heavy_heads: int,
        attn_light_dim_head: int,
        attn_light_heads: int,
        attn_light_window_size: int,
        ff_num_heavy_tokens: int,
        ff_heavy_mult: float,
        ff_light_mult: float,
        channels: int = 3,
        router_straight_through: bool = True,
        router_kwargs: Mapping[str, Any] | None = None,
        router_use_triton: UseTriton = False,
        flash_attn: bool = True,
        attn_num_routed_kv: int = 1,
        default_coor_descent_eps: float = 1.0,
        init: Start = "published",
        attn_rotary_emb: bool = False,
        attn_light_rotary_emb: bool = False,
    ) -> None:
        super().__init__()
        check_counts(num_classes=num_classes, dim=dim, depth=depth, channels=channels)
        height, width = _pair(image_size)
        patch_height, patch_width = _pair(patch_size)
        for name, sizes in {"image_size": (height, width), "patch_size": (patch_height, patch_width)}.items():
            for size in sizes:
                check_counts(**{name: size})
        divides = height % patch_height == 0 and width % patch_width == 0
        require(divides, "patch_size", patch_size, "a divisor of image_size = {}", image_size)
        require(dim % 4 == 0, "dim", dim, "a multiple of 4")

        self.channels, self.patch_size = channels, (patch_height, patch_width)
        patch_dim = channels * patch_height * patch_width
        self.to_patch_embedding = nn.Sequential(
            Rearrange("b c (h p) (w q) -> b h w (p q c)", p=patch_height, q=patch_width),
            nn.LayerNorm(patch_dim),
            nn.Linear(patch_dim, dim),
            nn.LayerNorm(dim),
        )
        options: dict[str, Any] = {
            "router_straight_through": router_straight_through,
            "router_kwargs": {"eps": default_coor_descent_eps, **(router_kwargs or {})},
            "use_triton": Operations.of(router_use_triton),
            "init": init,
        }
        self.transformer = _Transformer(
            nn.ModuleList(
                [
                    ConditionalRoutedImageAttention(
                        dim,
                        num_heavy_tokens_q=attn_num_heavy_tokens_q,
                        num_heavy_tokens_kv=attn_num_heavy_tokens_kv,
                        num_routed_kv=attn_num_routed_kv,
                        light_dim_head=attn_light_dim_head,
                        light_heads=attn_light_heads,
                        light_window_size=attn_light_window_size,
                        heavy_dim_head=attn_heavy_dim_head,
                        heavy_heads=attn_heavy_heads,
                        use_flash_attn=flash_attn,
                        rotary_emb=attn_rotary_emb,
                        light_rotary_emb=attn_light_rotary_emb,
                        **options,
                    ),
                    ConditionalRoutedFeedForward(
                        dim,
                        num_heavy_tokens=ff_num_heavy_tokens,
                        light_ff_mult=ff_light_mult,
                        heavy_ff_mult=ff_heavy_mult,
                        **options,
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.linear_head = nn.Sequential(
            Reduce("b h w c -> b c", "mean"), nn.LayerNorm(dim), nn.Linear(dim, num_classes)
        )

    def forward(self, img: Tensor) -> Tensor:
        """Images `b c h w` to logits `b num_classes`.

        Raises:
            ValueError: images do not have these channels, or patches do not divide them.
        """
        height, width = self.patch_size
        fits = img.dim() == 4 and img.shape[1] == self.channels
        fits = fits and img.shape[2] % height == 0 and img.shape[3] % width == 0
        allowed = "of shape (b, {}, h, w) with h a multiple of {} and w of {}"
        require(fits, "img", img.shape, allowed, self.channels, height, width)
        x = self.to_patch_embedding(img)
        return self.linear_head(self.transformer(x + _position_embedding(x)))


class _Transformer(nn.Module):
    """Pairs of an attention and a feed-forward layer, each with a residual."""

    def __init__(self, layers: Iterable[nn.ModuleList]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Patches `b h w d`."""
        for layer in self.layers.children():
            attention, feed_forward = layer.children()
            x = attention(x, residual=x)
            tokens = rearrange(x, "b h w d -> b (h w) d")
            x = feed_forward(tokens, residual=tokens).view_as(x)
        return x


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _position_embedding(x: Tensor, temperature: float = 10000) -> Tensor:
    """Sines and cosines of the row and the column of patches `b h w d`: `h w d`."""
    _, height, width, dim = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    wavelengths = temperature ** -(torch.arange(dim // 4, dtype=wide, device=x.device) / max(dim // 4 - 1, 1))
    rows = (torch.arange(height, device=x.device)[:, None] * wavelengths)[:, None].expand(-1, width, -1)
    columns = (torch.arange(width, device=x.device)[:, None] * wavelengths)[None].expand(height, -1, -1)
    return torch.cat((columns.sin(), columns.cos(), rows.sin(), rows.cos()), dim=-1).to(x.dtype)
