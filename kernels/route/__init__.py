"""`kernels.route`, and the parts of it that other operations take."""

from kernels.route.api import Choice, route

__all__ = ["Choice", "route"]
