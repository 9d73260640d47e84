"""Files of many records: 5 s and 1 GB to load 200,000, and 15 s to write them as CSV.

Seconds are processor time: the time of a clock is that of all programs on the machine. Programs beside it only add to
processor time, too, as they share caches. So one measurement of three within the limit is enough.
"""

import pytest

from tests.measurements.large_results import CSV, FILE_BYTES, LOAD, RECORDS, measure, write_large

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    write_large(path)
    assert path.stat().st_size == pytest.approx(FILE_BYTES, rel=0.02)
    return path


def measure_within(seconds, *arguments):
    for _ in range(3):
        cost = measure(*arguments)
        if cost.cpu < seconds:
            break
    assert cost.cpu < seconds
    return cost


def test_loading(large):
    cost = measure_within(5, LOAD, large)
    assert cost.records == RECORDS
    assert cost.peak_bytes < 1e9


def test_csv(large, tmp_path):
    """The whole command, from its start."""
    cost = measure_within(15, CSV, large, tmp_path / "large.csv")
    assert cost.records == RECORDS
