"""Revision and uncommitted changes of the measured code, by the checkouts of the imported files."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import colt5_bench
from colt5_bench.records import git
from colt5_bench.startup import PACKAGES, is_outside, prefix_of
from colt5_bench.texts import printable

LONGEST_SECONDS = 30.0
"""Longest time to wait for git."""

RESULTS, BESIDE_RESULTS = ".jsonl", (".html", ".png", ".svg")
"""Endings of files that runs write: results, and the page and the plots in the same directory."""

BEGINNING_OF_RESULTS = b'{"kind": "environment"'

DOCUMENT, DOCUMENTS = ".md", "docs"
"""Ending and top-level folder of files that no measurement depends on."""

MOST_NAMED = 3
"""Most changed files that a message names."""

FIELDS = ("git", "harness")
"""Fields of an environment with the code of a run."""

SUITE_FILE = "suite_file"
"""Field of an environment: a hash of a suite outside of a checkout."""

GUESTS = "guests"
"""Field of an environment: implementations added by the user, by name, each with a hash of its file."""

LINK, REPOSITORY = "120000", "160000"
"""Modes of entries of a tree that are not files."""

GONE, EMPTY = "gone", "a directory"
"""States of a path that is no file. Files in a directory count by themselves."""


class UnknownRevisionError(Exception):
    """A revision is unknown. The reason is for the record and names no directory; the advice is for the user."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


@dataclass(frozen=True)
class Code:
    """The checkout of a file, and its revision."""

    place: Path
    """Top of the checkout. For code without a revision, the parent directory of its outermost package."""

    described: dict[str, Any]
    """For the record: `revision` and `dirty`, a hash of the changes or False; or `unknown`, the reason."""

    advice: str = ""
    """For the user, if the revision is unknown."""

    contents: Mapping[str, str] = field(default_factory=dict, repr=False)
    """A hash of each file that a measurement may depend on. Empty if the revision is unknown."""

    @classmethod
    def of(cls, file: Path) -> "Code":
        try:
            top = _top(file.parent)
            return cls._in_repository(top, file.relative_to(top).as_posix())
        except UnknownRevisionError as error:
            return cls(_above_packages(file), {"unknown": error.reason}, error.advice)

    @classmethod
    def _in_repository(cls, top: Path, file: str) -> "Code":
        revision, committed, present = _listed(top)
        if file not in committed and file not in present:
            raise UnknownRevisionError(
                "git ignores its files",
                "Measure files that git does not ignore, as with `python bench.py` in a clone",
            )
        changes = _changes(top, committed, present)
        contents = {path: identity for path, (_, identity) in committed.items()} | changes
        return cls(top, {"revision": revision, "dirty": _digest(changes)}, contents=contents)

    def changed_files(self, began: "Code") -> str:
        """Files that changed since a run began: a few names, and how many more. Empty if a revision is unknown."""
        if not began.contents or not self.contents:
            return ""
        both = {**began.contents, **self.contents}
        paths = sorted(path for path in both if began.contents.get(path) != self.contents.get(path))
        more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
        return printable(", ".join(paths[:MOST_NAMED])) + more

    def __str__(self) -> str:
        return f"{self.place} ({named(self.described) or 'unknown'})"


