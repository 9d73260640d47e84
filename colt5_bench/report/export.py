"""Records as a table for other programs: CSV and Parquet."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from math import nan
from pathlib import Path

import pandas as pd

from colt5_bench.files import atomic_write
from colt5_bench.records.columns import error_in_csv, time_in_csv
from colt5_bench.records.results import Record
from colt5_bench.records.samples import intervals

_OF_SEVERAL = ("fields", "timings", "accuracy", "metrics", "curves", "kernels", "changed_settings")
_COLUMNS = [each.name for each in fields(Record) if each.name not in _OF_SEVERAL]


def write_csv(path: Path, records: Sequence[Record]) -> Path:
    """Write a line for each record, with the columns of `to_frame`."""
    with atomic_write(path) as unfinished:
        to_frame(records).to_csv(unfinished, index=False)
    return path


def write_parquet(path: Path, records: Sequence[Record]) -> Path:
    """Write a row for each record, with the columns of `to_frame`. A column with several types becomes text.

    Raises:
        ImportError: pyarrow, which is optional, is not installed.
    """
    frame = to_frame(records).convert_dtypes()
    mixed = frame.select_dtypes("object").columns
    frame[mixed] = frame[mixed].astype("string")
    with atomic_write(path) as unfinished:
        frame.to_parquet(unfinished, engine="pyarrow", index=False)
    return path


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """A row for each record. Columns are the fields of the case, `<column>_ms` for each time column with
    `<column>_ms_low` and `<column>_ms_high`, its 95 % interval, `<tensor>_error`, and the metrics under their names."""
    records = list(records)
    # All at once, because one by one takes longer than everything else.
    bounds = iter(intervals([timing.samples for record in records for timing in record.timings.values()]).tolist())
    return pd.DataFrame([_row(record, bounds) for record in records])


def _row(record: Record, bounds: Iterator[list[float]]) -> dict[str, object]:
    row = {**record.fields, **{name: getattr(record, name) for name in _COLUMNS}}
    for column in record.timings:
        name, (low, high) = time_in_csv(column), next(bounds)
        row[name] = 1e3 * (record.seconds(column) or nan)
        row[f"{name}_low"], row[f"{name}_high"] = 1e3 * low, 1e3 * high
    row |= {error_in_csv(tensor): divergence.largest for tensor, divergence in record.accuracy.items()}
    return row | record.metrics
