"""Tests of whole runs of the training suite, from the command line."""

import signal
import subprocess
import sys
from pathlib import Path
from time import process_time
from types import SimpleNamespace

import pytest

from colt5_bench import cli, commands
from colt5_bench.records.results import load
from colt5_bench.request import NO_REPORT, REPORT
from colt5_bench.session import CHECKPOINTS

ROOT = Path(__file__).parents[2]
CORPUS, OTHER_CORPUS = ROOT / "docs" / "performance.md", ROOT / "docs" / "layers.md"
"""Single files, which are split in order. A folder is split by hashes of its files, so an edit could empty a split."""

QUICK = ["-k", "task=text and seed=1", "--corpus", str(CORPUS)]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def command(out, *options):
    return ["bench.py", "--suite", "quality", "--preset", "smoke", "--device", "cpu", "--out", str(out), *options]


def run(out, *options):
    """Run in this process; return its status, and its records by implementation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv(REPORT, NO_REPORT)
        _, *words = command(out, *options)
        status = cli.main(words)
    return status, {record.implementation: record for record in load(out).records}


def course(record):
    """All of a run that does not depend on time."""
    curves = {name: curve for name, curve in record.curves.items() if name != "seconds"}
    return curves, {name: value for name, value in record.metrics.items() if "seconds" not in name}, record.data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    status, records = run(out, *QUICK, "--impl=light", "--impl=random")
    assert status == commands.DONE
    return SimpleNamespace(out=out, records=records)


def killed(out, *options):
    """A run that is killed after the first checkpoint of its last implementation."""
    with subprocess.Popen(
        [sys.executable, *command(out, *options, "-v")], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        for line in process.stderr:
            if line.startswith("random: step"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("way", [[], ["--isolate"]], ids=["in the run", "isolated"])
def test_a_killed_run_is_completed_bit_for_bit(tmp_path, whole, way, capfd):
    out, options = tmp_path / "out", [*QUICK, "--impl=light", "--impl=random", *way]
    killed(out, *options)
    # One finished run, and one in progress.
    assert len([*(out / CHECKPOINTS).iterdir()]) == 2
    status, records = run(out, *options, "--resume", "-v")
    told = capfd.readouterr().err
    assert status == commands.DONE, told
    assert {*records} == {*whole.records}
    assert all(course(record) == course(whole.records[name]) for name, record in records.items())
    assert next(line for line in told.splitlines() if ": step" in line).startswith("random: step 16,")
    assert not [*(out / CHECKPOINTS).iterdir()]


def test_a_run_is_not_completed_with_other_data(whole, capfd):
    options = [*QUICK, "--impl=light", "--impl=random"]
    other = [each if each != str(CORPUS) else str(OTHER_CORPUS) for each in options]
    status, records = run(whole.out, *other, "--resume")
    assert status == commands.USAGE
    assert "differ in data" in capfd.readouterr().err
    assert records == whole.records


@pytest.mark.parametrize("kind", ["missing", "empty", "of another suite"])
def test_a_corpus_that_is_of_no_use_is_an_error_of_usage(tmp_path, capsys, kind):
    corpus = tmp_path / kind
    if kind == "empty":
        corpus.mkdir()
    suite = "topk" if kind == "of another suite" else "quality"
    arguments = ["--suite", suite, "--preset", "smoke", "--device", "cpu", "--corpus", str(corpus)]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == commands.USAGE
    told = capsys.readouterr().err
    assert "error: --corpus " in told
    assert ("quality" if kind == "of another suite" else str(corpus)) in told


def test_a_training_suite_is_not_profiled(tmp_path, capsys):
    arguments = ["--suite", "quality", "--preset", "smoke", "--device", "cpu", "--profile", "torch"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == commands.USAGE
    assert "leave out quality" in capsys.readouterr().err


def test_smoke_takes_less_than_a_minute_and_every_loss_falls(tmp_path):
    """A quarter of it, without second seeds, by processor time, because wall time includes other programs."""
    begun = process_time()
    status, _ = run(tmp_path / "out", "-k", "seed=1")
    assert process_time() - begun < 45
    assert status == commands.DONE
    records = [record for record in load(tmp_path / "out").records if record.status != "skipped"]
    assert {record.status for record in records} == {"ok"}
    for record in records:
        curve = record.curves["training_loss"]
        assert curve[-1] < curve[0], (record.case, record.implementation)
