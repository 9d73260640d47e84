"""Constants that the kernels of coordinate descent and its CPU path share."""

MAX_SHIFT = 8.0
"""Largest distance, in temperatures, between the threshold and the base of the weights. It bounds the argument of the
exponential, and so its rounding error, for the entries near the threshold."""

LARGEST = 1e30
"""Cap of a weight: far above any k, and far below the overflow of fp32."""

FAR = 2.0**20
"""Largest distance, in temperatures, of the highest score of a row below 0. If the score is lower, it becomes the
origin of scores and a, because a would have no digits left for differences of scores."""
