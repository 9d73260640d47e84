"""What tests of kernels share."""

from types import ModuleType

import pytest
import triton.language as tl
from triton.runtime import interpreter

from kernels._common.launch import LAUNCHERS, PLANNERS

_patch_lang = interpreter._patch_lang


def _patch_lang_once(fn):
    """Patch the language modules that a function sees, unless all are patched already.

    Triton's interpreter patches them again at each call of a function from a kernel, which takes most of its time.
    """
    seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    patched = seen and not any(tl.core.is_builtin(lang.load) for lang in seen)
    return interpreter._LangPatchScope() if patched else _patch_lang(fn)


interpreter._patch_lang = _patch_lang_once

_get_np_dtype = interpreter._get_np_dtype
_np_dtypes = {}


def _get_np_dtype_once(dtype):
    """NumPy's dtype of numbers or blocks, remembered by name.

    Triton's interpreter makes a table of all dtypes each time that it asks for one, several times an operation.
    """
    scalar = dtype.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _get_np_dtype(scalar)
    return _np_dtypes[scalar.name]


interpreter._get_np_dtype = _get_np_dtype_once


@pytest.fixture
def set_sizes(monkeypatch):
    """Set sizes that launchers plan with, so that a few entries go the way of many, and forget what was planned."""

    def forget():
        for planner in PLANNERS:
            planner.cache_clear()
        for launcher in LAUNCHERS:
            launcher.forget()

    def set_sizes(module: ModuleType, **sizes: int) -> None:
        forget()
        for name, size in sizes.items():
            monkeypatch.setattr(module, name, size)

    yield set_sizes
    forget()
