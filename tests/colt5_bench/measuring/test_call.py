import pytest
import torch

from colt5_bench.case import DIRECTIONS, FORWARD, Problem
from colt5_bench.measuring.call import Call


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_inputs_stay_the_same_in_a_stream_and_are_new_in_another(direction):
    given = []

    def function(x):
        given.append(x)
        return 2 * x

    problem = Problem({"x": torch.randn(3)}, torch.ones(3), ("x",))
    call = Call(function, problem, direction)
    for _ in range(3):
        call()
        call.renew()
    assert len({id(x) for x in given}) == 1
    # As if earlier launches had been in a stream that is not current now.
    call._stream = object()
    call.renew()
    call()
    assert given[-1] is not given[0]
    assert given[-1].data_ptr() == given[0].data_ptr()
    assert given[-1].requires_grad is (direction != FORWARD)
