import json
from dataclasses import asdict
from time import process_time

import pytest
import torch

from colt5_bench.case import Cost
from colt5_bench.measuring import roofline
from colt5_bench.measuring.roofline import Ceilings, limit_seconds, measure_ceilings, read_ceilings
from colt5_bench.measuring.static_facts import compiled_kernels
from colt5_bench.records.environment import device_name

pytestmark = pytest.mark.alone

PRODUCTS = {"float32": 1e12, "bfloat16": 1e13}
CEILINGS = Ceilings(copy_bandwidth=1e12, exponentials=1e9, products=PRODUCTS, device="toy", measured=True)
WRITTEN = asdict(CEILINGS)


class TestRead:
    def test_are_the_ones_that_were_written(self):
        assert read_ceilings(json.dumps(asdict(CEILINGS)), "toy") == CEILINGS

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            *(json.dumps({key: value for key, value in WRITTEN.items() if key != left_out}) for left_out in WRITTEN),
            *(json.dumps({**WRITTEN, changed: None}) for changed in WRITTEN),
            json.dumps({**WRITTEN, "device": "another"}),
        ],
    )
    def test_are_none_of_anything_else(self, text):
        assert read_ceilings(text, "toy") is None


class TestLimit:
    def test_is_that_of_the_traffic_where_that_takes_longer(self):
        assert limit_seconds(Cost(bytes=10**12, exponentials=10**8), CEILINGS) == 1.0

    def test_is_that_of_the_exponentials_where_they_take_longer(self):
        assert limit_seconds(Cost(bytes=10**12, exponentials=3 * 10**9), CEILINGS) == 3.0

    def test_is_that_of_the_products_where_they_take_longer(self):
        assert limit_seconds(Cost(bytes=10**12, flops=5 * 10**12), CEILINGS) == 5.0

    def test_products_are_as_fast_as_their_dtype(self):
        assert limit_seconds(Cost(bytes=0, flops=5 * 10**12, flops_dtype="bfloat16"), CEILINGS) == 0.5

    def test_nothing_takes_no_time(self):
        assert limit_seconds(Cost(bytes=0), CEILINGS) == 0


class TestTooFast:
    @pytest.mark.parametrize("seconds", [2.0, 1.0, 0.9])
    def test_what_memory_can_do_is_believed(self, seconds):
        assert roofline.too_fast(seconds, size=10**12, ceilings=CEILINGS) is None

    def test_what_it_cannot_do_is_refused_with_both_figures(self):
        why = roofline.too_fast(0.5, size=10**12, ceilings=CEILINGS)
        assert why == "2000 GB/s from a cold cache, while a device copy reaches 1000"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
class TestMeasured:
    def test_are_of_a_plausible_size_and_measured_in_a_second_or_two(self, device):
        """The time is CPU time of each thread, so a busy machine makes no difference."""
        roofline._measure_ceilings.cache_clear()
        started = process_time()
        ceilings = measure_ceilings(torch.device(device))
        assert process_time() - started < (2 * torch.get_num_threads() if device == "cpu" else 10)  # compiles a kernel
        assert ceilings.device == device_name(torch.device(device))
        assert ceilings.measured
        bandwidth, exponentials = ((1e8, 1e12), (1e7, 1e12)) if device == "cpu" else ((1e11, 2e13), (1e11, 1e14))
        assert bandwidth[0] < ceilings.copy_bandwidth < bandwidth[1]
        assert exponentials[0] < ceilings.exponentials < exponentials[1]
        assert set(ceilings.products) == {"float32", "bfloat16", "float16"}
        assert all(1e8 < rate < (1e14 if device == "cpu" else 1e16) for rate in ceilings.products.values())

    def test_are_measured_once(self, device):
        assert measure_ceilings(torch.device(device)) is measure_ceilings(torch.device(device))


def test_the_shortest_of_several_calls_counts(monkeypatch):
    clock, times = [0.0], iter([0.09, 0.05, 0.08, 0.01])

    def take(call):
        clock[0] += (seconds := next(times))
        return seconds

    monkeypatch.setattr(roofline, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(roofline, "_cpu_seconds", take)
    assert roofline._shortest(lambda: None, torch.device("cpu")) == 0.05


@pytest.mark.compiled
@pytest.mark.parametrize("target", [80, 90])
def test_the_kernel_keeps_its_elements_in_registers(target):
    def launch():
        roofline._exponentials_kernel[(1,)](torch.empty(2048), roofline.GPU_EXPONENTIALS, 2048, num_warps=8)

    (facts,) = compiled_kernels(launch, target=target)
    assert facts["spilled_bytes"] == 0
