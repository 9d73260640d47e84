"""Comparisons on the command line: exit statuses, revisions, baselines, and checked runs."""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench import cli
from colt5_bench.case import DIRECTIONS
from colt5_bench.commands import DONE, FAILURE, INTERRUPTED, UNDECIDED, UNMEASURED, USAGE
from colt5_bench.commands._check import REPEATED_SHARE, Check, checked
from colt5_bench.commands._comparison import expression
from colt5_bench.compare.revisions import MOST_TURNS, TURNS
from colt5_bench.records import environment
from colt5_bench.records.results import load, write
from colt5_bench.records.samples import runs_that_confirm
from colt5_bench.request import CEILINGS
from colt5_bench.selection import SelectionError, case_filter
from tests.colt5_bench import toy
from tests.colt5_bench.compare.test_compare import ENVIRONMENT, THRESHOLDS, ours, reference
from tests.colt5_bench.made import record

ROOT = Path(__file__).parents[3]

ON_A_CLOCK = """

import colt5_bench.measuring.rounds


class Clock:
    seconds, calls = 0.0, 0

    def __call__(self):
        return self.seconds

    def take(self, milliseconds):
        self.calls += 1
        self.seconds += 1e-3 * milliseconds * (1 + 0.002 * (self.calls % 7 - 3))


def slowed(scores):
    clock.take(float(os.environ["MILLISECONDS"]))
    return 2 * scores


clock = colt5_bench.measuring.rounds.perf_counter = Clock()
SUITE = suite(slowed)
"""
"""Makes the toy suite use its own clock, on which one implementation takes a known time."""

OF_OURS = replace(
    toy.SUITE,
    cases=lambda preset, device: [argparse.Namespace(id=ours().case)],
    implementations=dict.fromkeys(("reference", "ours"), toy.SUITE.implementations["reference"]),
)
"""A suite with exactly the records of `ours()` and `reference()`."""

FAKE_BENCH = """
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path


def vary(path, factor):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["options"] = {{"suite": suite.stem}}
    if suite.suffix:
        lines[0]["suite_file"] = hashlib.sha256(suite.read_bytes()).hexdigest()
    lines[0]["git"] = {{"revision": subprocess.check_output(["git", "rev-parse", "{head}"], text=True).strip()}}
    for line in lines:
        line["key" if "key" in line else "environment"] = str(path)
        for timing in line.get("timings", {{}}).values():
            timing["samples"] = [factor * sample for sample in timing["samples"]]
    path.write_text("".join(json.dumps(line) + chr(10) for line in lines))


suite = Path(sys.argv[1].removeprefix("--suite="))
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
here = Path(__file__).parent
(out / "toy.jsonl").write_text((here / "results.jsonl").read_text())
vary(out / "toy.jsonl", random.Random("/".join(out.parts[-3:])).gauss(1, {noise}))
with Path("{log}").open("a") as log:
    print(here.name, *sys.argv[1:], file=log)
{after}
sys.exit({status})
"""
"""A bench.py that reads its results from a file next to it. It shifts them by another offset each time, and logs its
run."""


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def saved(tmp_path):
    """A results file with the given records."""

    def saved(name, *records, **more):
        described = {**ENVIRONMENT, **more}
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, [described], [replace(made, environment=described["key"]) for made in records])
        return path

    return saved


def compare(*arguments):
    return cli.main(["compare", *map(str, arguments)])


