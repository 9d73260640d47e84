"""Windowed attention in one pass over tiles: no window of keys is copied, and no p is written to memory.

The forward pass is FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) over the tiles in reach of a
block of queries. Besides the output it keeps one number per query and head, the log-sum-exp (lse) l of its logits s,
from which the backward pass recomputes p. With p = exp(s - l), g the gradient of the output o and delta = sum g o,

    ds = p (g v - delta),    dq = scale ds k,    dk = scale ds' q,    dv = p' g

which one kernel computes: its even programs accumulate dq over keys, its odd programs dk and dv over queries.

With rotary position embedding, a first kernel rotates the keys. Each program rotates its queries, and keeps them for
the backward pass; gradients are rotated back before they are written.

The gradient of a position bias is the sum of ds over all pairs at a distance. Tiles of ds with the same offset from the
diagonal have the same distances, so a second kernel adds up such tiles of many blocks, and then their diagonals.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels._common.attention import LARGEST_HEAD
from kernels._common.operation import Operation
from kernels._common.tensors import has_values, runs_triton
from kernels.windowed_attention import cpu
from kernels.windowed_attention.backward import launch_backward
from kernels.windowed_attention.forward import launch_forward
from reference._shared.arguments import check_windows
from reference._shared.autocast import autocast_dtype


def _forward(
    qkv: Tensor,
    heads: int,
    window_size: int,
    causal: bool,
    mask: Tensor | None,
    rotary_theta: float | None,
    position_bias: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the lse of each query to the base 2, and rotated keys and queries `b n t (h d)`, if there are any."""
    batch, n, width = qkv.shape
    out = qkv.new_empty(batch, n, width // 3)
    lse = qkv.new_empty(batch, heads, n, dtype=torch.promote_types(qkv.dtype, torch.float32))
    rotated = qkv.new_empty(batch, n, 0 if rotary_theta is None else 1 + save, width // 3)
    if has_values(qkv):
        options = (heads, window_size, causal, _contiguous(mask), rotary_theta, _contiguous(position_bias))
        launch_forward(qkv.contiguous(), *options, out, lse, rotated)
    return out, lse, rotated


def _backward(
    grad_output: Tensor,
    qkv: Tensor,
    mask: Tensor | None,
    position_bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    rotated: Tensor,
    heads: int,
    window_size: int,
    causal: bool,
    rotary_theta: float | None,
    needs_position_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dbias = None
    if position_bias is not None and needs_position_bias:
        dbias = torch.zeros_like(position_bias, memory_format=torch.contiguous_format)
    if has_values(qkv):
        options = (heads, window_size, causal, _contiguous(mask), rotary_theta, _contiguous(position_bias))
        launch_backward(grad_output.contiguous(), qkv.contiguous(), *options, output, lse, rotated, dqkv, dbias)
    return dqkv, dbias


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _runs_kernel(qkv: Tensor, heads: int) -> bool:
    """fp64 stays fp64, which the kernels do not support, and tiles of larger heads do not fit into registers."""
    return qkv.dtype != torch.float64 and qkv.shape[-1] <= 3 * heads * LARGEST_HEAD and runs_triton(qkv)


_operation = Operation(
    "windowed_attention", _forward, _backward, outputs=("output", "lse", "rotated"), gradients=("qkv", "position_bias")
)


def pairs_in_reach(n: int, window_size: int, causal: bool) -> int:
    """Number of pairs of a query and a key in reach, in a sequence of n tokens without a mask."""
    if not causal:
        radius = min(window_size, max(n - 1, 0))
        return n * (2 * radius + 1) - radius * (radius + 1)
    windows, rest = divmod(n, window_size)
    within = windows * window_size * (window_size + 1) // 2 + rest * (rest + 1) // 2
    return within + max(n - window_size, 0) * window_size


@register_flop_formula(torch.ops.colt5.windowed_attention)
def _flops(shape: torch.Size, heads: int, window_size: int, causal: bool, *_: object, **__: object) -> int:
    """Operations of the products of query and key, and of p and value, for each pair in reach. A flop counter counts
    them in the same way."""
    batch, n, width = shape
    return 2 * 2 * batch * pairs_in_reach(n, window_size, causal) * width // 3


@register_flop_formula(torch.ops.colt5.windowed_attention_backward)
def _backward_flops(grad_output: torch.Size, shape: torch.Size, *arguments: Any, **_: object) -> int:
    """A gradient for either factor of both products, and p again, as PyTorch counts its own kernels."""
    return _flops(shape, *arguments[-5:]) * 5 // 2


def windowed_attention(
    qkv: Tensor,
    *,
    heads: int,
    window_size: int,
    causal: bool = False,
    mask: Tensor | None = None,
    rotary_theta: float | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """`reference.windowed_attention` tile by tile, forward and backward, in memory linear in n for any window.

    Products are in the dtype of qkv, sums and the softmax in fp32. Results are bitwise equal from run to run: the
    backward pass has no atomic additions. Autocast converts qkv to its dtype. The definition, which is a kernel of
    PyTorch, computes CPU tensors, fp64, and heads of more than 128 dimensions.

    Args:
        qkv: `b n (3 h d)`, any float dtype: queries, keys and values, each as consecutive heads.
        heads: number of heads h.
        window_size: at least 1, in tokens. It is the radius without `causal`, else the size of windows. Then a token
            attends to its own window, up to itself, and to the whole window before.
        causal: whether attention is causal.
        mask: bool, `b n`, False for masked tokens, which are not attended to.
        rotary_theta: theta of rotary position embedding (2104.09864), None for no embedding. Dimensions i and i + d / 2
            of queries and keys rotate by theta^(-2 i / d) radians per position. d must be even.
        position_bias: `h (2 r + 1)`, any float dtype: entry r + j - i of its head is added to the logit of a query at i
            and a key at j; distances beyond r use the entries of r.

    Returns:
        `b n (h d)`, in the dtype of qkv. A token that attends to nothing gives 0, with gradient 0.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode, except on the CPU.
    """
    check_windows(qkv, heads, window_size, mask, rotary_theta, position_bias)
    lowered = autocast_dtype(qkv)
    qkv = qkv if lowered is None else qkv.to(lowered)
    if not _runs_kernel(qkv, heads):
        return cpu.windowed_attention(qkv, heads, window_size, causal, mask, rotary_theta, position_bias)
    out, *_ = _operation(qkv, heads, window_size, causal, mask, rotary_theta, position_bias)
    return out
