"""Profiles of calls. They are never recorded as times.

Each case, direction and implementation is run a few times in named ranges, and every mode shows these names. `ncu` and
`nsys` start such a run themselves: see `nsight`.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import NamedTuple

import nvtx
import torch

from colt5_bench.measuring.call import Call
from colt5_bench.measuring.measure import reason_to_skip
from colt5_bench.measuring.memory import SILENT
from colt5_bench.measuring.timing import current
from colt5_bench.selection import case_filter
from colt5_bench.suite import Suite

MODES = {
    "nvtx": "NVTX ranges for a profiler that you start yourself",
    "torch": "a Chrome trace and a table of operators",
    "ncu": "hardware metrics of each kernel, from Nsight Compute",
    "nsys": "a timeline and the time of each kernel, from Nsight Systems",
    "memory": "a snapshot of the GPU's memory for https://pytorch.org/memory_viz",
    "proton": "the kernels of each range, from Triton's profiler Proton",
}

NEEDS_GPU = ("ncu", "nsys", "memory", "proton")

TOOLS = {"ncu": "NVIDIA Nsight Compute", "nsys": "NVIDIA Nsight Systems"}

DOMAIN = "colt5-bench"
"""Domain of the NVTX ranges."""

WARM_UP_CALLS, CALLS = 2, 3
"""Calls before the profile, which compile and fill caches, and calls in the profile."""

MOST_ALLOCATIONS = 100_000
"""Most entries in the history of a snapshot."""

LONGEST_NAME = 150
"""Most characters of a file name, and of the name of an operator in a table."""

Range = Callable[[str], AbstractContextManager[object]]
Recorder = Callable[["Point", torch.device, Path], AbstractContextManager[list[Path]]]
"""A context that profiles its body, and then gives the files of the profile."""


class Point(NamedTuple):
    """A unit of profiling."""

    suite: str
    case: str
    direction: str
    implementation: str

    def label(self, phase: str) -> str:
        """The name of a range, unique for point and phase."""
        return " | ".join((f"{self.suite} {self.case}", self.direction, self.implementation, phase))

    @property
    def phases(self) -> tuple[str, ...]:
        """Phases of a call: `forward`, and `backward`."""
        return tuple(self.direction.split("+"))

    def file_name(self, number: int) -> str:
        """File name with a number, because the rest may be cut."""
        described = "-".join((self.suite, self.implementation, self.direction, self.case))
        return f"{number:03d}-{re.sub(r'[^A-Za-z0-9=+,._-]', '_', described)}"[:LONGEST_NAME]


@dataclass
class Outcome:
    """Results of the points."""

    files: list[Path] = field(default_factory=list)
    skipped: dict[Point, str] = field(default_factory=dict)
    """Reasons by point."""

    failed: dict[Point, str] = field(default_factory=dict)


def missing(mode: str, device: torch.device) -> str | None:
    """Reason why this profile is not possible here, with advice, or None."""
    if mode in NEEDS_GPU and device.type != "cuda":
        return f"--profile {mode} needs a GPU, but the device is {device.type}: use --profile torch."
    if mode in TOOLS and which(mode) is None:
        return f"--profile {mode} needs {TOOLS[mode]}, but {mode} is not on the PATH: install it, or add its directory."
    if mode == "proton" and find_spec("triton.profiler") is None:
        return "--profile proton needs triton.profiler, which this build of Triton lacks: use --profile torch."
    return None


def points(
    suites: Iterable[Suite], preset: str, device: torch.device, *, implementations: Sequence[str], cases: str
) -> list[Point]:
    """All selected points, as a run would measure them."""
    wanted = case_filter(cases)
    return [
        Point(suite.name, case.id, direction, name)
        for suite in suites
        for case in suite.cases(preset, device)
        if wanted(case.id)
        for direction in suite.directions(case)
        for name in suite.implementations
        if not implementations or name in implementations
    ]


def profile(
    mode: str, wanted: Sequence[Point], suites: dict[str, Suite], preset: str, device: torch.device, directory: Path
) -> Outcome:
    """Profile point after point, in this process. An error affects only its point."""
    if mode != "nvtx":
        directory.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    for number, point in enumerate(wanted, start=1):
        path = directory / point.file_name(number)
        try:
            with current(device), _in_this_thread():
                outcome.files += _profile_point(mode, point, suites[point.suite], preset, device, path)
        except _Skipped as why:
            outcome.skipped[point] = str(why)
        except Exception as error:
            outcome.failed[point] = " ".join(f"{type(error).__name__}: {error}".split())
    return outcome


class _Skipped(Exception):
    """The implementation cannot run the case; the message is the reason."""


def _profile_point(mode: str, point: Point, suite: Suite, preset: str, device: torch.device, path: Path) -> list[Path]:
    record, open_range = RECORDERS[mode]
    call = _prepare(point, suite, preset, device)
    with record(point, device, path) as files:
        _run(call, point, open_range, device)
    return files


def _prepare(point: Point, suite: Suite, preset: str, device: torch.device) -> Call:
    """A call, after it was compiled and has filled its caches."""
    implementation = suite.implementations[point.implementation]
    case = next(case for case in suite.cases(preset, device) if case.id == point.case)
    if why := reason_to_skip(implementation, case, point.direction, device):
        raise _Skipped(why)
    problem = (implementation.operation or suite).problem(case, device)
    call = Call(implementation.build(case), problem, point.direction)
    for _ in range(WARM_UP_CALLS):
        call()
    _synchronize(device)
    return call


def _run(call: Call, point: Point, open_range: Range, device: torch.device) -> None:
    with open_range(f"{point.suite} {point.case} | {point.direction}"), open_range(point.implementation):
        for _ in range(CALLS):
            with open_range(point.label("forward")):
                output = call.forward()
            if "backward" in point.phases:
                with open_range(point.label("backward")):
                    call.backward(output)
        _synchronize(device)


def _in_this_thread() -> AbstractContextManager[object]:
    """Run backward passes in this thread: ranges belong to a thread, and PyTorch has its own for a GPU."""
    return torch.autograd.set_multithreading_enabled(False)


@contextmanager
def _for_a_tool(point: Point, device: torch.device, path: Path) -> Iterator[list[Path]]:
    """A context between the marks of CUDA's profiler interface, so that tools leave out everything else."""
    with torch.cuda.profiler.profile() if device.type == "cuda" else nullcontext():
        yield []


