"""The same calls timed by NVIDIA's cuda-bench, the Python package of nvbench, in its own process.

    python -m colt5_bench.selftest.cuda_bench DEVICE_INDEX RESULTS.json

It needs a process, because its registry of benchmarks is global and its output bypasses Python.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from colt5_bench.measuring.roofline import repeated_exponentials
from colt5_bench.measuring.rounds import Call

COPIED_BYTES = 2**28
FACTOR = 4096

MEAN = "nv/cold/time/gpu/mean"
"""Name in cuda-bench of GPU time with a flushed L2, after a kernel that blocks the stream."""

LONGEST_SECONDS = 300


def _copy(device: torch.device) -> Call:
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    return lambda: destination.copy_(source)


def _exponentials(device: torch.device) -> Call:
    return repeated_exponentials(device)[0]


def _product(device: torch.device) -> Call:
    factor = torch.randn(FACTOR, FACTOR, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(factor)
    return lambda: torch.matmul(factor, factor, out=product)


CALLS: dict[str, Callable[[torch.device], Call]] = {
    "copy": _copy,
    "exponentials": _exponentials,
    "product": _product,
}
"""Calls that are limited by memory, by the special functions, and by the tensor cores."""


def unavailable(device: torch.device) -> str | None:
    """Reason why cuda-bench cannot be used, or None."""
    if device.type != "cuda":
        return "needs a GPU"
    if find_spec("cuda") is None or find_spec("cuda.bench") is None:
        return "cuda-bench is not installed (pip install cuda-bench[cu13], or [cu12] for CUDA 12)"
    return None


def measure(device: torch.device) -> dict[str, float]:
    """Seconds of each of the calls, by name.

    Raises:
        RuntimeError: cuda-bench gave no times.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with TemporaryDirectory() as directory:
        results = Path(directory) / "results.json"
        command = [sys.executable, "-m", "colt5_bench.selftest.cuda_bench", str(index), str(results)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"cuda-bench took longer than {LONGEST_SECONDS} s") from error
        if done.returncode != 0 or not results.is_file():
            message = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise RuntimeError(f"cuda-bench ended with status {done.returncode} and the message: {message}")
        return read(json.loads(results.read_text(encoding="utf-8")))


def read(results: dict[str, Any]) -> dict[str, float]:
    """The mean GPU time of each benchmark in the output of cuda-bench.

    Raises:
        RuntimeError: a call is missing, or has no time.
    """
    means = {
        benchmark["name"]: float(entry["value"])
        for benchmark in results["benchmarks"]
        for state in benchmark["states"]
        for summary in state.get("summaries") or []
        if summary["tag"] == MEAN
        for entry in summary["data"]
        if entry["name"] == "value"
    }
    if missing := [name for name in CALLS if name not in means]:
        raise RuntimeError(f"cuda-bench gave no {MEAN} for {', '.join(missing)}")
    return {name: means[name] for name in CALLS}


def main(index: str, results: str) -> None:
    """Let cuda-bench measure all calls and write the results."""
    from cuda import bench

    device = torch.device("cuda", int(index))
    torch.cuda.set_device(device)
    for name, make in CALLS.items():
        bench.register(_benchmark(make, device)).set_name(name)
    bench.run_all_benchmarks(["cuda_bench", "--quiet", "--devices", index, "--json", results])


def _benchmark(make: Callable[[torch.device], Call], device: torch.device) -> Callable[[Any], None]:
    def benchmark(state: Any) -> None:
        call = make(device)
        call()
        torch.cuda.synchronize()

        def launch(launch: Any) -> None:
            stream = torch.cuda.ExternalStream(launch.get_stream().addressof(), device=device)
            with torch.cuda.stream(stream):
                call()

        state.exec(launch, batched=False)

    return benchmark


if __name__ == "__main__":
    main(*sys.argv[1:])
