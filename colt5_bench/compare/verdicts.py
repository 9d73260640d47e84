"""A verdict on every figure of two runs.

Times are compared on the same hardware. Elsewhere speed-ups over the reference, which was timed side by side with
everything else, take their place. A case that had a value in the baseline has to have one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from colt5_bench.compare.conditions import Conditions, Pairing, notes_on
from colt5_bench.compare.figures import Draft, Point, figures
from colt5_bench.compare.findings import Comparison, Finding, Verdict
from colt5_bench.compare.samples import holm, judge
from colt5_bench.compare.thresholds import Rules
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
    drafts: list[Draft] = []
    for key in dict.fromkeys([*before.records, *after.records]):
        old, new = None if key in left_out else before.records.get(key), after.records.get(key)
        if (about := new or old) is None:
            continue
        point = Point(about, labels[key])
        if old is None or new is None or old.status != "ok" or new.status != "ok":
            drafts += [point.draft(*each) for each in _of_status(old, new)]
            continue
        pairing = Pairing(before.conditions[key], after.conditions[key], any_machine)
        pairings.append(pairing)
        held_to = rules.of(new, pairing.kind)
        beside = replace(point.record, implementation=references.get(new.suite, "")).key
        drafts += figures(point, old, new, pairing, held_to, (before.records.get(beside), after.records.get(beside)))
    notes = notes_on(pairings)
    if left_out:
        devices = ", ".join(dict.fromkeys(before.conditions[key].device for key in before.records if key in left_out))
        notes.append(f"{len(left_out)} records of the baseline are of {devices} and left out: this run is of none")
    notes += [f"the last line of {file} is cut off, and a record with it" for file in (*baseline.cut_off, *run.cut_off)]
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


def _settle(drafts: Sequence[Draft]) -> list[Finding]:
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
    before, after = old.status if old else None, new.status if new else None
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
    said = (status.replace("_", " ") if status else None for status in (before, after))
    yield verdict, "status", *said, "", why
