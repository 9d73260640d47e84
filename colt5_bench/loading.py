"""Suites of a checkout and devices of this machine, loaded."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, reduce
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import torch

from colt5_bench.process.functions import Functions
from colt5_bench.process.garbage import no_garbage_collection
from colt5_bench.process.settings import preserved
from colt5_bench.selection import Guest, SelectionError, pick, suite_files
from colt5_bench.startup import is_outside, prefix_of
from colt5_bench.suite import Grid, Implementation, Suite, Trainee, TrainingSuite
from colt5_bench.texts import describe_error


def load_suites(checkout: Path, others: Mapping[str, Path] = MappingProxyType({})) -> dict[str, Grid]:
    """Every suite of the checkout. There is no registry: a suite is a file in suites/ with a `SUITE`.

    A broken file does not affect other suites; its fault is printed to stderr.

    Args:
        others: more files by name, named by the user.

    Raises:
        SelectionError: one of these is no suite, or has the name of another suite.
    """
    suites = {}
    for name, file in others.items():
        if name in suite_files(checkout):
            raise SelectionError(
                f"--suite {file}: the checkout already has a suite {name!r}, so the file needs another name."
            )
        try:
            if str(file.parent) not in sys.path:
                sys.path.append(str(file.parent))
            suites[name] = checked(load_suite(file), name)
        except OSError as error:
            raise SelectionError(f"--suite {file}: {error.strerror or error}.") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise SelectionError(f"--suite {file}: {describe_error(error)}") from error
    for name, file in suite_files(checkout).items():
        try:
            suite = load_suite(file)
            if suite is not None:
                suites[name] = checked(suite, name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            print(f"{file.relative_to(checkout)} is left out: {describe_error(error)}", file=sys.stderr)
    return suites


def pick_suites(names: Sequence[str], suites: Mapping[str, Grid]) -> list[str]:
    """The selected names of suites, without duplicates; `all` selects every suite.

    Raises:
        SelectionError: a suite does not exist.
    """
    return list(suites) if "all" in names else [pick("suite", name, suites) for name in dict.fromkeys(names)]


def load_suite(file: Path) -> Any:
    """The `SUITE` of a file, or None. The file is imported as a module of the package `suites`."""
    prefix = "" if is_outside(file) else prefix_of(file.parents[1])
    name = f"{prefix}suites.{file.stem}"
    module = sys.modules.get(name)
    if module is None or module.__file__ != str(file):
        with no_garbage_collection():
            module = _run_file(file, name)
    return getattr(module, "SUITE", None)


GROUP = "colt5_bench.implementations"
"""Entry points through which installed packages add guests. Names are SUITE.NAME, as `coor_descent.mine`."""


def installed_guests(suite: Grid) -> tuple[Guest, ...]:
    """Guests that installed packages add to a suite. Faulty ones are left out, with one message."""
    return _installed_guests(suite.name, _guest_of(suite) is not None)


@cache
def _installed_guests(suite: str, takes_guests: bool) -> tuple[Guest, ...]:
    found = []
    for point in entry_points(group=GROUP):
        name, _, own = point.name.partition(".")
        if name == suite:
            try:
                if not takes_guests:
                    raise SelectionError(f"suite {suite} takes no added implementations.")
                guest = Guest.parse(f"{own}={point.value.replace(' ', '')}")
                _function_of(guest)
                found.append(guest)
            except SelectionError as error:
                print(f"entry point {point.name} is left out: {error}", file=sys.stderr)
    return tuple(found)


def _guest_of(suite: Grid) -> Callable[[Callable[..., Any]], Implementation[Any]] | None:
    return suite.guest if isinstance(suite, Suite) else None


def invite(suite: Grid, guests: Iterable[Guest]) -> Grid:
    """The suite with its own implementations and those of guests.

    Raises:
        SelectionError: the suite takes no guests, has the name already, or a function does not exist.
    """
    for guest in guests:
        if (make := _guest_of(suite)) is None:
            raise SelectionError(f"--impl {guest}: suite {suite.name} takes no added implementations.")
        if guest.name in suite.implementations:
            raise SelectionError(
                f"--impl {guest}: suite {suite.name} already has an implementation {guest.name}; choose another name."
            )
        made = replace(make(_function_of(guest)), name=guest.name, **_traces[guest.place]._asdict())
        suite = replace(suite, implementations={**suite.implementations, guest.name: made})
    return suite


def describe_guest(guest: Guest) -> dict[str, str]:
    """For the record: file or module of a guest, without directories, and a hash of the file."""
    file = _module_of(guest).__file__
    content = Path(file).read_bytes() if file else b""
    place = guest.place if guest.file is None else guest.file.name
    return {"function": f"{place}:{guest.attribute}", "sha256": hashlib.sha256(content).hexdigest()}


def _function_of(guest: Guest) -> Callable[..., Any]:
    module = _module_of(guest)
    try:
        found = reduce(getattr, guest.attribute.split("."), module)
    except AttributeError:
        public = [name for name, each in vars(module).items() if callable(each) and not name.startswith("_")]
        raise SelectionError(
            f"--impl {guest}: {guest.place} has no {guest.attribute}, only {', '.join(public) or 'no function at all'}."
        ) from None
    if not callable(found):
        raise SelectionError(f"--impl {guest}: {guest.attribute} must be a function or a class, got {found!r:.60}.")
    return found


def _module_of(guest: Guest) -> ModuleType:
    """The module of a guest, which is executed once. It can import files from its directory.

    Raises:
        SelectionError: the module does not exist, or fails.
    """
    if guest.place not in _traces:
        functions = Functions()
        with preserved() as changed:
            module = _imported(guest)
        replaced = functions.restore()
        _traces[guest.place] = _Traces(
            tuple(changed), f"it replaces {replaced} when it is imported" if replaced else ""
        )
        return module
    return _imported(guest)


class _Traces(NamedTuple):
    """Changes of the process by the import of a module, which were undone. They are fields of implementations."""

    changed_settings: tuple[str, ...]
    refused: str


_traces: dict[str, _Traces] = {}
"""By the place of a guest. A module is executed once."""


def _imported(guest: Guest) -> ModuleType:
    try:
        if guest.file is None:
            return importlib.import_module(guest.place)
        name = f"colt5_bench_guest_{hashlib.sha256(guest.place.encode()).hexdigest()[:12]}"
        if str(guest.file.parent) not in sys.path:
            # Last in the path, so that no file there shadows our packages.
            sys.path.append(str(guest.file.parent))
        return sys.modules.get(name) or _run_file(guest.file, name)
    except OSError as error:
        raise SelectionError(f"--impl {guest}: cannot read {guest.place}: {error.strerror or error}.") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise SelectionError(f"--impl {guest}: {guest.place} cannot be imported: {describe_error(error)}") from error


def _run_file(file: Path, name: str) -> ModuleType:
    """A file as a new module."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def checked(suite: object, name: str) -> Grid:
    """The suite of a file, if its fields are valid.

    Raises:
        TypeError, ValueError: a field is wrong; the message names it and what is allowed.
    """
    if not isinstance(suite, Grid):
        raise TypeError(f"SUITE must be a Suite or a TrainingSuite, got a {type(suite).__name__}")
    if suite.name != name:
        raise ValueError(f"SUITE.name must be {name!r}, the name of its file, got {suite.name!r}")
    trains = isinstance(suite, TrainingSuite)
    for field in ("cases", "directions", *(("data", "course") if trains else ("problem", "truth", "plain", "cost"))):
        if not callable(value := getattr(suite, field)):
            raise TypeError(f"SUITE.{field} must be a function, got {value!r:.80}")
    if not isinstance(suite.implementations, Mapping) or not suite.implementations:
        raise TypeError(
            f"SUITE.implementations must be a dict of implementations by name, got {suite.implementations!r:.80}"
        )
    kind = Trainee if trains else Implementation
    for key, each in suite.implementations.items():
        where = f"SUITE.implementations[{key!r}]"
        if not isinstance(each, kind):
            raise TypeError(f"{where} must be of class {kind.__name__}, got {each!r:.80}")
        if each.name != key:
            raise ValueError(f"{where}.name must be {key!r}, got {each.name!r}")
        if not callable(each.build):
            raise TypeError(f"{where}.build must be a function, got {each.build!r:.80}")
    if suite.reference not in suite.implementations:
        names = ", ".join(suite.implementations)
        raise ValueError(f"SUITE.reference must be one of {names}, got {suite.reference!r}")
    return suite


def choose_device(name: str) -> torch.device:
    """The device of a name. `auto` is the GPU if there is one.

    Raises:
        SelectionError: the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SelectionError(f"--device must be auto, cpu, cuda or cuda:<index>, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SelectionError(f"--device {name} does not exist: PyTorch sees {torch.cuda.device_count()} GPUs.")
    return device
