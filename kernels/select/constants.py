"""A constant that the kernels of selection and their CPU path share."""

LAST_INDEX = 0x7FFFFFFF
"""A key contains this minus the index, so that of equal scores the first is the largest."""
