from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

from colt5_bench.case import FORWARD
from colt5_bench.measuring import fairness, watch
from colt5_bench.measuring import inputs as giving
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.inputs import UPSTREAM, Inputs, same_bits
from colt5_bench.measuring.oracle import Oracle
from colt5_bench.measuring.refusal import RefusedError
from colt5_bench.process.functions import Functions
from tests.colt5_bench import toy

CASE, CPU, GPU = toy.ToyCase(2, 8), torch.device("cpu"), torch.device("cuda")


class Streams:
    """Streams of a GPU. The current one is number 0, and the others do their work when all are waited for."""

    def __init__(self, monkeypatch):
        self.waiting, self.held, self._numbers, self._current = [], Counter(), count(), 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(torch.cuda, "Stream", self.make)
        monkeypatch.setattr(torch.cuda, "stream", self.enter)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.held.update([self._current]))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: [work() for work in self.waiting])

    def make(self, device, priority):
        number = next(self._numbers) % watch.STREAMS_OF_A_POOL
        return SimpleNamespace(cuda_stream=1 + number - priority * watch.STREAMS_OF_A_POOL)

    @contextmanager
    def enter(self, stream):
        before, self._current = self._current, stream.cuda_stream
        yield
        self._current = before


@pytest.mark.parametrize("elsewhere", [False, True])
def test_work_in_another_stream_is_found_if_the_call_does_not_wait_for_it(monkeypatch, elsewhere):
    streams = Streams(monkeypatch)
    x = torch.randn(8)

    def call():
        y = torch.zeros(8)
        streams.waiting.append(lambda: y.copy_(2 * x))
        if not elsewhere:
            streams.waiting.pop()()
        return (y,)

    assert watch.works_elsewhere(call, GPU) is elsewhere
    # Each stream of both pools once, without its own.
    assert streams.held == Counter(range(1, 2 * watch.STREAMS_OF_A_POOL + 1))


def timed(function):
    """A watch after the timing of its call."""
    given = Inputs(toy.problem(CASE, CPU), toy.problem(CASE, CPU))
    watched = watch.Watch(Call(function, given.problem, FORWARD), given, Functions(), ())
    watched.before()
    watched.after(watched.call())
    return watched


def in_a_new_thread(work):
    Thread(target=work).start()


@pytest.mark.parametrize("quick", [0, 1, 2, watch.MOST_REPEATS - 1])
@pytest.mark.parametrize("start", [in_a_new_thread, "worker"], ids=["new thread", "worker"])
def test_work_in_a_thread_is_found_however_often_the_thread_was_quicker(monkeypatch, start, quick):
    """On a busy machine, the calling thread may wait for a core before it has copied the results."""
    copied, written, calls = Event(), Event(), count()
    keep = watch.Watch._keep

    def keep_and_go_on(self, results, copies):
        copied.set()
        assert written.wait(10)
        keep(self, results, copies)

    monkeypatch.setattr(watch.Watch, "_keep", keep_and_go_on)
    with ThreadPoolExecutor(1) as pool:

        def function(scores):
            y = torch.zeros_like(scores)
            copied.clear()
            written.clear()
            late = next(calls) > quick

            def work():
                if late:
                    copied.wait(10)
                y.copy_(2 * scores)
                written.set()

            pool.submit(work) if start == "worker" else start(work)
            if not late:
                written.wait(10)
            return y

        watched = timed(function)
        with pytest.raises(RefusedError, match="its results change after it has returned"):
            watched.finish()
    assert next(calls) == quick + 2


def test_a_call_without_threads_is_repeated_once():
    """Or a few times, because other threads of this process may work meanwhile."""
    calls, finished = count(), 20
    watched = timed(lambda scores: (next(calls), 2 * scores)[1])
    for _ in range(finished):
        watched.finish()
    assert finished < next(calls) < 3 * finished


def made(other=True):
    problem = toy.problem(CASE, CPU)
    problem.inputs |= {"mask": torch.ones(3, dtype=torch.bool), "places": torch.arange(3.0)}
    second = toy.problem(toy.ToyCase(2, 8), CPU)
    second.inputs |= {"mask": torch.zeros(3, dtype=torch.bool), "places": torch.arange(3.0) + 5}
    second.inputs["scores"] += 1
    return Inputs(problem, second if other else None)


