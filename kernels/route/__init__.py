"""`kernels.route`, and its parts that other operations use."""

from kernels.route.api import Choice, route

__all__ = ["Choice", "route"]
