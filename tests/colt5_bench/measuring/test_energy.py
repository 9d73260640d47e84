from math import inf
from time import perf_counter, sleep

import pynvml
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench.measuring import energy
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.energy import Energy, Power, Reading, mean_power, measure_energy
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from colt5_bench.records import environment
from colt5_bench.request import Request
from colt5_bench.selection import SelectionError
from colt5_bench.selftest import checks
from colt5_bench.session import Session
from tests.colt5_bench import toy as toy_suite

CPU, CASE = torch.device("cpu"), toy_suite.ToyCase(2, 8)


def readings_of(watts, *, step, between, seconds=2.0, sensed=1.0):
    """Readings of a counter that moves in steps, and of a sensor that may be wrong."""
    moments = [at * between for at in range(int(seconds / between))]
    return [Reading(at, 7.0 + watts * (at // step) * step, watts * sensed) for at in moments]


@given(st.floats(10, 1000), st.floats(0.02, 0.1), st.floats(0.001, 0.01), st.floats(0.5, 1.5))
def test_steps_of_the_counter_do_not_matter(watts, step, between, sensed):
    power = mean_power(readings_of(watts, step=step, between=between, sensed=sensed))
    # A step is seen up to one reading late, at either end of the window.
    assert power.by_counter == pytest.approx(watts, rel=2 * between / (2.0 - 3 * step))
    assert power.by_sensor == pytest.approx(watts * sensed)


@pytest.mark.parametrize("step", [0.5, 10.0])
def test_a_counter_that_hardly_moves_tells_nothing(step):
    with pytest.raises(environment.InstrumentError, match=r"must change at least 6 times, and changed \d times"):
        mean_power(readings_of(300, step=step, between=0.005))


@given(st.floats(20, 900), st.floats(20, 900), st.floats(0.8, 1.25), st.floats(1e-6, 1e-1))
def test_energy_is_told_only_where_both_instruments_agree(above, idle, sensed, seconds):
    found = Energy(seconds, Power(idle + above, idle + above * sensed), Power(idle, idle))
    off = abs(sensed - 1) / ((1 + sensed) / 2)
    assert found.disagreement == pytest.approx(off, abs=1e-9)
    if abs(off - energy.AGREEMENT) > 1e-6:
        assert (found.joules is None) == (off > energy.AGREEMENT)
        assert ("energy_mJ" in found.metrics()) == (off <= energy.AGREEMENT)
    if found.joules is not None:
        assert found.joules == pytest.approx(above * seconds)


def test_what_takes_no_more_than_the_idle_gpu_has_no_energy():
    found = Energy(1e-3, Power(100, 100), Power(100, 100))
    assert found.joules is None
    assert found.metrics() == {"energy_disagreement": inf, "idle_W": 100}


class Toy:
    """Instruments of a device that uses more power after a call, until it rests."""

    def __init__(self, busy=300.0, idle=100.0):
        self._busy, self._idle = busy, idle
        self._before, self._joules, self.is_used = perf_counter(), 0.0, False

    def work(self):
        self.is_used = True
        sleep(1e-3)

    def rest(self, seconds):
        self.is_used = False
        sleep(seconds)

    def watts(self):
        return self._busy if self.is_used else self._idle

    def joules(self):
        now = perf_counter()
        self._joules += (now - self._before) * self.watts()
        self._before = now
        return self._joules


@pytest.fixture
def toy(monkeypatch):
    made = Toy()
    monkeypatch.setattr(energy, "sleep", made.rest)
    return made


def measured(toy):
    return measure_energy(toy.work, toy, CPU, window=0.3, settling=0.05, idle_window=0.3)


def test_energy_of_a_call_is_its_power_beyond_the_idle_one_times_its_seconds(toy):
    found = measured(toy)
    assert found.seconds >= 1e-3
    assert found.joules == pytest.approx(200 * found.seconds, rel=1e-3)
    assert found.idle == pytest.approx((100, 100), rel=1e-3)


def test_an_instrument_that_fails_is_told(toy):
    def fail():
        raise environment.InstrumentError("broken")

    toy.watts = fail
    with pytest.raises(environment.InstrumentError, match="broken"):
        measured(toy)


class Field:
    def __init__(self, milliwatts, status):
        self.nvmlReturn = status
        self.value = type("Value", (), {"uiVal": milliwatts})


@pytest.fixture
def nvml(monkeypatch):
    """A fake NVML; a dict of its answers, which may be changed."""
    answers = {"handle": "handle", "joules": lambda: 5_000, "watts": Field(250_000, pynvml.NVML_SUCCESS)}
    monkeypatch.setattr(environment, "_nvml_handle", lambda device: answers["handle"])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: answers["joules"]())
    monkeypatch.setattr(pynvml, "nvmlDeviceGetFieldValues", lambda handle, fields: [answers["watts"]])
    return answers


def unsupported():
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_the_meter_reads_joules_and_watts(nvml):
    meter = environment.EnergyMeter(CPU)
    assert (meter.joules(), meter.watts()) == (5.0, 250.0)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ({"handle": None}, "NVML does not find the GPU cpu"),
        ({"joules": unsupported}, "NVML has no energy counter for this GPU: Not Supported"),
        ({"watts": Field(0, pynvml.NVML_ERROR_NOT_SUPPORTED)}, "NVML has no power sensor for this GPU: Not Supported"),
    ],
)
def test_a_device_without_an_instrument_is_refused(nvml, answers, why):
    nvml.update(answers)
    with pytest.raises(environment.InstrumentError, match=why):
        environment.EnergyMeter(CPU)


