"""Suites of a checkout and devices of this machine, loaded."""

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from colt5_bench.selection import SelectionError, pick, suite_files
from colt5_bench.startup import prefix_of
from colt5_bench.suite import Grid
from colt5_bench.texts import describe_error


def load_suites(checkout: Path) -> dict[str, Grid]:
    """Every suite of the checkout. There is no registry: a suite is a file in suites/ with a `SUITE`.

    A file that is broken costs no other suite; what is wrong with it is said on the error stream.
    """
    suites = {}
    for name, file in suite_files(checkout).items():
        try:
            suite = load_suite(file)
            if suite is not None:
                suites[name] = _checked(suite, name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            print(f"{file.relative_to(checkout)} is left out: {describe_error(error)}", file=sys.stderr)
    return suites


def pick_suites(names: Sequence[str], suites: Mapping[str, Grid]) -> list[str]:
    """The names of suites that were asked for, each once; `all` is every suite.

    Raises:
        SelectionError: there is no suite of a name.
    """
    return list(suites) if "all" in names else [pick("suite", name, suites) for name in dict.fromkeys(names)]


def load_suite(file: Path) -> Any:
    """The `SUITE` of a file, or None. The file becomes a module of the package `suites`, if it is none yet."""
    name = f"{prefix_of(file.parents[1])}suites.{file.stem}"
    module = sys.modules.get(name)
    if module is None or module.__file__ != str(file):
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return getattr(module, "SUITE", None)


def _checked(suite: object, name: str) -> Grid:
    if not isinstance(suite, Grid):
        raise TypeError(f"SUITE is a {type(suite).__name__} and no Suite or TrainingSuite")
    if suite.name != name:
        raise ValueError(f"SUITE is called {suite.name!r}, and has to be called as its file")
    return suite


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        SelectionError: no such device is here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SelectionError(f"there is no device {name!r}; there is auto, cpu, cuda and cuda:<index>.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SelectionError(f"device {name} was asked for and PyTorch sees {torch.cuda.device_count()} GPUs.")
    return device
