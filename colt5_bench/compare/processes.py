"""Processes that end when their parent ends for any reason."""

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
    """Let the system kill this process as soon as its parent has ended."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class Terminated(SystemExit):
    """A signal to end this process."""


@contextmanager
def unwinding_when_terminated() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that temporary files are removed.

    Raises:
        Terminated: one of them arrived. It has the exit status that a shell gives for the signal.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        for each in caught:
            # The cleanup must not be interrupted.
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(128 + number)

    # An ignored signal, as under nohup, stays ignored.
    caught = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is signal.SIG_DFL]
    for each in caught:
        signal.signal(each, terminate)
    try:
        yield
    finally:
        for each in caught:
            signal.signal(each, signal.SIG_DFL)
