from math import isnan

import pandas as pd

from colt5_bench.records.results import STATUSES
from colt5_bench.report.export import write_csv, write_parquet
from tests.colt5_bench.made import diverging, record, timed

RECORDS = [timed("ours", 2), diverging("ours", 1e-3, n=None, mask=True), record("other", status="skipped", k="half")]


def test_csv_has_a_line_a_record(tmp_path):
    frame = pd.read_csv(write_csv(tmp_path / "below" / "records.csv", RECORDS))
    assert list(frame["implementation"]) == ["ours", "ours", "other"]
    assert frame["wall_ms"][0] == 2
    assert isnan(frame["wall_ms"][2])
    assert frame["scores_error"][1] == 1e-3


def test_csv_tells_every_ending(tmp_path):
    endings = [record(status=status, reason=f"why {status}") for status in STATUSES]
    frame = pd.read_csv(write_csv(tmp_path / "records.csv", endings))
    assert list(frame["status"]) == [*STATUSES]
    assert list(frame["reason"]) == [f"why {status}" for status in STATUSES]


def test_parquet_keeps_types_and_what_is_missing(tmp_path):
    records = [*RECORDS, record("third", k=3)]
    frame = pd.read_parquet(write_parquet(tmp_path / "records.parquet", records))
    assert list(frame["status"]) == ["ok", "ok", "skipped", "ok"]
    assert frame["n"][0] == 512
    assert pd.isna(frame["n"][1])
    assert bool(frame["mask"][1]) is True
    assert list(frame["k"][2:]) == ["half", "3"]
