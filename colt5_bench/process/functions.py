"""Functions that times and truths depend on. If one is replaced, this is detected and undone."""

import gc
import random
import secrets
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from operator import attrgetter, is_
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.utils._device import DeviceContext

PACKAGES = ("colt5_bench", "kernels", "reference", "suites")
"""Packages with functions and constants that measure, are measured, or judge."""

OWNERS: tuple[Any, ...] = (
    *(gc, random, random.Random, random.SystemRandom, secrets, statistics, threading, time),
    *(torch, torch.autograd, torch.backends.cuda, torch.cuda, torch.linalg, torch.nn.functional, torch.special),
    *(torch.Tensor, torch.nn.Module, torch.autograd.Function),
    *(torch.cuda.CUDAGraph, torch.cuda.Event, torch.cuda.Stream),
)
"""Modules and classes of other packages whose functions they call."""


CLOCK = (
    *("call", "inputs", "rounds", "timing", "watch"),
    *("time", "torch.cuda", "torch.cuda.graphs.CUDAGraph", "torch.cuda.streams.Event", "torch.cuda.streams.Stream"),
)
"""Modules that are used while times are taken."""

_INSIDE = attrgetter("__code__", "__defaults__")


class _Owner:
    """A module, class or object, with its attributes at the creation of this snapshot."""

    def __init__(self, owner: Any) -> None:
        self.name, self._owner = _name(owner), owner
        self._attributes = dict(vars(owner))
        self._functions = {name: each for name, each in self._attributes.items() if type(each) is FunctionType}
        self._insides = [*map(_INSIDE, self._functions.values())]

    def restore(self) -> list[str]:
        """Restore replaced attributes. Each text names one, and its replacement."""
        now, texts = vars(self._owner), []
        if not self._has_same_attributes():
            replaced = [name for name, value in self._attributes.items() if now.get(name) is not value]
            texts = [self._put_back(name) for name in replaced if self._counts(name, now.get(name))]
        if not self._has_same_insides():
            for (name, function), inside in zip(self._functions.items(), self._insides, strict=True):
                if _INSIDE(function) != inside:
                    texts.append(f"{self.name}.{name} by {_place(function)}")
                    function.__code__, function.__defaults__ = inside
        return texts

    def is_up_to_date(self) -> bool:
        """True if nothing was replaced, added or removed."""
        return self._has_same_attributes() and self._has_same_insides()

    def _has_same_attributes(self) -> bool:
        now = vars(self._owner)
        return len(now) == len(self._attributes) and all(map(is_, now.values(), self._attributes.values()))

    def _has_same_insides(self) -> bool:
        return [*map(_INSIDE, self._functions.values())] == self._insides

    def _counts(self, name: str, now: Any) -> bool:
        """True for functions, classes and constants. Attributes that PyTorch itself wraps on demand do not count."""
        value = self._attributes[name]
        # torch.Storage depends on the default dtype.
        if name.startswith("__") or isinstance(value, ModuleType) or (self.name, name) == ("torch", "Storage"):
            return False
        within = getattr(now, "__globals__", {}).get("__name__", "").startswith("torch.")
        if within and getattr(now, "__wrapped__", None) is value:
            return False
        return callable(value) or isinstance(value, classmethod | staticmethod | property) or name.isupper()

    def _put_back(self, name: str) -> str:
        text = f"{self.name}.{name} by {_place(vars(self._owner).get(name))}"
        if isinstance(self._owner, type):
            setattr(self._owner, name, self._attributes[name])
        else:
            vars(self._owner)[name] = self._attributes[name]
        return text


class Functions:
    """Functions, classes and constants of OWNERS and PACKAGES, at the creation of this snapshot."""

    def __init__(self) -> None:
        self._owners = [*map(_seen, _owners())]
        self._clock = [each for each in self._owners if each.name.removeprefix("colt5_bench.measuring.") in CLOCK]
        self._kernels = {*torch.library._impls}

    def restore(self) -> str:
        """Restore and name what was replaced; an empty text if nothing was."""
        replaced = [text for owner in self._owners for text in owner.restore()]
        replaced += [*_uncovered(), *(f"functions of PyTorch by a {mode}" for mode in _left_modes())]
        replaced += [f"{name} of PyTorch" for name in sorted(torch.library._impls - self._kernels) if _is_kernel(name)]
        return _listed(replaced)

    def restore_clock(self) -> str:
        """The same for functions that are used while times are taken. It takes a tenth of the time."""
        return _listed([text for owner in self._clock for text in owner.restore()])


def _seen(owner: Any) -> _Owner:
    """The earlier snapshot of an owner, if it is still valid. This check is a third of the work."""
    seen = _OWNERS_SEEN.get(id(owner))
    if seen is None or not seen.is_up_to_date():
        seen = _OWNERS_SEEN[id(owner)] = _Owner(owner)
    return seen


_OWNERS_SEEN: dict[int, _Owner] = {}
"""Snapshots by ids of owners, which stay unique while the owners are kept here."""


def _owners() -> Iterator[Any]:
    yield from OWNERS
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES and isinstance(module, ModuleType):
            yield module
            yield from (each for each in vars(module).values() if isinstance(each, type) and each.__module__ == name)


def _uncovered() -> list[str]:
    """Methods of torch.Tensor that hide those of its base class, which cannot be replaced. They are removed."""
    hiding = [name for name in vars(torch.Tensor).keys() - _METHODS if hasattr(torch._C.TensorBase, name)]
    texts = [f"torch.Tensor.{name} by {_place(vars(torch.Tensor)[name])}" for name in hiding]
    for name in hiding:
        delattr(torch.Tensor, name)
    return texts


_METHODS = frozenset(vars(torch.Tensor))


def _left_modes() -> list[str]:
    """Modes that PyTorch still has active, except the default device. They are ended."""
    function_modes = [
        each for each in torch.overrides._get_current_function_mode_stack() if type(each) is not DeviceContext
    ]
    dispatch_modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    for mode in (*reversed(function_modes), *reversed(dispatch_modes)):
        mode.__exit__(None, None, None)
    return [type(mode).__name__ for mode in (*function_modes, *dispatch_modes)]


def _is_kernel(name: str) -> bool:
    """True for a kernel of an operator of PyTorch, for devices or for autograd. Other entries are decompositions."""
    return name.startswith("aten/") and name.rpartition("/")[2].startswith(("CPU", "CUDA", "Autograd"))


def _name(owner: Any) -> str:
    module = getattr(owner, "__module__", "")
    return f"{module}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__


def _place(value: Any) -> str:
    """Name and line of a function, without a directory; the type of another object."""
    code = getattr(value, "__code__", None)
    if code is None:
        return f"{value!r:.60}" if isinstance(value, int | float | str) else f"a {type(value).__name__}"
    return f"{code.co_qualname} of {code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}"


def _listed(texts: Iterable[str], most: int = 3) -> str:
    found = list(texts)
    more = f", and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
