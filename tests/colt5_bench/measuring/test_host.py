import math
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F

from colt5_bench.measuring import host
from colt5_bench.measuring.host import measure_host

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def not_measured_yet():
    measure_host.cache_clear()
    yield
    measure_host.cache_clear()


def test_without_a_gpu_there_is_no_kernel():
    seconds = measure_host(CPU)
    assert 0 < seconds.linear < 1
    assert seconds.empty_kernel is None


def test_the_time_is_that_of_one_call(monkeypatch):
    """A slow series, as the first one, does not count."""
    clock, calls = [0.0], []

    def linear(*tensors):
        calls.append(tensors)
        first = len(calls) <= host.CALLS
        clock[0] += 5.0 if first or len(calls) > host.SERIES * host.CALLS else 0.25

    monkeypatch.setattr(host, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(F, "linear", linear)
    assert math.isclose(measure_host(CPU).linear, 0.25)


def test_a_process_measures_once(monkeypatch):
    first = measure_host(CPU)
    monkeypatch.setattr(F, "linear", None)
    assert measure_host(CPU) is first


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_need_not_be_the_current_one():
    assert measure_host(torch.device("cuda", torch.cuda.device_count() - 1)).empty_kernel > 0
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_on_a_gpu_a_launch_takes_microseconds():
    began = perf_counter()
    seconds = measure_host(CUDA)
    assert 1e-7 < seconds.linear < 1e-3
    assert 1e-7 < seconds.empty_kernel < 1e-3
    assert perf_counter() - began < 5