class TestSavedRuns:
    def test_the_exit_status_is_what_was_found(self, here, saved, capsys):
        before, same = saved("a.jsonl", reference(), ours(1.0)), saved("b.jsonl", reference(), ours(1.0))
        slower = saved("c.jsonl", reference(), ours(1.1))
        assert compare(before, same) == DONE
        assert compare(before, slower) == FAILURE
        assert compare(slower, before) == DONE
        assert "1 worse" in capsys.readouterr().out
        assert compare(before, saved("e.jsonl", reference(), ours(1.04))) == UNDECIDED
        assert "1 time may have become worse" in capsys.readouterr().out
        # No figure of a GPU can be compared with a measurement on a CPU.
        assert compare(before, saved("d.jsonl", ours(column="wall"), gpu=None)) == UNMEASURED

    def test_only_what_is_selected_counts(self, here, saved):
        before, after = saved("a.jsonl", reference(), ours(1.0)), saved("b.jsonl", reference(), ours(1.1))
        assert compare(before, after, "--impl", "reference") == DONE
        assert compare(before, after, "--suite", "toy", "-k", "n=512") == FAILURE
        assert compare(before, after, "-k", "n=513") == UNMEASURED

    @pytest.mark.parametrize("form", ["json", "markdown", "junit"])
    def test_formats(self, here, saved, capsys, form):
        assert compare(saved("a.jsonl", ours(1.0)), saved("b.jsonl", ours(1.1)), "--format", form) == FAILURE
        printed = capsys.readouterr().out
        start = {"json": "{", "markdown": "### 1 regression against", "junit": "<?xml"}[form]
        assert printed.startswith(start)

    def test_a_changed_schema_is_told_of(self, here, saved, capsys):
        before, after = saved("a.jsonl", ours()), saved("b.jsonl", ours())
        before.write_text(before.read_text().replace('"schema": 2', '"schema": 1'))
        assert compare(before, after) == USAGE
        assert "schema must be 2 for this version, got 1" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("{run}", "HEAD"), "is a saved run, but HEAD is not"),
            (
                ("no-such-run", "HEAD"),
                "no-such-run is neither a results file, nor a directory",
            ),
            (("HEAD", "HEAD"), "name at least one suite with --suite"),
            (("HEAD", "HEAD", "--suite", "topc"), "no suite 'topc'"),
            (("HEAD", "HEAD", "--suite", "topk", "--rounds", "0"), "--rounds must be at least 1, got 0"),
            (("{run}", "{run}", "--thresholds", "none.toml"), "cannot read the thresholds none.toml"),
        ],
    )
    def test_what_cannot_be_compared_is_a_usage_error(self, here, saved, capsys, arguments, message):
        run = str(saved("a.jsonl", ours()))
        assert compare(*(argument.format(run=run) for argument in arguments)) == USAGE
        assert message in capsys.readouterr().err

    def test_the_page_of_a_run_has_them_on_top(self, here, saved, tmp_path):
        """Findings on the suites of the run, and on no others."""
        before = saved("a.jsonl", reference(), ours(1.0), replace(ours(), suite="other"))
        page = tmp_path / "page.html"
        run = saved("b.jsonl", reference(), ours(1.1))
        assert cli.main(["report", str(run), "--baseline", str(before), "--out", str(page)]) == DONE
        assert "1 worse, 11 same" in page.read_text()


