"""Checks that a machine has the cores that a run wants."""

import os


def busy_cores() -> float | None:
    """Number of cores that others keep busy, of the last minute. None where the machine cannot tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def warning(threads: int, cores: int | None, busy: float | None) -> str:
    """A warning for the user before times are taken, or nothing.

    Args:
        threads: that a call runs in.
        cores: that this process may use.
        busy: how many of them are taken.
    """
    if cores is None or busy is None or threads <= max(cores - round(busy), 0):
        return ""
    named, free = f"{threads} thread{'s' if threads > 1 else ''}", max(cores - busy, 0)
    return (
        f"calls use {named}, but only {free:.1f} of {cores} cores were free before: times depend on how busy the "
        "machine is. Wait until it is idle, or set OMP_NUM_THREADS to a lower number."
    )
