from math import inf
from random import Random
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch.utils._pytree import tree_leaves

from colt5_bench.measuring import rounds, timing
from colt5_bench.measuring.spin import Spin
from colt5_bench.process.workspaces import clear_workspaces
from colt5_bench.records.environment import GpuState

pytestmark = pytest.mark.alone

CPU = torch.device("cpu")
GPU = torch.device("cuda")
COOL, HOT = GpuState(1980, ()), GpuState(600, ("hw_thermal_slowdown",))

durations = st.floats(1e-6, 1e3)


class Clock:
    """Stands still except during calls."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.called = []
        for module in (timing, rounds):
            monkeypatch.setattr(module, "perf_counter", lambda: self.now)

    def call(self, name, seconds):
        """A call that takes the next one of the seconds, and after that always the last one."""
        remaining = iter(seconds)

        def run():
            nonlocal last
            self.called.append(name)
            last = next(remaining, last)
            self.now += last

        last = seconds[-1]
        return run


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def on_wall(calls, **options):
    return {name: columns["wall"] for name, columns in time_on_cpu(calls, **options).items()}


def time_on_cpu(calls, **options):
    return timing.time_interleaved(calls, device=CPU, columns=("wall",), **options)


def noisy(seed, size=1000):
    random = Random(seed)
    return [random.uniform(1.0, 2.0) for _ in range(size)]


class TestInterval:
    @pytest.mark.parametrize("count", range(1, 6))
    def test_fewer_than_six_samples_bound_nothing(self, count):
        assert timing.median_interval([1.0] * count) == (-inf, inf)
        assert timing.relative_interval([1.0] * count) == inf

    @pytest.mark.parametrize(
        ("count", "low", "high"),
        # Tables of the sign test: 6 samples give the extremes, 10 the second from either end, 25 the eighth.
        [(6, 1, 6), (8, 1, 8), (9, 2, 8), (10, 2, 9), (15, 4, 12), (20, 6, 15), (25, 8, 18)],
    )
    def test_is_that_of_the_tables(self, count, low, high):
        samples = list(range(1, count + 1))
        Random(0).shuffle(samples)
        assert timing.median_interval(samples) == (low, high)

    @given(st.integers(6, 400))
    def test_covers_the_median_as_often_as_claimed_and_no_narrower_one_does(self, count):
        low, high = timing.median_interval(list(range(1, count + 1)))
        assert low + high == count + 1
        assert 1 - 2 * binom.cdf(low - 1, count, 0.5) >= timing.CONFIDENCE
        assert 1 - 2 * binom.cdf(low, count, 0.5) < timing.CONFIDENCE

    def test_covers_the_median_of_a_skewed_distribution(self):
        random = Random(1)
        true_median = 2**0.5
        intervals = [timing.median_interval([random.paretovariate(2) for _ in range(30)]) for _ in range(4000)]
        covered = sum(low <= true_median <= high for low, high in intervals) / len(intervals)
        exact = 1 - 2 * binom.cdf(9, 30, 0.5)
        assert covered == pytest.approx(exact, abs=0.012)

    @given(st.lists(durations, min_size=6, max_size=60), st.floats(0.01, 100))
    def test_does_not_depend_on_the_unit(self, samples, unit):
        scaled = timing.relative_interval([unit * sample for sample in samples])
        assert scaled == pytest.approx(timing.relative_interval(samples))

    @given(st.lists(durations, min_size=6, max_size=60))
    def test_holds_the_median(self, samples):
        low, high = timing.median_interval(samples)
        assert low <= median(samples) <= high


class TestStopping:
    def test_a_steady_call_stops_at_the_fewest_samples(self, clock):
        result = on_wall({"steady": clock.call("steady", [0.001])}, min_samples=10)["steady"]
        assert result.stopped == "confident"
        assert len(result.samples) == 10
        assert result.relative_interval == pytest.approx(0, abs=1e-9)
        assert result.sm_clock_mhz is None

    def test_a_noisy_call_stops_once_its_interval_is_narrow_enough(self, clock):
        result = on_wall({"noisy": clock.call("noisy", noisy(0))}, target=0.2, max_samples=1000, max_seconds=inf)
        result = result["noisy"]
        assert result.stopped == "confident"
        assert result.relative_interval == timing.relative_interval(result.samples) <= 0.2
        assert timing.relative_interval(result.samples[:-1]) > 0.2

    def test_the_number_of_samples_is_bounded(self, clock):
        result = on_wall({"noisy": clock.call("noisy", noisy(1))}, target=0, max_samples=31, max_seconds=inf)["noisy"]
        assert (result.stopped, len(result.samples)) == ("max_samples", 31)

    def test_the_time_is_bounded_for_all_calls_together(self, clock):
        calls = {name: clock.call(name, noisy(seed)) for seed, name in enumerate("abc")}
        results = on_wall(calls, target=0, max_seconds=100)
        assert {result.stopped for result in results.values()} == {"max_seconds"}
        assert sum(sum(result.samples) for result in results.values()) == pytest.approx(100, abs=6)

    def test_time_is_no_reason_to_have_too_few_samples(self, clock):
        result = on_wall({"noisy": clock.call("noisy", noisy(2))}, target=0, min_samples=12, max_seconds=2.5)["noisy"]
        assert (result.stopped, len(result.samples)) == ("max_seconds", 12)

    def test_a_call_longer_than_all_may_take_has_three_samples(self, clock):
        result = on_wall({"slow": clock.call("slow", noisy(3))}, target=0, max_seconds=0.5)["slow"]
        assert (result.stopped, len(result.samples)) == ("max_seconds", 3)
        assert result.relative_interval == inf

    def test_the_confident_leave_while_others_go_on(self, clock):
        calls = {"steady": clock.call("steady", [1.0]), "noisy": clock.call("noisy", noisy(4))}
        results = on_wall(calls, target=0, min_samples=8, max_samples=40, max_seconds=inf)
        assert len(results["steady"].samples) == 8
        assert len(results["noisy"].samples) == 40
        assert clock.called[-32:] == ["noisy"] * 32


class TestOrder:
    def test_every_round_has_every_call_once(self, clock):
        calls = {name: clock.call(name, noisy(ord(name))) for name in "abcd"}
        on_wall(calls, target=0, max_samples=50, max_seconds=inf)
        rounds = [clock.called[start : start + 4] for start in range(4 * timing.WARM_UP_CALLS, len(clock.called), 4)]
        assert len(rounds) == 50
        assert all(sorted(each) == list("abcd") for each in rounds)

    def test_no_call_has_a_place_of_its_own(self, clock):
        calls = {name: clock.call(name, noisy(ord(name))) for name in "abcd"}
        on_wall(calls, target=0, max_samples=200, max_seconds=inf)
        sampled = clock.called[4 * timing.WARM_UP_CALLS :]
        for place in range(4):
            for name in "abcd":
                assert 25 <= sampled[place::4].count(name) <= 80

    def test_drift_does_not_tell_equal_calls_apart(self, clock):
        drifting = iter(1 + 0.01 * step for step in range(10000))

        def call():
            clock.now += next(drifting)

        results = on_wall({"a": call, "b": call}, target=0, max_samples=100, max_seconds=inf)
        medians = [median(result.samples) for result in results.values()]
        assert medians[0] == pytest.approx(medians[1], rel=0.03)

    def test_samples_are_given_to_the_call_they_are_of(self, clock):
        calls = {name: clock.call(name, [seconds]) for name, seconds in {"a": 1.0, "b": 2.0, "c": 3.0}.items()}
        results = on_wall(calls, max_seconds=inf)
        assert {name: set(result.samples) for name, result in results.items()} == {"a": {1.0}, "b": {2.0}, "c": {3.0}}

    def test_every_call_is_warmed_up_before_any_is_timed(self, clock):
        calls = {name: clock.call(name, [9.0] * timing.WARM_UP_CALLS + [1.0]) for name in "ab"}
        results = on_wall(calls, max_seconds=inf)
        assert all(set(result.samples) == {1.0} for result in results.values())
        assert timing.WARM_UP_CALLS >= 2

    def test_what_comes_before_a_sample_is_not_timed(self, clock):
        prepared = []

        def before():
            clock.now += 100
            prepared.append(len(clock.called))

        result = on_wall({"a": clock.call("a", [1.0])}, before={"a": before}, max_seconds=inf)["a"]
        assert set(result.samples) == {1.0}
        assert prepared == list(range(len(clock.called)))


class TestThrottling:
    @pytest.fixture
    def states(self, monkeypatch):
        """States of the GPU between rounds; the last one is repeated."""
        queue = [COOL]
        monkeypatch.setattr(timing, "gpu_state", lambda device: queue.pop(0) if len(queue) > 1 else queue[0])
        return queue

    def test_a_round_before_or_after_which_it_is_throttled_is_repeated(self, clock, states):
        states[:] = [COOL, COOL, HOT, COOL]
        calls = {name: clock.call(name, [1.0, 1.0, 1.0, 7.0, 7.0, 1.0]) for name in "ab"}
        for result in on_wall(calls, max_seconds=inf).values():
            assert result.discarded == 2
            assert result.samples == [1.0] * 10
            assert result.stopped == "confident"
            assert result.sm_clock_mhz == COOL.sm_clock_mhz

    def test_a_gpu_that_stays_hot_ends_it(self, clock, states):
        states[:] = [HOT]
        result = on_wall({"a": clock.call("a", [1e-6])}, max_samples=20)["a"]
        assert (result.samples, result.discarded, result.stopped) == ([], 20, "throttled")
        assert result.sm_clock_mhz is None

    def test_a_gpu_that_gets_hot_ends_it_when_time_is_up(self, clock, states):
        states[:] = [COOL, COOL, COOL, HOT]
        result = on_wall({"a": clock.call("a", [0.5])}, max_seconds=2.0)["a"]
        assert (result.samples, result.stopped) == ([0.5, 0.5], "throttled")

    def test_power_limit_is_a_normal_state(self, clock, states):
        states[:] = [GpuState(1700, ("sw_power_cap",))]
        result = on_wall({"a": clock.call("a", [1.0])}, max_seconds=inf)["a"]
        assert (result.discarded, result.sm_clock_mhz) == (0, 1700)

    def test_what_the_gpu_said_stands_beside_the_samples(self, clock, states):
        states[:] = [
            GpuState(1980, (), 300.0, 50.0),
            GpuState(1900, ("sw_power_cap",), 700.0, 60.0),
            GpuState(600, ("hw_thermal_slowdown",), 200.0, 90.0),
            GpuState(1900, (), 690.0, 80.0),
            GpuState(1940, (), 690.0, 70.0),
        ]
        result = on_wall({"a": clock.call("a", [1.0])}, max_seconds=inf)["a"]
        assert result.discarded == 2
        assert result.sm_clock_mhz == 1940
        assert result.sm_clock_range_mhz == [1900, 1980]
        assert (result.power_w, result.temperature_c) == (690.0, 80.0)
        assert result.throttle_reasons == {"sw_power_cap": 1, "hw_thermal_slowdown": 1}

    def test_without_nvml_nothing_is_said(self, clock):
        result = on_wall({"a": clock.call("a", [1.0])})["a"]
        assert (result.sm_clock_range_mhz, result.power_w, result.temperature_c) == (None, None, None)
        assert result.throttle_reasons == {}


class FakeCuda:
    """A GPU whose events are times of a clock that work advances, and whose cache is either warm or not."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.log.append("spin"))
        properties = SimpleNamespace(L2_cache_size=64)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda size, *, dtype, device: FakeBuffer(self, empty(size, dtype=dtype)))
        monkeypatch.setattr(rounds, "_spin_cycles_per_second", lambda: 1e9)

    def call(self):
        """Takes a second, or three if the cache has none of its data."""
        self.log.append("call")
        previous = [entry for entry in self.log[:-1] if entry not in ("spin", "event")]
        self.now += 1.0 if previous[-1:] == ["call"] else 3.0


