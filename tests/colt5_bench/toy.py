"""A suite with known results: y = 2 x, and implementations that fail in all possible ways."""

import ctypes
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from colt5_bench.case import DIRECTIONS, FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite


@dataclass(frozen=True)
class ToyCase(Case):
    rows: int
    n: int


def cases(preset, device):
    return [ToyCase(2, 8)] if preset == "smoke" else [ToyCase(2, 8), ToyCase(2, 16)]


def problem(case, device):
    generator = case.generator()
    scores, upstream = (torch.randn(case.rows, case.n, generator=generator) for _ in range(2))
    return Problem({"scores": scores.to(device)}, upstream.to(device))


def truth(case, problem, direction):
    scores, upstream = problem.inputs["scores"].double(), problem.upstream.double()
    return Truth(2 * scores) if direction == FORWARD else Truth(2 * scores, {"scores": 2 * upstream})


def good(scores):
    return 2 * scores


def wrong(scores):
    return 2.5 * scores


def wrong_gradient(scores):
    return scores + scores.detach()


def raising(scores):
    raise RuntimeError("no luck\nwith this")


def out_of_memory(scores):
    return torch.empty(2**60)


def spoiling(scores):
    y = 2 * scores
    with torch.no_grad():
        scores.zero_()
    return y


def dying(scores):
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(scores):
    if scores.shape[-1] == 16 and not Path("released").exists():
        Path("hanging").write_text(str(os.getpid()))
        # Sleeps with the lock of the interpreter: no other thread of the process runs.
        ctypes.PyDLL(None).sleep(3600)
    return 2 * scores


def take(share, device):
    """Take an amount of a GPU's memory for a moment; PyTorch's allocator keeps it."""
    torch.empty(int(share * torch.cuda.get_device_properties(device).total_memory), dtype=torch.uint8, device=device)


def greedy(scores):
    """Needs more of a GPU's memory than `breaking` leaves; its graph needs the same amount again."""
    if scores.is_cuda:
        take(0.4, scores.device)
    return 2 * scores


def breaking(scores):
    """Breaks the context of a GPU after taking most of its memory. If there is no GPU, it raises the same error."""
    if scores.is_cuda:
        take(0.7, scores.device)
        return 2 * scores.gather(-1, torch.full_like(scores, 1000, dtype=torch.int64))
    raise torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be ...")


def leaving(scores):
    """Changes the directory, then ends the process as if without an error."""
    os.chdir("/")
    os._exit(0)


def interrupting(scores):
    if scores.shape[-1] == 16:
        os.kill(os.getpid(), signal.SIGINT)
    return 2 * scores


def _implementation(function, **more):
    return Implementation(function.__name__, lambda case: function, **more)


def suite(*functions, **more):
    """The toy suite with these implementations besides the reference."""
    implementations = {function.__name__: _implementation(function) for function in functions}
    settings = {
        "name": "toy",
        "description": "twice the scores",
        "cases": cases,
        "directions": lambda case: DIRECTIONS,
        "implementations": {"reference": Implementation("reference", lambda case: good), **implementations},
        "reference": "reference",
        "problem": problem,
        "truth": truth,
        "plain": lambda case: good,
        "cost": lambda case, direction: Cost(bytes=8 * case.rows * case.n),
        "guest": lambda function: Implementation("guest", lambda case: function),
    }
    return Suite(**{**settings, **more})


SUITE = suite(*(globals()[name] for name in os.environ.get("TOY", "good").split(",")))


def test_toy(record, benchmark):
    replay(record, benchmark)
