"""What the user asked for: suites by name, cases by expression or share, a device, and help with what was mistyped."""

import ast
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import TypeVar

import torch

from colt5_bench.suite import Suite
from colt5_bench.texts import said

T = TypeVar("T")


class SelectionError(ValueError):
    """The user asked for what there is not; the message says what is allowed."""


def suite_files(checkout: Path) -> dict[str, Path]:
    """The files that may hold a suite, by its name: those of suites/ that are not private."""
    paths = sorted((checkout / "suites").glob("*.py"))
    return {path.stem: path for path in paths if not path.name.startswith("_") and path.stem != "conftest"}


def load_suites(checkout: Path) -> dict[str, Suite]:
    """Every suite of the checkout. There is no registry: a suite is a file in suites/ with a `SUITE`.

    A file that is broken costs no other suite; what is wrong with it is said on the error stream.
    """
    suites = {}
    for name, file in suite_files(checkout).items():
        try:
            suite = getattr(importlib.import_module(f"suites.{name}"), "SUITE", None)
            if suite is not None:
                suites[name] = _checked(suite, name)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            print(f"{file.relative_to(checkout)} is left out: {said(error)}", file=sys.stderr)
    return suites


def _checked(suite: object, name: str) -> Suite:
    if not isinstance(suite, Suite):
        raise TypeError(f"SUITE is a {type(suite).__name__} and no Suite")
    if suite.name != name:
        raise ValueError(f"SUITE is called {suite.name!r}, and has to be called as its file")
    return suite


def pick(kind: str, name: str, allowed: Iterable[str]) -> str:
    """The name itself, if it is allowed.

    Raises:
        SelectionError: it is not.
    """
    names = list(allowed)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SelectionError(f"there is no {kind} {name!r}; there is {', '.join(names)}.{hint}")
    return name


_OF_EXPRESSIONS = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not),
    *(ast.Compare, ast.In, ast.Constant, ast.Name, ast.Load),
)


def case_filter(expression: str) -> Callable[[str], bool]:
    """Whether a case id satisfies an expression of substrings joined by `and`, `or`, `not` and parentheses.

    An empty expression is satisfied by every id; `n=512` by that of `n=5120` too.

    Raises:
        SelectionError: the expression cannot be read.
    """
    if not expression.strip():
        return lambda case_id: True
    words = (word.strip() for word in re.split(r"(\band\b|\bor\b|\bnot\b|[()])", expression))
    operators = {"and", "or", "not", "(", ")"}
    source = " ".join(word if word in operators else f"({word!r} in case_id)" for word in words if word)
    try:
        tree = ast.parse(source, mode="eval")
        # `n=(8 or 16)` would be a call.
        if not all(isinstance(each, _OF_EXPRESSIONS) for each in ast.walk(tree)):
            raise SyntaxError
        code = compile(tree, "<cases>", "eval")
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise SelectionError(
            f"cannot read the case expression {expression!r}: it joins substrings of case ids with and, or, not and "
            "parentheses, as in 'n=512 and not dtype=bfloat16'"
        ) from error
    return lambda case_id: bool(eval(code, {"case_id": case_id}))


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of the cases, numbered from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/4`, the second of four.

        Raises:
            SelectionError: it is none.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise SelectionError(f"there is no shard {text!r}; the shards of four are 1/4, 2/4, 3/4 and 4/4.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, cases: Sequence[T]) -> Sequence[T]:
        """Every `count`-th case: neighbours in a grid take about as long, so that shards do."""
        return cases[self.index - 1 :: self.count]


WHOLE = Shard(1, 1)


def parse_seconds(text: str) -> float:
    """A limit of time.

    Raises:
        SelectionError: it is none.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = nan
    if not 0 < seconds < inf:
        raise SelectionError(f"there is no time limit of {text!r}; it is a number of seconds above 0, such as 600.")
    return seconds


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
