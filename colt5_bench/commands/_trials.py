"""Real comparisons with a known result: of a revision with itself, or with a slower copy."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import torch

from colt5_bench.case import FORWARD
from colt5_bench.commands import DONE, FAILURE, INTERRUPTED, UNDECIDED, UNMEASURED
from colt5_bench.commands._comparison import Comparer, add_thresholds, thresholds_file
from colt5_bench.commands._in_turns import add_measuring, check_measuring, compare_in_turns, place
from colt5_bench.compare import Comparison, Finding, Rules, load_rules
from colt5_bench.compare.findings import Verdict
from colt5_bench.compare.revisions import MeasuringError, revision, with_appended
from colt5_bench.compare.simulation import FEWEST_FOUND, MOST_FALSE_ALARMS
from colt5_bench.loading import choose_device
from colt5_bench.measuring.rounds import CPU_COLUMNS, GPU_TIME_COLUMNS
from colt5_bench.records.results import Record
from colt5_bench.report.comparison import as_json
from colt5_bench.report.page import OURS
from colt5_bench.request import SELECTING, declare
from colt5_bench.selection import SelectionError
from colt5_bench.suite import Grid

Outcome = Literal["false alarm", "undecided", "quiet", "found", "missed"]

PLANT = """

from colt5_bench.selftest.planted import slowed  # noqa: E402

