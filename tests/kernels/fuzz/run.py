"""Run random cases of all operations and layers for some time, on all visible GPUs.

    CUDA_VISIBLE_DEVICES=0,1 python -m tests.kernels.fuzz.run --seconds 1200 --workers 16 --seed 1

takes twenty minutes on two GPUs with eight processes on each. It prints the number of cases of each operation, the
number of undecided ones, and the failures, each with a line by which to repeat it:

    python -m tests.kernels.fuzz.run --case '{"name": ...}'

It exits with 1 if a case failed, if there were too few cases, or if more than a tenth is undecided.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from tests.kernels.fuzz.cases import NAMES, SCALES, Case, cases
from tests.kernels.fuzz.check import Verdict, examine

STARTING = 30
"""Seconds for processes to start, and to compile the first kernels."""

RATE = 400 / (300 - STARTING)
"""Least cases per second after that."""

MOST_FAILURES = 20
PROGRAM = [sys.executable, "-W", "ignore", "-m", "tests.kernels.fuzz.run"]
"""Command that starts a process."""

ROOT = Path(__file__).parents[3]

PATIENCE = 120
"""Seconds after which a case counts as hanging."""


@dataclass
class Summary:
    """Outcomes of all cases."""

    counts: Counter = field(default_factory=Counter)
    undecided: list[Verdict] = field(default_factory=list)
    failures: list[Verdict] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.counts.total()

    def add(self, verdict: Verdict) -> None:
        self.counts[verdict.case.name] += 1
        if verdict.status != "ok":
            (self.failures if verdict.status == "failed" else self.undecided).append(verdict)

    def faults(self, least: int) -> list[str]:
        """Reasons why the fuzz as a whole fails, with a least number of cases."""
        faults = [f"{len(self.failures)} cases failed"] if self.failures else []
        if self.cases < least:
            faults.append(f"there were {self.cases} cases, expected are {least}")
        if 10 * len(self.undecided) > self.cases:
            faults.append(f"{len(self.undecided)} of {self.cases} cases are undecided, allowed is a tenth")
        return faults

    def __str__(self) -> str:
        by_name = ", ".join(f"{name} {self.counts[name]}" for name in NAMES)
        lines = [f"{self.cases} cases, {len(self.undecided)} undecided, {len(self.failures)} failed", by_name]
        return "\n".join([*lines, *map(str, self.undecided[:MOST_FAILURES]), *map(str, self.failures)])


def fuzz(seconds: float, workers: int, seed: int, scale: str, device: str) -> Summary:
    """Run cases for a time in separate processes: after a case that breaks its process, a new process starts."""
    summary, lock, deadline = Summary(), threading.Lock(), time.monotonic() + seconds
    threads = [
        threading.Thread(target=_attend_worker, args=(summary, lock, deadline, number, workers, seed, scale, device))
        for number in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return summary


def _attend_worker(
    summary: Summary,
    lock: threading.Lock,
    deadline: float,
    number: int,
    workers: int,
    seed: int,
    scale: str,
    device: str,
) -> None:
    """Start a process, receive its verdicts, and start another one after a crash."""
    start = 5 * number
    while time.monotonic() < deadline and len(summary.failures) < MOST_FAILURES:
        options = {"number": number, "workers": workers, "seed": 1000 * seed + number, "scale": scale}
        options |= {"device": device, "start": start, "seconds": deadline - time.monotonic()}
        running = None
        with tempfile.TemporaryFile("w+") as errors, _started(options, errors) as process:
            watchdog = threading.Timer(PATIENCE, process.kill)
            watchdog.start()
            for line in process.stdout:
                watchdog.cancel()
                record = json.loads(line)
                if "index" in record:
                    running, start = Case.parse(record["case"]), record["index"] + 1
                    watchdog = threading.Timer(PATIENCE, process.kill)
                    watchdog.start()
                    continue
                with lock:
                    summary.add(Verdict(running, record["status"], record["messages"]))
                running = None
                if len(summary.failures) >= MOST_FAILURES:
                    process.kill()
            watchdog.cancel()
            process.wait()
            errors.seek(0)
            said = [line.strip() for line in errors if line.strip()]
        if process.returncode and len(summary.failures) < MOST_FAILURES:
            message = f"its process ended with {process.returncode}: {said[-1] if said else 'it said nothing'}"
            if running is None:
                raise RuntimeError(message)
            with lock:
                summary.add(Verdict(running, "failed", [message]))


def _started(options: dict[str, Any], errors: IO[str]) -> subprocess.Popen:
    command = [*PROGRAM, "--as-worker", json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)


def work(number: int, workers: int, seed: int, scale: str, device: str, start: int, seconds: float) -> Iterator[dict]:
    """Reports of a process: each case before it runs, and its outcome."""
    torch.set_num_threads(1)
    deadline = time.monotonic() + seconds
    chosen = torch.device(device)
    if device == "cuda":
        gpus = torch.cuda.device_count()
        chosen = torch.device("cuda", number % gpus)
        torch.cuda.set_device(chosen)
        torch.cuda.set_per_process_memory_fraction(0.9 / -(-workers // gpus))
    for index, case in enumerate(cases(seed, SCALES[scale], start), start):
        if time.monotonic() > deadline:
            return
        yield {"index": index, "case": str(case)}
        verdict = examine(case, chosen)
        yield {"status": verdict.status, "messages": verdict.messages}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.fuzz.run", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", choices=SCALES)
    parser.add_argument("--case", help="the line of a case, to run it alone")
    parser.add_argument("--as-worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_worker:
        for record in work(**json.loads(options.as_worker)):
            print(json.dumps(record), flush=True)
        return 0
    if options.case:
        verdict = examine(Case.parse(options.case), torch.device(options.device))
        print(verdict)
        return int(verdict.status == "failed")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    scale = options.scale or ("interpreter" if interpreted else {"cuda": "gpu"}.get(options.device, "cpu"))
    summary = fuzz(options.seconds, options.workers, options.seed, scale, options.device)
    print(summary)
    faults = summary.faults(expected(options.seconds) if options.device == "cuda" else 1)
    print("\n".join(faults) or "passed")
    return int(bool(faults))


def expected(seconds: float) -> int:
    """Expected number of cases on a GPU."""
    return max(round(RATE * (seconds - STARTING)), 1)


if __name__ == "__main__":
    sys.exit(main())
