"""After its import, Triton's interpreter computes the same in a fraction of its time."""

from functools import cache, reduce

import numpy as np
import triton
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang


def _patch_lang_once(fn):
    """Patch the language modules that a function uses, unless all are patched already.

    Triton's interpreter patches them again in each call of a function from a kernel, which takes most of its time.
    """
    seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    patched = seen and not any(tl.core.is_builtin(lang.load) for lang in seen)
    return interpreter._LangPatchScope() if patched else _patch_lang(fn)


interpreter._patch_lang = _patch_lang_once

_get_np_dtype = interpreter._get_np_dtype
_np_dtypes = {}


def _get_np_dtype_once(dtype):
    """NumPy's dtype of numbers or blocks, cached by name.

    Triton's interpreter makes a table of all dtypes at each request, several times per operation.
    """
    scalar = dtype.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _get_np_dtype(scalar)
    return _np_dtypes[scalar.name]


interpreter._get_np_dtype = _get_np_dtype_once


generic_reduce = interpreter.ReduceOps.generic_reduce


def _reduce_slices(self, blocks):
    """Blocks reduced along an axis by any function, slice by slice.

    Triton's interpreter calls the function element by element, for as many elements as a sort compares.
    """
    ndim = len(blocks[0].shape)
    blocks, axis = self.unravel(blocks, self.axis)
    dtypes = [block.dtype for block in blocks]

    def tensors(arrays):
        return [self.to_tensor(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]

    def combine(one, other):
        combined = self.combine_fn.fn(*tensors(one), *tensors(other))
        combined = combined if isinstance(combined, tuple) else (combined,)
        return [result.handle.data.reshape(part.shape) for result, part in zip(combined, one, strict=True)]

    slices = zip(*(np.moveaxis(block.handle.data, axis, 0) for block in blocks), strict=True)
    reduced = reduce(combine, slices)
    if self.keep_dims:
        reduced = [np.expand_dims(array, axis if self.axis is not None else tuple(range(ndim))) for array in reduced]
    return tensors(reduced)


interpreter.ReduceOps.generic_reduce = _reduce_slices


# Overflow checks take a dozen operations per addition and assert nothing, because that needs `debug`.
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@cache
def _shape(*sizes):
    """The shape of a type, its text and number of elements, and the shape and number of a tensor."""
    assert sizes, "a block has a dimension"
    numel = validate_block_shape(sizes)
    shape, constants = tl.tuple(sizes), tl.tuple([tl.constexpr(size) for size in sizes])
    return shape, str(shape), numel, constants, tl.constexpr(numel)


def _init_type(self, element_ty, shape):
    """Make a type of blocks with shared data for its shape: Triton's interpreter makes new data for each operation."""
    sizes = [size.value if isinstance(size, tl.constexpr) else size for size in shape]
    self.shape, text, self.numel, *self.of_tensors = _shape(*sizes)
    self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"


def _init_tensor(self, handle, type):  # noqa: A002
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensors if type.is_block() else SCALAR


SCALAR = tl.tuple([]), tl.constexpr(1)

_broadcast = TritonSemantic.broadcast_impl_value


def _broadcast_if_need_be(self, one, other):
    """Both unchanged if they have the same shape, which Triton's interpreter compares size by size."""
    return (one, other) if one.shape is other.shape else _broadcast(self, one, other)


if triton.knobs.runtime.interpret:
    tl.core.block_type.__init__ = _init_type
    tl.core.tensor.__init__ = _init_tensor
    TritonSemantic.broadcast_impl_value = _broadcast_if_need_be