class TestRevisions:
    @pytest.fixture
    def repository(self, tmp_path, here, saved, monkeypatch):
        """A checkout with two revisions, `before` and `after`, and the list of started runs."""
        root, log = tmp_path / "checkout", tmp_path / "log"
        for package in ("reference", "kernels", "suites"):
            (root / package).mkdir(parents=True)
            (root / package / "__init__.py").touch()
        (root / "suites" / "thresholds.toml").write_text((ROOT / "suites" / "thresholds.toml").read_text())

        def git(*arguments):
            command = ["git", "-c", "user.name=me", "-c", "user.email=me@example.org", "-C", str(root), *arguments]
            subprocess.run(command, check=True, capture_output=True)

        git("init", "--initial-branch=main")
        monkeypatch.chdir(root)
        # In this process the packages are those of the real checkout.
        for name in ("check", "load_suites"):
            monkeypatch.setattr(f"colt5_bench.commands.compare.{name}", lambda *places: {"toy": toy.SUITE})

        def commit(tag, *records, status=0, noise=0.001, head="HEAD", after="", **more):
            text = FAKE_BENCH.format(log=log, status=status, noise=noise, head=head, after=after)
            (root / "bench.py").write_text(text)
            (root / "results.jsonl").write_text(saved(f"{tag}.jsonl", *records, **more).read_text())
            git("add", ".")
            git("commit", "--message", tag)
            git("tag", tag)

        def started():
            return log.read_text().splitlines()

        return commit, started

    def test_are_measured_in_turns(self, repository, tmp_path):
        commit, started = repository
        commit("before", ours(1.0))
        commit("after", ours(1.1), status=1)
        out = tmp_path / "out"
        arguments = ("before", "after", "--suite", "toy", "--out", out)
        assert compare(*arguments, "--rounds", "4", "--preset", "smoke") == FAILURE
        sides = [line.split()[0] for line in started()]
        # More turns than requested: a slowdown is confirmed by as many turns as one time needs.
        turns = runs_that_confirm(1)
        assert sides == ["a", "b", "b", "a"] * (turns // 2)
        assert all("--suite=toy" in line and "--preset smoke" in line for line in started())
        assert {len(load(out / side).records) for side in "ab"} == {turns}
        worktrees = subprocess.run(["git", "worktree", "list"], check=True, capture_output=True, text=True).stdout
        assert len(worktrees.splitlines()) == 1
        # Existing results are not mixed with others.
        assert compare(*arguments) == USAGE

    def test_the_first_turn_of_each_measures_what_the_device_can_do(self, repository, tmp_path):
        commit, _ = repository
        file, before, after = tmp_path / "told", {"copy_bandwidth": 1.0}, {"copy_bandwidth": 2.0}
        told = f"import os; print(os.environ[{CEILINGS!r}], file=Path({str(file)!r}).open('a'))"
        commit("before", ours(1.0), ceilings=before, after=told)
        commit("after", ours(0.8), ceilings=after, after=told)
        compare("before", "after", "--suite", "toy", "--out", tmp_path / "out", "--rounds", "3")
        assert file.read_text().splitlines() == ["", "", *map(json.dumps, (after, before, before, after))]

    def test_what_is_settled_is_measured_no_more(self, repository, tmp_path):
        commit, started = repository
        commit("before", ours(1.0))
        commit("after", ours(0.8))
        assert compare("before", "after", "--suite", "toy", "--out", tmp_path / "out") == DONE
        assert len(started()) == 2 * TURNS

    @pytest.mark.parametrize("outside", [False, True])
    def test_a_guest_is_the_file_of_each_revision_or_one_from_elsewhere(self, repository, tmp_path, outside):
        commit, started = repository
        place = tmp_path if outside else Path()
        (place / "mine.py").write_text("def twice(scores):\n    return 2 * scores\n")
        commit("before", ours(1.0))
        commit("after", ours(1.001))
        guest = f"mine={place}/mine.py:twice"
        compare("before", "after", "--suite", "toy", "--impl", guest, "--out", tmp_path / "out")
        seen = f"{tmp_path}/mine.py" if outside else "mine.py"
        assert all(f"--impl=mine={seen}:twice" in line for line in started())

    @pytest.mark.parametrize("outside", [False, True])
    def test_a_suite_of_ones_own_is_one_file_for_both(self, repository, tmp_path, outside):
        commit, started = repository
        file = (tmp_path if outside else Path()) / "toy.py"
        file.touch()
        commit("before", ours(1.0))
        file.write_text("# Another, in the checkout of another revision.")
        commit("after", ours(1.1))
        assert compare("before", "after", "--suite", file, "--out", tmp_path / "out") == FAILURE
        # As many additional turns as confirm the slowdown.
        assert len(started()) > 2 * TURNS
        assert all(f"--suite={file.absolute()} " in line for line in started())

    def test_a_suite_that_changes_meanwhile_is_none(self, repository, tmp_path, capsys):
        commit, _ = repository
        (tmp_path / "toy.py").touch()
        commit("before", ours(1.0), after="suite.write_text('# Now another.')")
        commit("after", ours(1.0))
        arguments = ("--suite", tmp_path / "toy.py", "--out", tmp_path / "out")
        assert compare("before", "after", *arguments) == UNMEASURED
        assert "the file of suite toy changed between two turns" in capsys.readouterr().err

    @pytest.mark.parametrize("command", [("compare", "before", "before"), ("selftest", "--comparisons", "1")])
    def test_a_suite_of_a_checkout_is_that_of_each_revision(self, repository, tmp_path, capsys, monkeypatch, command):
        commit, _ = repository
        commit("before", ours(1.0))
        for name in ("check", "load_suites"):
            monkeypatch.setattr(f"colt5_bench.commands.selftest.{name}", lambda *places: {"toy": toy.SUITE})
        file = tmp_path / "suites" / "toy.py"
        assert cli.main([*command, "--suite", str(file), "--out", str(tmp_path / "out")]) == USAGE
        assert f"{file}: a file in a folder suites/ belongs to one checkout" in capsys.readouterr().err

    def test_saved_runs_have_no_guests(self, saved, capsys):
        run = saved("run.jsonl", ours(1.0))
        assert compare(run, run, "--impl", "mine=mine.py:twice") == USAGE
        assert "saved runs are not measured" in capsys.readouterr().err

    def test_what_is_unclear_is_measured_more_often(self, repository, tmp_path, capsys):
        """Until it is clear, or until the limit: a tenth slower on a machine whose runs differ by 3 and by 30 %."""
        commit, started = repository
        commit("before", ours(1.0), noise=0.03)
        commit("after", ours(1.1), noise=0.03)
        commit("noisy", ours(1.1), noise=0.3)
        assert compare("before", "after", "--suite", "toy", "--out", tmp_path / "out") == FAILURE
        assert 2 * TURNS < len(started()) <= 2 * MOST_TURNS
        assert f"still unclear after {TURNS} rounds: ours cold forward +" in capsys.readouterr().err
        assert "-k (rows=8 n=512 eps=0.1)" in started()[-1]
        count = len(started())
        # The limit holds whatever number of rounds it is no multiple of.
        for rounds in ("3", "4"):
            noisy = ("noisy", "noisy", "--suite", "toy", "--rounds", rounds, "--out", tmp_path / rounds)
            assert compare(*noisy) == UNDECIDED
            assert len(started()) - count == 2 * MOST_TURNS
            count = len(started())

    def test_one_that_cannot_be_measured_is_said(self, repository, tmp_path, capsys):
        commit, _ = repository
        commit("before", ours(1.0))
        commit("after", ours(1.0), status=2)
        assert compare("before", "after", "--suite", "toy", "--out", tmp_path / "out") == UNMEASURED
        assert "ended with status 2" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "more",
        [
            {"head": "HEAD~"},
            {"harness": {"revision": "abc", "dirty": False}},
            {"harness": {"unknown": "it is in no git repository"}},
        ],
        ids=str,
    )
    def test_results_of_other_code_are_not_taken_for_those_of_a_revision(self, repository, tmp_path, capsys, more):
        commit, started = repository
        commit("before", ours(1.0))
        commit("after", ours(1.0), **more)
        assert compare("before", "after", "--suite", "toy", "--out", tmp_path / "out") == UNMEASURED
        assert "was measured with other code than" in capsys.readouterr().err
        assert len(started()) == 2


