"""Peers, each of them optional, and PyTorch's dense layers."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from colt5_bench.case import Case, Problem, Truth
from colt5_bench.suite import Implementation, Operation
from suites._dense import Attend, attend_plainly, attend_with_flash, attend_with_sdpa
from suites._descent import LONGEST_SEGMENTED, DescentCase, in_segments, lenient, segments_of
from suites._layers import Layer, LayerCase, as_function, seeded_problem, truth_of, without_memory


def colt5_not_installed(case: Case, device: torch.device) -> str | None:
    return None if find_spec("colt5_attention") else "colt5-attention is not installed (pip install '.[peers]')"


def in_triton_missing(case: DescentCase, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its Triton kernel runs on a GPU only"
    return colt5_not_installed(case, device) or in_segments(case, device)


def _plain(case: DescentCase) -> Callable[..., Tensor]:
    from colt5_attention.coor_descent import coor_descent

    return lambda scores: coor_descent(scores, **case.arguments)


def in_triton(case: DescentCase, segments: int) -> Callable[..., Tensor]:
    from colt5_attention.triton_coor_descent import triton_coor_descent

    return lambda scores: triton_coor_descent(scores, **case.arguments, checkpoint_segments=segments)


def colt5_topk() -> Callable[..., tuple[Tensor, ...]]:
    from colt5_attention.topk import topk

    return topk


COLT5_PLAIN = Implementation("colt5_plain", _plain, colt5_not_installed, bound=lenient)

COLT5_TRITON = Implementation[DescentCase](
    "colt5_triton", lambda case: in_triton(case, 1), in_triton_missing, bound=lenient
)

COLT5_TRITON_SEGMENTED = Implementation[DescentCase](
    "colt5_triton_segmented", lambda case: in_triton(case, segments_of(case)), in_triton_missing, bound=lenient
)
"""Segments of five iterations, which take more memory and less time."""


def _colt5_layer(case: LayerCase, use_triton: bool) -> Callable[..., Tensor]:
    colt5 = import_module("colt5_attention")
    return as_function(without_memory(lambda: case.layer.make(colt5, use_triton)))


def _layer_missing(case: LayerCase, device: torch.device) -> str | None:
    if case.layer.autocast:
        return "each of its layers raises an error under autocast, because it multiplies tensors of two dtypes"
    if case.layer.torch_dtype.itemsize < 4:
        return "routes in half precision, in which too many scores are equal"
    return case.layer.colt5_raises or colt5_not_installed(case, device)


def _layer_in_triton_missing(case: LayerCase, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its Triton kernel runs on a GPU only"
    if max(shape[1] for shape in case.layer.inputs.values()) > LONGEST_SEGMENTED:
        return f"takes rows of at most {LONGEST_SEGMENTED} scores"
    return _layer_missing(case, device)


COLT5_LAYER_PLAIN = Implementation[LayerCase](
    "colt5_plain", lambda case: _colt5_layer(case, False), _layer_missing, bound=lenient
)

COLT5_LAYER_TRITON = Implementation[LayerCase](
    "colt5_triton", lambda case: _colt5_layer(case, True), _layer_in_triton_missing, bound=lenient
)

MOST_DENSE_PAIRS = {"cuda": 2**34, "cpu": 2**24}
"""Most pairs of query and key for dense attention, by type of device."""


def _dense_layer(case: LayerCase, dtype: str | None) -> tuple[Layer, Callable[[Attend], nn.Module]]:
    """The shapes of the dense layer's arguments, and its constructor. It has no mask."""
    layer = case.layer
    assert layer.dense is not None
    return replace(layer, masks={}, dtype=dtype or layer.dtype), layer.dense


def _dense(case: LayerCase, attend: Attend, dtype: str | None = None) -> Callable[..., Tensor]:
    layer, make = _dense_layer(case, dtype)
    return as_function(without_memory(lambda: make(attend)), autocast=layer.autocast)


def _dense_operation(dtype: str | None = None) -> Operation[LayerCase]:
    """The dense layer with its own weights, by default in the dtype of the case."""

    def problem(case: LayerCase, device: torch.device) -> Problem:
        layer, make = _dense_layer(case, dtype)
        return seeded_problem(case, layer, lambda: make(attend_plainly), device)

    def plain(case: LayerCase) -> Callable[..., Tensor]:
        return _dense(case, attend_plainly, dtype)

    def truth(case: LayerCase, problem: Problem, direction: str) -> Truth:
        return truth_of(_dense(case, attend_plainly, "float64"), problem, direction)

    return Operation(problem, truth, plain)


def _dense_missing(case: LayerCase, device: torch.device) -> str | None:
    layer, most = case.layer, MOST_DENSE_PAIRS[device.type]
    if layer.dense is None:
        return "this kind of layer has no dense counterpart"
    return None if layer.dense_pairs <= most else f"dense attention of more than {most} pairs takes too long"


