"""`python bench.py compare A B`: what became better or worse, between saved runs or revisions."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from colt5_bench.commands import UNMEASURED
from colt5_bench.commands._comparison import STATUSES, Comparer, add_options, expression, in_scope, status_of
from colt5_bench.compare import Comparison, read_baseline
from colt5_bench.compare.output import FORMATS, append_summary, write
from colt5_bench.compare.revisions import MOST_TURNS, TURNS, Alternating, MeasuringError, revision
from colt5_bench.parts import read
from colt5_bench.samples import runs_that_confirm
from colt5_bench.selection import SelectionError, load_suites, pick
from colt5_bench.startup import check, find_checkout
from colt5_bench.suite import PRESETS

SUMMARY = "say what became better or worse: between two saved runs, or two revisions that are measured in turns"
EXAMPLES = f"""\
  python bench.py compare reports/baselines/nvidia-h200.jsonl reports/after
  python bench.py compare reports/before reports/after --suite coor_descent -k n=4096 --format markdown
  python bench.py compare main my-branch --suite coor_descent --impl reference --impl ours

{STATUSES}"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", metavar="A", help="what was: a results file, a directory with any, or a revision")
    parser.add_argument("run", metavar="B", help="what is: likewise")
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="only this; may be repeated")
    parser.add_argument("--impl", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument(
        "-k", dest="cases", default="", metavar="EXPR", help="only cases with this in their id; and, or, not, ( )"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the output (default: %(default)s)")
    add_options(parser)
    measuring = parser.add_argument_group("of revisions, which are measured")
    measuring.add_argument("--preset", choices=PRESETS, default="default", help="how much (default: %(default)s)")
    measuring.add_argument(
        "--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>"
    )
    measuring.add_argument(
        "--rounds",
        type=int,
        default=TURNS,
        metavar="N",
        help="turns of each (default: %(default)s); cases that are unclear then, or worse, get as many more "
        f"until they are settled, but no more than {MOST_TURNS} in all",
    )
    measuring.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: reports/<utc-timestamp>-compare)"
    )


def main(options: argparse.Namespace) -> int:
    checkout = find_checkout(Path.cwd().resolve())
    check(checkout)
    suites = load_suites(checkout)
    comparer = Comparer.of(options, suites)
    saved = [Path(name).exists() for name in (options.baseline, options.run)]
    if all(saved):
        comparison = comparer(read_baseline(Path(options.baseline)), read(Path(options.run)), in_scope(options))
    elif any(saved):
        there, other = (options.baseline, options.run) if saved[0] else (options.run, options.baseline)
        raise SelectionError(f"{there} is a saved run and {other} is none: compare two runs, or two revisions.")
    else:
        for name in options.suite:
            pick("suite", name, suites)
        try:
            comparison = _compare_revisions(options, checkout, comparer)
        except MeasuringError as error:
            print(f"compare: {error}", file=sys.stderr)
            return UNMEASURED
    write(comparison, options.format)
    if options.format == "text":
        append_summary(comparison)
    return status_of(comparison)


def _compare_revisions(options: argparse.Namespace, checkout: Path, comparer: Comparer) -> Comparison:
    revisions = [revision(checkout, name) for name in (options.baseline, options.run)]
    if not options.suite:
        raise SelectionError("revisions are measured: say which suites with --suite.")
    if options.rounds < 1:
        raise SelectionError(f"--rounds has to be at least 1, got {options.rounds}.")
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    directory = options.out or checkout / "reports" / f"{started}-compare"
    if directory.exists() and any(directory.rglob("*.jsonl")):
        raise SelectionError(f"{directory} has results already; --out has to name a place without.")
    selection = [
        *("--preset", options.preset, "--device", options.device),
        *(f"--impl={name}" for name in options.impl),
    ]
    with Alternating(checkout, revisions, selection, directory.resolve()) as alternating:
        for _ in range(options.rounds):
            alternating.measure(options.suite, options.cases)
        comparison = _compare(alternating, comparer, options)
        while alternating.turns < MOST_TURNS:
            # Every turn is a run more of what is unclear, or worse by few runs.
            if not (doubtful := comparison.doubtful(runs_that_confirm(comparison.times))):
                break
            cases = expression([case for cases in doubtful.values() for case in cases])
            for _ in range(options.rounds):
                alternating.measure(list(doubtful), cases)
            comparison = _compare(alternating, comparer, options)
    print(f"results: {directory}", file=sys.stderr)
    return comparison


def _compare(alternating: Alternating, comparer: Comparer, options: argparse.Namespace) -> Comparison:
    before, after = map(read, alternating.places)
    return comparer(before, after, in_scope(options))
