"""A verdict on every figure of two runs.

Times are compared on the same hardware. Elsewhere speed-ups over the reference, which was timed side by side with
everything else, take their place. A case that had a value in the baseline has to have one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, isnan
from typing import Any

from colt5_bench.compare.conditions import Conditions, Pairing, notes_on
from colt5_bench.compare.findings import Comparison, Figure, Finding, Unit, Verdict
from colt5_bench.compare.samples import Change, change, holm, judge
from colt5_bench.compare.thresholds import Bound, Rules, Thresholds
from colt5_bench.report import label, varying_fields
from colt5_bench.report.layout import by
from colt5_bench.results import FAILED, Record, Run, Timing

Key = tuple[str, str, str, str]


class IncomparableError(ValueError):
    """Records that cannot stand on one side of a comparison; the message says why."""


def compare(
    baseline: Run,
    run: Run,
    rules: Rules,
    references: Mapping[str, str],
    *,
    scope: Callable[[Record], bool] = lambda record: True,
    any_machine: bool = False,
) -> Comparison:
    """Compare a run with a baseline. Records of the same point are put together, with all their samples.

    Args:
        baseline: what was.
        run: what is.
        rules: how much of a change counts.
        references: by suite, the implementation that speed-ups are over.
        scope: which records take part. What is in the baseline alone is missing.
        any_machine: compare speed-ups over the reference in place of times, even on hardware of the same name.

    Raises:
        IncomparableError: a side has records of one point from several devices or revisions.
    """
    before, after = _Side.of(baseline, scope), _Side.of(run, scope)
    kinds = {conditions.kind for conditions in after.conditions.values()}
    left_out = {key for key, each in before.conditions.items() if kinds and each.kind not in kinds}
    labels = _labels([*before.records.values(), *after.records.values()])
    pairings: list[Pairing] = []
    drafts: list[_Draft] = []
    for key in dict.fromkeys([*before.records, *after.records]):
        old, new = None if key in left_out else before.records.get(key), after.records.get(key)
        if (about := new or old) is None:
            continue
        point = _Point(about, labels[key])
        if old is None or new is None or old.status != "ok" or new.status != "ok":
            drafts += [point.draft(*each) for each in _of_status(old, new)]
            continue
        pairing = Pairing(before.conditions[key], after.conditions[key], any_machine)
        pairings.append(pairing)
        held_to = rules.of(new, pairing.kind)
        beside = replace(point.record, implementation=references.get(new.suite, "")).key
        drafts += _of_values(point, old, new, pairing, held_to, (before.records.get(beside), after.records.get(beside)))
    notes = notes_on(pairings)
    if left_out:
        devices = ", ".join(dict.fromkeys(before.conditions[key].device for key in before.records if key in left_out))
        notes.append(f"{len(left_out)} records of the baseline are of {devices} and left out: this run is of none")
    return Comparison(_settle(drafts), notes)


@dataclass(frozen=True)
class _Side:
    """The records of a run by their key, and what each was measured under."""

    records: Mapping[Key, Record]
    conditions: Mapping[Key, Conditions]

    @classmethod
    def of(cls, run: Run, scope: Callable[[Record], bool]) -> "_Side":
        records, conditions = {}, {}
        for same in by(filter(scope, run.records), lambda record: record.key):
            key, under = same[0].key, {Conditions.of(record, run) for record in same}
            for what in ("device", "revision"):
                if len({getattr(each, what) for each in under}) > 1:
                    raise IncomparableError(
                        f"{run.path} holds {' '.join(key)} of more than one {what}: compare runs of one {what}"
                    )
            records[key], conditions[key] = _together(same), under.pop()
        return cls(records, conditions)


def _together(same: Sequence[Record]) -> Record:
    """Records of one point as one. If it failed once, it failed."""
    failed = next((record for record in same if record.status in FAILED), None)
    if failed or len(same) == 1:
        return failed or same[0]
    ok = [record for record in same if record.status == "ok"] or [*same]
    columns = dict.fromkeys(column for record in ok for column in record.timings)
    return replace(ok[-1], timings={column: _all_samples(column, ok) for column in columns})


def _all_samples(column: str, records: Sequence[Record]) -> Timing:
    timings = [record.timings[column] for record in records if column in record.timings]
    return replace(timings[-1], samples=[sample for timing in timings for sample in timing.samples])


def _labels(records: Sequence[Record]) -> dict[Key, str]:
    """What tells the case of each record from the others of its suite."""
    labels = {}
    for own in by(records, lambda record: record.suite):
        varying = varying_fields(own)
        labels.update({record.key: label(record.fields, varying) for record in own})
    return labels


@dataclass(frozen=True)
class _Draft:
    """A finding whose verdict may have to wait until all times are known that are tested together."""

    finding: Finding
    change: Change | None = None
    threshold: float = 0.0


@dataclass(frozen=True)
class _Point:
    """What findings of a record have in common."""

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
        change: Change | None = None,
        threshold: float = 0.0,
    ) -> _Draft:
        finding = Finding(
            verdict,
            *self.record.key[:2],
            self.record.direction,
            self.record.implementation,
            metric,
            baseline,
            now,
            unit,
            interval=(change.low, change.high) if change else None,
            note=note,
            label=self.label,
        )
        return _Draft(finding, change, threshold)


def _settle(drafts: Sequence[_Draft]) -> list[Finding]:
    """The verdicts on times, corrected for their number."""
    tested = [draft for draft in drafts if draft.change]
    corrected = iter(holm([draft.change.p for draft in tested if draft.change]))
    return [
        replace(draft.finding, verdict=judge(draft.change, next(corrected), draft.threshold))
        if draft.change
        else draft.finding
        for draft in drafts
    ]


def _of_status(old: Record | None, new: Record | None) -> Iterator[tuple[Any, ...]]:
    """Of a point that has no values on one side, or on both."""
    before, after = old and old.status, new and new.status
    why = new.reason if new else ""
    if after in FAILED and before not in FAILED:
        verdict: Verdict = "failed"
    elif before == "ok":
        verdict, why = "missing", why or "the run has no record of it"
    elif after == "ok":
        verdict = "better" if before in FAILED else "new"
    elif after is None or before is None:
        # Had no value then, and has none now.
        return
    else:
        verdict = "same"
    yield verdict, "status", _said(before), _said(after), "", why


def _said(status: str | None) -> str | None:
    return status and status.replace("_", " ")


def _of_values(
    point: _Point,
    old: Record,
    new: Record,
    pairing: Pairing,
    held_to: Thresholds,
    references: tuple[Record | None, Record | None],
) -> Iterator[_Draft]:
    yield point.draft("same", "status", "ok", "ok")
    if pairing.times:
        for column in old.timings:
            yield from _of_times(point, column, old, new, getattr(held_to, column))
    elif pairing.speed_ups:
        yield from _of_speed_ups(point, old, new, references, held_to.speed_up)
    if pairing.memory:
        yield from _of_number(point, "peak memory", old.peak_bytes, new.peak_bytes, held_to.peak_memory, "B")
        yield from _of_number(point, "saved memory", old.saved_bytes, new.saved_bytes, held_to.saved_memory, "B")
    if pairing.same_kind:
        yield from _of_errors(point, old, new, held_to)
        yield from _of_metrics(point, old, new, held_to.metrics)
    if pairing.kernels:
        yield from _of_kernels(point, old.kernels, new.kernels, held_to)


def _of_times(point: _Point, column: str, old: Record, new: Record, threshold: float) -> Iterator[_Draft]:
    before, after = _samples(old, column), _samples(new, column)
    seconds = old.seconds(column), new.seconds(column)
    if verdict := _without_a_number(*seconds):
        reason = new.timings[column].stopped if column in new.timings and not after else ""
        yield point.draft(verdict, column, *seconds, "s", reason)
    elif before and after:
        yield point.draft("unclear", column, *seconds, "s", "", change(before, after), threshold)


def _of_speed_ups(
    point: _Point, old: Record, new: Record, references: tuple[Record | None, Record | None], threshold: float
) -> Iterator[_Draft]:
    """By the column that the figure of a case is."""
    column = next(iter(old.timings), "")
    if None in references or point.record.key in (reference and reference.key for reference in references):
        return
    beside_old, beside_new = (_samples(reference, column) for reference in references if reference)
    before, after = _samples(old, column), _samples(new, column)
    if not beside_old or not beside_new:
        return
    ratios = [
        reference.seconds(column) / own if reference and (own := record.seconds(column)) else None
        for reference, record in zip(references, (old, new), strict=True)
    ]
    metric = f"speed-up, {column}"
    if verdict := _without_a_number(*ratios):
        yield point.draft(verdict, metric, *ratios, "x")
    elif before and after:
        found = change(before, after, (beside_old, beside_new))
        yield point.draft("unclear", metric, *ratios, "x", "", found, threshold)


def _samples(record: Record, column: str) -> list[float]:
    return record.timings[column].samples if column in record.timings else []


def _of_number(
    point: _Point, metric: str, before: float | None, after: float | None, relative: float, unit: Unit = ""
) -> Iterator[_Draft]:
    """Of what is better the lower it is."""
    if before is None and after is None:
        return
    verdict = _without_a_number(before, after) or _by(before, after, relative)
    yield point.draft(verdict, metric, before, after, unit)


def _by(before: float | None, after: float | None, relative: float) -> Verdict:
    assert before is not None
    assert after is not None
    if after > before * (1 + relative):
        return "worse"
    return "better" if before > after * (1 + relative) else "same"


def _without_a_number(before: float | None, after: float | None) -> Verdict | None:
    """The verdict where a side has no number; None where both have one. Infinity is none."""
    had, has = (value is not None and isfinite(value) for value in (before, after))
    if had and has:
        return None
    if had:
        return "missing" if after is None else "failed"
    return "new" if has else "same"


def _of_errors(point: _Point, old: Record, new: Record, held_to: Thresholds) -> Iterator[_Draft]:
    for tensor in dict.fromkeys([*old.accuracy, *new.accuracy]):
        of_old, of_new = old.accuracy.get(tensor), new.accuracy.get(tensor)
        before, after = of_old and of_old.largest, of_new and of_new.largest
        if not (verdict := _without_a_number(before, after)):
            assert of_old
            assert of_new
            verdict = _by(before, after, held_to.error)
            larger = max(of_old, of_new, key=lambda divergence: divergence.largest)
            if larger.budget is not None and larger.largest <= held_to.error_share * larger.budget:
                verdict = "same"
        yield point.draft(verdict, f"error of {tensor}", before, after, "error")


def _of_metrics(point: _Point, old: Record, new: Record, bounds: Mapping[str, Bound]) -> Iterator[_Draft]:
    for name in dict.fromkeys([*old.metrics, *new.metrics]):
        before, after = old.metrics.get(name), new.metrics.get(name)
        verdict = _without_a_number(before, after)
        if verdict == "same" and before is not None and after is not None and isnan(before) != isnan(after):
            # Infinity then, NaN now, or the other way round.
            verdict = "failed" if isnan(after) else "new"
        if not verdict and name in bounds:
            assert before is not None
            assert after is not None
            verdict = _within(bounds[name], before, after)
        yield point.draft(verdict or "same", name, before, after)


def _within(bound: Bound, before: float, after: float) -> Verdict:
    if abs(after - before) <= max(bound.absolute, bound.relative * abs(before)):
        return "same"
    if bound.better == "equal":
        return "worse"
    return "better" if (after < before) == (bound.better == "lower") else "worse"


def _of_kernels(
    point: _Point, old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], held_to: Thresholds
) -> Iterator[_Draft]:
    """Kernels of one name and target are taken in the order of their launch."""
    before, after = _numbered(old), _numbered(new)
    for name in dict.fromkeys([*before, *after]):
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            verdict: Verdict = "missing" if now is None else "new"
            yield point.draft(verdict, name, was and "launched", now and "launched")
            continue
        constants = "" if was["constants"] == now["constants"] else "compiled for other settings than in the baseline"
        for fact in ("registers", "spilled_bytes", "shared_bytes"):
            yield point.draft(
                _by(was[fact], now[fact], getattr(held_to, fact)), f"{name} {fact}", was[fact], now[fact], "", constants
            )
        for kind in sorted({*was["instructions"], *now["instructions"]}):
            counts = was["instructions"].get(kind, 0), now["instructions"].get(kind, 0)
            verdict = _by(*counts, held_to.instructions)
            yield point.draft(verdict, f"{name} {kind} instructions", *counts, "", constants)


def _numbered(kernels: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By name and target, and by number from the second on."""
    named: dict[str, Mapping[str, Any]] = {}
    for kernel in kernels:
        name = " ".join(str(kernel[key]) for key in ("name", "target") if key in kernel)
        count = sum(each == name or each.startswith(f"{name} #") for each in named)
        named[f"{name} #{count + 1}" if count else name] = kernel
    return named
