"""Check whether enough cores of the machine are free."""

import os


def busy_cores() -> float | None:
    """Number of cores that were busy in the last minute. None if the system does not provide it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def warning(threads: int, cores: int | None, busy: float | None) -> str:
    """A warning for the user before times are taken, or nothing.

    Args:
        threads: number of threads of a call.
        cores: number of cores that this process may use.
        busy: number of busy cores.
    """
    if cores is None or busy is None or threads <= max(cores - round(busy), 0):
        return ""
    named, free = f"{threads} thread{'s' if threads > 1 else ''}", max(cores - busy, 0)
    fewer = ", or set OMP_NUM_THREADS to a lower number" if threads > 1 else ""
    return (
        f"calls use {named}, but only {free:.1f} of {cores} cores were free before: times depend on how busy the "
        f"machine is. Wait until it is idle{fewer}."
    )
