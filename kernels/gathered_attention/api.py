"""Attention to keys and values that the kernel gathers by index from a sequence that has them once.

The operator makes lists with -1 for absent entries, so a kernel needs one load to know which keys to fetch.
"""

import torch
from torch import Tensor

from kernels._common.attention import LARGEST_HEAD
from kernels._common.operation import Operation
from kernels._common.tensors import has_values, runs_triton
from kernels.gathered_attention import cpu
from kernels.gathered_attention.backward import launch_backward
from kernels.gathered_attention.forward import launch_forward
from reference._shared.arguments import check_gathered


def _forward(
    query: Tensor,
    key_value: Tensor,
    indices: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the lse of each query, and lists, int32 of the shape of indices. A kernel writes lse to the base 2.

    In memory the heads of a query are adjacent, as projections write and read them.
    """
    batch, windows, heads, queries, dim = query.shape
    out = query.new_empty((batch, windows, queries, heads, dim)).transpose(2, 3)
    lse = query.new_empty((batch, windows, heads, queries), dtype=torch.promote_types(query.dtype, torch.float32))
    lists = indices.new_empty(indices.shape, dtype=torch.int32)
    if has_values(out):
        attend = launch_forward if _runs_kernel(query) else cpu.forward
        attend(query, key_value, indices, weights, null_kv, mask, multiply_keys, out, lse, lists)
    return out, lse, lists


def _backward(
    grad_output: Tensor,
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    output: Tensor,
    lse: Tensor,
    lists: Tensor,
    multiply_keys: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, weights, and the learned pair."""
    # The layout of `_forward`, which kernels read; a function transform returns a copy.
    as_made = output.transpose(2, 3)
    if not as_made.is_contiguous():
        output = as_made.contiguous().transpose(2, 3)
    dquery = torch.empty_like(output)
    # The routes of a token are adjacent, as the projection that made them needs them.
    dkey_value = key_value.new_empty(key_value.transpose(1, 2).shape).transpose(1, 2)
    if not has_values(query):
        return dquery, dkey_value.zero_(), torch.zeros_like(weights), torch.zeros_like(null_kv)
    differentiate = launch_backward if _runs_kernel(query) else cpu.backward
    inputs = (query, key_value, lists, weights, null_kv, multiply_keys, output, lse)
    for_weights, for_null = differentiate(_dense_rows(grad_output), *inputs, dquery, dkey_value)
    return dquery, dkey_value, for_weights.to(weights.dtype), for_null.to(null_kv.dtype)


def _runs_kernel(query: Tensor) -> bool:
    """fp64 stays fp64, which the kernels do not support."""
    return query.dtype != torch.float64 and query.shape[-1] <= LARGEST_HEAD and runs_triton(query)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_operation = Operation(
    "gathered_attention",
    _forward,
    _backward,
    outputs=("output", "lse", "lists"),
    gradients=("query", "key_value", "weights", "null_kv"),
)


def gathered_attention(
    query: Tensor,
    key_value: Tensor,
    indices: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
) -> Tensor:
    """`reference.gathered_attention` without copies of keys and values, in memory linear in their number.

    The kernel reads keys and values by index in an online softmax over the list of a window. The backward pass sorts
    the entries of all lists by their token. It is correct for any lists, and fast if a token stays in the lists of the
    following windows, as with routing from prefixes. It keeps the output and one number per query and head. Results are
    bitwise equal from run to run. PyTorch computes CPU tensors, fp64, and heads of more than 128 dimensions, window by
    window.

    Args:
        query: `b w h i d`, any float dtype: the queries of w windows, h heads of d dimensions.
        key_value: `b r n (h kv d)`, in the dtype of the queries. Each token has a key and a value side by side, per
            route and head of the route.
        indices: `b w r s`, integers: the tokens that the window attends to. Masked entries may have any value; all
            other entries of a list are different, and within the sequence.
        weights: `b w r s`, any float dtype: multiplied with values, and with keys if `multiply_keys_by_score`.
        null_kv: `2 h d`, any float dtype: a key and a value that every query also attends to.
        mask: `b w r s`, bool; False for masked entries.

    Returns:
        `b w h i d`, in the dtype of the queries; in memory `b w i h d`.

    Raises:
        ValueError: an argument is of a wrong dtype, or shapes do not match.
        NotImplementedError: for a second derivative or forward mode.
    """
    check_gathered(query, key_value, indices, weights, null_kv, mask)
    out, *_ = _operation(
        _dense_rows(query),
        _dense_rows(key_value),
        indices.contiguous(),
        weights.contiguous(),
        null_kv.contiguous(),
        None if mask is None else mask.contiguous(),
        multiply_keys_by_score,
    )
    return out
