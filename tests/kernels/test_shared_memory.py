"""Words of shared memory against PyTorch: in Triton's interpreter, and on a GPU if there is one."""

import pytest
import torch
import triton
import triton.language as tl

from kernels._common import shared_memory as shared
from kernels._common.tensors import INTERPRETED
from tests.kernels.devices import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or Triton's interpreter")


@triton.jit
def _count_kernel(places_ptr, mask_ptr, stand_in_ptr, counts_ptr, numbers_ptr, takers_ptr, BLOCK: tl.constexpr):
    """Counts of places, three times the ticket of each entry at its place, and its ticket among all."""
    words = shared.shared_words(stand_in_ptr, 2 * BLOCK + 4)
    fours = 4 * tl.arange(0, BLOCK // 4)
    entries = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK // 4], tl.int32)
    shared.store_four(words, fours, zeros, zeros, zeros, zeros)
    shared.store_four(words, BLOCK + fours, zeros, zeros, zeros, zeros)
    shared.store_word(words, 2 * BLOCK, 0, tl.program_id(0) == 0)
    tl.debug_barrier()
    places, mask = tl.load(places_ptr + entries), tl.load(mask_ptr + entries) != 0
    shared.count_word(words, places, mask)
    tl.store(numbers_ptr + entries, shared.add_word(words, BLOCK + places, 3, mask))
    tl.store(takers_ptr + entries, shared.take_place(words, 2 * BLOCK, mask))
    tl.debug_barrier()
    first, second, third, fourth = shared.load_four(words, fours)
    tl.store(counts_ptr + fours, first)
    tl.store(counts_ptr + fours + 1, second)
    tl.store(counts_ptr + fours + 2, third)
    tl.store(counts_ptr + fours + 3, fourth)


@triton.jit
def _move_kernel(x_ptr, places_ptr, mask_ptr, stand_in_ptr, y_ptr, BLOCK: tl.constexpr):
    """Some of x, each moved to another place, and 0 for the others."""
    words = shared.shared_words(stand_in_ptr, 2 * BLOCK)
    entries = tl.arange(0, BLOCK)
    shared.store_pair(words, entries, tl.zeros([BLOCK], tl.int64), entries >= 0)
    tl.debug_barrier()
    places, mask = tl.load(places_ptr + entries), tl.load(mask_ptr + entries) != 0
    shared.store_pair(words, places, tl.load(x_ptr + entries), mask)
    tl.debug_barrier()
    tl.store(y_ptr + entries, shared.load_pair(words, entries, entries % 3 > 0))


def draw(n, n_places, kept):
    """Places, and a mask that keeps a share of them."""
    generator = torch.Generator().manual_seed(n + n_places)
    places = torch.randint(n_places, (n,), generator=generator, dtype=torch.int32)
    return places.to(DEVICE), (torch.rand(n, generator=generator) < kept).to(DEVICE)


@pytest.mark.parametrize(("n", "num_warps"), [(128, 4), (1024, 4), (2048, 32)])
@pytest.mark.parametrize("n_places", [1, 7, 128])
@pytest.mark.parametrize("kept", [0.0, 0.03, 0.7, 1.0])
def test_counts_are_exact_and_numbers_unique(n, num_warps, n_places, kept):
    places, mask = draw(n, n_places, kept)
    stand_in, counts, numbers, takers = (torch.zeros(2 * n + 4, dtype=torch.int32, device=DEVICE) for _ in range(4))
    _count_kernel[(1,)](places, mask, stand_in, counts, numbers, takers, BLOCK=n, num_warps=num_warps)
    expected = torch.bincount(places[mask], minlength=n)
    assert torch.equal(counts[:n].long(), expected)
    taken = numbers[:n][mask]
    for place in range(n_places):
        assert taken[places[mask] == place].sort().values.tolist() == list(range(0, 3 * expected[place], 3))
    assert (numbers[:n][~mask] == 0).all()
    assert takers[:n][mask].sort().values.tolist() == list(range(mask.sum()))


@pytest.mark.parametrize(("n", "num_warps"), [(128, 4), (1024, 4), (2048, 32)])
def test_pairs_are_stored_and_loaded_by_place(n, num_warps):
    _, mask = draw(n, 1, 0.5)
    places = torch.randperm(n, dtype=torch.int32).to(DEVICE)
    x = torch.randint(-(2**62), 2**62, (n,), device=DEVICE)
    stand_in, y = torch.zeros(2 * n, dtype=torch.int32, device=DEVICE), torch.empty_like(x)
    _move_kernel[(1,)](x, places, mask, stand_in, y, BLOCK=n, num_warps=num_warps)
    expected = torch.zeros_like(x)
    expected[places[mask].long()] = x[mask]
    expected[::3] = 0
    assert torch.equal(y, expected)
