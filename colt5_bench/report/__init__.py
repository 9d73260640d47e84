"""What tables and plots share: how cases are told apart, and which figures stand for a record."""

from collections.abc import Iterable, Sequence
from math import inf, isnan

from colt5_bench.results import Divergence, Record


def varying_fields(records: Sequence[Record]) -> list[str]:
    """The case fields that are not the same in all records, in the order of the case."""
    names = dict.fromkeys(name for record in records for name in record.fields)
    return [name for name in names if len({text(record.fields.get(name)) for record in records}) > 1]


def text(value: object) -> str:
    """A field's value, as short as it can be said."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(fields: dict[str, object], names: Iterable[str]) -> str:
    """`n=512 eps=0.1`: those of the named fields that have a value."""
    return " ".join(f"{name}={text(fields[name])}" for name in names if fields.get(name) is not None)


def severity(divergence: Divergence) -> float:
    """The largest error, to compare by: NaN is the worst there is."""
    return inf if isnan(divergence.largest) else divergence.largest


def worst(record: Record) -> Divergence | None:
    """The tensor that is farthest from its truth."""
    return max(record.accuracy.values(), key=severity, default=None)


def worst_gradient(record: Record) -> Divergence | None:
    """The gradient that is farthest from its truth."""
    gradients = (divergence for tensor, divergence in record.accuracy.items() if tensor != "output")
    return max(gradients, key=severity, default=None)