@dataclass(frozen=True)
class Origin:
    """Where the code of a run comes from."""

    suite: Path
    measured: Code
    harness: Code | None
    """None if the harness is of the same checkout as the measured code."""

    @classmethod
    def of(cls, suite: Path) -> "Origin":
        """Origin of the file of a suite, of the imported packages of operations, and of the harness.

        A suite outside of a checkout is described by a hash, and the code that it measures by these packages.
        """
        harness = Code.of(Path(colt5_bench.__file__).resolve())
        if is_outside(suite):
            imported = (getattr(sys.modules.get(name), "__file__", None) for name in PACKAGES)
            file = next(filter(None, imported), colt5_bench.__file__)
            measured = Code.of(Path(file).resolve())
            return cls(suite, measured, None if harness.place == measured.place else harness)
        measured = Code.of(suite.resolve())
        prefix = prefix_of(suite.parents[1])
        for package in (prefix + name for name in PACKAGES):
            file = getattr(sys.modules.get(package), "__file__", None)
            if file and not _is_in(Path(file).resolve(), measured.place):
                reason = f"{package} was imported from another place than the checkout of the suite"
                advice = (
                    f"It is in {Path(file).parent}: start `python bench.py` in the checkout that you want to measure"
                )
                measured = Code(measured.place, {"unknown": reason}, advice)
        return cls(suite, measured, None if harness.place == measured.place else harness)

    @property
    def described(self) -> dict[str, Any]:
        """For the record: `git`, `harness` if its checkout differs, and `suite_file` if the suite is outside of one."""
        described: dict[str, Any] = {"git": self.measured.described, "harness": None}
        if self.harness:
            described["harness"] = self.harness.described
        if is_outside(self.suite):
            described[SUITE_FILE] = hashlib.sha256(self.suite.read_bytes()).hexdigest()
        return described

    def changed_files(self, began: "Origin") -> dict[str, str]:
        """Files that changed since a run began, by field of the environment."""
        harness = self.harness.changed_files(began.harness) if self.harness and began.harness else ""
        return {"git": self.measured.changed_files(began.measured), "harness": harness}

    def notes(self) -> Iterator[str]:
        """Lines for the user: why a revision is unknown, and that the harness is of another checkout."""
        for code in filter(None, (self.measured, self.harness)):
            if why := code.described.get("unknown"):
                yield printable(
                    f"warning: the revision of {code.place} is unknown: {why}. {code.advice}. Otherwise this run can "
                    "be neither resumed nor merged, and cannot become a baseline"
                )
        if self.harness:
            yield printable(
                f"warning: the harness of {self.harness} measures the code of {self.measured}: start `python bench.py` "
                "there to measure it with its own harness"
            )


def _above_packages(file: Path) -> Path:
    return next(directory for directory in file.parents[1:] if not (directory / "__init__.py").is_file())


def named(described: Any) -> str | None:
    """The revision as one word, with a plus and the hash of its changes if there are any. None if it is unknown."""
    if not isinstance(described, Mapping) or "revision" not in described:
        return None
    changes = described.get("dirty")
    # Old records have only the fact that there were changes.
    return f"{described['revision']}{'+' if changes else ''}{changes if isinstance(changes, str) else ''}"


def doubt(described: Any) -> str:
    """Reason why it is unknown whether another run had the same code; empty if it is known."""
    if named(described) is None:
        return described.get("unknown", "it is not recorded") if described else "it is not recorded"
    return "the uncommitted changes are not recorded" if described.get("dirty") is True else ""


