"""A number that the kernels of routing scores and their CPU path have in common."""

SMALLEST_NORM = 1e-12
"""A token whose norm is below this is divided by this, as by PyTorch's normalize."""
