"""A comparison of revisions, which are measured in turns until each verdict is settled."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from colt5_bench.commands._comparison import Comparer, expression, in_scope
from colt5_bench.compare import Comparison, Finding
from colt5_bench.compare.revisions import MOST_TURNS, TURNS, Alternating
from colt5_bench.loading import invite
from colt5_bench.records.parts import read
from colt5_bench.records.samples import runs_that_confirm
from colt5_bench.request import declare
from colt5_bench.selection import Guest, SelectionError, pick, split_guests
from colt5_bench.startup import is_outside, reports_of
from colt5_bench.suite import Grid

MOST_SHOWN = 4
"""Times that a line names of those that are not settled."""


def add_measuring(parser: argparse._ArgumentGroup) -> None:
    declare(parser.add_argument, ("preset",))
    parser.add_argument(
        "--rounds",
        type=int,
        default=TURNS,
        metavar="N",
        help="turns of each revision (default: %(default)s); unclear or worse cases get as many more turns, until "
        f"they are settled, up to {MOST_TURNS} in all",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="directory for the results (default: reports/<utc-timestamp>-<command>)"
    )


def check_measuring(options: argparse.Namespace, suites: Mapping[str, Grid]) -> None:
    """Refuse what cannot be measured, and tell guests from names.

    Raises:
        SelectionError: no suite is named, one is named that there is not or that a checkout has, the number of rounds
            is none, or a guest cannot be loaded.
    """
    if not options.suite:
        raise SelectionError("revisions are measured: name at least one suite with --suite.")
    for name in options.suite:
        pick("suite", name, suites)
    for name, file in options.files.items():
        if not is_outside(file):
            raise SelectionError(
                f"--suite {file}: a file in a folder suites/ belongs to one checkout, but each revision has its own. "
                f"Move the file to another folder, or use --suite {name} if both revisions have it."
            )
    if options.rounds < 1:
        raise SelectionError(f"--rounds must be at least 1, got {options.rounds}.")
    options.impl, options.guests = split_guests(options.impl)
    for name in options.suite:
        invite(suites[name], options.guests)


def place(options: argparse.Namespace, checkout: Path, command: str) -> Path:
    """Where results go.

    Raises:
        SelectionError: there are results already.
    """
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    directory: Path = options.out or reports_of(checkout) / f"{started}-{command}"
    if directory.exists() and any(directory.rglob("*.jsonl")):
        raise SelectionError(f"{directory} already has results: choose a directory without results with --out.")
    return directory.resolve()


def compare_in_turns(
    options: argparse.Namespace, checkout: Path, comparer: Comparer, revisions: Sequence[str], directory: Path
) -> Comparison:
    """Measure two revisions in turns and compare them.

    Args:
        options: those of `SELECTING` and `add_measuring`, `device`, and `files`, by the names of suites that stand
            outside of the checkout. Such a file is the same for both revisions.
        checkout: of the repository.
        comparer: compares what was measured.
        revisions: the commit before and the one after.
        directory: where the results go.

    Raises:
        MeasuringError: a run ended otherwise than with results.
    """
    selection = [
        *("--preset", options.preset, "--device", options.device),
        *(f"--impl={name}" for name in options.impl if name not in {guest.name for guest in options.guests}),
        *(f"--impl={_of_each(guest, checkout)}" for guest in options.guests),
    ]

    def measure(suites: Iterable[str], cases: str) -> None:
        for _ in range(options.rounds):
            alternating.measure([str(options.files.get(name, name)) for name in suites], cases)

    with Alternating(checkout, revisions, selection, directory) as alternating:
        measure(options.suite, options.cases)
        comparison = _compare(alternating, comparer, options)
        while alternating.turns < MOST_TURNS:
            # Every turn is a run more of what is unclear, or worse by few runs.
            runs = runs_that_confirm(comparison.times)
            if not (to_repeat := comparison.cases_to_repeat(runs)):
                break
            _say_what_is_unsettled(comparison.unsettled(runs), alternating.turns)
            cases = dict.fromkeys(case for cases in to_repeat.values() for case in cases)
            measure(to_repeat, expression(cases, dict.fromkeys(each.case for each in comparison.findings)))
            comparison = _compare(alternating, comparer, options)
    return comparison


def _say_what_is_unsettled(findings: Sequence[Finding], turns: int) -> None:
    """Why a comparison goes on: the times, and the intervals that they may have changed by."""
    shown = [
        f"{each.implementation} {each.metric} {each.direction} {each.interval_text}" for each in findings[:MOST_SHOWN]
    ]
    more = f" and {len(findings) - len(shown)} more" if len(findings) > len(shown) else ""
    print(f"still unclear after {turns} rounds: {'; '.join(shown)}{more}", file=sys.stderr)


def _of_each(guest: Guest, checkout: Path) -> Guest:
    """A file within the checkout is that of each revision."""
    if guest.file is None or not guest.file.is_relative_to(checkout):
        return guest
    return replace(guest, place=str(guest.file.relative_to(checkout)))


def _compare(alternating: Alternating, comparer: Comparer, options: argparse.Namespace) -> Comparison:
    before, after = map(read, alternating.places)
    return comparer(before, after, in_scope(options))
