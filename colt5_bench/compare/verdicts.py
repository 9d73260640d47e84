"""A verdict on every figure of two runs.

Times are compared on the same hardware. On different hardware, speed-ups over the reference, which was timed in the
same rounds, take their place. A case that has a value in the baseline needs one in the run.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from colt5_bench.compare.baselines import fault
from colt5_bench.compare.conditions import Conditions, Pairing, notes_on
from colt5_bench.compare.figures import Draft, Measured, Subject, Times, figures
from colt5_bench.compare.findings import Comparison, Finding, Verdict, verdict_on
from colt5_bench.compare.thresholds import Rules
from colt5_bench.records.derived import group_by, label, varying_fields
from colt5_bench.records.results import FAILED, Record, Run
from colt5_bench.records.samples import Changes, compared, holm, judge, narrower

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
    """Compare a run with a baseline. Several records of an implementation at a point count as several runs, and
    duplicates count once.

    Args:
        baseline: the old side.
        run: the new side.
        rules: thresholds of changes.
        references: the reference implementation of each suite.
        scope: selects the records. A record only in the baseline is `missing`.
        any_machine: compare speed-ups over the reference instead of times, even on hardware of the same name.

    Raises:
        IncomparableError: a side has records of one point from several devices or revisions, or the baseline has an
            impossible value.
    """
    for record in filter(scope, baseline.records):
        if why := fault(record):
            raise IncomparableError(f"{baseline.path}, {' '.join(record.key)}: {why}")
    before, after = _Side.of(baseline, scope), _Side.of(run, scope)
    kinds = {conditions.kind for conditions in after.conditions.values()}
    left_out = {key for key, each in before.conditions.items() if kinds and each.kind not in kinds}
    labels = _labels([each.record for side in (before, after) for each in side.by_key.values()])
    pairings: list[Pairing] = []
    drafts: list[Draft] = []
    for key in dict.fromkeys([*before.by_key, *after.by_key]):
        old, new = None if key in left_out else before.by_key.get(key), after.by_key.get(key)
        if (shown := new or old) is None:
            continue
        subject = Subject(shown.record, labels[key])
        if old is None or new is None or old.record.status != "ok" or new.record.status != "ok":
            drafts += _of_status(subject, old, new)
            continue
        pairing = Pairing(before.conditions[key], after.conditions[key], any_machine)
        pairings.append(pairing)
        thresholds = rules.of(new.record, pairing.kind)
        reference_key = replace(new.record, implementation=references.get(new.record.suite, "")).key
        of_reference = before.by_key.get(reference_key), after.by_key.get(reference_key)
        drafts += figures(subject, old, new, pairing, thresholds, of_reference)
    notes = notes_on(pairings)
    if left_out:
        devices = ", ".join(dict.fromkeys(before.conditions[key].device for key in before.by_key if key in left_out))
        notes.append(
            f"{len(left_out)} records of the baseline are left out: they were measured on {devices}, this run was not"
        )
    notes += [
        f"the last line of {file} is cut off, so its record is missing" for file in (*baseline.cut_off, *run.cut_off)
    ]
    return Comparison(_settle(drafts), notes)


@dataclass(frozen=True)
class _Side:
    """The records of a run by their key, and their conditions."""

    by_key: Mapping[Key, Measured]
    conditions: Mapping[Key, Conditions]

    @classmethod
    def of(cls, run: Run, scope: Callable[[Record], bool]) -> "_Side":
        by_key, conditions = {}, {}
        for same in group_by(filter(scope, run.records), lambda record: record.key):
            key, under = same[0].key, {Conditions.of(record, run) for record in same}
            for what in ("device", "revision"):
                if len({getattr(each, what) for each in under}) > 1:
                    raise IncomparableError(
                        f"{run.path} has {' '.join(key)} from more than one {what}: compare runs of one {what}"
                    )
            by_key[key], conditions[key] = _merged(same), under.pop()
        return cls(by_key, conditions)


def _merged(same: Sequence[Record]) -> Measured:
    """Records with the same key as one. If one of them failed, all count as failed. Duplicates count as one run."""
    failed = next((record for record in same if record.status in FAILED), None)
    ok = [record for record in same if record.status == "ok"]
    distinct = {str([timing.samples for timing in record.timings.values()]): record for record in ok}
    return Measured(failed or (ok[-1] if ok else same[0]), list(distinct.values()))


def _labels(records: Sequence[Record]) -> dict[Key, str]:
    """Labels that distinguish the cases of a suite."""
    labels = {}
    for group in group_by(records, lambda record: record.suite):
        varying = varying_fields(group)
        labels.update({record.key: label(record.fields, varying) for record in group})
    return labels


def _settle(drafts: Sequence[Draft]) -> list[Finding]:
    """All findings, those on times with their verdicts. Times of a column show each other's noise, and all tests are
    corrected for their number."""
    timed = [(draft, draft.times) for draft in drafts if draft.times]
    settled = {}
    if timed:
        groups = group_by(timed, lambda pair: pair[0].finding.metric)
        found = [_changes([times for _, times in group]) for group in groups]
        change, other = (Changes.joined(each) for each in zip(*found, strict=True))
        in_order = [pair for group in groups for pair in group]
        bounds = np.log1p([times.threshold for _, times in in_order])
        meanings = judge(change, holm(change.p), bounds, other)
        intervals = np.exp([change.low, change.high]).T.tolist()
        for (draft, times), meaning, interval in zip(in_order, meanings, intervals, strict=True):
            settled[id(draft)] = replace(
                draft.finding,
                verdict=verdict_on(meaning),
                interval=tuple(interval),
                threshold=times.threshold,
                baseline_runs=len(times.before),
                runs=len(times.after),
            )
    return [settled.get(id(draft), draft.finding) for draft in drafts]


def _changes(times: Sequence[Times]) -> tuple[Changes, Changes]:
    """Changes of the times of a column, alone or relative to the reference, and the other figure."""
    column = times[0].column
    alone = compared([(each.before, each.after) for each in times], column)
    return narrower(alone, compared([each.relative for each in times], column))


def _of_status(subject: Subject, old: Measured | None, new: Measured | None) -> Iterator[Draft]:
    """Findings about an implementation at a point that has no values on one side, or on both."""
    before, after = old.record.status if old else None, new.record.status if new else None
    why = new.record.reason if new else ""
    if after == "refused" or (after in FAILED and before not in (None, *FAILED)):
        verdict: Verdict = "failed"
    elif before == "ok":
        verdict, why = "missing", why or "the run has no such record"
    elif after == "ok" or (before is None and after in FAILED):
        verdict = "better" if before in FAILED else "new"
    elif after is None or before is None:
        # Neither side has a value.
        return
    else:
        verdict = "same"
    was, now = (status.replace("_", " ") if status else None for status in (before, after))
    yield subject.draft(verdict, "status", was, now, "", why)
