"""Rows of scores as nobody expects them: outliers, ties, infinities, either sign, of any dtype."""

import math

import torch
from hypothesis import strategies as st

LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def rows(dtype, infinities=(-math.inf,)):
    """Lists of up to 8 numbers of a dtype, most of which are near each other, or near an outlier."""
    finfo = torch.finfo(dtype)
    magnitudes = [1e2, 1e4, 6e4, 1e6, 1e9, 1e15, 1e30, 2e30, 1e38, finfo.max, finfo.tiny, finfo.smallest_normal / 8]
    far = st.sampled_from([each for each in magnitudes if each <= finfo.max]).flatmap(
        lambda x: st.sampled_from([x, -x])
    )
    near = st.sampled_from([0.0, -0.0, 0.25, -0.5, 1.0, -1.0, 3.0])
    base = st.one_of(st.just(0.0), st.just(0.0), far)
    entry = st.one_of(near, near, near, far, st.sampled_from(infinities))

    def add(base_and_entries):
        base, entries = base_and_entries
        sums = torch.tensor([base + each for each in entries], dtype=torch.float64).clamp(min=-finfo.max, max=finfo.max)
        sums = torch.where(torch.tensor(entries, dtype=torch.float64).isinf(), torch.tensor(entries).double(), sums)
        return sums.to(dtype)

    return st.tuples(base, st.lists(entry, min_size=1, max_size=8)).map(add)
