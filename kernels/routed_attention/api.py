"""Attention to routed keys and values and to a learned pair, in the layout in which projections make and take them.

It is that of FlashAttention (Dao et al. 2022, https://arxiv.org/abs/2205.14135), with the weights of the router inside.
PyTorch's own is as fast, but for the keys and values that have to be put together for it, and not the same from run to
run: its backward pass adds to the gradient of the queries in any order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels._common.launch import is_traced, runs_triton
from kernels._common.operation import backward_of, define, define_backward, define_gradient, eager
from kernels.routed_attention import cpu
from kernels.routed_attention.triton import LARGEST_HEAD, launch_backward, launch_forward
from reference._shared.arguments import check_routed

_INPUTS = "Tensor query, Tensor key_value, Tensor weights, Tensor null_kv, Tensor? mask, bool multiply_keys"


def _allocate(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the same before it is rounded, if that is to be saved, and the logarithm to the base 2 of what each
    softmax divides by."""
    batch, n_queries, _ = query.shape
    rounds = query.dtype != torch.float32
    return (
        query.new_empty(query.shape),
        query.new_empty(query.shape if save and rounds else 0, dtype=torch.float32),
        query.new_empty((batch, null_kv.shape[1], n_queries), dtype=torch.float32),
    )


def _forward(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate(query, key_value, weights, null_kv, mask, multiply_keys, save)
    if query.numel():
        launch_forward(query, key_value, weights, null_kv, mask, multiply_keys, *outputs)
    return outputs


def _allocate_gradients(
    grad: Tensor,
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key_value.new_empty(key_value.shape),
        weights.new_empty(weights.shape, dtype=torch.float32),
        null_kv.new_empty(null_kv.shape, dtype=torch.float32),
    )


def _backward(
    grad: Tensor,
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    mask: Tensor | None,
    multiply_keys: bool,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, of keys and values, and in fp32 of weights and the learned pair."""
    given = (query, key_value, weights, null_kv, mask, multiply_keys, out, lse)
    dquery, dkey_value, dweights, dnull = _allocate_gradients(grad, *given)
    if not query.numel():
        return dquery, dkey_value.zero_(), dweights.zero_(), dnull.zero_()
    return dquery, dkey_value, *launch_backward(grad.contiguous(), *given, dquery, dkey_value)


define(f"routed_attention({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor)", _forward, _allocate)
define_backward(
    f"routed_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _allocate_gradients,
)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    *given, ctx.multiply_keys, _ = inputs
    out, wide, lse = output
    ctx.mark_non_differentiable(wide, lse)
    ctx.save_for_backward(*given, wide if out.dtype != torch.float32 else out, lse)


def _differentiate(ctx, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *given, out, lse = ctx.saved_tensors
    _, _, weights, null_kv, _ = given
    backward = backward_of(grad, torch.ops.colt5.routed_attention_backward, _backward)
    dquery, dkey_value, dweights, dnull = backward(grad, *given, ctx.multiply_keys, out, lse)
    return dquery, dkey_value, dweights.to(weights.dtype), dnull.to(null_kv.dtype), None, None, None


define_gradient("routed_attention", _setup_context, _differentiate)


_eager = eager(_forward, _setup_context, _differentiate)


def routed_attention(
    query: Tensor,
    key_value: Tensor,
    weights: Tensor,
    null_kv: Tensor,
    *,
    mask: Tensor | None = None,
    multiply_keys_by_score: bool = False,
) -> Tensor:
    """`reference.routed_attention` in one kernel, and in two backward, with nothing copied.

    Products are of the dtype of queries, keys and values, sums and the softmax in fp32. Results are bitwise equal from
    run to run. CPU tensors, fp64 ones, and heads of more than 128 dimensions get the same mathematics in PyTorch.

    Args:
        query: `b i (h d)`, any float dtype.
        key_value: `b r j (h kv d)`, in the dtype of the queries: of each token and route, for the heads of the route, a
            key and a value side by side. Any strides but the last.
        weights: `b r j`, multiplied with values, and with keys if `multiply_keys_by_score`.
        null_kv: `2 h d`: a key and a value that every query attends to, too.
        mask: `b r j`, bool; False for tokens that are not attended to.

    Returns:
        `b i (h d)`, in the dtype of the queries.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        NotImplementedError: a second derivative or forward mode is asked for, but on the CPU.
    """
    check_routed(query, key_value, weights, null_kv, mask)
    tensors = (query, key_value, weights, null_kv)
    if query.dtype == torch.float64 or null_kv.shape[2] > LARGEST_HEAD or not runs_triton(query):
        return cpu.routed_attention(*tensors, mask, multiply_keys_by_score)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    operation: Callable[..., tuple[Tensor, ...]] = _eager if save else _forward
    if is_traced(query):
        operation = torch.ops.colt5.routed_attention
    out, *_ = operation(
        query.contiguous(),
        key_value if key_value.stride(-1) == 1 else key_value.contiguous(),
        weights.contiguous(),
        null_kv.contiguous(),
        None if mask is None else mask.contiguous(),
        multiply_keys_by_score,
        save,
    )
    return out
