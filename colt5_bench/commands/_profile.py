"""`python bench.py run --profile MODE`: profile the points of a run."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from colt5_bench.commands import DONE, FAILURE
from colt5_bench.profiling import profiler
from colt5_bench.profiling.profiler import Outcome, Point
from colt5_bench.request import Request
from colt5_bench.selection import WHOLE, SelectionError
from colt5_bench.startup import reports_of
from colt5_bench.suite import Grid, Suite


def add_option(parser: argparse.ArgumentParser) -> None:
    modes = "; ".join(f"{mode}: {gives}" for mode, gives in profiler.MODES.items())
    parser.add_argument(
        "--profile", choices=profiler.MODES, metavar="MODE", help=f"profile instead of measuring. {modes}"
    )


def main(
    options: argparse.Namespace, request: Request, suites: list[Grid], device: torch.device, checkout: Path
) -> int:
    """Profile the selected points, without recording times."""
    mode = options.profile
    if options.pytest:
        raise SelectionError("--profile does not start pytest: leave out -- and all that follows it.")
    of_records = {
        "--resume": request.resume,
        "--isolate": request.isolate,
        "--time-limit": request.time_limit is not None,
        "--shard": request.shard != WHOLE,
    }
    if given := [option for option, is_given in of_records.items() if is_given]:
        raise SelectionError(f"--profile writes no records, so it cannot be combined with {' and '.join(given)}.")
    operations = [suite for suite in suites if isinstance(suite, Suite)]
    if training := [suite.name for suite in suites if suite not in operations]:
        raise SelectionError(f"--profile cannot profile a suite that trains: leave out {', '.join(training)}.")
    if why := profiler.missing(mode, device):
        raise SelectionError(why)
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    directory = request.out or reports_of(checkout) / f"{started}-profile-{mode}"
    points = profiler.points(
        operations, request.preset, device, implementations=request.implementations, cases=request.cases
    )
    if mode in profiler.TOOLS:
        return _under_a_tool(mode, options.suite, request, points, directory)
    by_name = {suite.name: suite for suite in operations}
    outcome = profiler.profile(mode, points, by_name, request.preset, device, directory)
    _print(outcome, points, mode)
    return FAILURE if outcome.failed else DONE


def _under_a_tool(mode: str, suites: list[str], request: Request, points: list[Point], directory: Path) -> int:
    from colt5_bench.profiling import nsight  # Imported here, because it needs pandas, which takes long to import.

    start = {"ncu": nsight.ncu, "nsys": nsight.nsys}[mode]
    try:
        seen = start([*(f"--suite={name}" for name in suites), *request.arguments()], points, directory)
    except nsight.NsightError as error:
        print(f"--profile {mode}: {error}", file=sys.stderr)
        return FAILURE
    for file in seen.files:
        print(f"profile: {file}")
    return DONE if seen.complete else FAILURE


def _print(outcome: Outcome, points: list[Point], mode: str) -> None:
    for point, why in outcome.skipped.items():
        print(f"skipped: {' '.join(point)}: {why}")
    for point, why in outcome.failed.items():
        print(f"failed: {' '.join(point)}: {why}", file=sys.stderr)
    for file in outcome.files:
        print(f"profile: {file}")
    seen = len(points) - len(outcome.skipped) - len(outcome.failed)
    print(f"{mode}: {seen} of {len(points)} profiled, {len(outcome.skipped)} skipped, {len(outcome.failed)} failed")
