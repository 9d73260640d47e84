"""Energy of a call on a GPU, by two instruments that have to agree.

NVML has a counter of the energy that a GPU has used, and a sensor of its current power. A thread reads both while a
call is repeated. The counter changes in steps of some 20 to 100 ms, so its power is computed from step to step. The
readings of the sensor in between are integrated. The power of the idle GPU is subtracted from both.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from time import perf_counter, sleep
from typing import NamedTuple, Protocol

import torch

from colt5_bench.records.environment import InstrumentError

WINDOW = 2.0
"""Seconds for which a call is repeated: more than ten steps of the slowest counter."""

SETTLING = 1.0
"""Seconds before the window, for power and clocks to settle."""

IDLE_WINDOW = 1.0

FEWEST_STEPS = 5
"""Fewest steps of the counter that determine the power."""

AGREEMENT = 0.05
"""Largest difference of the two instruments, relative to their mean."""

BETWEEN_READINGS = 0.005
CHUNK_SECONDS = 0.02
"""Host time of calls before a wait for the GPU, whose queue must not fill up."""


class Meter(Protocol):
    """The two instruments of a GPU."""

    def joules(self) -> float:
        """Reading of the counter."""

    def watts(self) -> float:
        """Reading of the sensor."""


class Reading(NamedTuple):
    """Both instruments at one moment."""

    seconds: float
    joules: float
    watts: float


class Power(NamedTuple):
    """Mean power in watts, by either instrument."""

    by_counter: float
    by_sensor: float


@dataclass(frozen=True)
class Energy:
    """Energy of a call."""

    seconds: float
    """Mean time of a call."""

    busy: Power
    idle: Power

    @property
    def disagreement(self) -> float:
        """Difference of the instruments over their mean, without idle power; infinite if the mean is not above 0."""
        counter, sensor = self._above_idle
        mean = (counter + sensor) / 2
        return abs(counter - sensor) / mean if mean > 0 else float("inf")

    @property
    def joules(self) -> float | None:
        """Energy of a call by the counter, without idle power; None if the instruments do not agree."""
        return self._above_idle.by_counter * self.seconds if self.disagreement <= AGREEMENT else None

    @property
    def _above_idle(self) -> Power:
        return Power(self.busy.by_counter - self.idle.by_counter, self.busy.by_sensor - self.idle.by_sensor)

    def metrics(self) -> dict[str, float]:
        """Metrics for a record, without the energy of a call if the instruments do not agree."""
        agreed = {} if self.joules is None else {"energy_mJ": 1e3 * self.joules}
        return {**agreed, "energy_disagreement": self.disagreement, "idle_W": self.idle.by_counter}


def mean_power(readings: Sequence[Reading]) -> Power:
    """Mean power from the first step of the counter to its last.

    Raises:
        InstrumentError: the counter changed too few times.
    """
    steps = [at for at in range(1, len(readings)) if readings[at].joules != readings[at - 1].joules]
    if len(steps) <= FEWEST_STEPS:
        raise InstrumentError(
            f"the energy counter must change at least {FEWEST_STEPS + 1} times, and changed {len(steps)} times"
        )
    within = readings[steps[0] : steps[-1] + 1]
    seconds = within[-1].seconds - within[0].seconds
    pairs = itertools.pairwise(within)
    by_sensor = sum((late.seconds - early.seconds) * (early.watts + late.watts) / 2 for early, late in pairs)
    return Power((within[-1].joules - within[0].joules) / seconds, by_sensor / seconds)


class _Reader(Thread):
    """Reads both instruments until it is stopped."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(daemon=True)
        self._meter, self._stopped = meter, Event()
        self.readings: list[Reading] = []
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            while not self._stopped.wait(BETWEEN_READINGS):
                joules, watts = self._meter.joules(), self._meter.watts()
                self.readings.append(Reading(perf_counter(), joules, watts))
        except Exception as error:  # The caller of `power` gets this error.
            self._error = error

    def __enter__(self) -> "_Reader":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()

    def power(self) -> Power:
        if self._error is not None:
            raise self._error
        return mean_power(self.readings)


def idle_power(meter: Meter, device: torch.device, seconds: float = IDLE_WINDOW) -> Power:
    """Mean power while nothing runs. Clocks are still as high as during the calls, as they are between calls, too."""
    _wait(device)
    with _Reader(meter) as reader:
        sleep(seconds)
    return reader.power()


def measure_energy(
    call: Callable[[], object],
    meter: Meter,
    device: torch.device,
    *,
    window: float = WINDOW,
    settling: float = SETTLING,
    idle_window: float = IDLE_WINDOW,
) -> Energy:
    """Repeat a call, and measure its energy.

    Args:
        call: the call to measure.
        meter: instruments of the device.
        device: device of the call.
        window: seconds of the measurement.
        settling: seconds before the window.
        idle_window: seconds after the window, in which nothing runs.

    Raises:
        InstrumentError: an instrument does not answer, or changes too seldom.
    """
    _repeat(call, device, settling)
    with _Reader(meter) as reader:
        seconds = _repeat(call, device, window)
    return Energy(seconds, reader.power(), idle_power(meter, device, idle_window))


def _repeat(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Mean seconds of a call, over as many calls as fit into the time."""
    calls, start = 0, perf_counter()
    while (now := perf_counter()) < start + seconds:
        while perf_counter() < now + CHUNK_SECONDS:
            call()
            calls += 1
        _wait(device)
    return (perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
