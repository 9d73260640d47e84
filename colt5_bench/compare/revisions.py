"""Two revisions measured in turns on one machine, each in its own checkout, through its own command line."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from colt5_bench.compare.processes import die_with, unwinding_when_terminated
from colt5_bench.files import open_exclusively
from colt5_bench.records import git, provenance
from colt5_bench.records.parts import read
from colt5_bench.records.results import Run
from colt5_bench.request import CEILINGS, NO_REPORT, REPORT
from colt5_bench.selection import SelectionError

SIDES = ("a", "b")

TURNS, MOST_TURNS = 3, 15
"""First turns of each revision, and most turns of cases that are still unclear or not confirmed."""

PREFIX, OWNER = "colt5-bench-", "owner"
"""Prefix of the temporary directory of a comparison, and a file in it that the comparison keeps open."""

AUTHOR = "colt5-bench"
"""Author of commits that a comparison makes."""

PATHS = ("PYTHONPATH", "PYTHONSAFEPATH")
"""Variables that keep the directory of a started file out of Python's path."""

MEASURED = (0, 1)
"""Exit statuses of a run with results. Some implementations may have failed."""


class MeasuringError(RuntimeError):
    """A revision could not be measured; the message is for the user."""


def revision(checkout: Path, name: str) -> str:
    """The commit that a name stands for.

    Raises:
        SelectionError: the name is no commit.
    """
    found = git.run(checkout, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if found.returncode:
        raise SelectionError(
            f"{name} is neither a results file, nor a directory with results files, nor a git revision."
        )
    return found.stdout.strip()


def with_appended(checkout: Path, commit: str, texts: Mapping[str, str]) -> str:
    """A commit on top of another one that appends texts to files. No branch and no file of the checkout changes.

    Args:
        checkout: checkout of the repository.
        commit: the commit with the files.
        texts: appended texts, by path within the checkout.

    Raises:
        MeasuringError: git failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = {**git.environment(), "GIT_INDEX_FILE": str(Path(directory) / "index")}

        def asked(*arguments: str, given: str = "") -> str:
            command = [
                "git",
                "-C",
                str(checkout),
                "-c",
                f"user.name={AUTHOR}",
                "-c",
                f"user.email={AUTHOR}",
                *arguments,
            ]
            done = subprocess.run(command, env=environment, input=given, capture_output=True, text=True, check=False)
            if done.returncode:
                raise MeasuringError(f"cannot change a copy of {commit}: {_last_line(done.stderr)}")
            return done.stdout

        asked("read-tree", commit)
        for path, text in texts.items():
            blob = asked("hash-object", "-w", "--stdin", given=asked("show", f"{commit}:{path}") + text).strip()
            asked("update-index", "--cacheinfo", f"100644,{blob},{path}")
        return asked(
            "commit-tree", asked("write-tree").strip(), "-p", commit, "-m", "A copy with appended text"
        ).strip()


class Alternating:
    """Measures both revisions once per round. The order alternates.

    The state of the machine in a round, such as heat or load, affects both.
    """

    def __init__(self, checkout: Path, revisions: Sequence[str], selection: Sequence[str], directory: Path) -> None:
        self._checkout, self._revisions, self._selection = checkout, revisions, selection
        self.places = [directory / side for side in SIDES]
        """Directory of the results of each revision."""
        self.turns = 0
        """Number of turns of each revision."""
        self._suite_files: dict[str, str] = {}
        """Hash of each suite file outside of a checkout, by the name of the suite."""
        self._ceilings: dict[int, str] = {}
        """By side, the ceilings of the device from its first turn."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        _put_away(self._checkout)
        self._stack.enter_context(unwinding_when_terminated())
        temporary = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        self._stack.enter_context(open_exclusively(temporary / OWNER))
        self._worktrees = [temporary / side for side in SIDES]
        try:
            for worktree, commit in zip(self._worktrees, self._revisions, strict=True):
                self._stack.callback(git.run, self._checkout, "worktree", "remove", "--force", str(worktree))
                added = git.run(self._checkout, "worktree", "add", "--detach", str(worktree), commit)
                if added.returncode:
                    raise MeasuringError(f"cannot check out {commit}: {_last_line(added.stderr)}")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def measure(self, suites: Sequence[str], cases: str) -> None:
        """A round: all selected cases of the suites, once for each revision.

        Args:
            suites: names, and paths of suites outside of a checkout.
            cases: expression that selects cases.

        Raises:
            MeasuringError: a run ended without results, or with results of other code.
        """
        self.turns += 1
        order = (0, 1) if self.turns % 2 else (1, 0)
        for side in order:
            commit, out = self._revisions[side], self.places[side] / f"round-{self.turns}"
            print(f"round {self.turns}: {SIDES[side]}, {commit[:10]}, {', '.join(suites)}", file=sys.stderr)
            command = [
                *(sys.executable, "bench.py"),
                *(f"--suite={suite}" for suite in suites),
                *self._selection,
                *("-k", cases, "--out", str(out)),
            ]
            # Paths to the packages of this checkout must not come before those of the other checkout.
            environment = {name: value for name, value in git.environment().items() if name not in PATHS}
            # A turn needs no page. This is a variable, because an older revision may not have an option.
            environment[REPORT] = NO_REPORT
            environment[CEILINGS] = self._ceilings.get(side, "")
            done = subprocess.run(
                command,
                cwd=self._worktrees[side],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                # If this process is killed, the run must end, too.
                preexec_fn=partial(die_with, os.getpid()),
            )
            if done.returncode not in MEASURED:
                why = _last_line(done.stderr) or _last_line(done.stdout)
                raise MeasuringError(f"{commit[:10]} ended with status {done.returncode}: {why}")
            run = read(out)
            _refuse_other_code(run, commit)
            self._refuse_other_files(run)
            measured = (json.dumps(each["ceilings"]) for each in run.environments.values() if "ceilings" in each)
            self._ceilings.setdefault(side, next(measured, ""))

    def _refuse_other_files(self, run: Run) -> None:
        """Check that all turns measure the same suite file."""
        for environment in run.environments.values():
            described: Any = environment
            if (digest := described.get(provenance.SUITE_FILE)) is not None:
                name = described["options"]["suite"]
                if self._suite_files.setdefault(name, digest) != digest:
                    raise MeasuringError(
                        f"the file of suite {name} changed between two turns: start the comparison again"
                    )


def _refuse_other_code(run: Run, commit: str) -> None:
    """Check the measured code: an installed harness may have come first, or the code may have changed."""
    for environment in run.environments.values():
        described: Any = environment.get("git") or {}
        if described.get("revision", commit) != commit or environment.get("harness") or provenance.change(environment):
            raise MeasuringError(f"{run.path} was measured with other code than {commit[:10]}")


def _put_away(checkout: Path) -> None:
    """Remove what killed comparisons left behind: worktrees of this checkout, and their directories."""
    listed = git.run(checkout, "worktree", "list", "--porcelain").stdout.splitlines()
    worktrees = [Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree ")]
    directories = {each.parent for each in worktrees} | set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
    for directory in directories:
        if directory.name.startswith(PREFIX) and (directory / OWNER).exists():
            # Running comparisons have the file open. Directories of other users stay.
            with suppress(OSError), open_exclusively(directory / OWNER):
                for side in SIDES:
                    # Forced twice, to remove unfinished worktrees, too.
                    git.run(checkout, "worktree", "remove", "--force", "--force", str(directory / side))
                shutil.rmtree(directory)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
