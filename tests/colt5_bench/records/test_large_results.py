"""Files of many records: 5 s and 1 GB to load 200,000, and 15 s to write them as CSV.

Seconds are processor time, because wall time includes other programs on the machine. A slower machine has more of them,
by a yardstick that is measured next to them. Other programs make processor time longer, too, so a program is measured
several times if it takes too long.
"""

import pytest

from tests.attempts import first_good
from tests.measurements.large_results import CSV, FILE_BYTES, LOAD, PARSE, RECORDS, measure, write_large

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(1200)]


PARSE_SECONDS = 3.0
"""Seconds of the yardstick on a machine for which the limits are meant, a virtual one with an AMD EPYC."""


def measured_within(seconds, large, program, *arguments):
    """Cost of a program, and whether it took fewer seconds; on a slower machine, in proportion to the yardstick."""

    def attempt():
        cost = measure(program, large, *arguments)
        return cost, cost.cpu < seconds or cost.cpu < seconds * measure(PARSE, large).cpu / PARSE_SECONDS

    return first_good(attempt, lambda measured: measured[1])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    write_large(path)
    assert path.stat().st_size == pytest.approx(FILE_BYTES, rel=0.02)
    return path


def test_loading(large):
    cost, is_within = measured_within(5, large, LOAD)
    assert cost.records == RECORDS
    assert is_within, cost
    assert cost.peak_bytes < 1e9


def test_csv(large, tmp_path):
    """The whole command, from its start."""
    cost, is_within = measured_within(15, large, CSV, tmp_path / "large.csv")
    assert cost.records == RECORDS
    assert is_within, cost