@pytest.fixture
def records_of(nvml, monkeypatch):
    """Records of the toy suite, by name, with a given outcome of measuring the energy of a call."""

    def measured(end):
        monkeypatch.setattr(energy, "measure_energy", lambda call, meter, device: end(call()))
        conditions = Conditions(CPU, "cpu", "abc", measure_ceilings(CPU), max_seconds=0.01, energy=True)
        suite = toy_suite.suite(toy_suite.good, toy_suite.wrong)
        found = measure(suite, CASE, "forward", list(suite.implementations), conditions)
        return {record.implementation: record for record in found}

    return measured


def test_a_record_has_the_energy_of_a_correct_call(records_of):
    found = records_of(lambda output: Energy(1e-3, Power(300, 300), Power(100, 100)))
    assert found["good"].metrics == pytest.approx({"energy_mJ": 200, "energy_disagreement": 0, "idle_W": 100})
    assert (found["wrong"].status, found["wrong"].metrics) == ("wrong", {})


def test_times_stand_where_an_instrument_fails(records_of):
    def fail(output):
        raise environment.InstrumentError("broken")

    found = records_of(fail)["good"]
    assert (found.status, found.metrics) == ("ok", {"energy_disagreement": inf})
    assert found.timings["wall"].samples


@pytest.mark.parametrize("answers", [{"handle": None}, {"joules": unsupported}])
def test_energy_that_nobody_can_tell_is_refused_before_anything_is_measured(nvml, answers):
    nvml.update(answers)
    with pytest.raises(SelectionError, match="--energy needs a GPU whose energy NVML can measure: NVML "):
        Session(Request("cpu", energy=True))


def test_the_selftest_skips_it_on_a_cpu():
    check = checks.check_energy(CPU)
    assert (check.outcome, check.note) == ("skipped", "NVML does not find the GPU cpu")


@pytest.mark.parametrize(("factor", "outcome"), [(1.0, "passed"), (1.2, "failed")])
def test_the_selftest_expects_twice_the_energy_of_twice_the_work(monkeypatch, factor, outcome):
    found = [Energy(1e-3, Power(300, 300), Power(100, 100)), Energy(2e-3 * factor, Power(300, 300), Power(100, 100))]
    monkeypatch.setattr(checks, "EnergyMeter", lambda device: None)
    monkeypatch.setattr(checks, "measure_energy", lambda call, meter, device: found.pop(0))
    assert checks.check_energy(CPU).outcome == outcome


@pytest.mark.gpu
@pytest.mark.alone
def test_twice_the_work_takes_twice_the_energy_on_a_gpu():
    check = checks.check_energy(torch.device("cuda"))
    # If the instruments disagree, no energy is shown, and the check has no result.
    assert check.outcome in ("passed", "unclear"), check
