"""Result of a comparison: a finding for each figure of each case."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log1p, sqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from colt5_bench.records.derived import Interval, short, spans_one

Verdict = Literal["failed", "missing", "worse", "unclear", "new", "better", "same"]

VERDICTS: tuple[Verdict, ...] = ("failed", "missing", "worse", "unclear", "new", "better", "same")
"""Verdicts in the order of display. Findings that are the same are only counted."""

ON_TIMES: Mapping[float, Verdict] = {1: "worse", 0: "same", -1: "better"}

REGRESSIONS: tuple[Verdict, ...] = ("failed", "missing", "worse")

Figure = float | str | None
"""A number, a status, or None."""

Unit = Literal["s", "B", "x", "error", ""]
"""Unit of a figure: seconds, bytes, a speed-up, a distance from fp64, or a plain number."""


@dataclass(frozen=True)
class Finding:
    """Result of a comparison for one figure of one case."""

    verdict: Verdict
    suite: str
    case: str
    direction: str
    implementation: str

    metric: str
    """Name of the figure. It is `status`; a time column, or `speed-up` with one; `peak` and `saved` memory; the `error`
    of a tensor; a kernel, its target and a fact; or a metric of the suite."""

    baseline: Figure
    now: Figure
    unit: Unit = ""

    interval: tuple[float, float] | None = None
    """95 % interval of a ratio: new time over old, or old speed-up over new. Above 1 is worse."""

    threshold: float | None = None
    """Largest relative increase of a time that counts as the same."""

    baseline_runs: int | None = None
    """Number of runs of the baseline with this time."""

    runs: int | None = None
    """Number of runs on the new side."""

    note: str = ""

    label: str | None = None
    """The fields of the case that differ within the suite, as text."""

    @property
    def is_regression(self) -> bool:
        return self.verdict in REGRESSIONS

    @property
    def is_undecided(self) -> bool:
        """True if it may be a regression: the interval reaches beyond the threshold."""
        return self.verdict == "unclear" and self.interval is not None and self.interval[1] > 1 + (self.threshold or 0)

    def may_settle(self, runs: int) -> bool:
        """True if an unclear time may become clear with so many runs on the new side.

        More of them average out their own noise. The noise of the baseline remains.
        """
        if self.interval is None or self.baseline_runs is None or self.runs is None:
            return False
        low, high = np.log(self.interval)
        of_baseline = 1 / self.baseline_runs
        reach = (high - low) / 2 * sqrt((of_baseline + 1 / runs) / (of_baseline + 1 / self.runs))
        bound = log1p(self.threshold or 0)
        return bool(reach <= bound or (low + high) / 2 - reach > bound)

    @property
    def baseline_text(self) -> str:
        return _format_figure(self.baseline, self.unit)

    @property
    def now_text(self) -> str:
        return _format_figure(self.now, self.unit)

    @property
    def change(self) -> str:
        """`+12.3 %` of the baseline, or only its interval if there is no significant change. It is empty without two
        numbers that have a ratio."""
        before, after = self.baseline, self.now
        if not isinstance(before, int | float) or not isinstance(after, int | float) or not before:
            return ""
        if (interval := self.change_interval) and spans_one(interval):
            return self.interval_text
        return f"{100 * (after / before - 1):+.1f} %"

    @property
    def change_interval(self) -> Interval | None:
        """Interval of the new figure over the one of the baseline. A speed-up has the inverse ratio."""
        if self.interval is None or self.unit != "x":
            return self.interval
        low, high = self.interval
        return 1 / high, 1 / low

    @property
    def interval_text(self) -> str:
        """`+8.0 to +16.2 %`; empty without an interval."""
        if (interval := self.change_interval) is None:
            return ""
        return f"{100 * (interval[0] - 1):+.1f} to {100 * (interval[1] - 1):+.1f} %"


@dataclass(frozen=True)
class Comparison:
    """All findings, and notes on them."""

    findings: Sequence[Finding]

    notes: Sequence[str] = field(default_factory=tuple)
    """Differences between the conditions of the two runs, and the figures that are therefore not compared."""

    @property
    def regressions(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_regression]

    @property
    def undecided(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_undecided]

    @property
    def compared(self) -> bool:
        """True if any finding is not new."""
        return any(finding.verdict != "new" for finding in self.findings)

    @property
    def counts(self) -> str:
        """`1 worse, 12 same`, the worst first."""
        counts = Counter(finding.verdict for finding in self.findings)
        named = [f"{counts[verdict]:,} {verdict}" for verdict in VERDICTS if counts[verdict]]
        return ", ".join(named) or "nothing to compare"

    def notable(self) -> list[Finding]:
        """Findings that are neither the same nor new, the worst first."""
        ordered = sorted(self.findings, key=lambda finding: VERDICTS.index(finding.verdict))
        return [finding for finding in ordered if finding.verdict not in ("same", "new")]

    def summary_lines(self) -> list[str]:
        """Summary in lines: the number of new findings, which are not listed, and of undecided ones."""
        new = Counter(finding.suite for finding in self.findings if finding.verdict == "new")
        by_suite = ", ".join(f"{count:,} of {suite}" for suite, count in new.items())
        undecided = len(self.undecided)
        times = f"{undecided:,} time{'s' if undecided > 1 else ''}"
        return [
            *([f"new, so not in the baseline and not listed: {by_suite}"] if new else []),
            *([f"{times} may have become worse: the noise hides it, and more runs may decide it"] if undecided else []),
        ]

    def cases_to_repeat(self, runs: int) -> dict[str, list[str]]:
        """The cases with unsettled times, by suite. They have to be measured again."""
        cases: dict[str, list[str]] = {}
        for finding in self.unsettled(runs):
            if finding.case not in cases.setdefault(finding.suite, []):
                cases[finding.suite].append(finding.case)
        return cases

    def unsettled(self, runs: int) -> list[Finding]:
        """Times that are unclear, or worse by fewer runs."""
        hasty = (each for each in self.findings if each.verdict == "worse" and each.runs is not None)
        return [
            *(finding for finding in self.findings if finding.verdict == "unclear"),
            *(finding for finding in hasty if finding.runs is not None and finding.runs < runs),
        ]

    @property
    def times(self) -> int:
        """Number of times that were tested."""
        return sum(finding.runs is not None for finding in self.findings)


def verdict_on(meaning: ArrayLike) -> Verdict:
    """The verdict for a meaning from `judge`."""
    return ON_TIMES.get(float(np.asarray(meaning)), "unclear")


def _format_figure(figure: Figure, unit: Unit) -> str:
    if figure is None:
        return "-"
    if isinstance(figure, str):
        return figure
    match unit:
        case "s":
            return f"{short(1e3 * figure)} ms"
        case "B":
            return f"{figure:,.0f} B"
        case "x":
            return f"{short(figure)}x"
        case "error":
            return f"{figure:.1e}"
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:.4g}"
