"""`kernels.windowed_attention` by its definition, which is PyTorch's own attention kernel, for CPU tensors."""

from torch import Tensor

from reference._shared.rotary import places, rotate_heads
from reference.windowed_attention import attend_to_all
from reference.windowed_attention import windowed_attention as by_definition


def windowed_attention(
    qkv: Tensor,
    heads: int,
    window_size: int,
    causal: bool,
    mask: Tensor | None,
    rotary_theta: float | None,
    position_bias: Tensor | None,
) -> Tensor:
    """The definition or, if every token reaches all others, attention without windows."""
    if not causal and window_size >= qkv.shape[1] > 0 and position_bias is None:
        if rotary_theta is not None:
            qkv = rotate_heads(qkv, heads, places(qkv.shape[1], qkv.device), rotary_theta)
        return attend_to_all(qkv, heads=heads, window_size=window_size, mask=mask)
    return by_definition(
        qkv,
        heads=heads,
        window_size=window_size,
        causal=causal,
        mask=mask,
        rotary_theta=rotary_theta,
        position_bias=position_bias,
    )
