"""`python bench.py baseline RUN FILE`: make a run the baseline of later runs."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from colt5_bench.commands import DONE
from colt5_bench.commands._comparison import Comparer, add_options
from colt5_bench.compare.baselines import read_baseline
from colt5_bench.loading import load_suites
from colt5_bench.records import provenance
from colt5_bench.records.parts import read
from colt5_bench.records.results import Run, write
from colt5_bench.report.comparison import show
from colt5_bench.selection import SelectionError
from colt5_bench.startup import check, find_checkout

EXAMPLES = """\
  python bench.py baseline reports/nvidia-h200 reports/baselines/nvidia-h200.jsonl

The records of the run replace those of the same suites in the file; records of other suites stay. On a noisy machine,
use a directory with several runs of one revision: such a baseline knows how much equal runs differ.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a results file, or a directory with results")
    parser.add_argument("file", type=Path, metavar="FILE", help="the baseline; created if it does not exist")
    add_options(parser)


def main(options: argparse.Namespace) -> int:
    checkout = find_checkout(Path.cwd().resolve())
    check(checkout)
    comparer = Comparer.of(options, load_suites(checkout))
    run = read_baseline(options.run)
    _refuse_unfit(run)
    before = read(options.file) if options.file.exists() else Run(options.file)
    suites = {record.suite for record in run.records}
    kept = [record for record in before.records if record.suite not in suites]
    _refuse_another_device(before, run, options.file)
    comparison = comparer(before, run, lambda record: record.suite in suites)

    options.file.parent.mkdir(parents=True, exist_ok=True)
    records = [*kept, *run.records]
    named = dict.fromkeys(record.environment for record in records)
    environments = {**before.environments, **run.environments}
    write(options.file, [environments[key] for key in named], records)
    show(comparison, Console())
    if kept:
        print(f"kept: {len(kept)} records of {', '.join(dict.fromkeys(record.suite for record in kept))}")
    print(f"baseline: {options.file}, {len(kept) + len(run.records)} records")
    return DONE


def _refuse_unfit(run: Run) -> None:
    """Check that a run names a revision that can be checked out, and has each point completely and equally often."""
    if not run.records:
        raise SelectionError(f"{run.path} contains no records.")
    if run.cut_off:
        raise SelectionError(f"the last line of {run.cut_off[0]} is cut off: complete the run first.")
    # By suite, because each environment of a completed run expects all records.
    expected = {environment["options"]["suite"]: environment["expected"] for environment in _described(run)}
    for suite, number in expected.items():
        if (missing := number - sum(record.suite == suite for record in run.records)) > 0:
            raise SelectionError(
                f"{run.path} lacks {missing} of {number} records of suite {suite}: complete it with --resume."
            )
    if len({(record.key, record.environment) for record in run.records}) < len(run.records):
        raise SelectionError(f"{run.path} contains records of one run twice: keep one copy of the results of each run.")
    counts = Counter(record.key for record in run.records)
    most: Counter[str] = Counter()
    for key, count in counts.items():
        most[key[0]] = max(most[key[0]], count)
    if short := next((key for key in counts if counts[key] < most[key[0]]), None):
        raise SelectionError(
            f"{run.path} contains {counts[short]} records of {' '.join(short)} and {most[short[0]]} of other cases of "
            "the suite: name the results of one run, or of several complete runs."
        )
    for record in run.records:
        environment: Any = run.environments.get(record.environment, {})
        git = environment.get("git")
        if provenance.named(git) is None:
            raise SelectionError(
                f"the revision of {run.path} is unknown: {provenance.doubt(git)}. Measure in a clone, then try again."
            )
        if environment.get("harness"):
            raise SelectionError(
                f"{run.path} was measured by the harness of another checkout: start `python bench.py` in the checkout "
                "that is measured, then try again."
            )
        if git.get("dirty"):
            raise SelectionError(
                f"{run.path} was measured with uncommitted changes to {git['revision'][:10]}: commit them, measure "
                "again, then try again."
            )


def _described(run: Run) -> list[dict[str, Any]]:
    """Environments that have what the run was to measure. Old files lack this."""
    return [each for each in run.environments.values() if "options" in each and "expected" in each]


def _refuse_another_device(before: Run, run: Run, file: Path) -> None:
    """The device models of a run. A baseline is for one GPU model, or for processors of any model."""
    theirs, ours = _devices(before), _devices(run)
    if theirs and theirs != ours:
        raise SelectionError(
            f"{file} was measured on {' and '.join(sorted(theirs))}, but {run.path} on {' and '.join(sorted(ours))}: "
            "use another baseline for each kind of device."
        )


def _devices(run: Run) -> set[str]:
    on_gpu = {key for key, environment in run.environments.items() if environment.get("gpu")}
    return {record.device if record.environment in on_gpu else "a CPU" for record in run.records}
