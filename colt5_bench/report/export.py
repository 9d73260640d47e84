"""Records as a table for other programs: CSV and Parquet."""

from collections.abc import Sequence
from pathlib import Path

from colt5_bench.files import atomic_write
from colt5_bench.records.results import Record, to_frame


def write_csv(path: Path, records: Sequence[Record]) -> Path:
    """Write a line a record, with the columns of `to_frame`."""
    with atomic_write(path) as unfinished:
        to_frame(records).to_csv(unfinished, index=False)
    return path


def write_parquet(path: Path, records: Sequence[Record]) -> Path:
    """Write a row a record, with the columns of `to_frame`; a column with several types becomes text.

    Raises:
        ImportError: pyarrow, which is optional, is not installed.
    """
    frame = to_frame(records).convert_dtypes()
    mixed = frame.select_dtypes("object").columns
    frame[mixed] = frame[mixed].astype("string")
    with atomic_write(path) as unfinished:
        frame.to_parquet(unfinished, engine="pyarrow", index=False)
    return path
