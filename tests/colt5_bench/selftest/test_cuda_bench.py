import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from colt5_bench.selftest import cuda_bench

GPU = torch.device("cuda", 0)
SECONDS = {"copy": 1e-4, "exponentials": 2e-4, "product": 3e-4}


def benchmark(name, seconds):
    """A file in cuda-bench's format: numbers are strings."""
    summaries = [
        {"tag": "nv/cold/time/cpu/mean", "data": [{"name": "value", "type": "float64", "value": "9.0"}]},
        {"tag": "nv/cold/time/gpu/mean", "data": [{"name": "value", "type": "float64", "value": str(seconds)}]},
    ]
    return {"name": name, "states": [{"name": "Device=0", "summaries": summaries}]}


RESULTS = {"benchmarks": [benchmark(name, seconds) for name, seconds in SECONDS.items()]}


def test_gpu_times_are_read():
    assert cuda_bench.read(RESULTS) == SECONDS


@pytest.mark.parametrize("states", [[], [{"name": "Device=0", "is_skipped": True, "summaries": None}]])
def test_a_call_without_a_time_is_an_error_that_names_it(states):
    benchmarks = [*RESULTS["benchmarks"][:2], {"name": "product", "states": states}]
    with pytest.raises(RuntimeError, match=r"no nv/cold/time/gpu/mean for product"):
        cuda_bench.read({"benchmarks": benchmarks})


class TestProcess:
    @pytest.fixture
    def process(self, monkeypatch):
        def answer(code, *, results=None, error=""):
            def run(command, **options):
                assert command[1:4] == ["-m", "colt5_bench.selftest.cuda_bench", "0"]
                if results is not None:
                    Path(command[4]).write_text(json.dumps(results))
                return subprocess.CompletedProcess(command, code, "", error)

            monkeypatch.setattr(subprocess, "run", run)

        return answer

    def test_gives_times(self, process):
        process(0, results=RESULTS)
        assert cuda_bench.measure(GPU) == SECONDS

    @pytest.mark.parametrize("code", [0, 1])
    def test_that_writes_nothing_says_why(self, process, code):
        process(code, error="warming up\nno such device")
        with pytest.raises(RuntimeError, match=f"status {code} and the message: no such device"):
            cuda_bench.measure(GPU)

    def test_that_hangs_is_ended(self, monkeypatch):
        def run(command, **options):
            raise subprocess.TimeoutExpired(command, options["timeout"])

        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(RuntimeError, match="longer than"):
            cuda_bench.measure(GPU)


def test_where_there_is_none_it_says_how_to_get_it(monkeypatch):
    assert cuda_bench.unavailable(torch.device("cpu")) == "needs a GPU"
    monkeypatch.setattr(cuda_bench, "find_spec", lambda name: None)
    assert "pip install cuda-bench[cu13]" in cuda_bench.unavailable(GPU)


def test_every_call_is_registered_and_runs_in_the_stream_it_is_given(monkeypatch):
    streams, called, executed, arguments = [], [], {}, []

    class State:
        def __init__(self, name):
            self.name = name

        def exec(self, launch, /, *, batched):
            executed[self.name] = batched
            launch(SimpleNamespace(get_stream=lambda: SimpleNamespace(addressof=lambda: 4711)))

    registered = []

    def register(function):
        entry = SimpleNamespace(function=function, name=None)
        registered.append(entry)
        return SimpleNamespace(set_name=lambda name: setattr(entry, "name", name))

    def run_all_benchmarks(argv):
        arguments.extend(argv)
        for entry in registered:
            entry.function(State(entry.name))

    bench = ModuleType("cuda.bench")
    bench.register, bench.run_all_benchmarks = register, run_all_benchmarks
    package = ModuleType("cuda")
    package.bench = bench
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bench", bench)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: streams.append(address))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    calls = {name: lambda device, name=name: lambda: called.append(name) for name in cuda_bench.CALLS}
    monkeypatch.setattr(cuda_bench, "CALLS", calls)

    cuda_bench.main("0", "results.json")
    # Once to compile, once to measure.
    assert called == [name for name in SECONDS for _ in range(2)]
    assert streams == [4711] * 3
    assert executed == dict.fromkeys(SECONDS, False)
    assert arguments[-4:] == ["--devices", "0", "--json", "results.json"]