def test_inputs_get_values_that_no_call_had_and_their_first_ones_back():
    given = made()
    first = {name: tensor.clone() for name, tensor in given.problem.inputs.items()}
    seen = [first["scores"]]
    for number in range(20):
        given.renew(given.plan(number).factor)
        assert given.spoilt() == ""
        assert not any(torch.equal(given.problem.inputs["scores"], each) for each in seen)
        seen.append(given.problem.inputs["scores"].clone())
        # Only inputs with gradients get a factor: it would change places into other numbers.
        assert torch.equal(given.problem.inputs["places"], first["places"] + 5)
        assert not given.problem.inputs["mask"].any()
    assert given.restore() == ""
    assert all(torch.equal(tensor, first[name]) for name, tensor in given.problem.inputs.items())


@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize("name", ["scores", "mask", "places", UPSTREAM])
def test_inputs_that_are_written_to_are_named_and_put_back(name, renewed):
    given = made()
    tensors = {**given.problem.inputs, UPSTREAM: given.problem.upstream}
    first = tensors[name].clone()
    if renewed:
        given.renew()
    tensors[name].flatten()[0] = ~tensors[name].flatten()[0] if name == "mask" else torch.nan
    assert given.restore() == name
    assert torch.equal(tensors[name], first)


def test_each_call_is_as_probable_to_be_the_last_that_is_kept():
    """All implementations have the same plan, for any order of requests."""
    last = Counter()
    for _ in range(2000):
        given = made(other=False)
        plans = [given.plan(number) for number in range(5)]
        assert [given.plan(number) for number in range(5)] == plans
        assert all(giving.LEAST_FACTOR <= plan.factor <= 1 for plan in plans)
        last[max(number for number, plan in enumerate(plans) if plan.kept)] += 1
    # Each is expected 400 times, with a standard deviation of 18.
    assert all(300 < last[number] < 500 for number in range(5)), last


def test_an_input_that_repeats_its_memory_stays_as_it_is():
    problem = toy.problem(CASE, CPU)
    problem.upstream = torch.ones(1).expand(2, 8)
    given = Inputs(problem, toy.problem(CASE, CPU))
    given.renew()
    assert given.problem.upstream.eq(1).all()
    assert given.restore() == ""


def test_memory_is_measured_with_the_first_values_nearly():
    given = made()
    first = {name: tensor.clone() for name, tensor in given.problem.inputs.items()}
    given.renew_slightly()
    factors = given.problem.inputs["scores"] / first["scores"]
    assert torch.allclose(factors, factors[0, 0])
    assert giving.LEAST_FACTOR <= factors[0, 0] < 1
    assert all(torch.equal(given.problem.inputs[name], first[name]) for name in ("mask", "places"))
    assert given.restore() == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64, torch.bool], ids=str)
def test_bits_are_the_same_or_not(dtype):
    one = torch.ones(4, dtype=dtype)
    assert same_bits(one, one.clone())
    assert not same_bits(one, torch.zeros(4, dtype=dtype))
    assert not same_bits(one, one.reshape(2, 2))
    if dtype.is_floating_point:
        one[0] = torch.nan
        assert same_bits(one, one.clone())
        assert not same_bits(torch.zeros(1, dtype=dtype), -torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("step", [1, 2, 7])
@pytest.mark.parametrize("shape", [(40,), (1, 40, 1), (40, 2), (1, 40), (3, 40)])
def test_bits_with_holes_between_them(shape, step):
    """Outputs may be views of any strides."""
    view = torch.randn(shape)[tuple(slice(None, None, step if size == 40 else 1) for size in shape)]
    other = view.clone()
    assert same_bits(view, other)
    other.view(-1)[-1] += 1
    assert not same_bits(view, other)


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("kept", [True, False], ids=["a kept call", "another call"])
def test_results_of_a_graph_are_compared_with_those_of_a_call(monkeypatch, right, kept):
    """For any random choice of kept calls: a graph may have been captured without the work."""
    oracle = Oracle.consult(toy.suite(), CASE, FORWARD, CPU, "secret")
    given = oracle.inputs
    monkeypatch.setattr(given, "plan", lambda number: giving.Plan(0.99, kept))
    watched = watch.Watch(Call(toy.good, given.problem, FORWARD), given, Functions(), ())
    for _ in range(3):
        watched.before()
        watched.after([(2.0 if right else 0.0) * given.problem.inputs["scores"]], replayed=True)
    for _ in range(3):
        watched.before()
        watched.after(watched.call())
    watched.finish()
    assert (watched.replayed is None) == right
    fault = fairness._timed_fault(toy.suite().implementations["reference"], watched, oracle, {})
    assert bool(fault) != right
    assert right or "as a CUDA graph output is off" in fault
