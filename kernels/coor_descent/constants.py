"""Numbers that the kernels of coordinate descent and its CPU path have in common."""

MAX_SHIFT = 8.0
"""Largest distance, in temperatures, of the threshold from the base that the weights were computed at. It bounds the
argument of the exponential, and so the rounding of that argument, for the entries near the threshold."""

LARGEST = 1e30
"""Cap of a weight: well above any k, well below where fp32 overflows."""

FAR = 2.0**20
"""Largest distance, in temperatures, of the highest score of a row below 0. Where it is further, it is the origin that
scores and a are counted from: a had no digits left for what is between scores."""
