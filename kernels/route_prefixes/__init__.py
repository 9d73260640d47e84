"""`kernels.route_prefixes`, in its own folder."""

from kernels.route_prefixes.api import route_prefixes

__all__ = ["route_prefixes"]
