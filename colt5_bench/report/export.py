"""Records as a table for other programs: CSV and Parquet."""

from collections.abc import Sequence
from pathlib import Path

from colt5_bench.results import Record, to_frame


def write_csv(path: Path, records: Sequence[Record]) -> Path:
    """Write a line a record, with the columns of `to_frame`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    to_frame(records).to_csv(path, index=False)
    return path


def write_parquet(path: Path, records: Sequence[Record]) -> Path:
    """Write a row a record, with the columns of `to_frame`; a column with several types becomes text.

    Raises:
        ImportError: pyarrow, which is optional, is not installed.
    """
    frame = to_frame(records).convert_dtypes()
    mixed = frame.select_dtypes("object").columns
    frame[mixed] = frame[mixed].astype("string")
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, engine="pyarrow", index=False)
    return path
