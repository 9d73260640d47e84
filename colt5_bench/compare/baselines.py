"""Checks of a baseline before a comparison."""

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from colt5_bench.records.results import Record, Run, load
from colt5_bench.selection import SelectionError

HAS_NO_SAMPLES = ("not capturable", "throttled", "refused")
"""Beginnings of the reasons why a time column may be empty."""


def read_baseline(path: Path) -> Run:
    """The results at the path of a baseline.

    Raises:
        SelectionError: it cannot be read, or a record is not valid; the message names file and line.
    """
    try:
        return load(path, fault=fault)
    except ValueError as error:
        raise SelectionError(str(error)) from error


def fault(record: Record) -> str:
    """An impossible value of a record; an empty text if there is none."""
    return next(_faults(record), "")


def _faults(record: Record) -> Iterator[str]:
    for column, timing in record.timings.items():
        for sample in timing.samples:
            if not _is_number(sample) or sample <= 0:
                yield f"a {column} time must be a number of seconds above 0, got {sample!r}"
        if not timing.samples and not timing.stopped.startswith(HAS_NO_SAMPLES):
            yield f"the {column} time has no samples, and `stopped` does not say why, got {timing.stopped!r}"
    for name in ("peak_bytes", "saved_bytes"):
        size = getattr(record, name)
        if size is not None and (not _is_number(size) or size < 0):
            yield f"{name} must be a number of bytes of at least 0, got {size!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
