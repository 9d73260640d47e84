"""Tables of generated widths and contents: no row is wrapped, no figure is cut, and omitted columns are named."""

import re
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from colt5_bench.compare import Comparison, Finding
from colt5_bench.records.results import Timing
from colt5_bench.report.comparison import show
from colt5_bench.report.table import summary
from colt5_bench.report.terminal import Column, Group, print_table, shortened
from colt5_bench.texts import NARROWEST, folded
from tests.colt5_bench.made import BOTH, FORWARD, diverging, record, timed

names = st.text("abcdefghij_漢", min_size=1, max_size=60)
figures = st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,4})?(±[0-9]{1,3}%)?", fullmatch=True)
widths = st.integers(NARROWEST, 200)


def printed(print_to, width):
    console = Console(file=StringIO(), width=width)
    print_to(console)
    return console.file.getvalue().splitlines()


def left_out(lines):
    """The columns that the table names as not shown, and the width that shows them."""
    said = [re.fullmatch(r"not shown: (.*): COLUMNS=(\d+) shows them.*", line) for line in lines]
    found = [each for each in said if each]
    assert len(found) <= 1
    return (found[0][1].split(", "), int(found[0][2])) if found else ([], None)


@st.composite
def tables(draw):
    count, rows = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    implementations = draw(st.lists(names, min_size=rows, max_size=rows, unique=True))
    cells = [[draw(figures) for _ in range(count)] for _ in range(rows)]
    ranks = [0, *draw(st.permutations(range(1, count)))]
    columns = [Column("name", lambda at: implementations[at], number=False)]
    columns += [
        Column(f"title {place} [ms]", lambda at, place=place: cells[at][place], rank)
        for place, rank in enumerate(ranks)
    ]
    return columns, implementations, cells, ranks


@settings(deadline=None)
@given(tables(), widths, st.text("abc =", max_size=120))
def test_a_table_is_as_wide_as_the_terminal(table, width, heading):
    columns, implementations, cells, ranks = table
    groups = [Group(heading, range(len(cells)))]
    lines = printed(lambda console: print_table("title", columns, groups, console), width)
    gone, needed = left_out(lines)
    body = [line for line in lines if not line.startswith("not shown")]
    assert max(map(cell_len, body)) <= width
    rows = [line.split() for line in lines[-len(cells) - bool(gone) :][: len(cells)]]
    shown = [place for place in range(len(ranks)) if f"title {place} [ms]" not in gone]
    # One line per row, with each figure of the shown columns, and names that stay distinct.
    assert [row[1:] for row in rows] == [[own[place] for place in shown] for own in cells]
    assert len({row[0] for row in rows}) == len(implementations)
    # The least important columns are omitted, and the named width has room for all.
    assert {ranks[place] for place in shown} == set(range(len(shown)))
    if gone:
        assert needed > width
        assert not left_out(printed(lambda console: print_table("title", columns, groups, console), needed))[0]


@given(st.lists(names, min_size=1, max_size=30), st.integers(8, 60))
def test_names_that_are_shortened_stay_distinct(several, width):
    short = shortened(several, width)
    assert len(set(short.values())) == len(set(several))
    assert all(cell_len(each) <= width for each in short.values())
    assert all(short[name] == name for name in several if cell_len(name) <= width)


def of_a_gpu(name, milliseconds, **fields):
    made = timed(name, milliseconds, "cold", **fields)
    for column in ("warm", "graph", "wall"):
        made.timings[column] = Timing(column, [milliseconds / 900] * 10, "confident", 0.0)
    return made


LONG = {f"field_{letter}": f"value_{letter}" for letter in "abcdefgh"}
RUNS = {
    "times of a GPU": [of_a_gpu(name, 0.1234 * n, n=n) for n in (1, 2) for name in ("reference", "ours")],
    "long labels": [timed(name, 2, n=n, **LONG) for n in (1, 2) for name in ("reference", "a_rather_long_name_of_it")],
    "errors": [diverging(name, 1e-5, std=std) for std in (1, 5) for name in ("reference", "ours")],
    "no times": [record("reference"), record("ours", status="out_of_memory", reason="tried")],
}
for made in RUNS["errors"]:
    made.metrics = {"routing_gradient": 0.125, "saturated_entries": 640.0}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("width", [*range(NARROWEST, 201, 8), 105, 148])
def test_the_table_of_a_run_fits(kind, width):
    lines = printed(lambda console: summary(RUNS[kind], "reference", console), width)
    rule = next(at for at, line in enumerate(lines) if line.startswith("──"))
    gone, _ = left_out(lines)
    end = next(at for at, line in enumerate(lines) if line.startswith(("not shown", "all with")))
    assert max(map(cell_len, lines[:end])) <= width
    rows = [line for line in lines[rule:end] if line.startswith("  ")]
    assert len(rows) == len(RUNS[kind])
    assert {len(row.split("  ")) > 1 for row in rows} == {True}
    if width >= 132:
        assert gone == []


FINDINGS = [
    Finding(
        verdict, "toy", "n=512", direction, name, metric, 1.2345e-3, 1.3456e-3, "s", interval, note=note, label=label
    )
    for verdict, interval in (("worse", (1.05, 1.2)), ("unclear", (0.9, 1.3)))
    for direction in (FORWARD, BOTH)
    for name in ("ours", "a_rather_long_name_of_it")
    for metric in ("cold", *(f"_a_kernel_with_a_long_name sm_90 {fact}" for fact in ("spilled_bytes", "registers")))
    for label, note in (("n=512", ""), (" ".join(map("=".join, LONG.items())), "compiled for " * 12))
]


@pytest.mark.parametrize("width", [*range(NARROWEST, 201, 8), 105, 148])
def test_the_table_of_a_comparison_fits(width):
    lines = printed(lambda console: show(Comparison(FINDINGS), console), width)
    end = next(at for at, line in enumerate(lines) if line.startswith(("not shown", "note", "against")))
    assert max(map(cell_len, lines[:end])) <= width
    rows = [line for line in lines[:end] if re.match(r"  (worse|unclear)", line)]
    assert len(rows) == len(FINDINGS)
    gone, _ = left_out(lines)
    for title, figure in (("baseline", "1.23 ms"), ("now", "1.35 ms")):
        assert all((figure in row) is (title not in gone) for row in rows)
    if width >= 80:
        assert gone == []
    # No text shows an insignificant change as a change.
    assert all("+9.0 %" not in row for row in rows if "unclear" in row)
    assert "change" in gone or all("-10.0 to +30.0 %" in row for row in rows if "unclear" in row)


@given(st.lists(names, max_size=30), widths)
def test_prose_is_as_wide_as_the_terminal(words, width):
    line = " ".join(["suite:", *words])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        text = folded(line)
    assert " ".join(text.split()) == line
    for each in text.splitlines():
        assert len(each) <= width or len(each.split()) == 1
