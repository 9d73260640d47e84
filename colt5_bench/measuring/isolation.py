"""Protection from the measured code: a process that dies or hangs, or a lost CUDA context, costs one record.

Processes are forked from a server that has imported PyTorch and other packages, and has never used a GPU.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic

import torch

import colt5_bench
from colt5_bench.case import Case
from colt5_bench.loading import invite, load_suite
from colt5_bench.measuring.conditions import Conditions, Tell, silent
from colt5_bench.measuring.failures import BrokenContextError
from colt5_bench.measuring.measure import measure, unmeasured
from colt5_bench.records.results import Record
from colt5_bench.request import TIME_LIMIT
from colt5_bench.selection import Guest
from colt5_bench.suite import Grid
from colt5_bench.texts import describe_error

STARTING_SECONDS, ENDING_SECONDS = 300.0, 10.0
"""Longest time that a process may take to start, and to end after its last answer."""

PRELOADED = ["pynvml", "torch", "torch.fx.experimental.symbolic_shapes", "triton"]
"""Modules that take long to import, and are the same for every checkout. Autograd imports the third one in its first
call."""


@dataclass(frozen=True)
class Task:
    """A case in a direction, described so that another process can find it."""

    suite: Grid
    case: Case
    direction: str
    file: Path
    """Module that contains the suite as `SUITE`."""

    preset: str
    guests: tuple[Guest, ...] = ()


@dataclass(frozen=True)
class _Address:
    """Part of a task that is sent to another process. A suite itself cannot be pickled, because of its lambdas."""

    file: Path
    guests: tuple[Guest, ...]
    preset: str
    case: str
    direction: str
    threads: int
    path: list[str]
    """Search path of modules."""


@dataclass(frozen=True)
class _Line:
    """A line for the user, sent by another process."""

    text: str


@dataclass
class _Attempt:
    """Result of one attempt to measure implementations together."""

    finished: list[Record]
    why: str = ""
    """Reason why some implementations are not finished."""

    culprit: str = ""
    """The implementation that ended the attempt, if it is known and has no record."""


class Measurer:
    """Measures points in this process until its CUDA context is lost. After that, or from the beginning, each point has
    its own process."""

    def __init__(self, *, isolated: bool, time_limit: float = TIME_LIMIT) -> None:
        self.isolated = isolated
        self._time_limit = time_limit

    def measure(
        self, task: Task, implementations: Sequence[str], conditions: Conditions, tell: Tell = silent
    ) -> list[Record]:
        """One record for each named implementation.

        If an attempt leaves implementations unfinished, they are measured again without the one that ended the attempt,
        or one by one if that one is unknown.
        """
        records: dict[str, Record] = {}
        waiting = [list(implementations)]
        while waiting:
            names = waiting.pop(0)
            attempt = self._attempt(task, names, conditions, tell)
            records.update({record.implementation: record for record in attempt.finished})
            left = [name for name in names if name not in records]
            if blamed := attempt.culprit or (left[0] if len(names) == len(left) == 1 else ""):
                suite, case, direction = task.suite, task.case, task.direction
                records[blamed] = unmeasured(suite, case, direction, blamed, conditions, attempt.why)
                left.remove(blamed)
            together = len(left) < len(names)
            waiting += ([left] if together else [[name] for name in left]) if left else []
        return [records[name] for name in implementations]

    def _attempt(self, task: Task, names: list[str], conditions: Conditions, tell: Tell) -> _Attempt:
        if self.isolated:
            return _in_a_process(task, names, conditions, self._time_limit, tell)
        try:
            return _Attempt(measure(task.suite, task.case, task.direction, names, conditions, tell=tell))
        except BrokenContextError as error:
            self.isolated = True
            if conditions.device.type == "cuda":
                _reset_context(conditions.device, error)
            return _Attempt(error.finished, str(error))


def _reset_context(device: torch.device, error: BrokenContextError) -> None:
    """Free the memory of a lost context, so that other processes can use it.

    PyTorch has no call for that. It must also not free tensors or events of that context any more, because an error in
    a destructor ends the process. So all objects of the failed call are kept alive, in the frames of its error.
    """
    gc.freeze()
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))
    driver, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(handle), device.index or 0)
    driver.cuDevicePrimaryCtxReset_v2(handle)


def _in_a_process(task: Task, names: list[str], conditions: Conditions, time_limit: float, tell: Tell) -> _Attempt:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    where = (task.file, task.guests, task.preset, task.case.id, task.direction)
    address = _Address(*where, torch.get_num_threads(), sys.path)
    answers, answering = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(answering, address, names, conditions))
    with _short_temporary_directory(), _this_harness_first():
        process.start()
    answering.close()
    begun, why = "", f"its process did not start within {STARTING_SECONDS:g} s"
    deadline = monotonic() + STARTING_SECONDS
    try:
        while answers.poll(max(deadline - monotonic(), 0)):
            answer = answers.recv()
            if isinstance(answer, _Attempt):
                process.join(ENDING_SECONDS)
                return answer
            if isinstance(answer, _Line):
                tell(answer.text)
            elif answer is None:
                deadline, why = monotonic() + time_limit, f"took longer than the time limit of {time_limit:g} s"
            else:
                begun = answer
    except (EOFError, OSError):
        process.join()
        why = f"its process {_ending(process.exitcode)}"
    finally:
        _end(process)
        answers.close()
    return _Attempt([], why, begun)


@contextmanager
def _short_temporary_directory() -> Iterator[None]:
    """A short temporary directory: the server has a socket in it, and paths of sockets have at most 107 characters."""
    before, tempfile.tempdir = tempfile.tempdir, "/tmp" if len(tempfile.gettempdir()) > 60 else tempfile.gettempdir()
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextmanager
def _this_harness_first() -> Iterator[None]:
    """Let new processes import this harness, even if the measured checkout has its own."""
    before = sys.path
    sys.path = [str(Path(colt5_bench.__file__).parents[1]), *before]
    try:
        yield
    finally:
        sys.path = before


def _answer(answers: Connection, address: _Address, names: list[str], conditions: Conditions) -> None:
    """In the process: send None after the start, each implementation before its turn, lines, and the attempt."""
    # A separate group: Ctrl-C reaches only the run, which then ends all processes of the case.
    os.setsid()
    _end_with_the_run(answers)
    sys.path[:] = address.path
    torch.set_num_threads(address.threads)
    try:
        suite = invite(load_suite(address.file), address.guests)
        case = next(case for case in suite.cases(address.preset, conditions.device) if case.id == address.case)
        answers.send(None)
        attempt = _Attempt(
            measure(
                *(suite, case, address.direction, names, conditions),
                begin=answers.send,
                tell=lambda text: answers.send(_Line(text)),
            )
        )
    except BrokenContextError as error:
        attempt = _Attempt(error.finished, str(error))
    except BaseException as error:
        attempt = _Attempt([], f"its process failed: {describe_error(error)}")
    answers.send(attempt)


def _end_with_the_run(answers: Connection) -> None:
    """End this process if the run is killed, so that it does not occupy the GPU.

    Another process waits for this: no thread can, while measured code holds the lock of the interpreter.
    """
    run = multiprocessing.parent_process()
    assert run is not None
    if os.fork() == 0:
        # The pipe must not stay open in this process, or the end of the measured one would not be seen.
        answers.close()
        run.join()
        os.killpg(0, signal.SIGKILL)


def _end(process: BaseProcess) -> None:
    """End a process, and all processes that it has started."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    process.close()


def _ending(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    hint = ", as the system does when memory runs out" if -status == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{hint}"
