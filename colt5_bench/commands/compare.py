"""`python bench.py compare A B`: show what became better or worse between saved runs or revisions."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from colt5_bench.commands import UNMEASURED
from colt5_bench.commands._comparison import STATUSES, Comparer, add_options, in_scope, status_of
from colt5_bench.commands._in_turns import add_measuring, check_measuring, compare_in_turns, place
from colt5_bench.compare import Comparison, read_baseline
from colt5_bench.compare.revisions import MeasuringError, revision
from colt5_bench.loading import load_suites
from colt5_bench.records.parts import read
from colt5_bench.report.comparison import FORMATS, append_summary, write
from colt5_bench.request import SELECTING, declare
from colt5_bench.selection import SelectionError, split_guests, split_paths
from colt5_bench.startup import check, find_checkout
from colt5_bench.suite import Grid

EXAMPLES = f"""\
  python bench.py compare reports/baselines/nvidia-h200.jsonl reports/after
  python bench.py compare reports/before reports/after --suite coor_descent -k n=4096 --format markdown
  python bench.py compare main my-branch --suite coor_descent --impl reference --impl ours
  python bench.py compare main my-branch --suite my_suite.py

{STATUSES}"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "baseline", metavar="A", help="the old side: a results file, a directory with results, or a revision"
    )
    parser.add_argument("run", metavar="B", help="the new side, of the same kind")
    declare(parser.add_argument, SELECTING)
    parser.add_argument("--format", choices=FORMATS, default="text", help="format of the output (default: %(default)s)")
    add_options(parser)
    measuring = parser.add_argument_group("options for revisions, which are measured")
    add_measuring(measuring)
    declare(measuring.add_argument, ("device",))


def main(options: argparse.Namespace) -> int:
    checkout = find_checkout(Path.cwd().resolve())
    check(checkout)
    options.suite, options.files = split_paths(options.suite)
    suites = load_suites(checkout, options.files)
    comparer = Comparer.of(options, suites)
    saved = [Path(name).exists() for name in (options.baseline, options.run)]
    if any(saved) and split_guests(options.impl)[1]:
        raise SelectionError(
            "--impl NAME=... is for a function to be measured, and saved runs are not measured: use --impl NAME."
        )
    if all(saved):
        comparison = comparer(read_baseline(Path(options.baseline)), read(Path(options.run)), in_scope(options))
    elif any(saved):
        there, other = (options.baseline, options.run) if saved[0] else (options.run, options.baseline)
        raise SelectionError(f"{there} is a saved run, but {other} is not: compare two saved runs, or two revisions.")
    else:
        try:
            comparison = _compare_revisions(options, checkout, comparer, suites)
        except MeasuringError as error:
            print(f"compare: {error}", file=sys.stderr)
            return UNMEASURED
    write(comparison, options.format)
    if options.format == "text":
        append_summary(comparison)
    return status_of(comparison)


def _compare_revisions(
    options: argparse.Namespace, checkout: Path, comparer: Comparer, suites: Mapping[str, Grid]
) -> Comparison:
    revisions = [revision(checkout, name) for name in (options.baseline, options.run)]
    check_measuring(options, suites)
    directory = place(options, checkout, "compare")
    comparison = compare_in_turns(options, checkout, comparer, revisions, directory)
    print(f"results: {directory}", file=sys.stderr)
    return comparison
