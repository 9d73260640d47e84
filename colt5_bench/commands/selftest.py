"""`python bench.py selftest`: check that the harness measures right on this machine."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from colt5_bench.commands import DONE, FAILURE, _trials
from colt5_bench.compare import simulation
from colt5_bench.loading import choose_device, load_suites
from colt5_bench.request import declare
from colt5_bench.selection import SelectionError, split_paths
from colt5_bench.selftest import checks
from colt5_bench.selftest.checks import Check, Report
from colt5_bench.startup import check, find_checkout

EXAMPLES = """\
  python bench.py selftest
  python bench.py selftest --device cpu --json
  python bench.py selftest --statistics
  python bench.py selftest --comparisons 30 --suite combine --preset smoke --device cpu
  python bench.py selftest --comparisons 10 --planted 0.5 --suite combine --preset smoke --device cpu

A check is unclear if noise hides the answer; this is no failure. On an idle machine no check is unclear.

exit status:
  0    no check failed
  1    a check failed
  2    wrong usage
  3    with --comparisons: something could not be measured
  4    with --comparisons: too few planted slowdowns are found, and noise hides the others
  130  with --comparisons: interrupted; the complete comparisons are summarised
"""

STYLES = {"passed": "green", "failed": "red", "unclear": "yellow", "skipped": "dim"}


def configure(parser: argparse.ArgumentParser) -> None:
    declare(parser.add_argument, ("device",))
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--statistics",
        action="store_true",
        help="measure nothing; simulate comparisons under several kinds of noise, and print as Markdown how many have "
        "false alarms, and the shares of slowdowns that are found / called the same",
    )
    kinds.add_argument("--json", action="store_true", help="print figures and limits for programs")
    _trials.configure(parser, kinds)


def main(options: argparse.Namespace) -> int:
    checkout = find_checkout(Path.cwd().resolve())
    check(checkout)
    if options.statistics:
        rows = list(simulation.simulate())
        print(simulation.markdown(rows))
        return DONE if all(map(simulation.meets_aim, rows)) else FAILURE
    if options.comparisons is not None:
        options.suite, options.files = split_paths(options.suite)
        return _trials.run(options, checkout, load_suites(checkout, options.files))
    if options.suite or options.planted is not None:
        raise SelectionError("--suite and --planted need --comparisons N.")
    report = checks.run(choose_device(options.device))
    if options.json:
        print(json.dumps({**asdict(report), "passed": report.passed}, indent=2))
    else:
        _print(report, Console())
    return DONE if report.passed else FAILURE


def _print(report: Report, console: Console) -> None:
    table = Table(title=f"selftest on {report.device}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("check", "figure", "limit", "", "outcome"):
        table.add_column(name, justify="right" if name in ("figure", "limit") else "left")
    for each in report.checks:
        outcome = f"[{STYLES[each.outcome]}]{each.outcome}[/]"
        table.add_row(each.name, _number(each, each.figure), _number(each, each.limit), each.unit, outcome)
    console.print(table)
    for each in report.checks:
        if each.note:
            console.print(f"  {each.name}: {each.note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"noise: samples of one call are {report.noise:.1%} apart (interquartile range over median)")


def _number(each: Check, value: float | None) -> str:
    """A count as a number, a share as a percentage."""
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, int) else f"{value:+.2%}"