class FakeEvent:
    def __init__(self, cuda):
        self._cuda = cuda

    def record(self):
        self._cuda.log.append("event")
        self.at = self._cuda.now

    def query(self):
        return False

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class FakeBuffer:
    def __init__(self, cuda, values):
        self._cuda, self.nbytes = cuda, values.nbytes

    def zero_(self):
        self._cuda.log.append("written")

    def sum(self):
        self._cuda.log.append("read")


class TestColumnsOfAGpu:
    def test_cold_finds_an_empty_cache_and_warm_what_the_call_left(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        before, after = {"a": lambda: cuda.log.append("prepared")}, {"a": lambda *_: cuda.log.append("looked at")}
        seconds = {}
        for column in ("cold", "warm"):
            with rounds.rounds(column, {"a": cuda.call}, before, after, GPU) as (take, refused):
                cuda.log.clear()
                seconds[column] = take(["a"])
            assert refused == {}
            settled = ["written", "read"] if column == "cold" else ["call"]
            assert cuda.log == ["prepared", *settled, "spin", "event", "call", "event", "looked at"]
        assert seconds == {"cold": [3.0], "warm": [1.0]}

    @pytest.mark.parametrize(
        "results",
        [
            None,
            torch.tensor(3.0),
            torch.zeros(2**40, device="meta"),
            torch.ones(2, 3),
            (torch.ones(2), None, torch.zeros(0)),
            [torch.ones(1), {"more": (torch.tensor(2), "text")}],
        ],
        ids=["none", "scalar", "many rows", "tensor", "with holes", "nested"],
    )
    def test_a_graph_has_whatever_tensors_its_call_returns(self, monkeypatch, results):
        cuda, looked = FakeCuda(monkeypatch), []
        graph = SimpleNamespace(replay=cuda.call, reset=lambda: None)
        monkeypatch.setattr(rounds, "_capture", lambda call, before: rounds._Captured(graph, call()))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(rounds, "clear_workspaces", lambda: None)
        before, after = {"a": lambda: None}, {"a": lambda *given: looked.append(given)}
        with rounds.rounds("graph", {"a": lambda: results}, before, after, GPU) as (take, refused):
            looked.clear()
            assert take(["a"]) == [3.0]
        assert refused == {}
        tensors = [each for each in tree_leaves(results) if isinstance(each, torch.Tensor)]
        ((copies, replayed),) = looked
        assert replayed
        for copy, tensor in zip(copies, tensors, strict=True):
            assert (copy.shape, copy.dtype) == (tensor.shape, tensor.dtype)
            assert copy is not tensor

    @pytest.mark.parametrize(
        ("on_host", "on_gpu", "in_a_row"),
        [
            (1e-4, 1e-5, 10),
            (1e-4, 1e-3, 10),
            (1e-4, 4e-3, 4),
            (1e-4, 0.1, 2),
            (1e-3, 0.1, 2),
            (1e-3, 1e-3, 3),
            (0.1, 0.1, 1),
        ],
    )
    def test_a_row_is_as_long_as_host_and_gpu_have_time_for(self, monkeypatch, on_host, on_gpu, in_a_row):
        now = done = 0.0
        called = []

        def call():
            nonlocal now, done
            called.append(now)
            now += on_host
            done = max(now, done) + on_gpu

        def synchronize(device):
            nonlocal now
            now = max(now, done)

        monkeypatch.setattr(rounds, "perf_counter", lambda: now)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        nothing = {"a": lambda *_: None}
        host = rounds.HostRound({"a": call}, nothing, nothing, GPU)
        assert now < 3 * 3 * (on_host + on_gpu) + 1e-9
        called.clear()
        assert host(["a"]) == [pytest.approx(on_host)]
        # The first call is not counted.
        assert len(called) == in_a_row + (in_a_row > 1)

    def test_the_flush_is_larger_than_the_cache(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        assert (
            rounds.GpuRound({"a": cuda.call}, *[{"a": lambda *_: None}] * 2, GPU, cold=True)._flushing.nbytes >= 2 * 64
        )


class TestArguments:
    @pytest.mark.parametrize("column", ["cold", "warm", "graph", "lukewarm"])
    def test_a_column_that_the_device_has_not_is_refused(self, column):
        with pytest.raises(ValueError, match=column):
            timing.time_interleaved({"a": lambda: None}, device=CPU, columns=("wall", column))

    def test_what_a_call_raises_comes_through(self):
        with pytest.raises(ZeroDivisionError):
            on_wall({"a": lambda: 1 / 0})

    def test_no_calls_take_no_time(self):
        assert time_on_cpu({}) == {}


def test_a_real_call_takes_about_the_time_it_takes():
    # NumPy calls in one thread: two threads would wait for each other if other programs run.
    x, y = np.zeros(2**16), np.zeros(2**16)

    def exponentials(times):
        for _ in range(times):
            np.exp(x, out=y)

    calls = {"one": lambda: exponentials(1), "eight": lambda: exponentials(8)}
    results = on_wall(calls, max_seconds=0.3)
    # The fastest of many, which other programs on the machine affect least.
    ratio = min(results["eight"].samples) / min(results["one"].samples)
    assert 4 < ratio < 16


@pytest.mark.parametrize("seconds", [1e-4, 3e-3, 3e-2])
def test_a_train_takes_as_long_as_its_calls(seconds):
    spin, started = Spin(seconds, CPU), []

    def call():
        started.append(None)
        spin()

    nothing = {"call": lambda *_: None}
    train = rounds.EagerRound({"call": call}, nothing, nothing, CPU)
    started.clear()
    (measured,) = train(["call"])
    durations = spin.durations(len(started))
    # Another program may run between two calls.
    assert sum(durations) / len(durations) <= measured < 2 * sum(durations) / len(durations)
    most = min(max(rounds.TRAIN_SECONDS / seconds, 1), rounds.CALLS_IN_A_TRAIN)
    assert most / 4 < len(durations) <= most


def nothing(*_):
    pass


def allocated_bytes(*, of_graphs=True):
    """Bytes of tensors and workspaces on GPUs, with or without those in the memory of CUDA graphs."""
    segments = torch.cuda.memory_snapshot()
    return sum(each["allocated_size"] for each in segments if of_graphs or each["segment_pool_id"] == (0, 0))


@pytest.mark.gpu
class TestOnGpu:
    def test_columns_agree_with_what_the_gpu_is_known_to_do(self):
        x = torch.zeros(2**28, device=GPU)
        results = timing.time_interleaved({"double": lambda: x * 2}, device=GPU, columns=("cold", "graph", "wall"))
        cold, graph, wall = (median(results["double"][column].samples) for column in ("cold", "graph", "wall"))
        bandwidth = 2 * x.nbytes / cold
        assert 2e11 < bandwidth < 1e13
        assert graph == pytest.approx(cold, rel=0.05)
        assert wall < cold

    def test_launching_is_hidden(self):
        x = torch.zeros(1, device=GPU)

        def many():
            for _ in range(200):
                x.add_(1)

        results = timing.time_interleaved({"many": many}, device=GPU, columns=("cold", "graph", "wall"))["many"]
        # The host needs longer to launch these than the GPU to run them.
        assert median(results["cold"].samples) < median(results["wall"].samples)

    @pytest.mark.parametrize(("launches", "elements"), [(200, 1), (1, 2**28)])
    def test_a_caller_waits_for_the_slower_of_host_and_gpu(self, launches, elements):
        x = torch.zeros(elements, device=GPU)

        def call():
            for _ in range(launches):
                x.add_(1)

        columns = ("cold", "wall", "eager")
        results = timing.time_interleaved({"call": call}, device=GPU, columns=columns)["call"]
        cold, wall, eager = (median(results[column].samples) for column in columns)
        assert 0.8 * max(cold, wall) < eager < 1.5 * max(cold, wall)

    def test_nothing_of_the_data_is_in_the_cache(self):
        x = torch.zeros(2**23, device=GPU)
        times = timing.time_interleaved({"sum": x.sum}, device=GPU, columns=("cold", "warm", "graph"))["sum"]
        assert median(times["cold"].samples) > 1.1 * median(times["warm"].samples)
        assert median(times["graph"].samples) > 1.1 * median(times["warm"].samples)

    def test_a_call_that_cannot_be_captured_says_why_and_does_no_harm(self):
        x = torch.zeros(1000, device=GPU)

        def synchronizes():
            return (x + torch.rand(1000, device=GPU)).sum().item()

        calls = {"before": lambda: x + 1, "synchronizes": synchronizes, "after": lambda: x * 2}
        results = timing.time_interleaved(calls, device=GPU, columns=("cold", "graph"))
        refused = results["synchronizes"]["graph"]
        assert refused.samples == []
        assert refused.stopped.startswith("not capturable: ")
        assert "\n" not in refused.stopped
        assert results["synchronizes"]["cold"].samples
        assert results["before"]["graph"].samples
        assert results["after"]["graph"].samples
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert torch.rand(10, device=GPU).isfinite().all()
        torch.cuda.empty_cache()
        assert torch.zeros(2**24, device=GPU).sum().item() == 0

    def test_memory_of_graphs_is_given_back(self):
        x = torch.zeros(2**24, device=GPU)
        calls = {"chain": lambda: ((x + 1) * 2).exp()}
        timing.time_interleaved(calls, device=GPU, columns=("graph",))
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        timing.time_interleaved(calls, device=GPU, columns=("graph",))
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == reserved

    def test_a_graph_has_its_own_workspace(self):
        # A product with a long sum, which several parts of the GPU share.
        x = torch.randn(64, 2**16, device=GPU)

        def product():
            return x @ x.T

        with rounds.rounds("graph", {"product": product}, {"product": nothing}, {"product": nothing}, GPU):
            everywhere, outside = allocated_bytes(), allocated_bytes(of_graphs=False)
            clear_workspaces()
            assert allocated_bytes() < everywhere
            assert allocated_bytes(of_graphs=False) == outside

    def test_forward_and_backward_are_captured(self):
        x = torch.randn(1000, device=GPU, requires_grad=True)
        calls = {"exp": lambda: torch.autograd.grad(x.exp().sum(), x)}
        assert timing.time_interleaved(calls, device=GPU, columns=("graph",))["exp"]["graph"].samples
