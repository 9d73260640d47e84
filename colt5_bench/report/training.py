"""The table of a suite that trains: repeats as one row, with intervals, at equal tokens and at equal times."""

from collections.abc import Callable, Sequence
from math import isinf

from rich.console import Console

from colt5_bench.records.derived import label, short, varying_fields
from colt5_bench.records.repeats import SEED, Estimate, Repeats, equal_seconds, repeats
from colt5_bench.records.results import Record
from colt5_bench.report import terminal
from colt5_bench.report.terminal import Column, print_table

NOTHING = "-"

EXPLAINED = (
    "means over seeds with 95 % intervals (t-distribution); differences from {reference} are per seed, and 'none' if "
    "the interval contains 0; 'at equal seconds' is the validation curve of {metric} after the time of the fastest run "
    "of a case"
)


def training_summary(records: Sequence[Record], reference: str, console: Console) -> None:
    """Print the repeats of each implementation in a row. The first metric of a record is compared."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    groups = repeats(records)
    places = {id(each): group for group in groups for each in group}
    varying = [name for name in varying_fields(records) if name != SEED]
    columns: list[Column[Repeats]] = [
        Column("implementation", lambda each: each.implementation, number=False),
        Column("runs", lambda each: _runs(each.records)),
    ]
    if names:
        columns += _compared(names[0], places, reference)
    columns += [Column(_words(name), _mean(name), 10 + place) for place, name in enumerate(names[1:])]
    print_table(
        f"{records[0].suite} on {records[0].device}",
        columns,
        [terminal.Group(label(group[0].records[0].fields, varying), group) for group in groups],
        console,
        elsewhere=", and so does the CSV of `bench.py report`",
    )
    same = [name for name in records[0].fields if name not in (*varying, SEED)]
    console.print(f"all with {label(records[0].fields, same)}", highlight=False, markup=False)
    if names:
        explained = EXPLAINED.format(reference=reference, metric=_words(names[0]))
        console.print(explained, highlight=False, markup=False)


def _compared(metric: str, places: dict[int, list[Repeats]], reference: str) -> list[Column[Repeats]]:
    def difference(each: Repeats) -> str:
        others = [other for other in places[id(each)] if other.implementation == reference]
        if not others or others[0] is each or (found := each.difference(others[0], metric)) is None:
            return NOTHING
        return "none" if found.is_zero and not isinf(found.reach) else f"{found.mean:+.3f}{_reach(found)}"

    def at_equal_seconds(each: Repeats) -> str:
        return _text(each.at(equal_seconds(places[id(each)]), f"validation_{metric}"))

    return [
        Column(_words(metric), _mean(metric)),
        Column("difference", difference, 1),
        Column("at equal seconds", at_equal_seconds, 2),
    ]


def _mean(metric: str) -> Callable[[Repeats], str]:
    return lambda each: _text(each.of(metric))


def _text(estimate: Estimate | None) -> str:
    return NOTHING if estimate is None else f"{_digits(estimate.mean)}{_reach(estimate)}"


def _digits(value: float) -> str:
    """Three decimals, in which bits per byte differ."""
    return f"{value:.3f}" if 0.1 <= abs(value) < 100 else short(value)


def _reach(estimate: Estimate) -> str:
    if isinf(estimate.reach):
        return "±?"
    return f"±{short(estimate.reach)}" if estimate.reach else ""


def _runs(records: Sequence[Record]) -> str:
    done = sum(record.status == "ok" for record in records)
    return str(done) if done == len(records) else f"{done} of {len(records)}"


def _words(name: str) -> str:
    return name.replace("_", " ")