def changed(before: Mapping[str, Any], now: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """A note for the environment of a run whose code changed since it began. Empty if it did not.

    Args:
        before: the environment.
        now: the fields with the code, as they are now.
        files: changed files, as `Origin.changed_files` names them.
    """
    return {
        name: {
            "unknown": "the code changed while it was measured",
            "began": before[name],
            "ended": described,
            **({"files": files[name]} if files.get(name) else {}),
        }
        for name, described in now.items()
        if described != before[name]
    }


def change(environment: Mapping[str, Any]) -> str:
    """Changes of the code of a run while it was measured, in words; empty if there are none."""
    changes = [each for name in FIELDS if "ended" in (each := environment.get(name) or {})]
    of_user = [each for name in (GUESTS, SUITE_FILE) if "ended" in (each := environment.get(name) or "")]
    return "; ".join(
        [
            *(
                f"{each['unknown']}: from {named(each['began']) or 'unknown'} to {named(each['ended']) or 'unknown'}"
                f"{', in ' if 'files' in each else ''}{each.get('files', '')}"
                for each in changes
            ),
            *(["a file named by --impl or --suite changed while it was measured"] if of_user else []),
        ]
    )


def _is_in(file: Path, place: Path) -> bool:
    try:
        return _top(file.parent) == place
    except UnknownRevisionError:
        return file.parents[1] == place


def _top(directory: Path) -> Path:
    return Path(_git(directory, "rev-parse", "--show-toplevel").removesuffix("\n"))


def _listed(top: Path) -> tuple[str, dict[str, tuple[str, str]], set[str]]:
    """The commit of a repository, mode and object of each path in it, and all paths that are not ignored.

    Paths of documents are left out.
    """
    revision = _git(top, "rev-parse", "--verify", "HEAD^{commit}").strip()
    committed = {}
    for entry in filter(None, _git(top, "ls-tree", "-r", "-z", "--full-tree", revision).split("\0")):
        facts, _, path = entry.partition("\t")
        mode, _, identity = facts.split(" ")
        if not _is_document(path):
            committed[path] = mode, identity
    # No remembered state of files is used, neither that of the index nor that of a file monitor.
    listed = _git(top, "-c", "core.fsmonitor=false", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    present = {path.rstrip("/") for path in listed.split("\0") if path and not _is_document(path)}
    return revision, committed, present


def _is_document(path: str) -> bool:
    return path.endswith(DOCUMENT) or path.startswith(f"{DOCUMENTS}/")


def _changes(top: Path, committed: Mapping[str, tuple[str, str]], present: set[str]) -> dict[str, str]:
    """All uncommitted changes: by path, a hash of the content.

    Only contents count, not times or permissions. Line ends of committed files do not count, because git may have
    changed them when it wrote the file. Results of runs are no change of the code.
    """
    added = present - committed.keys()
    added -= _written_by_runs(top, added)
    try:
        there = {path: _replacement(top / path, *entry) for path, entry in committed.items()}
        there |= {path: _added(top / path) for path in added}
    except OSError as error:
        advice = printable(f"Make {error.filename} readable")
        raise UnknownRevisionError("a file of the checkout cannot be read", advice) from error
    return {path: content for path, content in there.items() if content is not None}


def _digest(changes: Mapping[str, str]) -> str | bool:
    """A hash of all changes, or False if there are none."""
    return bool(changes) and hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:16]


def _replacement(path: Path, mode: str, identity: str) -> str | None:
    """A digest of the present content; None if it is the committed content."""
    if mode == REPOSITORY:
        # A submodule that was not fetched has no content that could differ.
        return None if (there := _added(path)) in (identity, EMPTY) else there or GONE
    if (mode == LINK) != path.is_symlink() or not (path.is_symlink() or path.is_file()):
        return _added(path) or GONE
    content = os.fsencode(path.readlink()) if mode == LINK else path.read_bytes()
    if identity == _blob(content, len(identity)):
        return None
    there = _blob(content.replace(b"\r\n", b"\n"), len(identity))
    return None if there == identity else there


def _blob(content: bytes, length: int) -> str:
    """Name of a content in git, with a number of digits."""
    algorithm = "sha256" if length == 2 * hashlib.sha256().digest_size else "sha1"
    return hashlib.new(algorithm, b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def _added(path: Path) -> str | None:
    """A digest of a file, a link or a repository; None if it is gone."""
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_dir():
        return _of_repository(path) if (path / ".git").exists() else EMPTY
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _of_repository(path: Path) -> str:
    """The revision of a repository inside another one, and its changes."""
    try:
        revision, committed, present = _listed(path)
        return f"{revision}{_digest(_changes(path, committed, present)) or ''}"
    except UnknownRevisionError as error:
        return error.reason


def _written_by_runs(top: Path, paths: set[str]) -> set[str]:
    results = {path for path in paths if path.endswith(RESULTS) and _holds_results(top / path)}
    directories = {PurePosixPath(path).parent for path in results}
    return results | {
        path for path in paths if path.endswith(BESIDE_RESULTS) and PurePosixPath(path).parent in directories
    }


def _holds_results(path: Path) -> bool:
    """Or will, or is gone."""
    try:
        with path.open("rb") as file:
            return BEGINNING_OF_RESULTS.startswith(file.read(len(BEGINNING_OF_RESULTS)))
    except FileNotFoundError:
        return True


def _git(directory: Path, *arguments: str) -> str:
    """Output of git.

    Raises:
        UnknownRevisionError: git failed, or did not answer.
    """
    try:
        done = git.run(directory, *arguments, seconds=LONGEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UnknownRevisionError("git does not answer", "Check that `git status` works there") from error
    except OSError as error:
        raise UnknownRevisionError("git cannot be started", "Install git, and add it to the PATH") from error
    if done.returncode == 0:
        return done.stdout
    if "safe.directory" in done.stderr:
        trust = done.stderr.split("\t")[-1].strip()
        raise UnknownRevisionError("git does not trust the repository, whose owner is another user", f"Run `{trust}`")
    if "not a git repository" in done.stderr:
        raise UnknownRevisionError("it is not in a git repository", "Measure in a clone")
    if "Needed a single revision" in done.stderr:
        raise UnknownRevisionError("its repository has no commit", "Commit the files")
    message = " ".join(done.stderr.split()) or f"status {done.returncode}"
    raise UnknownRevisionError("git cannot read the repository", f"Its message is: {message}")
