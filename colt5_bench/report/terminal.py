"""Tables as wide as the terminal. Columns without room are left out and named. No row is wrapped or cut."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from textwrap import wrap
from typing import Any, Generic, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from colt5_bench.texts import NARROWEST

T = TypeVar("T")

GAP, INDENT = "  ", "  "

REMARK_INDENT = 2 * INDENT

SHORTEST, READABLE = 8, 24
"""Fewest characters of a name. It keeps them as long as other columns can be left out."""


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column of a table of rows of one type."""

    title: str
    """Heading, which may be broken between words."""

    cell: Callable[[T], str]

    rank: int = 0
    """Order in which columns are left out, the highest rank first. A column of rank 0 always stays."""

    number: bool = True
    """True for figures: they are aligned to the right and never shortened. Names are aligned to the left."""


@dataclass(frozen=True)
class Group(Generic[T]):
    """Rows below a heading, which may have several lines."""

    heading: str
    rows: Sequence[T]


@dataclass(frozen=True, eq=False)
class _Laid:
    """A column as it is printed."""

    column: Column[Any]
    title: list[str]
    cells: list[str]

    @cached_property
    def width(self) -> int:
        return max(map(cell_len, (*self.title, *self.cells)), default=0)

    def padded(self, text: str) -> str:
        space = " " * (self.width - cell_len(text))
        return space + text if self.column.number else text + space


def print_table(
    title: str,
    columns: Sequence[Column[T]],
    groups: Sequence[Group[T]],
    console: Console,
    *,
    style: Callable[[T], str] = lambda row: "",
    remark: Callable[[T], str] = lambda row: "",
    elsewhere: str = "",
) -> None:
    """Print a table.

    Args:
        title: title above the table.
        columns: from left to right.
        groups: groups of rows.
        console: the output. The table is as wide as the console, or `NARROWEST`.
        style: style of a row.
        remark: remark on a row, printed below it.
        elsewhere: where else columns that are left out can be seen, as in `or the CSV`.
    """
    width, rows = max(console.width, NARROWEST), [row for group in groups for row in group.rows]
    every = [_lay(column, rows) for column in columns]
    shown = _with_room(every, width)
    laid = _shorten(shown, width)

    def say(line: str, style: str = "") -> None:
        console.print(Text(line.rstrip(), style), soft_wrap=True, highlight=False)

    for line in wrap(title, width):
        say(line, "bold")
    height = max(len(each.title) for each in laid)
    for titles in zip(*([""] * (height - len(each.title)) + each.title for each in laid), strict=True):
        say(_line(laid, titles))
    say("─" * _width(laid))
    lines = zip(rows, zip(*(each.cells for each in laid), strict=True), strict=True)
    for group in groups:
        for line in wrap(group.heading, width, break_on_hyphens=False):
            say(line, "bold")
        for row, cells in islice(lines, len(group.rows)):
            say(_line(laid, cells), style(row))
            for line in wrap(remark(row), width - len(REMARK_INDENT), break_on_hyphens=False):
                say(REMARK_INDENT + line, "dim")
    if left_out := [each.column.title for each in every if each not in shown]:
        say(f"not shown: {', '.join(left_out)}: COLUMNS={_width(every)} shows them{elsewhere}")


def shortened(names: Iterable[str], width: int) -> dict[str, str]:
    """Names shortened to a width, with an ellipsis. They stay distinct."""
    names = list(dict.fromkeys(names))
    known = {name: name for name in names if cell_len(name) <= width}
    for number, name in enumerate(names):
        if name not in known:
            taken = set(known.values())
            known[name] = next(each for each in _shorter(name, width, number) if each not in taken)
    return known


def _shorter(name: str, width: int, number: int) -> Iterator[str]:
    """Ways to shorten a name: first half of it from either end, at last with a number."""
    for head in sorted(range(1, width - 1), key=lambda head: abs(2 * head - width)):
        if cell_len(short := f"{name[:head]}…{name[head + 1 - width :]}") <= width:
            yield short
    end = f"…{number}"
    for head in range(width - len(end), -1, -1):
        if cell_len(name[:head] + end) <= width:
            yield name[:head] + end


def _lay(column: Column[T], rows: Sequence[T]) -> _Laid:
    cells = [column.cell(row) for row in rows]
    widest = max(map(cell_len, (*cells, *column.title.split())), default=1)
    return _Laid(column, wrap(column.title, widest, break_on_hyphens=False), cells)


def _line(laid: Sequence[_Laid], cells: Iterable[str]) -> str:
    return INDENT + GAP.join(each.padded(cell) for each, cell in zip(laid, cells, strict=True))


def _width(laid: Sequence[_Laid]) -> int:
    return len(INDENT) + sum(each.width for each in laid) + len(GAP) * (len(laid) - 1)


def _with_room(every: Sequence[_Laid], width: int) -> list[_Laid]:
    shown = list(every)

    def excess() -> int:
        long = sum(max(each.width - READABLE, 0) for each in shown if not each.column.number)
        return _width(shown) - long - width

    while excess() > 0 and any(each.column.rank for each in shown):
        shown.remove(max(shown, key=lambda each: each.column.rank))
    return shown


def _shorten(laid: Sequence[_Laid], width: int) -> list[_Laid]:
    """Shorten the widest names until all have room."""
    laid = list(laid)
    while (excess := _width(laid) - width) > 0:
        names = [each for each in laid if not each.column.number]
        widest = max(names, key=lambda each: each.width)
        if widest.width <= SHORTEST:
            break
        short = shortened(widest.cells, max(widest.width - excess, SHORTEST))
        cells = [short[cell] for cell in widest.cells]
        laid[laid.index(widest)] = replace(widest, title=wrap(widest.column.title, SHORTEST), cells=cells)
    return laid
