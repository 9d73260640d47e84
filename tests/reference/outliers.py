"""Unusual rows of scores: outliers, ties, infinities, either sign, of any dtype."""

import math

import torch
from hypothesis import strategies as st

LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def rows(dtype, infinities=(-math.inf,), largest=math.inf):
    """Lists of up to 8 numbers of a dtype. Most of them are near each other, or near an outlier up to `largest`."""
    finfo = torch.finfo(dtype)
    magnitudes = [1e2, 1e4, 6e4, 1e6, 1e9, 1e15, 1e30, 2e30, 1e38, finfo.max, finfo.tiny, finfo.smallest_normal / 8]
    far = st.sampled_from([each for each in magnitudes if each <= min(finfo.max, largest)]).flatmap(
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


WIDTH = 9
"""Entries of a row of a matrix: one more than a list has."""


def matrices(dtype, infinities=(-math.inf,), largest=math.inf):
    """Scores `6 n` of such rows and a mask; missing entries of a row are NaN and masked."""

    def pad(drawn):
        scores = torch.full((len(drawn), WIDTH), math.nan, dtype=dtype)
        for row, numbers in zip(scores, drawn, strict=True):
            row[: len(numbers)] = numbers
        return scores, torch.arange(WIDTH) < torch.tensor([[len(numbers)] for numbers in drawn])

    return st.lists(rows(dtype, infinities, largest), min_size=6, max_size=6).map(pad)
