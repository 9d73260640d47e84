"""Exceptions of implementations: each becomes the status and reason of a record, and the run goes on."""

import gc
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from colt5_bench.measuring.refusal import RefusedError
from colt5_bench.records.results import Record, Status
from colt5_bench.texts import describe_error, printable

LONGEST_REASON = 300
"""Characters of an error message that go into a record."""

BREAKS_THE_CONTEXT = (
    "an illegal memory access was encountered",
    "the launch timed out and was terminated",
    "device-side assert triggered",
    "hardware stack error",
    "an illegal instruction was encountered",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "unspecified launch failure",
    "uncorrectable ECC error encountered",
)
"""Texts of the errors after which every call to CUDA fails in the process that had one. The CUDA Runtime API's page on
`cudaError_t` says of these that the process must be terminated and relaunched. PyTorch and Triton pass them on."""

OUT_OF_MEMORY = re.compile(
    r"\w+: (\[enforce fail at alloc_cpu\.cpp:\d+\] .*)?DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|\w+: (CUDA error|Triton Error \[CUDA\]): out of memory"
)
"""Beginnings of errors, after their type, whose reason is lack of memory."""


class BrokenContextError(RuntimeError):
    """The CUDA context is lost: whatever is not measured yet needs another process."""

    def __init__(self, why: str, finished: Sequence[Record] = ()) -> None:
        super().__init__(why)
        self.finished = list(finished)
        """Records that stay valid. They are skipped or failed, or complete without times; one may have broken the
        context."""


@contextmanager
def failing(records: Sequence[Record], where: str = "", *, out_of_memory: Status = "out_of_memory") -> Iterator[None]:
    """An exception becomes the status and the reason of the records, and the run goes on.

    An exception that breaks the CUDA context ends the run in this process. If there are several records, it is unknown
    which one caused it, so they are measured again one by one.
    """
    try:
        yield
    except (BrokenContextError, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = describe_error(error)
        status: Status = out_of_memory if _is_out_of_memory(error, text) else "error"
        message = where + text[:LONGEST_REASON]
        if isinstance(error, RefusedError):
            status, message = "refused", printable(str(error))
        broken = breaks_context(text)
        if len(records) == 1 or not broken:
            for record in records:
                record.status, record.reason = status, message
        if broken:
            raise BrokenContextError(message) from None
    else:
        return
    # The traceback kept the tensors of the failed call alive until here.
    free_memory()


def free_memory() -> None:
    """Free what failed or ended calls have left in memory.

    Raises:
        BrokenContextError: the device has an error that only a new process ends.
    """
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # The error is from a kernel that was still running when something else failed.
            raise BrokenContextError(str(error)) from None


def breaks_context(message: str) -> bool:
    """True if no call to CUDA succeeds in this process after an error with such a message."""
    return any(text in message for text in BREAKS_THE_CONTEXT)


def _is_out_of_memory(error: BaseException, message: str) -> bool:
    """True if memory was too small. PyTorch has a separate type for memory of a GPU. For memory of the host, and if
    CUDA or Triton allocate memory of a GPU, the error is a RuntimeError with such a beginning."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.match(message) is not None


@contextmanager
def exit_refused() -> Iterator[None]:
    """Let `os._exit` raise, except in forked processes: it would end the run with the status of a success."""
    leave, here = os._exit, os.getpid()

    def refuse(status: int) -> None:
        if os.getpid() != here:
            leave(status)
        raise SystemExit(f"called os._exit({status})")

    os._exit = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = leave