class TestBaseline:
    @pytest.fixture
    def baseline(self, here, tmp_path):
        file = tmp_path / "baselines" / "toy.jsonl"
        return lambda run: (cli.main(["baseline", str(run), str(file)]), file)

    def test_is_made_and_updated_and_says_what_changes(self, baseline, saved, capsys):
        status, file = baseline(saved("first.jsonl", reference(), ours(1.0)))
        assert status == DONE
        assert len(load(file).records) == 2
        other = replace(ours(), suite="other")
        assert baseline(saved("second.jsonl", other, key="b"))[0] == DONE
        capsys.readouterr()
        assert baseline(saved("third.jsonl", ours(1.1), key="c"))[0] == DONE
        printed = capsys.readouterr().out
        assert "1 missing, 1 worse" in printed
        assert "kept: 1 records of other" in printed
        kept = load(file)
        assert [(made.suite, made.implementation) for made in kept.records] == [("other", "ours"), ("toy", "ours")]
        assert set(kept.environments) == {"b", "c"}

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            ({"git": {"revision": "abc", "dirty": True}}, "uncommitted changes to abc"),
            ({"git": {"revision": "abc", "dirty": "0123"}}, "uncommitted changes to abc"),
            ({"git": None}, "is unknown: it is not recorded. Measure in a clone"),
            ({"git": {"unknown": "it has no owner"}}, "is unknown: it has no owner."),
            ({"harness": {"revision": "abc", "dirty": False}}, "by the harness of another checkout"),
            ({"options": {"suite": "toy"}, "expected": 3}, "lacks 2 of 3 records of suite toy"),
        ],
    )
    def test_refuses_what_cannot_be_measured_again(self, baseline, saved, capsys, more, message):
        status, file = baseline(saved("run.jsonl", ours(), **more))
        assert status == USAGE
        assert not file.exists()
        assert message in capsys.readouterr().err

    def test_refuses_what_is_not_one_whole_run(self, baseline, saved, capsys):
        run = saved("run.jsonl", ours(), ours())
        assert baseline(run)[0] == USAGE
        assert "contains records of one run twice" in capsys.readouterr().err
        saved("runs/one.jsonl", reference(), ours())
        assert baseline(saved("runs/two.jsonl", ours(1.001), key="b").parent)[0] == USAGE
        assert "contains 1 records of toy" in capsys.readouterr().err
        run.write_text(run.read_text()[:-20])
        assert baseline(run)[0] == USAGE
        assert "is cut off" in capsys.readouterr().err
        assert baseline(saved("none.jsonl"))[0] == USAGE
        assert "contains no records" in capsys.readouterr().err

    def test_of_several_runs_it_knows_how_far_they_are_apart(self, baseline, saved, capsys):
        """A time of 1.0 ms may differ by 4 % if runs differ by 3 %, but not if three are alike."""
        for number in range(3):
            saved(f"runs/{number}.jsonl", reference(4 + 0.001 * number), ours(1 + 0.001 * number), key=str(number))
        status, file = baseline(saved("runs/3.jsonl", reference(), ours(1.0001), key="b").parent)
        assert status == DONE
        assert len(load(file).records) == 8
        assert compare(file, saved("runs/3.jsonl", reference(), ours(1.0001)).parent) == DONE

    @pytest.mark.parametrize(
        ("field", "sample"),
        [
            (field, sample)
            for field, zero in (("samples", ["0", "0.0", "null"]), ("peak_bytes", []), ("saved_bytes", []))
            for sample in ("NaN", "-1", "Infinity", "-Infinity", '"1"', "true", "[]", *zero)
        ],
    )
    def test_what_cannot_have_been_measured_is_named_with_file_and_line(self, here, saved, capsys, field, sample):
        """In every command that reads a baseline."""
        run = saved("run.jsonl", reference(), ours(peak_bytes=1234, saved_bytes=1234))
        told = run.read_text().splitlines()
        value = '"samples": [0.000' if field == "samples" else f'"{field}": 1234'
        wrong = f'"samples": [{sample}, 0.000' if field == "samples" else f'"{field}": {sample}'
        broken = run.with_name("broken.jsonl")
        broken.write_text("\n".join([*told[:-1], told[-1].replace(value, wrong)]) + "\n")
        assert broken.read_text() != run.read_text()
        page = run.with_name("page.html")
        for arguments in (
            ["compare", broken, run],
            ["report", run, "--baseline", broken, "--out", page],
            ["baseline", broken, run.with_name("new.jsonl")],
        ):
            assert cli.main(list(map(str, arguments))) == USAGE, arguments
            assert f"{broken}:{len(told)}: " in capsys.readouterr().err

    @pytest.mark.parametrize("stopped", ["confident", "max_samples", "max_seconds", ""])
    def test_a_time_without_samples_needs_a_reason(self, here, saved, capsys, stopped):
        empty = ours()
        empty.timings["cold"].samples, empty.timings["cold"].stopped = [], stopped
        run = saved("run.jsonl", ours())
        assert compare(saved("empty.jsonl", empty), run) == USAGE
        assert "empty.jsonl:2: the cold time has no samples" in capsys.readouterr().err
        empty.timings["cold"].stopped = "not capturable: synchronises"
        assert compare(saved("empty.jsonl", empty), run) == DONE

    def test_of_another_gpu_it_is_another_file(self, baseline, saved, capsys):
        assert baseline(saved("one.jsonl", ours()))[0] == DONE
        assert baseline(saved("other.jsonl", replace(ours(), device="Another GPU")))[0] == USAGE
        assert "was measured on Toy GPU, but" in capsys.readouterr().err

    def test_processors_share_a_file(self, baseline, saved):
        assert baseline(saved("one.jsonl", ours(), gpu=None))[0] == DONE
        assert baseline(saved("other.jsonl", replace(ours(), device="Another CPU"), gpu=None))[0] == DONE