@contextmanager
def _torch(point: Point, device: torch.device, path: Path) -> Iterator[list[Path]]:
    # Read at the first start of the profiler, which would otherwise print lines at each start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu else []
    files: list[Path] = []
    with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True) as run:
        yield files
    trace, table = path.with_name(f"{path.name}.trace.json.gz"), path.with_name(f"{path.name}.operators.txt")
    run.export_chrome_trace(str(trace))
    sort_by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    operators = run.key_averages().table(sort_by=sort_by, row_limit=-1, max_name_column_width=LONGEST_NAME)
    table.write_text(operators, encoding="utf-8")
    files += [trace, table]


@contextmanager
def _memory(point: Point, device: torch.device, path: Path) -> Iterator[list[Path]]:
    files: list[Path] = []
    torch.cuda.memory._record_memory_history(
        stacks="python", max_entries=MOST_ALLOCATIONS, device=device, clear_history=True
    )
    try:
        yield files
        snapshot = path.with_name(f"{path.name}.pickle")
        torch.cuda.memory._dump_snapshot(str(snapshot))
        files.append(snapshot)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None, device=device)


@contextmanager
def _proton(point: Point, device: torch.device, path: Path) -> Iterator[list[Path]]:
    from triton import profiler

    files: list[Path] = []
    session = profiler.start(str(path), hook="triton")
    try:
        yield files
    finally:
        profiler.finalize(session)
    files += sorted(path.parent.glob(f"{path.name}*"))
    if not files:
        raise RuntimeError("proton wrote no profile")


def _nvtx_range(name: str) -> AbstractContextManager[object]:
    return nvtx.annotate(name, domain=DOMAIN)


def _proton_range(name: str) -> AbstractContextManager[object]:
    from triton import profiler

    return profiler.scope(name)


RECORDERS: dict[str, tuple[Recorder, Range]] = {
    "nvtx": (_for_a_tool, _nvtx_range),
    "torch": (_torch, torch.profiler.record_function),
    "memory": (_memory, torch.profiler.record_function),
    "proton": (_proton, _proton_range),
}
"""For each mode that works in this process: functions that record a point, and name its ranges."""


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