SUITE = slowed(SUITE, {name!r}, {share!r})
"""
"""Text that is appended to a suite in the slower copy."""


def configure(parser: argparse.ArgumentParser, kinds: argparse._MutuallyExclusiveGroup) -> None:
    kinds.add_argument(
        "--comparisons",
        type=int,
        metavar="N",
        help="compare HEAD with itself N times, as `compare HEAD HEAD` does; count false alarms",
    )
    group = parser.add_argument_group("options of --comparisons")
    group.add_argument(
        "--planted",
        type=float,
        metavar="SHARE",
        help=f"compare HEAD with a copy in which each call of {OURS} takes longer by this share, 0.1 for 10 %%; count "
        "how often this is found",
    )
    declare(parser.add_argument, SELECTING)
    add_measuring(group)
    add_thresholds(parser)


@dataclass(frozen=True)
class Trial:
    """Result of a comparison, and the right result."""

    outcome: Outcome
    alarms: int
    """False regressions."""

    verdicts: Counter[Verdict]
    """Verdicts on slowed times if there are any, else on all times."""

    @classmethod
    def of(cls, comparison: Comparison, slowed: tuple[str, ...]) -> "Trial":
        """Outcome of a comparison with a known result.

        Args:
            comparison: comparison of a revision with itself or with a slower copy.
            slowed: time columns that are slowed down in the copy; empty if nothing is.
        """
        alarms = [finding for finding in comparison.regressions if not (slowed and finding.implementation == OURS)]
        times = [finding for finding in comparison.findings if finding.interval and _counts(finding, slowed)]
        verdicts = Counter(finding.verdict for finding in times)
        undecided: Outcome = "undecided" if any(finding.is_undecided for finding in times) else "quiet"
        if alarms:
            return cls("false alarm", len(alarms), verdicts)
        if slowed:
            return cls("found" if verdicts["worse"] else "undecided" if verdicts["unclear"] else "missed", 0, verdicts)
        return cls(undecided, 0, verdicts)

    def __str__(self) -> str:
        return f"{self.outcome:<11}  {_format_verdicts(self.verdicts)}"


def _counts(finding: Finding, slowed: tuple[str, ...]) -> bool:
    return not slowed or (finding.implementation == OURS and finding.metric in slowed)


def _format_verdicts(verdicts: Mapping[Verdict, int]) -> str:
    of: tuple[Verdict, ...] = ("worse", "unclear", "better", "same")
    return ", ".join(f"{verdicts.get(verdict, 0):,} {verdict}" for verdict in of)


def run(options: argparse.Namespace, checkout: Path, suites: Mapping[str, Grid]) -> int:
    """All comparisons, with a line for each and a summary at the end, also after an interruption."""
    rules = load_rules(thresholds_file(options))
    slowed = _slowed_columns(options, suites, rules)
    comparer = Comparer(rules, {name: suite.reference for name, suite in suites.items()}, any_machine=False)
    directory = place(options, checkout, "selftest")
    before = after = revision(checkout, "HEAD")
    if slowed:
        texts = {f"suites/{name}.py": PLANT.format(name=OURS, share=options.planted) for name in options.suite}
        after = with_appended(checkout, before, texts)
    trials: list[Trial] = []
    ended = DONE
    try:
        for number in range(1, options.comparisons + 1):
            place_of_one = directory / f"comparison-{number:0{len(str(options.comparisons))}}"
            print(f"comparison {number} of {options.comparisons}", file=sys.stderr)
            comparison = compare_in_turns(options, checkout, comparer, (before, after), place_of_one)
            (place_of_one / "comparison.json").write_text(as_json(comparison), encoding="utf-8")
            trials.append(Trial.of(comparison, slowed))
            print(f"{number:4}  {trials[-1]}  (load {os.getloadavg()[0]:.1f})", flush=True)
    except KeyboardInterrupt:
        ended = INTERRUPTED
    except MeasuringError as error:
        print(f"selftest: {error}", file=sys.stderr)
        ended = UNMEASURED
    for line in summary_lines(trials, options.planted):
        print(line)
    print(f"results: {directory}", file=sys.stderr)
    return ended or status_of(trials, planted=bool(slowed))


def _slowed_columns(options: argparse.Namespace, suites: Mapping[str, Grid], rules: Rules) -> tuple[str, ...]:
    """The time columns in which a planted slowdown has to be found: on a GPU, those of GPU time.

    Raises:
        SelectionError: the options are not valid together.
    """
    check_measuring(options, suites)
    if options.comparisons < 1:
        raise SelectionError(f"--comparisons must be at least 1, got {options.comparisons}.")
    if options.planted is None:
        return ()
    device = choose_device(options.device)
    columns = GPU_TIME_COLUMNS if device.type == "cuda" else CPU_COLUMNS
    if options.impl and OURS not in options.impl:
        raise SelectionError(
            f"--planted slows {OURS} down: --impl must name {OURS}, too, got {', '.join(options.impl)}."
        )
    for name in options.suite:
        if name in options.files:
            raise SelectionError(
                f"--planted changes a copy of the checkout, which does not contain {options.files[name]}: "
                "name a suite of the checkout, or leave out --planted."
            )
        if OURS not in suites[name].implementations or not suites[name].timed:
            raise SelectionError(
                f"--planted slows {OURS} down, but suite {name} takes no times of {OURS}: leave out this suite."
            )
        allowed = _most_allowed(name, device, columns, rules)
        if not allowed < options.planted < inf:
            raise SelectionError(
                f"--planted must be finite and above {allowed:g}, which {thresholds_file(options)} allows for times of "
                f"{OURS} in suite {name}, got {options.planted:g}: choose another share or other --thresholds."
            )
    return columns


def _most_allowed(suite: str, device: torch.device, columns: tuple[str, ...], rules: Rules) -> float:
    record = Record(suite, "", {}, OURS, FORWARD, device.type, "ok")
    thresholds = rules.of(record, device.type)
    return max(getattr(thresholds, column) for column in columns)


def summary_lines(trials: list[Trial], planted: float | None) -> Iterator[str]:
    """Summary of all comparisons."""
    outcomes = Counter(trial.outcome for trial in trials)
    verdicts: Counter[Verdict] = sum((trial.verdicts for trial in trials), Counter())
    expected: tuple[Outcome, ...] = ("quiet",) if planted is None else ("found", "missed")
    shown: tuple[Outcome, ...] = (*expected, "undecided", "false alarm")
    what = "of HEAD with itself" if planted is None else f"with {planted:.0%} planted"
    yield f"{len(trials)} comparisons {what}: {', '.join(f'{outcomes[outcome]} {outcome}' for outcome in shown)}"
    yield f"{sum(verdicts.values()):,} {'times' if planted is None else 'slowed times'}: {_format_verdicts(verdicts)}"


def status_of(trials: list[Trial], *, planted: bool) -> int:
    """The exit status: false alarms or misses fail, and a slowdown that noise hides is undecided."""
    outcomes = Counter(trial.outcome for trial in trials)
    if outcomes["false alarm"] > MOST_FALSE_ALARMS * len(trials):
        return FAILURE
    if not planted or outcomes["found"] >= FEWEST_FOUND * len(trials):
        return DONE
    return FAILURE if outcomes["missed"] > (1 - FEWEST_FOUND) * len(trials) else UNDECIDED
