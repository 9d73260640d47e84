"""A number that the kernels of selection and their CPU path have in common."""

LAST_INDEX = 0x7FFFFFFF
"""A key has the distance of an index from this, so that of equal scores the first is the largest."""
