"""`python bench.py run --profile MODE`: look into what a run would measure."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from colt5_bench import nsight, profiling
from colt5_bench.commands import DONE, FAILURE
from colt5_bench.profiling import Outcome, Point
from colt5_bench.selection import SelectionError
from colt5_bench.suite import Suite


def add_option(parser: argparse.ArgumentParser) -> None:
    modes = "; ".join(f"{mode}: {gives}" for mode, gives in profiling.MODES.items())
    parser.add_argument(
        "--profile", choices=profiling.MODES, metavar="MODE", help=f"profile in place of measuring. {modes}"
    )


def main(options: argparse.Namespace, suites: list[Suite], device: torch.device, checkout: Path) -> int:
    """Profile what was selected; no time is recorded."""
    mode = options.profile
    if options.pytest:
        raise SelectionError("what follows -- is for pytest, which --profile does not start: leave it out.")
    of_records = {name: getattr(options, name) for name in ("resume", "isolate", "time_limit", "shard")}
    if given := [f"--{name.replace('_', '-')}" for name, value in of_records.items() if value]:
        raise SelectionError(f"--profile records nothing that {' and '.join(given)} could be for: leave it out.")
    if why := profiling.missing(mode, device):
        raise SelectionError(why)
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    directory = options.out or checkout / "reports" / f"{started}-profile-{mode}"
    points = profiling.points(suites, options.preset, device, implementations=options.impl, cases=options.cases)
    if mode in profiling.TOOLS:
        return _under_a_tool(options, points, directory)
    by_name = {suite.name: suite for suite in suites}
    outcome = profiling.profile(mode, points, by_name, options.preset, device, directory)
    _print(outcome, points, mode)
    return FAILURE if outcome.failed else DONE


def _under_a_tool(options: argparse.Namespace, points: list[Point], directory: Path) -> int:
    selection = [
        *(f"--suite={name}" for name in options.suite),
        *(f"--impl={name}" for name in options.impl),
        *("--preset", options.preset, "--device", options.device, "-k", options.cases),
    ]
    start = {"ncu": nsight.ncu, "nsys": nsight.nsys}[options.profile]
    try:
        seen = start(selection, points, directory)
    except nsight.NsightError as error:
        print(f"--profile {options.profile}: {error}", file=sys.stderr)
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
