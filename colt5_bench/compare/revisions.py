"""Two revisions measured in turns on one machine, each in a checkout of its own, through its own command line."""

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
from colt5_bench.files import own
from colt5_bench.records import git, provenance
from colt5_bench.records.parts import read
from colt5_bench.records.results import Run
from colt5_bench.request import CEILINGS, NO_REPORT, REPORT
from colt5_bench.selection import SelectionError

SIDES = ("a", "b")

TURNS, MOST_TURNS = 3, 15
"""Turns of each revision: at first, and at most of the cases that are unclear or not confirmed by then."""

PREFIX, OWNER = "colt5-bench-", "owner"
"""Beginning of the name of a comparison's temporary directory, and a file in it that the comparison has open."""

AUTHOR = "colt5-bench"
"""Author of commits that a comparison makes."""

PATHS = ("PYTHONPATH", "PYTHONSAFEPATH")
"""Variables that keep Python from looking at first beside the file that it starts."""

MEASURED = (0, 1)
"""Exit statuses of a run that has results: some may be of implementations that failed."""


class MeasuringError(RuntimeError):
    """A revision could not be measured; the message is for the user."""


def revision(checkout: Path, name: str) -> str:
    """The commit that a name stands for.

    Raises:
        SelectionError: it stands for none.
    """
    found = git.run(checkout, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    if found.returncode:
        raise SelectionError(
            f"{name} is neither a results file, nor a directory with results files, nor a git revision."
        )
    return found.stdout.strip()


def with_appended(checkout: Path, commit: str, texts: Mapping[str, str]) -> str:
    """A commit on top of another, in which these texts follow what is in files. No branch and no file changes here.

    Args:
        checkout: of the repository.
        commit: which has the files.
        texts: by path within the checkout.

    Raises:
        MeasuringError: git refuses.
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
    """Measures both revisions, once a round each, and each first in every other round.

    What one round does to a machine, be it warm or busy, it does to both.
    """

    def __init__(self, checkout: Path, revisions: Sequence[str], selection: Sequence[str], directory: Path) -> None:
        self._checkout, self._revisions, self._selection = checkout, revisions, selection
        self.places = [directory / side for side in SIDES]
        """Where the results of each are."""
        self.turns = 0
        """Number of times that each was measured."""
        self._suite_files: dict[str, str] = {}
        """By the name of a suite that is of no checkout, a hash of its file."""
        self._ceilings: dict[int, str] = {}
        """By side, what its first turn found that the device can do."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        _put_away(self._checkout)
        self._stack.enter_context(unwinding_when_terminated())
        temporary = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX)))
        self._stack.enter_context(own(temporary / OWNER))
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
        """A round: all cases of the suites that satisfy the expression, once for each revision.

        Args:
            suites: names, and paths of those that are of no checkout.
            cases: an expression.

        Raises:
            MeasuringError: a run ended otherwise than with results, or with those of other code.
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
            # An installed or named path to this checkout's packages must not come before those of the other.
            environment = {name: value for name, value in git.environment().items() if name not in PATHS}
            # Nobody looks at the page of a turn. A variable, since an older revision may not know an option.
            environment[REPORT] = NO_REPORT
            environment[CEILINGS] = self._ceilings.get(side, "")
            done = subprocess.run(
                command,
                cwd=self._worktrees[side],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                # Not even if this process is killed does it measure for nobody.
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
        """All turns measure one suite, or there is nothing to compare."""
        for environment in run.environments.values():
            described: Any = environment
            if (digest := described.get(provenance.SUITE_FILE)) is not None:
                name = described["options"]["suite"]
                if self._suite_files.setdefault(name, digest) != digest:
                    raise MeasuringError(
                        f"the file of suite {name} changed between two turns: start the comparison again"
                    )


def _refuse_other_code(run: Run, commit: str) -> None:
    """An installed harness may have come first, or what is measured changed."""
    for environment in run.environments.values():
        described: Any = environment.get("git") or {}
        if described.get("revision", commit) != commit or environment.get("harness") or provenance.change(environment):
            raise MeasuringError(f"{run.path} was measured with other code than {commit[:10]}")


def _put_away(checkout: Path) -> None:
    """Remove remains of comparisons that were killed: worktrees of this checkout, and their directories."""
    listed = git.run(checkout, "worktree", "list", "--porcelain").stdout.splitlines()
    worktrees = [Path(line.removeprefix("worktree ")) for line in listed if line.startswith("worktree ")]
    directories = {each.parent for each in worktrees} | set(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
    for directory in directories:
        if directory.name.startswith(PREFIX) and (directory / OWNER).exists():
            # One that goes on is owned, and what is another user's stays.
            with suppress(OSError), own(directory / OWNER):
                for side in SIDES:
                    # Twice: also one that was not finished.
                    git.run(checkout, "worktree", "remove", "--force", "--force", str(directory / side))
                shutil.rmtree(directory)


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
