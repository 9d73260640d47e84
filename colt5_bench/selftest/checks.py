"""Checks of the harness on this machine: known durations, equal calls, a planted slowdown, a known rate.

A machine on which other programs run is noisy. Each check measures this noise together with its figure. A deviation
that the noise explains is `unclear`, which is no failure; other deviations are `failed`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal

import numpy as np
import torch

from colt5_bench.compare.findings import Verdict, verdict_on
from colt5_bench.measuring import roofline
from colt5_bench.measuring.energy import measure_energy
from colt5_bench.measuring.rounds import CPU_COLUMNS, GPU_COLUMNS, Call
from colt5_bench.measuring.spin import Spin
from colt5_bench.measuring.timing import current, relative_interval, time_interleaved
from colt5_bench.records.environment import EnergyMeter, InstrumentError, device_name
from colt5_bench.records.samples import changes_in_turns, judge
from colt5_bench.selftest import cuda_bench

DURATIONS = {"cpu": (2e-4, 1e-3, 5e-3), "cuda": (2e-3, 8e-3)}
"""Seconds. On a GPU they are long compared with the microseconds of a launch. On a CPU the shortest one is short
compared with the time slice of a thread, and this one is compared."""

DURATION_LIMIT = 0.02

COMPARISONS, MOST_FALSE_ALARMS = 100, 1

PLANTED, TRIALS, FEWEST_FOUND = 0.05, 20, 19

COMPARED_SAMPLES = 40
"""Samples of each compared call."""

WORK = {"cpu": 2**16, "cuda": 2**22}
"""Number of exponentials in a call that is compared with itself."""

COPIES, COPY_LIMIT = 5, {"cpu": 0.10, "cuda": 0.05}
AGREEMENT = 0.05

WARM_GAIN = 0.1
"""Least extra time of a sum of numbers from memory over a sum of numbers in the L2."""

LEAST_CHANGE = 0.02

ENERGY_LIMIT = 0.05

Outcome = Literal["passed", "failed", "unclear", "skipped"]


@dataclass(frozen=True)
class Check:
    """A check, with its figure and its limit."""

    name: str
    outcome: Outcome
    figure: float | None = None
    limit: float | None = None
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All checks on a device."""

    device: str
    noise: float
    """Interquartile range of the samples of a typical call over their median."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        return not any(check.outcome == "failed" for check in self.checks)


def verdict(before: Sequence[float], after: Sequence[float]) -> Verdict:
    """Verdict on the later samples against the earlier ones, as in a comparison of runs."""
    found = changes_in_turns(before, after)
    return verdict_on(judge(found, found.p, np.log1p(LEAST_CHANGE)))


def run(device: torch.device) -> Report:
    """All checks, in about five seconds on a CPU and 40 on a GPU."""
    with current(device):
        alarms, noise = check_equal(device)
        checks = [
            *check_durations(device),
            alarms,
            check_planted(device),
            check_copy(device),
            check_cold(device),
            check_energy(device),
            *check_cuda_bench(device),
        ]
    return Report(device_name(device), noise, checks)


def check_durations(device: torch.device) -> list[Check]:
    """Check spins of known duration, in each column. They are spins of the GPU, or of the host for the column of host
    time."""
    columns = GPU_COLUMNS if device.type == "cuda" else CPU_COLUMNS
    return [_check_duration(seconds, column, device) for seconds in DURATIONS[device.type] for column in columns]


def _check_duration(seconds: float, column: str, device: torch.device) -> Check:
    name = f"a spin of {1e3 * seconds:g} ms, {column}"
    spin = Spin(seconds, torch.device("cpu") if column == "wall" else device)
    timing = time_interleaved({"spin": spin}, device=device, columns=(column,))["spin"][column]
    if not timing.samples:
        return Check(name, "failed", limit=DURATION_LIMIT, note=timing.stopped)
    durations = spin.durations(len(timing.samples))
    error = median(sample / known - 1 for sample, known in zip(timing.samples, durations, strict=True))
    outcome: Outcome = "passed" if abs(error) <= DURATION_LIMIT else "failed"
    return Check(name, outcome, error, DURATION_LIMIT, "of the duration")


def check_equal(device: torch.device) -> tuple[Check, float]:
    """Repeated comparisons of a call with itself, and the noise of its samples."""
    call = _work(device)
    alarms, noise = 0, []
    for _ in range(COMPARISONS):
        before, after = _compare(call, call, device)
        alarms += verdict(before, after) in ("worse", "better")
        low, middle, high = quantiles(before, n=4)
        noise.append((high - low) / middle)
    outcome: Outcome = "passed" if alarms <= MOST_FALSE_ALARMS else "failed"
    unit = f"false alarms in {COMPARISONS}"
    return Check("equal calls", outcome, alarms, MOST_FALSE_ALARMS, unit), median(noise)


def check_planted(device: torch.device) -> Check:
    """A spin, compared with one that is longer by the planted share."""
    seconds = DURATIONS[device.type][0]
    call, slower = Spin(seconds, device), Spin((1 + PLANTED) * seconds, device)
    found, missed, too_noisy = 0, 0, 0
    for _ in range(TRIALS):
        before, after = _compare(call, slower, device)
        if verdict(before, after) == "worse":
            found += 1
        elif max(relative_interval(before), relative_interval(after)) > PLANTED / 2:
            too_noisy += 1
        else:
            missed += 1
    outcome: Outcome = "passed"
    if found < FEWEST_FOUND:
        outcome = "failed" if missed > TRIALS - FEWEST_FOUND else "unclear"
    note = f"in {too_noisy} of {TRIALS} the medians are too uncertain to find it" if too_noisy else ""
    return Check(f"{PLANTED:.0%} planted", outcome, found, FEWEST_FOUND, f"found of {TRIALS}", note)


def check_copy(device: torch.device) -> Check:
    """A copy as suites would time it, compared with the ceiling for suites, in turns."""
    ceilings, ratios = [], []
    for _ in range(COPIES):
        ceilings.append(roofline.copy_bandwidth(device))
        ratios.append(_timed_copy_bandwidth(device) / ceilings[-1])
    error, limit = median(ratios) - 1, COPY_LIMIT[device.type]
    spread = 1 - min(ceilings) / max(ceilings)
    outcome: Outcome = "passed"
    if abs(error) > limit:
        always = min(ratios) > 1 + limit or max(ratios) < 1 - limit
        outcome = "failed" if always and abs(error) > spread else "unclear"
    note = f"the ceiling itself was {min(ceilings) / 1e9:.1f} to {max(ceilings) / 1e9:.1f} GB/s"
    return Check("a copy", outcome, error, limit, "of the copy bandwidth", note)


def _timed_copy_bandwidth(device: torch.device) -> float:
    """Bandwidth of the fastest sample, because the ceiling is from the fastest try."""
    size = roofline.GPU_COPY_BYTES if device.type == "cuda" else roofline.CPU_COPY_BYTES
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    destination = torch.zeros_like(source)
    column = _main_column(device)
    timings = time_interleaved(
        {"copy": lambda: destination.copy_(source)},
        device=device,
        columns=(column,),
        target=0,
        max_seconds=roofline.TRYING_SECONDS,
    )
    return 2 * size / min(timings["copy"][column].samples)


def check_cold(device: torch.device) -> Check:
    """Check a sum of numbers that fit into the L2. Only if cold, they come from memory."""
    name = "a cold cache"
    if device.type == "cpu":
        return Check(name, "skipped", note="only a GPU's cache is flushed")
    x = torch.zeros(torch.cuda.get_device_properties(device).L2_cache_size // 8, device=device)
    timings = time_interleaved({"sum": x.sum}, device=device, columns=("cold", "warm", "graph"))["sum"]
    if missing := [timing for timing in timings.values() if not timing.samples]:
        return Check(name, "failed", note=f"{missing[0].column}: {missing[0].stopped}")
    cold, warm, graph = (median(timings[column].samples) for column in ("cold", "warm", "graph"))
    fastest = min(cold, graph)
    why = roofline.too_fast(fastest, size=x.nbytes, ceilings=roofline.measure_ceilings(device))
    gain = fastest / warm
    outcome: Outcome = "passed" if gain >= 1 + WARM_GAIN and why is None else "failed"
    return Check(name, outcome, gain - 1, WARM_GAIN, "longer than with a warm one, at least", why or "")


def check_energy(device: torch.device) -> Check:
    """Check that twice the work takes twice the energy, without that of the idle GPU."""
    name = "energy of twice the work"
    try:
        meter = EnergyMeter(device)
        once = _work(device)
        single, double = (measure_energy(call, meter, device) for call in (once, lambda: (once(), once())))
    except InstrumentError as why:
        return Check(name, "skipped", note=str(why))
    if single.joules is None or double.joules is None:
        disagreement = max(single.disagreement, double.disagreement)
        return Check(name, "unclear", note=f"NVML's counter and sensor are {disagreement:.0%} apart")
    error = double.joules / (2 * single.joules) - 1
    return Check(name, "passed" if abs(error) <= ENERGY_LIMIT else "failed", error, ENERGY_LIMIT, "of it")


def check_cuda_bench(device: torch.device) -> list[Check]:
    """The same kernels timed by NVIDIA's cuda-bench."""
    if why := cuda_bench.unavailable(device):
        return [Check("cuda-bench agrees", "skipped", note=why)]
    try:
        theirs = cuda_bench.measure(device)
    except RuntimeError as failure:
        return [Check("cuda-bench agrees", "failed", note=str(failure))]
    calls = {name: make(device) for name, make in cuda_bench.CALLS.items()}
    ours = time_interleaved(calls, device=device, columns=("cold",))
    checks = []
    for name, seconds in theirs.items():
        error = median(ours[name]["cold"].samples) / seconds - 1
        outcome: Outcome = "passed" if abs(error) <= AGREEMENT else "failed"
        checks.append(Check(f"cuda-bench agrees: {name}", outcome, error, AGREEMENT, "of its time"))
    return checks


def _compare(before: Call, after: Call, device: torch.device) -> tuple[list[float], list[float]]:
    column = _main_column(device)
    timings = time_interleaved(
        {"before": before, "after": after},
        device=device,
        columns=(column,),
        target=0,
        min_samples=COMPARED_SAMPLES,
        max_samples=COMPARED_SAMPLES,
    )
    return timings["before"][column].samples, timings["after"][column].samples


def _main_column(device: torch.device) -> str:
    return "cold" if device.type == "cuda" else "wall"


def _work(device: torch.device) -> Call:
    """A call that computes exponentials. On a CPU NumPy uses one thread: two that wait for each other would show
    how busy the machine is."""
    if device.type == "cpu":
        numbers = np.linspace(-1, 0, WORK["cpu"], dtype=np.float32)
        powers = np.empty_like(numbers)
        return lambda: np.exp(numbers, out=powers)
    x = torch.linspace(-1, 0, WORK["cuda"], device=device)
    y = torch.empty_like(x)
    return lambda: torch.exp(x, out=y)
