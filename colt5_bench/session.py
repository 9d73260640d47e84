"""A run: the points to measure, their order, the existing records, and the destination of new ones."""

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from colt5_bench.loading import choose_device, describe_guest, installed_guests
from colt5_bench.measuring.conditions import Conditions, Tell, silent
from colt5_bench.measuring.isolation import Measurer, Task
from colt5_bench.records import environment, provenance
from colt5_bench.records.parts import keep_finished
from colt5_bench.records.provenance import Origin
from colt5_bench.records.results import Group, Record, Writer
from colt5_bench.request import TIME_LIMIT, Request
from colt5_bench.selection import WHOLE, Guest, SelectionError, case_filter
from colt5_bench.suite import Grid, TrainingSuite

MAX_SECONDS = {"smoke": 0.1, "default": 1.0, "full": 2.0}
"""Longest sampling time of a time column of a case, by preset. A smoke run only shows that everything runs."""


CHECKPOINTS = "checkpoints"
"""Directory for checkpoints of unfinished training runs, next to the results."""


class Session:
    """Measures the points of suites, and writes the records of each group as soon as it is measured.

    First, `points` returns all points of the request. Then `begin` takes the points to measure, and `measure` is called
    for each group of them.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._device = choose_device(request.device)
        if request.energy:
            self._refuse_without_meter()
        self._selects_case = case_filter(request.cases)
        isolated = request.isolate or request.time_limit is not None
        self._measurer = Measurer(isolated=isolated, time_limit=request.time_limit or TIME_LIMIT)
        self._tasks: dict[Group, Task] = {}
        self._expected: dict[Group, list[str]] = {}
        self._records: dict[tuple[Group, str], Record] = {}
        self._environments: dict[str, dict[str, object]] = {}
        """By suite."""
        self._origins: dict[str, Origin] = {}
        """The code when the run began, by suite."""
        self._writers: dict[str, Writer] = {}
        self._begun: set[str] = set()
        """Suites whose results files already have an environment."""
        self._conditions: Conditions | None = None
        self._files: dict[str, Path] = {}
        """Files of suites, by name."""
        self._guests: dict[str, tuple[Guest, ...]] = {}
        """By suite, which has them among its implementations."""
        self._data: dict[str, str] = {}
        """Hash of the data of suites that train."""
        self.changed: list[str] = []
        """Changes of the code during the run, as lines."""

    def points(self, suite: Grid, file: Path) -> list[tuple[Group, str]]:
        """Add a suite of a file, and return the group and the implementation of each of its requested points."""
        self._files[suite.name] = file
        self._guests[suite.name] = (*installed_guests(suite), *self._request.guests)
        if isinstance(suite, TrainingSuite):
            self._data[suite.name] = _hash_of_data(suite, self._request.corpus)
        wanted = self._request.implementations
        names = [name for name in suite.implementations if not wanted or name in wanted]
        cases = [case for case in suite.cases(self._request.preset, self._device) if self._selects_case(case.id)]
        points = []
        for case in self._request.shard.of(cases):
            for direction in suite.directions(case):
                if self._request.points and (case.id, direction) not in self._request.points:
                    continue
                group = Group(suite.name, case.id, direction)
                self._tasks[group] = Task(suite, case, direction, file, self._request.preset, self._guests[suite.name])
                points += [(group, name) for name in names]
        return points

    def begin(self, expected: Iterable[tuple[Group, str]], suites: Sequence[str]) -> None:
        """Take the points to record and the names of their suites. An interrupted run is read.

        Warnings about the measured code are printed to stderr.

        Raises:
            SelectionError: results exist already, and the request does not complete them or cannot.
            OSError: results cannot be written, or another run is writing there.
        """
        for group, implementation in expected:
            self._expected.setdefault(group, []).append(implementation)
        for suite in suites:
            self._origins[suite] = origin = Origin.of(self._files[suite])
            for note in origin.notes():
                _tell_once(note)
            described = {**environment.describe(self._device), **self._code(suite, origin)}
            described["options"] = self._request.of_results(suite)
            if suite in self._data:
                described["data"] = self._data[suite]
            described["expected"] = sum(len(names) for group, names in self._expected.items() if group.suite == suite)
            digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
            self._environments[suite] = {"key": digest, **described}
            if self._request.out is not None:
                self._open_results(suite, self._request.out / f"{suite}.jsonl")

    def groups(self) -> dict[Group, list[str]]:
        """The implementations to record in each group. They are measured together."""
        return self._expected

    def measure(self, group: Group, tell: Tell = silent) -> list[Record]:
        """The records of all implementations of a group, which are measured together if they do not exist yet.

        Raises:
            OSError: the records cannot be written.
        """
        names = self._expected[group]
        if any((group, name) not in self._records for name in names):
            conditions = self._conditions_for(group.suite)
            with warnings.catch_warnings():
                # A warning of a measured implementation is no failure, under any filter of warnings.
                warnings.simplefilter("default")
                records = self._measurer.measure(self._tasks[group], names, conditions, tell)
            for record in records:
                self._records[group, record.implementation] = record
                if group.suite in self._writers:
                    self._write_environment_once(group.suite)
                    self._writers[group.suite].record(record)
                if conditions.checkpoints is not None:
                    (conditions.checkpoints / f"{record.digest}.pt").unlink(missing_ok=True)
        return [self._records[group, name] for name in names]

    def missing(self) -> list[str]:
        """The points that were expected but not recorded."""
        return [
            " ".join((*group, name))
            for group, names in self._expected.items()
            for name in names
            if (group, name) not in self._records
        ]

    def _refuse_without_meter(self) -> None:
        try:
            environment.EnergyMeter(self._device)
        except environment.InstrumentError as error:
            raise SelectionError(f"--energy needs a GPU whose energy NVML can measure: {error}.") from error

    def close(self) -> None:
        """Check whether the code has changed, and close the results files."""
        for suite, described in self._environments.items():
            origin = Origin.of(self._files[suite])
            files = origin.changed_files(self._origins[suite])
            if changes := provenance.changed(described, self._code(suite, origin), files):
                described |= changes
                self.changed.append(f"{suite}: {provenance.change(described)}")
                if suite in self._begun:
                    # This line has the key of the first one, and replaces it.
                    self._writers[suite].environment(described)
        for suite, writer in self._writers.items():
            nothing = not self._environments[suite]["expected"] and not writer.path.stat().st_size
            if nothing and self._request.shard != WHOLE:
                # A shard without a case gets a file, too.
                self._write_environment_once(suite)
            writer.close()

    def _code(self, suite: str, origin: Origin) -> dict[str, Any]:
        """The measured code, for the environment."""
        guests = {guest.name: describe_guest(guest) for guest in self._guests[suite]}
        return {**origin.described, **({provenance.GUESTS: guests} if guests else {})}

    def _open_results(self, suite: str, path: Path) -> None:
        self._writers[suite] = writer = Writer(path)
        if not path.stat().st_size:
            return
        if not self._request.resume:
            raise SelectionError(
                f"{path} exists already: complete it with --resume, or choose a directory without results with --out."
            )
        for record in keep_finished(writer, self._environments[suite], self._expected):
            self._records[record.group, record.implementation] = record

    def _conditions_for(self, suite: str) -> Conditions:
        if self._conditions is None:
            self._conditions = Conditions.on(
                self._device,
                "",
                self._request.ceilings,
                max_seconds=MAX_SECONDS[self._request.preset],
                targets=self._request.targets,
                energy=self._request.energy,
            )
        return replace(
            self._conditions,
            environment=str(self._environments[suite]["key"]),
            corpus=self._request.corpus,
            checkpoints=None if self._request.out is None else self._request.out / CHECKPOINTS,
        )

    def _write_environment_once(self, suite: str) -> None:
        if suite not in self._begun:
            conditions = self._conditions_for(suite)
            self._environments[suite]["ceilings"] = asdict(conditions.ceilings)
            self._environments[suite]["host"] = None if conditions.host is None else asdict(conditions.host)
            self._writers[suite].environment(self._environments[suite])
            self._begun.add(suite)


def _hash_of_data(suite: TrainingSuite, corpus: Path | None) -> str:
    try:
        return suite.data(corpus)
    except (ValueError, OSError) as error:
        raise SelectionError(str(error)) from error


@cache
def _tell_once(note: str) -> None:
    """Print a note once per process, because each suite has a session."""
    print(note, file=sys.stderr, flush=True)