class TestCheck:
    @pytest.fixture
    def check(self, here, saved, tmp_path):
        """The exit status of a run with these records; more are measured if `more` says so."""
        baseline = saved("baseline.jsonl", reference(), ours(1.0))

        def check(*records, status=DONE, more=None, **selected):
            options = {"suite": ["toy"], "impl": [], "cases": "", "shard": "1/1", "any_machine": False, "check": True}
            options |= {"preset": "smoke"}
            options |= {"baseline": baseline, "thresholds": ROOT / "suites" / "thresholds.toml", **selected}
            made = Check.of(argparse.Namespace(**options), {"toy": OF_OURS}, torch.device("cuda"))
            directory = tmp_path / "run"
            if records:
                saved("run/toy.jsonl", *records)
            return made.conclude(status, {"toy": directory}, {"toy": toy.SUITE}, more or nothing)

        def nothing(*_):
            return DONE

        return check

    def test_is_the_exit_status(self, check, capsys):
        assert check(reference(), ours(1.0)) == DONE
        assert check(reference(), ours(1.1)) == FAILURE
        assert check(reference(), ours(1.1), check=False) == DONE

    def test_wrong_values_fail(self, check):
        assert check(reference(), record(status="wrong", reason="off by 3"), status=FAILURE) == FAILURE

    def test_what_failed_in_the_baseline_may_fail(self, check, saved):
        known = saved("known.jsonl", reference(), record(status="wrong"))
        assert check(reference(), record(status="wrong"), status=FAILURE, baseline=known) == DONE

    def test_a_run_that_broke_is_not_measured(self, check):
        assert check(reference(), ours(1.0), status=UNMEASURED) == UNMEASURED
        assert check(status=UNMEASURED) == UNMEASURED

    def test_without_results_everything_is_missing(self, check):
        assert check() == FAILURE

    def test_what_was_not_asked_for_is_not_missing(self, check):
        assert check(reference(), impl=["reference"]) == DONE
        assert check(reference()) == FAILURE

    def test_the_page_has_the_findings(self, check, tmp_path):
        check(reference(), ours(1.1))
        assert "Against the baseline" in (tmp_path / "run" / "report.html").read_text()

    def test_unclear_cases_are_measured_again(self, check, saved, capsys):
        asked = []

        def more(suite, points, directory):
            asked.append((suite.name, points, directory.name))
            saved(f"run/{directory.name}/toy.jsonl", ours(1.04 - 0.001 * len(asked)), key=directory.name)
            return DONE

        assert check(reference(), ours(1.04), more=more) == UNDECIDED
        points = [("rows=8 n=512 eps=0.1", ours().direction)]
        assert asked == [("toy", points, f"again-{number}") for number in (1, 2)]
        assert "measuring again what is unclear or seems to be worse: 1 point (1 of 2)" in capsys.readouterr().out

    @pytest.mark.parametrize(("checked", "times"), [(True, 0), (False, 2)])
    def test_what_can_only_be_better_is_not_measured_again_to_check(self, check, saved, checked, times):
        asked = []

        def more(suite, points, directory):
            asked.append(points)
            saved(f"run/{directory.name}/toy.jsonl", ours(0.96 - 0.001 * len(asked)), key=directory.name)
            return DONE

        assert check(reference(), ours(0.96), more=more, check=checked) == DONE
        assert len(asked) == times

    @pytest.mark.parametrize(("again", "status", "times"), [(1.2, FAILURE, 1), (1.0, UNDECIDED, 1)])
    def test_what_seems_to_be_worse_is_confirmed(self, check, saved, again, status, times):
        asked = []

        def more(suite, cases, directory):
            asked.append(cases)
            saved(f"run/{directory.name}/toy.jsonl", ours(again + 0.001 * len(asked)), key=directory.name)
            return DONE

        assert check(reference(), ours(1.201), more=more) == status
        assert len(asked) == times

    def test_a_share_of_many_unclear_points_is_measured_again(self, check, saved):
        """All points that seem to be worse are measured again."""
        asked, names = [], [f"n={number}" for number in range(30)]
        known = [each for name in names for each in (replace(reference(), case=name), ours(case=name))]

        def now(name, number):
            return ours(1.3 if number in (3, 4) else 1.04, case=name)

        def more(suite, points, directory):
            asked.append([case for case, _ in points])
            return DONE

        found = [now(name, number) for number, name in enumerate(names)]
        check(*known[::2], *found, more=more, baseline=saved("many.jsonl", reference(), ours(), *known))
        worse, unclear = asked[0][:2], asked[0][2:]
        assert worse == ["n=3", "n=4"]
        assert len(unclear) == ceil(REPEATED_SHARE * (len(names) + 1))

    def test_noise_of_the_baseline_is_not_measured_again(self, check, saved):
        asked, noisy = [], ours()
        noisy.timings["cold"].samples = [1e-3 * (1 + 0.3 * (index % 3)) for index in range(12)]
        known = saved("noisy.jsonl", reference(), noisy)
        assert check(reference(), ours(1.2), baseline=known, more=lambda *each: asked.append(each) or DONE) == UNDECIDED
        assert not asked

    def test_interrupting_that_is_interrupting_the_run(self, check):
        asked = []
        assert check(reference(), ours(1.04), more=lambda *each: asked.append(each) or INTERRUPTED) == INTERRUPTED
        assert len(asked) == 1

    @pytest.mark.parametrize(
        ("record", "more"),
        [
            (replace(ours(), suite="other"), {}),
            (replace(ours(), case="n=1"), {}),
            (replace(ours(), implementation="gone"), {}),
            (ours(), {"gpu": None}),
            (ours(), {"key": "b", "gpu": None}),
        ],
    )
    def test_a_baseline_with_nothing_in_common_is_refused(self, check, saved, record, more):
        """Before any measurement, because `check` would then compare the results."""
        other = saved("other.jsonl", record, **more)
        with pytest.raises(SelectionError, match=r"has no record of a case that this run would measure \(suite toy"):
            check(reference(), baseline=other)
        with pytest.raises(SelectionError, match="has no record of a case"):
            check(reference(), baseline=saved("ours.jsonl", ours()), impl=["reference"])
        with pytest.raises(SelectionError, match="has no record of a case"):
            check(reference(), cases="n=513")

    @pytest.mark.parametrize(
        ("selected", "message"),
        [
            ({"baseline": None}, "--check needs --baseline FILE"),
            ({"shard": "1/2"}, "--check needs a whole run, got --shard 1/2"),
        ],
    )
    def test_what_cannot_be_checked(self, check, selected, message):
        with pytest.raises(SelectionError, match=message):
            check(**selected)


