"""A comparison of revisions that are measured in turns until each verdict is settled."""

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
"""Most unsettled times that a line names."""


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
    """Check the options, and separate guests from names.

    Raises:
        SelectionError: no suite is named, a suite does not exist or is a file of a checkout, the number of rounds is
            not valid, or a guest cannot be loaded.
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
    """The directory for results.

    Raises:
        SelectionError: the directory has results already.
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
        options: options of `SELECTING` and `add_measuring`, `device`, and `files`, by the names of suites that are
            outside of the checkout. Both revisions use the same file.
        checkout: checkout of the repository.
        comparer: compares the results.
        revisions: the old commit and the new one.
        directory: directory for the results.

    Raises:
        MeasuringError: a run ended without results.
    """
    selection = [
        *("--preset", options.preset, "--device", options.device),
        *(f"--impl={name}" for name in options.impl if name not in {guest.name for guest in options.guests}),
        *(f"--impl={_of_each(guest, checkout)}" for guest in options.guests),
    ]

    def measure(suites: Iterable[str], cases: str, rounds: int = options.rounds) -> None:
        for _ in range(rounds):
            alternating.measure([str(options.files.get(name, name)) for name in suites], cases)

    with Alternating(checkout, revisions, selection, directory) as alternating:
        measure(options.suite, options.cases)
        comparison = _compare(alternating, comparer, options)
        while alternating.turns < MOST_TURNS:
            # Every turn adds a run of times that are unclear, or worse by too few runs.
            runs = runs_that_confirm(comparison.times)
            if not (to_repeat := comparison.cases_to_repeat(runs)):
                break
            _say_what_is_unsettled(comparison.unsettled(runs), alternating.turns)
            cases = dict.fromkeys(case for cases in to_repeat.values() for case in cases)
            others = dict.fromkeys(each.case for each in comparison.findings)
            # No more turns than are needed to confirm a worse time, or than are allowed.
            limits = (limit - alternating.turns for limit in (runs, MOST_TURNS))
            rounds = min(options.rounds, *(turns for turns in limits if turns > 0))
            measure(to_repeat, expression(cases, others), rounds)
            comparison = _compare(alternating, comparer, options)
    return comparison


def _say_what_is_unsettled(findings: Sequence[Finding], turns: int) -> None:
    """Print the unsettled times and the intervals of their changes."""
    shown = [
        f"{each.implementation} {each.metric} {each.direction} {each.interval_text}" for each in findings[:MOST_SHOWN]
    ]
    more = f" and {len(findings) - len(shown)} more" if len(findings) > len(shown) else ""
    print(f"still unclear after {turns} rounds: {'; '.join(shown)}{more}", file=sys.stderr)


def _of_each(guest: Guest, checkout: Path) -> Guest:
    """The guest for any revision. A file within the checkout becomes the file of the revision."""
    if guest.file is None or not guest.file.is_relative_to(checkout):
        return guest
    return replace(guest, place=str(guest.file.relative_to(checkout)))


def _compare(alternating: Alternating, comparer: Comparer, options: argparse.Namespace) -> Comparison:
    before, after = map(read, alternating.places)
    return comparer(before, after, in_scope(options))
