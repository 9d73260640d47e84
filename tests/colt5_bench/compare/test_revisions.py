"""Comparisons of revisions that are killed by each signal at each moment."""

import multiprocessing
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from time import monotonic, sleep

import pytest

from colt5_bench.compare.revisions import Alternating

MEASURING = """
import os, pathlib, sys, time
pathlib.Path({started!r}).write_text(str(os.getpid()))
time.sleep(3600)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose measurements never end; each call of git is a moment for a signal."""
    root, commands = tmp_path / "checkout", tmp_path / "bin"
    root.mkdir()
    commands.mkdir()
    (root / "bench.py").write_text(MEASURING.format(started=str(tmp_path / "started")))
    monkeypatch.setenv("PYTHONPATH", "")
    for arguments in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=me", "-c", "user.email=me@example.org", "commit", "--quiet", "-m", "one"),
    ):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    Path(tempfile.gettempdir()).mkdir()
    return root


def compare(checkout, moment, number):
    """In a separate process: be killed at a moment."""
    os.setsid()
    calls = 0

    def run(command, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), number)
        return started(command, *arguments, **options)

    started, subprocess.run = subprocess.run, run
    with Alternating(checkout, ["HEAD", "HEAD"], [], checkout.parent / "out") as alternating:
        alternating.measure(["toy"], "")


def wait_for(condition, seconds=60):
    until = monotonic() + seconds
    while not condition():
        assert monotonic() < until
        sleep(0.02)


def left_behind(checkout):
    listed = subprocess.run(
        ["git", "-C", str(checkout), "worktree", "list", "--porcelain"], capture_output=True, text=True, check=True
    )
    worktrees = [line for line in listed.stdout.splitlines() if line.startswith("worktree ")]
    return [*worktrees[1:], *Path(tempfile.gettempdir()).iterdir()]


@pytest.mark.parametrize("moment", [1, 2, 3, "measuring"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_comparison_that_is_killed_leaves_nothing_that_measures_and_nothing_for_long(checkout, number, moment):
    process = multiprocessing.get_context("fork").Process(target=compare, args=(checkout, moment, number))
    process.start()
    measuring = checkout.parent / "started"
    if moment == "measuring":
        wait_for(lambda: measuring.exists() and measuring.read_text())
        os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode not in (0, None)
    if measuring.exists():
        wait_for(lambda: not Path("/proc", measuring.read_text()).exists())
    if number != signal.SIGKILL:
        assert left_behind(checkout) == []
    with Alternating(checkout, ["HEAD", "HEAD"], [], checkout.parent / "out"):
        # Another comparison removes what the killed one left behind, and nothing of a running one.
        assert len(left_behind(checkout)) == 3
        with Alternating(checkout, ["HEAD", "HEAD"], [], checkout.parent / "other"):
            assert len(left_behind(checkout)) == 6
    assert left_behind(checkout) == []
