"""Plans of launches, for machines that need not be there: what a multiprocessor has is enough for each of them."""

import pytest

from kernels import _descent_backward, _descent_forward

MULTIPROCESSORS = (1, 58, 72, 108, 132)

REGISTERS = 65536
"""Of a multiprocessor. A program that asks for more cannot run."""


def around(*borders):
    """Sizes from 1 to some millions: powers of two, the borders of a launcher, and the neighbours of all these."""
    middles = {2**power for power in range(23)} | set(borders)
    return sorted({size + step for size in middles for step in (-1, 0, 1) if size + step > 0})


@pytest.mark.parametrize("available", MULTIPROCESSORS)
def test_coordinate_descent_asks_for_no_more_registers_than_there_are(available):
    resident, streamed = _descent_forward.RESIDENT, _descent_forward.STREAMED
    for n in around(resident // 2, resident, 12000, available * resident):
        for n_rows in around(2, 4, available, 4 * available, 65536):
            plans = [_descent_backward._plan(n_rows, n, _descent_backward.CHUNK)]
            plans += [_descent_forward._plan(n_rows, n, simple, available, resident, streamed) for simple in (0, 1)]
            for plan in plans:
                threads = 32 * plan.settings["num_warps"]
                assert threads <= 1024, (n_rows, n)
                assert threads * plan.settings["maxnreg"] <= REGISTERS, (n_rows, n)
                assert plan.programs <= available or "launch_cooperative_grid" not in plan.settings, (n_rows, n)
