"""Files of many records: 5 s and 1 GB to load 200,000, and 15 s to write them as CSV.

Seconds are processor time, because wall time includes other programs on the machine.
"""

import pytest

from tests.measurements.large_results import CSV, FILE_BYTES, LOAD, RECORDS, measure, write_large

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    write_large(path)
    assert path.stat().st_size == pytest.approx(FILE_BYTES, rel=0.02)
    return path


def test_loading(large):
    cost = measure(LOAD, large)
    assert cost.records == RECORDS
    assert cost.cpu < 5
    assert cost.peak_bytes < 1e9


def test_csv(large, tmp_path):
    """The whole command, from its start."""
    cost = measure(CSV, large, tmp_path / "large.csv")
    assert cost.records == RECORDS
    assert cost.cpu < 15