@pytest.mark.parametrize("names", [["good"], ["good", "slowed"], []])
@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("unchecked", [["slowed", "lost", "other"], []])
def test_a_check_leaves_out_what_others_make_unless_it_is_named(tmp_path, capsys, names, checks, unchecked):
    thresholds = tmp_path / "thresholds.toml"
    thresholds.write_text(f"unchecked = {unchecked}\n" * bool(unchecked) + THRESHOLDS)
    suite = toy.suite()
    found = checked(argparse.Namespace(impl=names, check=checks, thresholds=thresholds), {"toy": suite})
    left_out = set(unchecked) & set(suite.implementations) if checks and not names else set()
    assert set(found or suite.implementations) == set(names or suite.implementations) - left_out
    assert all(name in capsys.readouterr().err for name in list(left_out)[:1])


@pytest.mark.alone
def test_a_slowdown_is_found_by_a_whole_run(saved, tmp_path):
    """A checkout with one suite and its own clock, on which a call takes 1.3 ms; it took 1 ms before."""
    for package in ("reference", "kernels", "suites"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "suites" / "toy.py").write_text(Path(toy.__file__).read_text() + ON_A_CLOCK)
    thresholds = (ROOT / "suites" / "thresholds.toml").read_text().replace("wall = 0.20", "wall = 0.05")
    (tmp_path / "suites" / "thresholds.toml").write_text(thresholds)
    case, device = toy.ToyCase(2, 8), torch.device("cpu")
    before = [
        replace(
            ours(1.0, name, "wall"),
            case=case.id,
            fields=case.fields(),
            direction=direction,
            device=environment.device_name(device),
            peak_bytes=None,
            saved_bytes=None,
            accuracy={},
        )
        for direction in DIRECTIONS
        for name in ("slowed", "lost")
    ]
    baseline = saved("baseline.jsonl", *before, **{**environment.describe(device), "threads": 1})
    summary = tmp_path / "summary.md"

    command = [sys.executable, ROOT / "bench.py", "--suite", "toy", "--device", "cpu", "--preset", "smoke"]
    command += ["--impl", "slowed", "--quiet", "--out", "out", "--baseline", baseline, "--check"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    told = {"MILLISECONDS": "1.3", "OMP_NUM_THREADS": "1", "GITHUB_STEP_SUMMARY": str(summary)}
    done = subprocess.run(
        command, cwd=tmp_path, env=inherited | told, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == FAILURE, done.stdout + done.stderr
    # `lost` was not requested, so it is not missing.
    assert "against the baseline: 2 worse, " in done.stdout
    changes = re.findall(r"worse .* \+(\S+) %$", done.stdout, flags=re.MULTILINE)
    assert [float(change) for change in changes] == pytest.approx([30, 30], abs=0.5)
    assert summary.read_text().startswith("### 2 regressions against the baseline")
    assert "Against the baseline" in (tmp_path / "out" / "report.html").read_text()
    # Unclear cases were measured again, with records only.
    assert [each.name for each in (tmp_path / "out" / "again-1").iterdir()] == ["toy.jsonl"]


IDS = st.lists(st.sampled_from(["n=1", "n=10", "in=1", "k=1", "k=12"]), min_size=1, max_size=3).map(",".join)


@given(cases=st.sets(IDS, min_size=1), others=st.sets(IDS))
def test_just_the_cases_that_are_unsettled_are_repeated(cases, others):
    """Ids often contain other ids: `n=1` is in `n=10`, and one more field makes an id longer."""
    selects = case_filter(expression(sorted(cases), sorted(others)))
    assert {each for each in cases | others if selects(each)} == cases