def _flash_missing(case: LayerCase, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "PyTorch's flash kernel in bf16 runs on a GPU only"
    if case.layer.dense is not None and not case.layer.dense_pairs:
        return "this layer has no attention"
    return _dense_missing(case, device)


DENSE = Implementation[LayerCase](
    "dense",
    lambda case: _dense(case, attend_with_sdpa),
    _dense_missing,
    bound=lenient,
    operation=_dense_operation(),
)
"""The dense layer in the dtype of the case, with the attention that PyTorch picks."""

DENSE_FLASH = Implementation[LayerCase](
    "dense_flash",
    lambda case: _dense(case, attend_with_flash, "bfloat16"),
    _flash_missing,
    operation=_dense_operation("bfloat16"),
)
"""The dense layer in bf16 for any dtype of the case, judged by fp64 on the inputs rounded to bf16."""


def not_installed(module: str, package: str, *, gpu: bool) -> Callable[[Case, torch.device], str | None]:
    """Reason why a package cannot be measured, or None.

    Args:
        module: name of the imported module.
        package: name of the installed package.
        gpu: True if it runs only on a GPU.
    """

    def missing(case: Case, device: torch.device) -> str | None:
        if gpu and device.type != "cuda":
            return f"{package} runs on a GPU only"
        return None if find_spec(module) else f"{package} is not installed (pip install {package})"

    return missing


FLASHINFER = not_installed("flashinfer", "flashinfer-python", gpu=True)
QUACK = not_installed("quack", "quack-kernels", gpu=True)
LIGER = not_installed("liger_kernel", "liger-kernel", gpu=True)
ENTMAX = not_installed("entmax", "entmax", gpu=False)
SOFTTORCH = not_installed("softtorch", "softtorch", gpu=False)
ADASPLASH = not_installed("adasplash", "adasplash", gpu=True)
ATTN_GYM = not_installed("attn_gym", "attn-gym", gpu=False)
FLASH_ATTN = not_installed("flash_attn", "flash-attn", gpu=True)
FLA = not_installed("fla", "flash-linear-attention", gpu=True)


def attend_with_adasplash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention `b h n d` with the 1.5-entmax."""
    contiguous = (each.contiguous() for each in (query, key, value))
    return import_module("adasplash").adasplash(*contiguous, alpha=1.5, is_causal=causal)


def native_sparse_with_fla(size: int, blocks: int, window: int) -> Callable[..., Tensor]:
    """The same as `suites._sparse.native_sparse`. The window uses FlexAttention: fla's own needs flash-attn."""
    parallel_nsa = import_module("fla.ops.nsa").parallel_nsa
    # A function is compiled for only a few sets of arguments.
    torch.compiler.reset()
    flex = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - window)

    @cache
    def last_keys(length: int, device: torch.device) -> BlockMask:
        return create_block_mask(near, None, None, length, length, device=device)

    def attend(query: Tensor, key: Tensor, value: Tensor, gates: Tensor) -> Tensor:
        gate_means, gate_selected, gate_near = gates
        attended = parallel_nsa(
            *(each.transpose(1, 2) for each in (query, key, value)),
            g_cmp=gate_means.squeeze(-1).transpose(1, 2),
            g_slc=gate_selected.squeeze(-1).transpose(1, 2),
            block_counts=blocks,
            block_size=size,
        )
        keys = last_keys(query.shape[2], query.device)
        return attended.transpose(1, 2) + gate_near * flex(query, key, value, block_mask=keys, enable_gqa=True)

    return attend


def to_blocks_with_fla(query: Tensor, key: Tensor, value: Tensor, causal: bool, *, size: int, blocks: int) -> Tensor:
    """The same as `suites._sparse.to_blocks`, for one sequence."""
    assert causal
    length = query.shape[2]
    attended = import_module("fla.ops.moba").parallel_moba(
        *(each.transpose(1, 2).contiguous() for each in (query, key, value)),
        cu_seqlens=torch.tensor([0, length], dtype=torch.int32, device=query.device),
        max_seqlen=length,
        chunk_size=size,
        topk=blocks,
    )
    return attended.transpose(1, 2)


def to_selected_with_attn_gym(query: Tensor, key: Tensor, places: Tensor, *, window: int) -> Tensor:
    """The same as `suites._sparse.to_selected`, with the places `i m` of the selected keys. On a CPU it is plain
    PyTorch."""
    gather_attn = import_module("attn_gym.sparse.gather_attn").gather_attn
    places = places.expand(len(query), -1, -1).contiguous()
    impl = "fused" if query.is_cuda else "reference"
    return gather_attn(query, key, key, places, sliding_window_size=window, impl=impl)
