"""Energy of a call on a GPU, by two instruments that have to agree.

NVML has a counter of the energy that a GPU has taken, and a sensor of the power that it takes. A thread reads both
while a call runs again and again. The counter moves in steps of some 20 to 100 ms, so that its power is taken from step
to step; the readings of the sensor in between are integrated. The power of the idle GPU is subtracted from both.
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
"""Seconds that a call runs again and again: ten steps of the slowest counter and more."""

SETTLING = 1.0
"""Seconds before the window, in which power and clocks settle."""

IDLE_WINDOW = 1.0

FEWEST_STEPS = 5
"""Least number of steps of the counter that say what the power is."""

AGREEMENT = 0.05
"""Largest difference of the two instruments over the power that they agree on."""

BETWEEN_READINGS = 0.005
CHUNK_SECONDS = 0.02
"""Host time of the calls that are launched before the GPU is waited for: its queue must not fill up."""


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
    """Time of a call, of one among many."""

    busy: Power
    idle: Power

    @property
    def disagreement(self) -> float:
        """Difference of the instruments over their mean, idle power subtracted; infinite if that is none."""
        counter, sensor = self._above_idle
        mean = (counter + sensor) / 2
        return abs(counter - sensor) / mean if mean > 0 else float("inf")

    @property
    def joules(self) -> float | None:
        """Energy of a call beyond the idle GPU's, by the counter; None where the instruments do not agree."""
        return self._above_idle.by_counter * self.seconds if self.disagreement <= AGREEMENT else None

    @property
    def _above_idle(self) -> Power:
        return Power(self.busy.by_counter - self.idle.by_counter, self.busy.by_sensor - self.idle.by_sensor)

    def metrics(self) -> dict[str, float]:
        """For a record; the energy of a call is left out where the instruments do not agree."""
        agreed = {} if self.joules is None else {"energy_mJ": 1e3 * self.joules}
        return {**agreed, "energy_disagreement": self.disagreement, "idle_W": self.idle.by_counter}


def mean_power(readings: Sequence[Reading]) -> Power:
    """Mean power from the first step of the counter to its last.

    Raises:
        InstrumentError: the counter made too few steps.
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
        except Exception as error:  # It is raised where the readings are asked for.
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
    """Mean power while nothing runs. Clocks are still those of the calls before: so they are between calls, too."""
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
    """Run a call again and again, and read its energy.

    Args:
        call: what is measured.
        meter: the instruments of the device.
        device: where the call runs.
        window: seconds that count.
        settling: seconds before.
        idle_window: seconds after, in which nothing runs.

    Raises:
        InstrumentError: an instrument does not answer, or moves too seldom.
    """
    _repeat(call, device, settling)
    with _Reader(meter) as reader:
        seconds = _repeat(call, device, window)
    return Energy(seconds, reader.power(), idle_power(meter, device, idle_window))


def _repeat(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of a call, of as many as there is time for."""
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
