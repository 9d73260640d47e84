"""`kernels.windowed_attention`, and the amount of its work."""

from kernels.windowed_attention.api import pairs_in_reach, windowed_attention

__all__ = ["pairs_in_reach", "windowed_attention"]
