"""Reports of measured records to pytest and to pytest-benchmark."""

from contextlib import suppress
from typing import TYPE_CHECKING

from colt5_bench.records.derived import summarised
from colt5_bench.records.results import Record

# Imported for types only, because every suite imports this module, also without pytest.
if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

_now = 0.0


def virtual_clock() -> float:
    """The timer of a replay, in seconds: the current sample, or 0 before it."""
    return _now


def replay(record: Record, benchmark: "BenchmarkFixture") -> None:
    """Pass or fail a test by its record, and give its samples to pytest-benchmark.

    The samples are those of the first time column. The plugin makes pytest-benchmark read `virtual_clock`. All other
    figures go into `extra_info`.
    """
    if record.status == "skipped":
        check(record)
    benchmark.extra_info.update(summarised(record))
    if record.status != "ok":
        # pytest-benchmark leaves benchmarks with errors out of its results.
        with suppress(_NotMeasured):
            benchmark.pedantic(_raise_not_measured)
        check(record)

    column, samples = next((column, t.samples) for column, t in record.timings.items() if t.samples)
    benchmark.extra_info["column"] = column
    remaining = iter(samples)

    def begin() -> None:
        global _now
        _now = 0.0

    def end() -> None:
        # Counted from 0 each time, so that the difference in pytest-benchmark is exactly the sample.
        global _now
        _now = next(remaining, 0.0)

    benchmark.pedantic(end, setup=begin, rounds=len(samples))


def check(record: Record) -> None:
    """Pass, fail or skip a test by its record. A suite without times needs nothing else."""
    import pytest

    if record.status == "skipped":
        pytest.skip(record.reason)
    if record.status != "ok":
        pytest.fail(f"{record.status}: {record.reason}", pytrace=False)


class _NotMeasured(Exception):
    pass


def _raise_not_measured() -> None:
    raise _NotMeasured
