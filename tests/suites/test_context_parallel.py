"""A run of several processes: the first one writes the results of all, even after one has ended."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from colt5_bench.commands import run
from colt5_bench.request import NO_REPORT, REPORT
from colt5_bench.selection import SelectionError
from suites import _ranks, context_parallel

ROOT = Path(__file__).parents[2]
SECONDS = 120


def records_in(path):
    """Records that have been written so far."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == "record"]


def of_both(records):
    return [record for record in records if record["fields"]["ranks"] == 2]


def process_of(rank, started):
    """The process of a rank that torchrun has started."""
    threads = Path(f"/proc/{started.pid}/task").iterdir()
    for child in " ".join((thread / "children").read_text() for thread in threads).split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"there is no rank {rank}")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_and_a_rank_that_ends(tmp_path, device):
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    out = tmp_path / "out"
    words = ["--nproc-per-node=2", "bench.py", "--suite", "context_parallel", "--preset", "smoke", "--device", device]
    words += ["--impl", "ours", "-k", "kind=attention", "--out", str(out)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", REPORT: NO_REPORT}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        file, end = out / "context_parallel.jsonl", time.monotonic() + SECONDS
        while not of_both(records_in(file)):
            assert run.poll() is None, run.stderr.read().decode()
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(process_of(1, run), signal.SIGKILL)
        run.communicate(timeout=SECONDS)
    assert run.returncode != 0
    records = records_in(file)
    # All expected records are there; cases of one process are measured as before.
    assert len(records) == 4
    assert {record["status"] for record in records if record["fields"]["ranks"] == 1} == {"ok"}
    first, *_, last = of_both(records)
    assert first["status"] == "ok"
    assert last["status"] == "error"
    assert "another rank has ended" in last["reason"]
    metrics = first["metrics"]
    assert metrics["bytes_sent"] == metrics["rank_0_bytes_sent"] + metrics["rank_1_bytes_sent"] > 0
    assert all(metrics[f"rank_{rank}_{figure}"] > 0 for rank in (0, 1) for figure in ("seconds", "process_peak_bytes"))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_without_torchrun_it_says_how_to_start(ranks):
    case = context_parallel.ParallelCase("attention", "strong", 512, ranks, 32)
    ours = context_parallel.SUITE.implementations["ours"]
    reason = ours.unavailable(case, torch.device("cpu"))
    assert f"torchrun --nproc-per-node={ranks} bench.py --suite context_parallel" in reason


def request(isolate=False, time_limit=None, targets=()):
    return SimpleNamespace(isolate=isolate, time_limit=time_limit, targets=targets)


@pytest.mark.parametrize(
    ("suites", "asked", "message"),
    [
        (["topk"], request(), "runs in several processes, got topk"),
        (["context_parallel", "topk"], request(), "runs in several processes, got topk"),
        (
            ["context_parallel"],
            request(isolate=True),
            "--isolate, --time-limit and --compile-for do not work under torchrun",
        ),
        (
            ["context_parallel"],
            request(time_limit=60),
            "--isolate, --time-limit and --compile-for do not work under torchrun",
        ),
        (
            ["context_parallel"],
            request(targets=(90,)),
            "--isolate, --time-limit and --compile-for do not work under torchrun",
        ),
    ],
)
def test_torchrun_is_for_suites_of_several_processes(suites, asked, message):
    every = {"context_parallel": context_parallel.SUITE, "topk": SimpleNamespace(serve=None)}
    with pytest.raises(SelectionError, match=message):
        run._service(Namespace(suite=suites), asked, every)


def test_other_ranks_serve():
    every = {"context_parallel": context_parallel.SUITE}
    assert run._service(Namespace(suite=["context_parallel"]), request(), every) is context_parallel.SUITE.serve


def times(factor, case, group, device):
    """A rank's part of a function that multiplies."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, factor)
    return _ranks.Part(module)


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_functions_of_a_case_take_turns(wants_gradient):
    """Calls of implementations alternate: none uses the part of another."""
    factors = [2.0, 3.0, 5.0]
    functions = [_ranks.together(partial(times, factor), "case", 1) for factor in factors]
    for number in (0, 2, 1, 2, 0):
        x = torch.ones(4, 1, requires_grad=wants_gradient)
        out = functions[number](input=x)
        assert (out == factors[number]).all()
        if wants_gradient:
            out.sum().backward()
            assert (x.grad == factors[number]).all()


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_a_call_stays(backward):
    """Sequences may be as large as half of a GPU's memory: a call holds nothing that its caller has dropped."""
    seen = []

    def make(case, group, device):
        module = torch.nn.Linear(1, 1, bias=False)
        module.register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
        return _ranks.Part(module)

    function = _ranks.together(make, "case", 1)
    x = torch.ones(4, 1, requires_grad=True)
    for _ in range(2):
        out = function(input=x)
        if backward:
            out.sum().backward()
        del out
    gc.collect()
    assert seen
    assert all(ref() is None for ref in seen)
