"""The figures that are compared of a point on both sides, and a verdict on each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan, nan
from typing import Any

from colt5_bench.compare.conditions import Pairing
from colt5_bench.compare.findings import Figure, Finding, Unit, Verdict
from colt5_bench.compare.thresholds import Bound, Thresholds
from colt5_bench.records.columns import PEAK, SAVED, SPEED_UP, error_of
from colt5_bench.records.results import Record
from colt5_bench.records.samples import Runs, beside, middle


@dataclass(frozen=True)
class Measured:
    """An implementation at a point, on one side."""

    record: Record
    runs: Sequence[Record]
    """Records that are ok, each from another run."""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for record in self.runs for column in record.timings))

    def samples(self, column: str) -> Runs:
        timings = (record.timings.get(column) for record in self.runs)
        return [timing.samples for timing in timings if timing and timing.samples]

    def beside(self, reference: "Measured | None", column: str) -> Runs:
        """Times in units of the reference's in the same rounds of the same runs; empty if a run lacks them."""
        if reference is None or reference.record.key == self.record.key:
            return []
        own, theirs = self._by_run(column), reference._by_run(column)
        return [beside(samples, theirs[run]) for run, samples in own.items()] if set(own) <= set(theirs) else []

    def _by_run(self, column: str) -> dict[str, list[float]]:
        timings = {record.environment: record.timings.get(column) for record in self.runs}
        return {run: timing.samples for run, timing in timings.items() if timing and timing.samples}


@dataclass(frozen=True)
class Times:
    """A time of both sides. Its verdict needs all times that are tested together."""

    column: str
    before: Runs
    after: Runs
    relative: tuple[Runs, Runs]
    """The same in units of the reference's time; empty without a reference."""

    threshold: float


@dataclass(frozen=True)
class Draft:
    """A finding, with its times if it is about times."""

    finding: Finding
    times: Times | None = None


@dataclass(frozen=True)
class Subject:
    """The implementation at a point that findings are about. Its record gives the common part of them."""

    record: Record
    label: str

    def draft(
        self,
        verdict: Verdict,
        metric: str,
        baseline: Figure,
        now: Figure,
        unit: Unit = "",
        note: str = "",
        times: Times | None = None,
    ) -> Draft:
        finding = Finding(
            verdict,
            *self.record.key[:2],
            self.record.direction,
            self.record.implementation,
            metric,
            baseline,
            now,
            unit,
            note=note,
            label=self.label,
        )
        return Draft(finding, times)


def figures(
    subject: Subject,
    before: Measured,
    after: Measured,
    pairing: Pairing,
    thresholds: Thresholds,
    references: tuple[Measured | None, Measured | None],
) -> Iterator[Draft]:
    """Findings on all comparable figures of an implementation at a point.

    Args:
        subject: the implementation at the point.
        before: its records in the baseline, which are ok.
        after: its records in the run, which are ok, too.
        pairing: conditions of both.
        thresholds: smallest changes that count.
        references: the reference of each side.
    """
    old, new = before.record, after.record
    yield subject.draft("same", "status", "ok", "ok")
    if pairing.times:
        for column in before.columns:
            yield from _of_times(subject, column, before, after, references, getattr(thresholds, column))
    elif pairing.speed_ups:
        yield from _of_speed_ups(subject, before, after, references, thresholds.speed_up)
    if pairing.memory:
        yield from _of_number(subject, PEAK.name, old.peak_bytes, new.peak_bytes, thresholds.peak, "B")
        yield from _of_number(subject, SAVED.name, old.saved_bytes, new.saved_bytes, thresholds.saved, "B")
    if pairing.same_kind:
        yield from _of_errors(subject, old, new, thresholds)
        yield from _of_metrics(subject, old, new, thresholds.metrics)
    if pairing.kernels:
        yield from _of_kernels(subject, old.kernels, new.kernels, thresholds)


def _of_times(
    subject: Subject,
    column: str,
    before: Measured,
    after: Measured,
    references: tuple[Measured | None, Measured | None],
    threshold: float,
) -> Iterator[Draft]:
    earlier, later = before.samples(column), after.samples(column)
    seconds = _middle(earlier), _middle(later)
    if verdict := _without_a_number(*seconds):
        stopped = [record.timings[column].stopped for record in after.runs if column in record.timings]
        yield subject.draft(verdict, column, *seconds, "s", stopped[-1] if stopped and not later else "")
    elif earlier:
        relative = before.beside(references[0], column), after.beside(references[1], column)
        yield subject.draft("unclear", column, *seconds, "s", "", Times(column, earlier, later, relative, threshold))


