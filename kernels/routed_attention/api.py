"""Attention to routed keys and values and to a learned pair, in the layout of the projections.

It is FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135) with the weights of the router inside.
PyTorch's own kernel is as fast, but it needs keys and values to be concatenated first, and its results are not the same
from run to run: its backward pass adds to the gradient of the queries in any order.
"""

import torch
from torch import Tensor

from kernels._common.attention import LARGEST_HEAD
from kernels._common.operation import Operation
from kernels._common.tensors import has_values, runs_triton
from kernels.routed_attention import cpu
from kernels.routed_attention.triton import launch_backward, launch_forward
from reference._shared.arguments import check_routed


def _forward(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the output before rounding if it is saved, and the lse to the base 2."""
    batch, n_queries, _ = query.shape
    rounds = query.dtype != torch.float32
    out = query.new_empty(query.shape)
    wide = query.new_empty(query.shape if save and rounds else 0, dtype=torch.float32)
    lse = query.new_empty((batch, null_kv.shape[1], n_queries), dtype=torch.float32)
    if has_values(query):
        launch_forward(query, key_value, weights, null_kv, mask, multiply_keys, out, wide, lse)
    return out, wide, lse


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    exact_out: Tensor,
    lse: Tensor,
    multiply_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, of keys and values, and in fp32 of weights and the learned pair."""
    dquery, dkey_value = query.new_empty(query.shape), key_value.new_empty(key_value.shape)
    if not has_values(query):
        dweights, dnull = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (weights, null_kv))
        return dquery, dkey_value.zero_(), dweights, dnull
    inputs = (query, key_value, weights, null_kv, mask, multiply_keys, exact_out, lse)
    return dquery, dkey_value, *launch_backward(grad_output.contiguous(), *inputs, dquery, dkey_value)


_operation = Operation(
    "routed_attention",
    _forward,
    _backward,
    outputs=("output", "wide", "lse"),
    gradients=("query", "key_value", "weights", "null_kv"),
    chosen={"exact_out": lambda output, wide: output if output.dtype == torch.float32 else wide},
)


def routed_attention(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
) -> Tensor:
    """`reference.routed_attention` in one kernel forward and two backward, without copies.

    Products are in the dtype of queries, keys and values, sums and the softmax in fp32. Results are bitwise equal from
    run to run. PyTorch computes CPU tensors, fp64, and heads of more than 128 dimensions by the same mathematics.

    Args:
        query: `b i (h d)`, any float dtype.
        key_value: `b r j (h kv d)`, in the dtype of the queries. Each token has a key and a value side by side, per
            route and head of the route. Any strides.
        weights: `b r j`, multiplied with values, and with keys if `multiply_keys_by_score`.
        null_kv: `2 h d`: a key and a value that every query also attends to.
        mask: `b r j`, bool; False for masked tokens.

    Returns:
        `b i (h d)`, in the dtype of the queries.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        NotImplementedError: for a second derivative or forward mode, except on the CPU.
    """
    check_routed(query, key_value, weights, null_kv, mask)
    tensors = (query, key_value, weights, null_kv)
    if query.dtype == torch.float64 or null_kv.shape[2] > LARGEST_HEAD or not runs_triton(query):
        return cpu.routed_attention(*tensors, mask, multiply_keys_by_score)
    out, *_ = _operation(
        query.contiguous(),
        key_value if key_value.stride(-1) == 1 else key_value.contiguous(),
        weights.contiguous(),
        null_kv.contiguous(),
        None if mask is None else mask.contiguous(),
        multiply_keys_by_score,
    )
    return out
