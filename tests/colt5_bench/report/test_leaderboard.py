"""Ranks of implementations: the first, ties, and the run of each."""

import random
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_bench import cli, commands
from colt5_bench.records.results import Run, Timing, write
from colt5_bench.report.leaderboard import BEHIND, BESIDE, FIRST, TIED, rank, write_leaderboard
from tests.colt5_bench.made import BOTH, FORWARD, record, timed


def noisy(name, level, noise, seed, **fields):
    """Thirty samples around a level in ms; `noise` is relative."""
    chance = random.Random(f"{name} {seed}")
    made = timed(name, level, **fields)
    made.timings["wall"] = Timing("wall", [level / 1e3 * chance.gauss(1, noise) for _ in range(30)], "confident", noise)
    return made


def places(records):
    ((entries),) = rank(records, "wall").values()
    return {entry.implementation: entry.place for entry in entries}


@given(st.permutations([1.0, 1.2, 3.0]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_fastest_for_certain_is_first(levels, seed):
    records = [noisy(name, level, 0.01, seed) for name, level in zip("abc", levels, strict=True)]
    (entries,) = rank(records, "wall").values()
    assert [entry.implementation for entry in entries] == [name for _, name in sorted(zip(levels, "abc", strict=True))]
    assert [entry.place for entry in entries] == [FIRST, BEHIND, BEHIND]
    assert entries[0].behind == ""
    assert entries[1].behind.startswith("1.")


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_what_cannot_be_told_apart_is_tied(seed):
    """Samples of one series in two orders, with the same median, next to a slower one."""
    first, slow = noisy("a", 1.0, 0.2, seed), noisy("c", 4.0, 0.2, seed)
    samples = first.timings["wall"].samples
    second = noisy("b", 1.0, 0.2, seed)
    second.timings["wall"].samples = samples[::-1]
    assert places([slow, second, first]) == {"a": TIED, "b": TIED, "c": BEHIND}


def test_other_work_has_no_place_and_what_failed_is_named():
    bound = noisy("bound", 0.1, 0.01, 0)
    bound.minimum_bytes = None
    failed = record("broken", status="out_of_memory", reason="too large")
    skipped = record("absent", status="skipped", reason="not installed")
    found = places([failed, skipped, bound, noisy("a", 1, 0.01, 0), noisy("b", 2, 0.01, 0)])
    assert found == {"bound": BESIDE, "a": FIRST, "b": BEHIND, "broken": "out of memory"}


def run_of(key, day, device="Toy GPU", threads=None, **levels):
    made = [replace(noisy(name, level, 0.01, key), environment=key, device=device) for name, level in levels.items()]
    gpu = {"gpu": {"name": device}} if threads is None else {"threads": threads}
    return Run(key, {key: {"key": key, "utc": f"2026-11-{day}T10:00", "torch": "2.13", **gpu}}, made)


class Table(HTMLParser):
    """Texts of the cells of the last table of a page."""

    def __init__(self, page):
        super().__init__()
        self.rows = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()


def board(tmp_path, *runs):
    page = write_leaderboard(tmp_path / "page.html", runs, {}).read_text()
    return Table(page[: page.rindex("</table>")]).rows


def test_machines_stand_beside_each_other(tmp_path):
    head, row = board(tmp_path, run_of("a", 20, ours=1, other=2), run_of("b", 20, "Toy CPU", 1, ours=4, other=3))
    assert head[2:] == ["Toy GPU, wall [ms]", "Toy CPU, 1 thread, wall [ms]"]
    assert row[2].startswith("ours 1")
    assert row[3].startswith("other")
    assert [cell.count("first") for cell in row[2:]] == [1, 1]


@pytest.mark.parametrize("order", [1, -1])
def test_the_newest_run_of_a_machine_counts_and_runs_are_not_mixed(tmp_path, order):
    """`old` is only in the old run, where it is the fastest by far."""
    runs = [run_of("a", 20, ours=1, old=0.1), run_of("b", 21, ours=2, other=3)]
    _, row = board(tmp_path, *runs[::order])
    assert "old" not in row[2]
    assert row[2].startswith("ours")
    assert "other" in row[2]
    # A newer run without times does not hide them.
    empty = run_of("c", 22, ours=1, other=1)
    for each in empty.records:
        each.timings, each.status = {}, "skipped"
    assert board(tmp_path, *runs[::order], empty)[1] == row


def test_suites_without_times_have_no_board(tmp_path):
    one = run_of("a", 20, ours=1)
    untimed = [replace(record("ours", direction), suite="health", environment="a") for direction in (FORWARD, BOTH)]
    one.records += untimed
    page = write_leaderboard(tmp_path / "page.html", [one], {}).read_text()
    assert "suite-toy" in page
    assert "suite-health" not in page


def test_several_runs_make_one_and_a_table(tmp_path, monkeypatch, capsys):
    paths = []
    for run in (run_of("a", 20, ours=1), run_of("b", 20, "Toy CPU", 2, ours=3)):
        write(tmp_path / f"{run.path}.jsonl", run.environments.values(), run.records)
        paths.append(str(tmp_path / f"{run.path}.jsonl"))
    outs = [str(tmp_path / name) for name in ("all.html", "all.csv")]
    assert cli.main(["report", *paths, "--out", outs[0], "--out", outs[1]]) == commands.DONE
    assert capsys.readouterr().out.split() == outs
    assert (tmp_path / "all.csv").read_text().count("\n") == 3
    assert "Toy CPU, 2 threads" in (tmp_path / "all.html").read_text()
    for option in (["--plots", str(tmp_path)], ["--baseline", paths[0]]):
        assert cli.main(["report", *paths, *option]) == commands.USAGE
        assert "need exactly one run, got 2" in capsys.readouterr().err
