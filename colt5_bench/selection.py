"""Selections by the user: suites by name, cases by expression or share, and hints for mistyped names.

Nothing here imports PyTorch, so that help and lists appear at once.
"""

import ast
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import TypeVar

from colt5_bench.texts import describe_error

T = TypeVar("T")

PRESETS = ("smoke", "default", "full")
"""The part of a suite that a run measures."""


class SelectionError(ValueError):
    """An option of the user is not valid; the message says what is allowed."""


def suite_files(checkout: Path) -> dict[str, Path]:
    """The files that may contain a suite, by its name: those in suites/ that are not private."""
    paths = sorted((checkout / "suites").glob("*.py"))
    return {path.stem: path for path in paths if not path.name.startswith("_") and path.stem != "conftest"}


def split_paths(suites: Iterable[str]) -> tuple[list[str], dict[str, Path]]:
    """Values of `--suite`: the names of all suites, and the files of those that are given by a path.

    Raises:
        SelectionError: two suites have the same name.
    """
    names, files = [], {}
    for text in dict.fromkeys(suites):
        file = Path(text).expanduser().absolute()
        names.append(file.stem if text.endswith(".py") else text)
        if text.endswith(".py"):
            files[file.stem] = file
    if twice := [name for name in names if names.count(name) > 1]:
        raise SelectionError(
            f"--suite names two suites {twice[0]!r}: suites have the names of their files, so rename one."
        )
    return names, files


def outlines(checkout: Path) -> dict[str, str]:
    """The description of each suite of the checkout, by its name. Files are read, but not executed."""
    described = {}
    for name, file in suite_files(checkout).items():
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError) as error:
            print(f"{file.relative_to(checkout)} is left out: {describe_error(error)}", file=sys.stderr)
            continue
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and "SUITE" in map(ast.unparse, statement.targets):
                described[name] = _description(statement.value) or ast.get_docstring(tree) or ""
    return described


def _description(suite: ast.expr) -> str:
    keywords = suite.keywords if isinstance(suite, ast.Call) else []
    values = [each.value for each in keywords if each.arg == "description"]
    return str(values[0].value) if values and isinstance(values[0], ast.Constant) else ""


def pick(kind: str, name: str, allowed: Iterable[str]) -> str:
    """The name itself, if it is allowed.

    Raises:
        SelectionError: the name is not allowed.
    """
    names = list(allowed)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SelectionError(f"there is no {kind} {name!r}; choose from {', '.join(names)}.{hint}")
    return name


_OF_EXPRESSIONS = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not),
    *(ast.Compare, ast.In, ast.Constant, ast.Name, ast.Load),
)


def case_filter(expression: str) -> Callable[[str], bool]:
    """True if a case id satisfies an expression of substrings joined by `and`, `or`, `not` and parentheses.

    Every id satisfies an empty expression. The id of `n=5120` satisfies `n=512`, too.

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
            f"-k must join parts of case ids with and, or, not and parentheses, as in 'n=512 and not dtype=bfloat16', "
            f"got {expression!r}"
        ) from error
    return lambda case_id: bool(eval(code, {"case_id": case_id}))


@dataclass(frozen=True)
class Guest:
    """An implementation of the user: a function, or for suites of layers a class."""

    name: str
    place: str
    """Absolute path of a Python file, or name of a module."""

    attribute: str
    """Name of the function in it."""

    @classmethod
    def parse(cls, text: str) -> "Guest":
        """`mine=path/to/file.py:function`, or `mine=package.module:function`. Paths are relative to the current
        directory.

        Raises:
            SelectionError: the text has another form.
        """
        match = re.fullmatch(r"([A-Za-z]\w*)=(.+):([A-Za-z_][\w.]*)", text)
        if match is None:
            raise SelectionError(
                "--impl with = must be NAME=path/to/file.py:FUNCTION or NAME=package.module:FUNCTION, where NAME is a "
                f"letter followed by letters, digits and underscores, got {text}."
            )
        name, place, attribute = match.groups()
        is_file = place.endswith(".py") or "/" in place
        return cls(name, str(Path(place).expanduser().absolute()) if is_file else place, attribute)

    def __str__(self) -> str:
        return f"{self.name}={self.place}:{self.attribute}"

    @property
    def file(self) -> Path | None:
        """None if the place is a module."""
        return Path(self.place) if self.place.startswith("/") else None


def split_guests(implementations: Iterable[str]) -> tuple[list[str], list[Guest]]:
    """Values of `--impl`: names and guests.

    The named implementations and the guests are measured. Without a name, all implementations are.

    Raises:
        SelectionError: a guest cannot be read, or two have the same name.
    """
    given = list(dict.fromkeys(implementations))
    guests = [Guest.parse(text) for text in given if "=" in text]
    names = [text for text in given if "=" not in text]
    for guest in guests:
        if sum(each.name == guest.name for each in guests) > 1:
            raise SelectionError(f"--impl names two implementations {guest.name!r}: give each another name.")
    return [*names, *(guest.name for guest in guests if names)], guests


@dataclass(frozen=True)
class Shard:
    """One of `count` shares of the cases, numbered from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/4`, the second of four.

        Raises:
            SelectionError: the text is no shard.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise SelectionError(f"--shard must be I/N with I from 1 to N, such as 1/4, got {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, cases: Sequence[T]) -> Sequence[T]:
        """Every `count`-th case. Neighbours in a grid take about as long, so shards do, too."""
        return cases[self.index - 1 :: self.count]


WHOLE = Shard(1, 1)


def parse_seconds(text: str) -> float:
    """A time limit in seconds.

    Raises:
        SelectionError: the text is no positive number.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = nan
    if not 0 < seconds < inf:
        raise SelectionError(f"--time-limit must be a number of seconds above 0, such as 600, got {text!r}.")
    return seconds
