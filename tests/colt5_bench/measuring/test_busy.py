"""The warning that a machine has fewer free cores than calls have threads."""

from itertools import product

import pytest

from colt5_bench.measuring.busy import busy_cores, warning


@pytest.mark.parametrize(
    ("threads", "cores", "busy"), [*product((1, 2, 8), (1, 2, 8), (0.0, 0.4, 0.9, 1.6, 7.0, 30.0))]
)
def test_it_is_given_where_threads_exceed_free_cores(threads, cores, busy):
    said = warning(threads, cores, busy)
    if threads > cores or busy >= cores:
        assert said
    if threads + busy <= cores:
        assert not said
    if said:
        assert f"of {cores} cores were free" in said
        assert f"{threads} thread" in said
        assert ("a lower number" in said) is (threads > 1)


def test_a_machine_that_cannot_tell_is_not_accused():
    assert warning(8, None, 3.0) == warning(8, 2, None) == ""
    assert (busy_cores() or 0) >= 0
