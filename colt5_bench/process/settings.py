"""Settings of the process. Changes by an implementation must not affect the next one."""

import os
import random
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch


class Setting(NamedTuple):
    """Reads and restores a setting."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


def _attribute(owner: Any, name: str) -> Setting:
    return Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_default_device(device: torch.device) -> None:
    """Set the default device. For the CPU no mode is used, because compilers cannot trace it."""
    torch.set_default_device(None if device == torch.device("cpu") else device)


SETTINGS: dict[str, Setting] = {
    "current directory": Setting(os.getcwd, os.chdir),
    "threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": Setting(torch.get_default_device, _set_default_device),
    "grad mode": Setting(torch.is_grad_enabled, torch._C._set_grad_enabled),
    "deterministic algorithms": Setting(
        _deterministic, lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    ),
    "float32 matmul precision": Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn.allow_tf32": _attribute(torch.backends.cudnn, "allow_tf32"),
    "cudnn.benchmark": _attribute(torch.backends.cudnn, "benchmark"),
    "cudnn.deterministic": _attribute(torch.backends.cudnn, "deterministic"),
    "cuda.matmul.allow_fp16_reduced_precision_reduction": _attribute(
        torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"
    ),
    "cuda.matmul.allow_bf16_reduced_precision_reduction": _attribute(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    ),
    "flush denormal": Setting(lambda: _flushes_denormals(), lambda flush: _flush_denormals(flush)),
    "torch's random numbers": Setting(torch.get_rng_state, torch.set_rng_state),
    "numpy's random numbers": Setting(np.random.get_state, np.random.set_state),
    "Python's random numbers": Setting(random.getstate, random.setstate),
}
if hasattr(torch._C, "_accelerator_getAllocatorSettings"):  # PyTorch 2.11 has no such function
    SETTINGS["allocator"] = Setting(
        torch._C._accelerator_getAllocatorSettings, torch._C._accelerator_setAllocatorSettings
    )
# The last one, because it cannot be read after an error that breaks the GPU's context.
SETTINGS["random numbers of CUDA"] = Setting(lambda: _cuda_random_state(), torch.cuda.set_rng_state_all)

RANDOM = frozenset(name for name in SETTINGS if "random numbers" in name)
"""States of random number generators. Each draw changes them."""


class Settings:
    """Values of settings at the creation of this snapshot.

    Args:
        left_out: names of settings that do not count.
    """

    def __init__(self, left_out: Container[str] = ()) -> None:
        self._values = {name: setting.read() for name, setting in SETTINGS.items() if name not in left_out}

    def restore(self) -> list[str]:
        """Restore changed settings, and name them.

        Raises:
            RuntimeError: the GPU's context is broken. All other settings are restored.
        """
        changed = []
        for name, value in self._values.items():
            if not _same(SETTINGS[name].read(), value):
                SETTINGS[name].write(value)
                changed.append(name)
        return changed


@contextmanager
def preserved() -> Iterator[list[str]]:
    """Restore all settings at the end of this context. The list then names those that had changed.

    Raises:
        RuntimeError: no other error ended the context, and a kernel has broken the GPU's.
    """
    before = Settings()
    changed: list[str] = []
    try:
        yield changed
    except BaseException:
        with suppress(RuntimeError):
            changed += before.restore()
        raise
    changed += before.restore()


def _flushes_denormals() -> bool:
    return (torch.tensor(1e-310, dtype=torch.float64, device="cpu") * 1.0).item() == 0


def _flush_denormals(flush: bool) -> None:
    torch.set_flush_denormal(flush)


def _cuda_random_state() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
