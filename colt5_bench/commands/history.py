"""`python bench.py history`: chosen cases over saved runs and revisions."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from colt5_bench.commands import DONE
from colt5_bench.commands.report import load_views, write_all_plots
from colt5_bench.records.derived import measured_under
from colt5_bench.records.parts import read
from colt5_bench.records.results import Record, Run
from colt5_bench.report.layout import RUN
from colt5_bench.report.page import write_page
from colt5_bench.request import SELECTING, declare
from colt5_bench.selection import SelectionError, case_filter, pick

EXAMPLES = """\
  python bench.py history
  python bench.py history reports/baselines reports/after --suite coor_descent --impl ours -k n=4096
"""

SAVED = Path("reports")
"""Directory of saved runs."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=Path,
        nargs="*",
        default=[SAVED],
        metavar="RUN",
        help=f"results files, or directories with results (default: {SAVED})",
    )
    declare(parser.add_argument, SELECTING)
    parser.add_argument(
        "--out",
        type=Path,
        default=SAVED / "history",
        metavar="DIR",
        help="directory for history.html and the plots (default: %(default)s)",
    )


def main(options: argparse.Namespace) -> int:
    runs = [read(path) for path in options.runs]
    everything = [record for run in runs for record in run.records]
    for name in options.suite:
        pick("suite", name, dict.fromkeys(record.suite for record in everything))
    for name in options.impl:
        pick("implementation", name, dict.fromkeys(record.implementation for record in everything))
    records = sorted(_placed(runs, _chosen(options)), key=lambda record: str(record.fields[RUN]))
    if not records:
        raise SelectionError(f"no record matches --suite {options.suite}, --impl {options.impl}, -k {options.cases!r}.")

    environments = {key: environment for run in runs for key, environment in run.environments.items()}
    measured = {record.environment for record in records}
    history = Run(
        options.out,
        {key: environment for key, environment in environments.items() if key in measured},
        records,
        [file for run in runs for file in run.cut_off],
    )
    views = {name: replace(view, x=RUN) for name, view in load_views().items()}
    plots = write_all_plots(history, views, options.out)
    page = write_page(options.out / "history.html", history, views, title="History")
    print(f"plots: {len(plots)} files in {options.out}")
    print(f"history of {len({record.fields[RUN] for record in records})} runs: {page}")
    return DONE


def _chosen(options: argparse.Namespace) -> Callable[[Record], bool]:
    wanted = case_filter(options.cases)
    return lambda record: (
        (not options.suite or record.suite in options.suite)
        and (not options.impl or record.implementation in options.impl)
        and wanted(record.case)
    )


def _placed(runs: list[Run], chosen: Callable[[Record], bool]) -> Iterator[Record]:
    """The chosen records, each with its run as a field, for the horizontal axis."""
    records = [(run, record) for run in runs for record in run.records if chosen(record)]
    measured = {record.environment: run.environments.get(record.environment, {}) for run, record in records}
    for precision in PRECISIONS:
        names = {key: measured_under(environment, precision) for key, environment in measured.items()}
        if len(set(names.values())) == len(names):
            break
    for run, record in records:
        yield replace(record, fields={RUN: names[record.environment] or run.path.stem, **record.fields})


PRECISIONS = (len("2026-11-23T22:05"), len("2026-11-23T22:05:36"), len("2026-11-23T22:05:36.123"))
"""Lengths of the time of a run as text. The shortest one that distinguishes the runs is used."""
