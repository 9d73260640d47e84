"""Records with known content."""

from colt5_bench.records.derived import label
from colt5_bench.records.results import Divergence, Record, Timing

FORWARD, BOTH = "forward", "forward+backward"


def record(implementation="ours", direction=FORWARD, *, times=None, status="ok", reason="", **fields):
    fields = {"rows": 8, "n": 512, "eps": 0.1, **fields}
    made = Record(
        suite="toy",
        case=label(fields, fields),
        fields=fields,
        implementation=implementation,
        direction=direction,
        device="Toy GPU",
        status=status,
        reason=reason,
    )
    for column, seconds in (times or {}).items():
        made.timings[column] = Timing(column, [seconds] * 10, "confident", 0.0)
    return made


def timed(implementation, milliseconds, column="wall", **fields):
    made = record(implementation, times={column: milliseconds / 1e3}, **fields)
    made.minimum_bytes, made.limit_seconds = 4_000_000, 5e-4
    made.peak_bytes, made.saved_bytes = 12_345_678, 2_000_000
    made.accuracy = {"output": Divergence(2e-7, 1e-7, 0), "scores": Divergence(3e-5, 1e-5, 0)}
    return made


def diverging(implementation, largest, **fields):
    made = record(implementation, BOTH, **fields)
    made.accuracy = {
        "output": Divergence(5e-7, 1e-7, 0),
        "scores": Divergence(largest, 2e-4, 0.125, kinks=7, largest_at_kink=0.75),
    }
    return made
