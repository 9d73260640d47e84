"""A planted slowdown: it is real, has the requested share, and affects one implementation, only in a copy."""

import os
import shutil
import subprocess
from pathlib import Path
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench.case import DIRECTIONS, FORWARD
from colt5_bench.commands._trials import PLANT
from colt5_bench.compare.revisions import Alternating, MeasuringError, revision, with_appended
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.spin import Spin
from colt5_bench.measuring.timing import time_interleaved
from colt5_bench.records.results import load
from colt5_bench.selftest import planted
from colt5_bench.selftest.planted import slowed
from tests.attempts import typical
from tests.colt5_bench import toy

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SHARES = st.floats(0.01, 10)

TIMED = """

from colt5_bench.measuring.spin import Spin


def ours(scores):
    Spin(2e-4, scores.device)()
    return 2 * scores


SUITE = suite(ours)
"""
"""An implementation that takes 0.2 ms."""


def ours(scores):
    return 2 * scores


@given(share=SHARES, seconds=st.floats(1e-7, 1), direction=st.sampled_from(DIRECTIONS))
def test_the_spin_is_the_share_of_a_call(share, seconds, direction):
    asked = []

    def call_seconds(call, device):
        asked.append(set(call.results()))
        return seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "call_seconds", call_seconds)
        patch.setattr(planted.Spin, "__call__", lambda spin: None)
        suite, case = slowed(toy.suite(ours), "ours", share), toy.ToyCase(2, 8)
        function = suite.implementations["ours"].build(case)
        call = Call(function, suite.problem(case, CPU), direction)
        for _ in range(3):
            call()
    assert function._spin._seconds == share * seconds
    # Measured once, with the backward pass if it belongs to the call.
    assert asked == [{"output"} if direction == FORWARD else {"output", "scores"}]


@given(share=SHARES, direction=st.sampled_from(DIRECTIONS))
def test_values_and_other_implementations_stay(share, direction):
    suite, case = toy.suite(ours), toy.ToyCase(2, 8)
    slower = slowed(suite, "ours", share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planted, "call_seconds", lambda call, device: 0.0)
        results = [
            Call(each.implementations["ours"].build(case), suite.problem(case, CPU), direction).results()
            for each in (suite, slower)
        ]
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(before, results[1][name]) for name, before in results[0].items())
    assert slower.implementations["reference"] is suite.implementations["reference"]


@pytest.mark.parametrize("share", [0.1, 0.5, 2.0])
def test_a_call_takes_longer_by_the_share(share):
    def ours(scores):
        Spin(2e-4, CPU)()
        return 2 * scores

    def measured():
        suite, case = toy.suite(ours), toy.ToyCase(2, 8)
        calls = {
            name: Call(each.implementations["ours"].build(case), suite.problem(case, CPU), FORWARD)
            for name, each in (("before", suite), ("after", slowed(suite, "ours", share)))
        }
        timings = time_interleaved(calls, device=CPU, columns=("wall",))
        before, after = (median(timings[name]["wall"].samples) for name in ("before", "after"))
        return after / before - 1

    expected = pytest.approx(share, abs=0.05, rel=0.3)
    assert typical(measured, lambda seen: seen == expected) == expected


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of the harness and the toy suite."""
    root = tmp_path / "checkout"
    for package in ("reference", "kernels", "suites"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").touch()
    (root / "suites" / "toy.py").write_text(Path(toy.__file__).read_text() + TIMED)
    # A copy of the harness, because a comparison refuses another one.
    shutil.copytree(ROOT / "colt5_bench", root / "colt5_bench", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "bench.py", root)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    for arguments in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=me", "-c", "user.email=me@example.org", "commit", "--quiet", "-m", "one"),
    ):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)
    return root


def git(root, *arguments):
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("text", ["# more\n", "no newline", "\n\n\n", "ä ∑\n"])
def test_a_copy_has_the_text_and_nothing_else_changes(repository, text):
    before = revision(repository, "HEAD")
    (repository / "suites" / "toy.py").write_text("what is not committed")
    (repository / "untracked").touch()
    seen = [git(repository, *arguments) for arguments in (("status", "--porcelain"), ("for-each-ref",))]
    after = with_appended(repository, before, {"suites/toy.py": text})
    assert (
        git(repository, "show", f"{after}:suites/toy.py") == git(repository, "show", f"{before}:suites/toy.py") + text
    )
    assert git(repository, "diff", "--name-only", before, after).split() == ["suites/toy.py"]
    assert seen == [git(repository, *arguments) for arguments in (("status", "--porcelain"), ("for-each-ref",))]
    assert revision(repository, "HEAD") == before


def test_a_file_that_is_not_there_is_told_of(repository):
    with pytest.raises(MeasuringError, match=r"cannot change a copy of HEAD: .*none\.py"):
        with_appended(repository, "HEAD", {"suites/none.py": ""})


@pytest.mark.slow
def test_a_copy_is_measured_to_be_slower(repository, tmp_path):
    commit = revision(repository, "HEAD")
    after = with_appended(repository, commit, {"suites/toy.py": PLANT.format(name="ours", share=0.5)})
    selection = ("--preset", "smoke", "--device", "cpu")

    def ratio():
        """The ratio of the direction in which it is further from the expected one."""
        alternating.measure(["toy"], "")
        before, slower = (
            {
                made.direction: made.seconds("wall")
                for made in load(place / f"round-{alternating.turns}").records
                if made.implementation == "ours"
            }
            for place in alternating.places
        )
        return max((slower[each] / before[each] for each in DIRECTIONS), key=lambda seen: abs(seen - 1.5))

    expected = pytest.approx(1.5, rel=0.2)
    with Alternating(repository, (commit, after), selection, tmp_path / "out") as alternating:
        assert typical(ratio, lambda seen: seen == expected) == expected
    # A turn makes no plots and no page.
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"toy.jsonl"}


@pytest.mark.gpu
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_call_on_a_gpu_takes_longer_by_the_share_in_each_column(share):
    device = torch.device("cuda")

    def ours(scores):
        Spin(1e-3, device)()
        return 2 * scores

    suite, case = toy.suite(ours), toy.ToyCase(2, 8)
    calls = {
        name: Call(each.implementations["ours"].build(case), suite.problem(case, device), FORWARD)
        for name, each in (("before", suite), ("after", slowed(suite, "ours", share)))
    }
    timings = time_interleaved(calls, device=device, columns=("cold", "warm", "graph"))
    for column in ("cold", "warm", "graph"):
        before, after = (median(timings[name][column].samples) for name in ("before", "after"))
        assert after / before - 1 == pytest.approx(share, abs=0.03)
