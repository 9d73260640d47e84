"""`python bench.py run --baseline FILE --check`: a run with a comparison at its end."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from rich.console import Console

from colt5_bench.commands import DONE, FAILURE, INTERRUPTED, UNMEASURED, attempt
from colt5_bench.commands._comparison import Comparer, add_options, in_scope, status_of, thresholds_file
from colt5_bench.compare import Comparison, load_rules, read_baseline
from colt5_bench.compare.conditions import Conditions
from colt5_bench.records.results import Run, load
from colt5_bench.report.comparison import append_summary, show
from colt5_bench.report.layout import View
from colt5_bench.selection import WHOLE, SelectionError, Shard
from colt5_bench.suite import Grid

MOST_REPETITIONS = 2
"""Most repetitions of a case with unclear times. A worse time needs at least two runs.
"""

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
        """Compare the run, and measure cases again that are unclear or seem to be worse. With `--check`, nothing is
        measured again that cannot be a regression.

        Args:
            status: exit status of the run.
            directories: directories of results, by suite.
            suites: measured suites, by name.
            more: measures cases again.
        """
        comparison = self._compare(directories)
        for repetition in range(1, MOST_REPETITIONS + 1):
            unsettled = [
                each
                for each in comparison.unsettled(runs=2)
                if each.is_regression or each.is_undecided or not self.options.check
            ]
            if not unsettled or status not in (DONE, FAILURE):
                break
            count = len({(each.suite, each.case) for each in unsettled})
            print(
                f"{count} cases are unclear or seem to be worse: measuring them again "
                f"({repetition} of {MOST_REPETITIONS})"
            )
            for name in dict.fromkeys(each.suite for each in unsettled):
                points = dict.fromkeys((each.case, each.direction) for each in unsettled if each.suite == name)
                status = max(status, more(suites[name], [*points], _free(directories[name])))
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
