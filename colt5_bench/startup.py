"""Checks before anything is measured. Error messages say what to do."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("reference", "kernels", "suites")
"""Packages of a checkout, without the harness."""

INSTALLED = "colt5"
"""The package that contains them in an installation, see setup.py."""


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within this context, Ctrl-C ends the process at once, because half-imported packages cannot unwind."""
    # An ignored signal, as with `&`, stays ignored.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class StartupError(Exception):
    """The run cannot begin; the message is for the user."""


def find_checkout(directory: Path) -> Path:
    """The directory of suites and operations. It is the given directory if that is a checkout. Else it is the place of
    this harness, which may be a checkout, too, or an installation.

    Raises:
        StartupError: there are no suites to run.
    """
    own = Path(__file__).resolve().parents[1]
    for place in (directory, own, own / INSTALLED):
        if all((place / name / "__init__.py").is_file() for name in PACKAGES):
            return place
    raise StartupError(
        f"{directory} is not a checkout of colt5-bench, which contains {', '.join(f'{name}/' for name in PACKAGES)}, "
        "and no suites are installed: change to the root of a checkout, then start again."
    )


def prefix_of(checkout: Path) -> str:
    """The prefix of names of modules. It is empty in a checkout, and not empty in an installation."""
    return f"{INSTALLED}." if (checkout / "__init__.py").is_file() else ""


def is_outside(suite: Path) -> bool:
    """True for the file of a suite outside of a folder `suites`, and so outside of a checkout."""
    return suite.parent.name != "suites"


def reports_of(checkout: Path) -> Path:
    """The directory of runs, in the checkout, or in the current directory if suites are installed."""
    return (Path.cwd() if prefix_of(checkout) else checkout) / "reports"


def check(checkout: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Make the packages of the checkout importable, and check that an import finds them.

    PyPI has a package `kernels`, which transformers uses optionally.

    Raises:
        StartupError: another package shadows one of them, or Triton's interpreter is on.
    """
    prefix = prefix_of(checkout)
    if not prefix and str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    for name in packages:
        spec = find_spec(prefix + name)
        found = _directory(spec)
        if found != checkout / name:
            raise StartupError(
                f"`import {name}` finds {found or 'nothing'} instead of {checkout / name}. Another package of this "
                f"name comes first on the path: start `python bench.py` in {checkout}, or `pip uninstall {name}`."
            )
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise StartupError("TRITON_INTERPRET=1 is set: the interpreter's times mean nothing. Unset it to measure.")


def _directory(spec: ModuleSpec | None) -> Path | None:
    return Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
