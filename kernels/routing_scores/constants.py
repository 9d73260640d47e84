"""A constant that the kernels of routing scores and their CPU path share."""

SMALLEST_NORM = 1e-12
"""A token with a smaller norm is divided by this instead, as in PyTorch's normalize."""
