"""Processes that end when who started them does, however that is."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2)."""

_prctl = ctypes.CDLL(None).prctl


def die_with(parent: int) -> None:
    """Have the system kill this process as soon as its parent has ended, whatever either is doing."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class Terminated(SystemExit):
    """A signal asked this process to end."""


@contextmanager
def unwinding_when_terminated() -> Iterator[None]:
    """SIGTERM and SIGHUP end what runs as an exception does, so that it puts away what it has made.

    Raises:
        Terminated: one of them came, with the status that a shell gives to who is ended by it.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        for each in caught:
            # Putting away is not interrupted.
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(128 + number)

    # One that is ignored, as under nohup, stays so.
    caught = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for each in caught:
        signal.signal(each, terminate)
    try:
        yield
    finally:
        for each in caught:
            signal.signal(each, signal.SIG_DFL)