def _of_speed_ups(
    subject: Subject,
    before: Measured,
    after: Measured,
    references: tuple[Measured | None, Measured | None],
    threshold: float,
) -> Iterator[Draft]:
    """The speed-up in the first time column, if the reference has a time on both sides."""
    column = next(iter(before.columns), "")
    earlier, later = before.beside(references[0], column), after.beside(references[1], column)
    if not earlier or (not later and after.samples(column)):
        return
    ratios = _inverse(_middle(earlier)), _inverse(_middle(later))
    metric = f"{SPEED_UP.name}, {column}"
    if verdict := _without_a_number(*ratios):
        yield subject.draft(verdict, metric, *ratios, "x")
    else:
        yield subject.draft("unclear", metric, *ratios, "x", "", Times(column, earlier, later, ((), ()), threshold))


def _middle(runs: Runs) -> float | None:
    """NaN if any sample is not a valid time."""
    if not runs:
        return None
    if not all(0 < sample < inf for samples in runs for sample in samples):
        return nan
    return middle(runs)


def _inverse(ratio: float | None) -> float | None:
    return 1 / ratio if ratio else None


def _of_number(
    subject: Subject, metric: str, before: float | None, after: float | None, relative: float, unit: Unit = ""
) -> Iterator[Draft]:
    """Findings of a figure whose lower values are better."""
    if before is None and after is None:
        return
    verdict = _without_a_number(before, after) or _by(before, after, relative)
    yield subject.draft(verdict, metric, before, after, unit)


def _by(before: float | None, after: float | None, relative: float) -> Verdict:
    assert before is not None
    assert after is not None
    if after > before * (1 + relative):
        return "worse"
    return "better" if before > after * (1 + relative) else "same"


def _without_a_number(before: float | None, after: float | None) -> Verdict | None:
    """The verdict if a side has no finite number; None if both have one."""
    had, has = (value is not None and isfinite(value) for value in (before, after))
    if had and has:
        return None
    if had:
        return "missing" if after is None else "failed"
    return "new" if has else "same"


def _of_errors(subject: Subject, old: Record, new: Record, thresholds: Thresholds) -> Iterator[Draft]:
    for tensor in dict.fromkeys([*old.accuracy, *new.accuracy]):
        of_old, of_new = old.accuracy.get(tensor), new.accuracy.get(tensor)
        before, after = of_old.largest if of_old else None, of_new.largest if of_new else None
        if not (verdict := _without_a_number(before, after)):
            assert of_old
            assert before is not None
            assert after is not None
            verdict = _by(before, after, thresholds.error)
            # The allowed error of the baseline counts: a new one may have grown together with the error.
            if of_old.budget is not None and max(before, after) <= thresholds.error_share * of_old.budget:
                verdict = "same"
        yield subject.draft(verdict, error_of(tensor).name, before, after, "error")


def _of_metrics(subject: Subject, old: Record, new: Record, bounds: Mapping[str, Bound]) -> Iterator[Draft]:
    for name in dict.fromkeys([*old.metrics, *new.metrics]):
        before, after = old.metrics.get(name), new.metrics.get(name)
        verdict = _without_a_number(before, after)
        if verdict == "same" and before is not None and after is not None and isnan(before) != isnan(after):
            # Infinity before, NaN now, or the opposite.
            verdict = "failed" if isnan(after) else "new"
        if not verdict and name in bounds:
            assert before is not None
            assert after is not None
            verdict = _within(bounds[name], before, after)
        yield subject.draft(verdict or "same", name, before, after)


def _within(bound: Bound, before: float, after: float) -> Verdict:
    if abs(after - before) <= max(bound.absolute, bound.relative * abs(before)):
        return "same"
    if bound.better == "equal":
        return "worse"
    return "better" if (after < before) == (bound.better == "lower") else "worse"


def _of_kernels(
    subject: Subject, old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], thresholds: Thresholds
) -> Iterator[Draft]:
    """Pair kernels with the same name and target in the order of their launches."""
    before, after = _numbered(old), _numbered(new)
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            verdict: Verdict = "missing" if now is None else "new"
            yield subject.draft(verdict, name, "launched" if was else None, "launched" if now else None)
            continue
        constants = "" if was["constants"] == now["constants"] else "compiled for other settings than in the baseline"
        for fact in ("registers", "spilled_bytes", "shared_bytes"):
            verdict = _by(was[fact], now[fact], getattr(thresholds, fact))
            yield subject.draft(verdict, f"{name} {fact}", was[fact], now[fact], "", constants)
        for kind in sorted({*was["instructions"], *now["instructions"]}):
            counts = was["instructions"].get(kind, 0), now["instructions"].get(kind, 0)
            verdict = _by(*counts, thresholds.instructions)
            yield subject.draft(verdict, f"{name} {kind} instructions", *counts, "", constants)


def _numbered(kernels: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Kernels by name and target, with a number from the second on."""
    named: dict[str, Mapping[str, Any]] = {}
    for kernel in kernels:
        name = " ".join(str(kernel[key]) for key in ("name", "target") if key in kernel)
        count = sum(each == name or each.startswith(f"{name} #") for each in named)
        named[f"{name} #{count + 1}" if count else name] = kernel
    return named
