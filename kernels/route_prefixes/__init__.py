"""`kernels.route_prefixes`, in a folder of its own."""

from kernels.route_prefixes.api import route_prefixes

__all__ = ["route_prefixes"]
