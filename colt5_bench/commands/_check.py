"""`python bench.py run --baseline FILE --check`: a run with a comparison at its end."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil, inf
from pathlib import Path

import torch
from rich.console import Console

from colt5_bench.commands import DONE, FAILURE, INTERRUPTED, UNMEASURED, attempt
from colt5_bench.commands._comparison import Comparer, add_options, in_scope, status_of, thresholds_file
from colt5_bench.compare import Comparison, Finding, load_rules, read_baseline
from colt5_bench.compare.conditions import Conditions
from colt5_bench.records.results import Group, Run, load
from colt5_bench.report.comparison import append_summary, show
from colt5_bench.report.layout import View
from colt5_bench.selection import WHOLE, SelectionError, Shard
from colt5_bench.suite import Grid

MOST_REPETITIONS = 2
"""Most repetitions of a point."""

FEWEST_RUNS = 2
"""Fewest runs that show a worse time."""

REPEATED_SHARE = 1 / 6
"""Most unclear points of a repetition, as a share of all points. A point that seems to be worse is always measured
again."""

Measure = Callable[[Grid, Sequence[tuple[str, str]], Path], int]
"""Measures cases and directions of a suite, writes results to a directory, and returns an exit status."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="compare with this results file or directory")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if anything is worse than in the baseline, and only then"
    )
    add_options(parser)


def checked(options: argparse.Namespace, suites: Mapping[str, Grid]) -> list[str]:
    """The implementations of a run: those of `--impl`, or all, with `--check` except the `unchecked` ones."""
    if options.impl or not options.check:
        return list(options.impl)
    unchecked = load_rules(thresholds_file(options)).unchecked
    names = dict.fromkeys(name for suite in suites.values() for name in suite.implementations)
    if left_out := [name for name in names if name in unchecked]:
        print(f"--check does not measure {', '.join(left_out)}; name them with --impl to measure them", file=sys.stderr)
    return [name for name in names if name not in unchecked]


@dataclass(frozen=True)
class Check:
    """The baseline and the comparer of a run."""

    options: argparse.Namespace
    baseline: Run
    comparer: Comparer

    @classmethod
    def of(cls, options: argparse.Namespace, suites: Mapping[str, Grid], device: torch.device) -> "Check | None":
        """The check, or None without a baseline. A baseline needs records in common with the run."""
        if options.check and Shard.parse(options.shard) != WHOLE:
            raise SelectionError(
                f"--check needs a whole run, got --shard {options.shard}: measure all shards, then `merge` them."
            )
        if not options.baseline:
            if options.check:
                raise SelectionError("--check needs --baseline FILE to compare with.")
            return None
        baseline, comparer = read_baseline(options.baseline), Comparer.of(options, suites)
        planned = {
            (name, case.id, implementation)
            for name in options.suite
            for case in suites[name].cases(options.preset, device)
            for implementation in suites[name].implementations
        }
        in_common = (
            (record.suite, record.case, record.implementation) in planned
            and Conditions.of(record, baseline).kind == device.type
            for record in filter(in_scope(options), baseline.records)
        )
        if not any(in_common):
            raise SelectionError(
                f"{options.baseline} has no record of a case that this run would measure (suite "
                f"{', '.join(options.suite)}, preset {options.preset}, on {device.type}): nothing could be compared."
            )
        return cls(options, baseline, comparer)

    def conclude(self, status: int, directories: Mapping[str, Path], suites: Mapping[str, Grid], more: Measure) -> int:
        """Compare the run, and measure points again that are unclear or seem to be worse. A point stays unclear if its
        baseline is too noisy. With `--check`, nothing is measured again that cannot be a regression.

        Args:
            status: exit status of the run.
            directories: directories of results, by suite.
            suites: measured suites, by name.
            more: measures points again.
        """
        comparison = self._compare(directories)
        most = ceil(REPEATED_SHARE * len({_point(each) for each in comparison.findings}))
        for repetition in range(1, MOST_REPETITIONS + 1):
            points = self._points_to_repeat(comparison, most)
            if not points or status not in (DONE, FAILURE):
                break
            print(
                f"measuring again what is unclear or seems to be worse: {len(points)} "
                f"point{'s' if len(points) > 1 else ''} ({repetition} of {MOST_REPETITIONS})"
            )
            for name in dict.fromkeys(suite for suite, _, _ in points):
                own = [(case, direction) for suite, case, direction in points if suite == name]
                status = max(status, more(suites[name], own, _free(directories[name])))
                if status not in (DONE, FAILURE):
                    break
            else:
                comparison = self._compare(directories)

        show(comparison, Console())
        append_summary(comparison)
        for name, directory in directories.items():
            self._write_page(directory, suites[name], comparison)
        if status == INTERRUPTED or not self.options.check:
            return status
        if status not in (DONE, FAILURE):
            print("--check: some cases could not be measured", file=sys.stderr)
            return UNMEASURED
        return status_of(comparison)

    def _points_to_repeat(self, comparison: Comparison, most: int) -> list[Group]:
        """Points that seem to be worse, and at most so many unclear ones, those first that are nearly clear."""
        unsettled = comparison.unsettled(FEWEST_RUNS)
        worse = dict.fromkeys(_point(each) for each in unsettled if each.is_regression)
        hopeful = [each for each in unsettled if each.may_settle(1 + MOST_REPETITIONS)]
        if self.options.check:
            hopeful = [each for each in hopeful if each.is_undecided]
        unclear = dict.fromkeys(_point(each) for each in sorted(hopeful, key=_width))
        return [*worse, *[point for point in unclear if point not in worse][:most]]

    def _compare(self, directories: Mapping[str, Path]) -> Comparison:
        run = Run(Path("this run"))
        for directory in directories.values():
            if any(directory.rglob("*.jsonl")):
                part = load(directory)
                run.environments |= part.environments
                run.records += part.records
        return self.comparer(self.baseline, run, in_scope(self.options))

    def _write_page(self, directory: Path, suite: Grid, comparison: Comparison) -> None:
        from colt5_bench.report.page import PAGE, write_page  # Imported here, because it takes long and is used last.

        results = directory / f"{suite.name}.jsonl"
        if results.exists():
            own = [finding for finding in comparison.findings if finding.suite == suite.name]
            page, views = directory / PAGE, {suite.name: View.of(suite)}
            attempt("report", lambda: write_page(page, load(results), views, findings=own))


def _free(directory: Path) -> Path:
    """A free directory for more results of a run. A resumed run may have some already."""
    return next(path for number in count(1) if not (path := directory / f"again-{number}").exists())


def _point(finding: Finding) -> Group:
    return Group(finding.suite, finding.case, finding.direction)


def _width(finding: Finding) -> float:
    low, high = finding.interval or (0.0, inf)
    return high / low if low else inf
