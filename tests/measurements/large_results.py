"""Cost of loading 200,000 records (287 MB) and of writing them as CSV, each in a new process.

python -m tests.measurements.large_results
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from colt5_bench.records.results import Divergence, Record, Timing, write

ROOT = Path(__file__).parents[2]
RECORDS, FILE_BYTES = 200_000, 287e6

GROUP = 10_000
"""Number of records that differ in more than rows."""

COLUMN, SAMPLES = "cold", 15
"""Number of samples per record, which gives the size of the file."""

MEASURING = """
import json, sys
from pathlib import Path
from time import perf_counter, process_time
{imports}
wall, cpu = perf_counter(), process_time()
{work}
wall, cpu = perf_counter() - wall, process_time() - cpu
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps({{"wall": wall, "cpu": cpu, "peak_bytes": 1024 * peak, "records": records}}))
"""

LOAD = MEASURING.format(
    imports="from colt5_bench.records.results import load", work="records = len(load(Path(sys.argv[1])).records)"
)
PARSE = MEASURING.format(
    imports="",
    work="""
with open(sys.argv[1]) as lines:
    records = sum(1 for line in lines if json.loads(line)) - 1
""",
)
"""The yardstick of a machine: Python's own parser reads the same file."""

CSV = MEASURING.format(
    imports="",
    work="""
from colt5_bench.cli import main
assert main(["report", sys.argv[1], "--out", sys.argv[2]]) == 0
with open(sys.argv[2]) as table:
    records = sum(1 for line in table) - 1
""",
)


@dataclass(frozen=True)
class Cost:
    """Time and memory of a process for all records. The start is included if it is that of the command."""

    wall: float
    """Seconds."""

    cpu: float
    """Seconds of processor time, which is reliable on a busy machine."""

    peak_bytes: int
    """Peak resident memory of the whole process."""

    records: int


def write_large(path: Path, records: int = RECORDS) -> None:
    """A results file as from a run, with different records: groups that differ in numbers of rows.

    Only the first group is written from records, because all of them would take too long for a test.
    """
    write(path, [{"key": "large", "utc": "2026-11-21T10:00:00+00:00", "git": None}], _made(min(records, GROUP)))
    environment, *group = path.read_text().splitlines(keepends=True)
    with path.open("w") as file:
        file.write(environment)
        for first in range(0, records, GROUP):
            for number, line in enumerate(group[: records - first]):
                for rows in ("rows={},", '"rows": {},'):
                    line = line.replace(rows.format(number), rows.format(first + number))
                file.write(line)


def _made(records: int) -> Iterator[Record]:
    random = Random(0)
    for number in range(records):
        fields: dict[str, Any] = {"rows": number, "n": 4096, "n_iters": 50, "k": 256, "eps": 0.1, "dtype": "float32"}
        made = Record(
            suite="coor_descent",
            case=",".join(f"{name}={value}" for name, value in fields.items()),
            fields=fields,
            implementation="ours",
            direction="forward",
            device="NVIDIA H200",
            status="ok",
            environment="large",
        )
        samples = [random.uniform(1e-4, 2e-4) for _ in range(SAMPLES)]
        made.timings[COLUMN] = Timing(COLUMN, samples, "confident", 0.01)
        made.peak_bytes, made.saved_bytes, made.limit_seconds = random.randrange(2**30), None, random.random()
        made.accuracy = {"output": Divergence(random.random(), random.random(), 0.0, budget=random.random())}
        yield made


def measure(program: str, *arguments: Path) -> Cost:
    """Run a program in a separate process."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "large.jsonl"
        write_large(path)
        print(f"{RECORDS:,} records, {path.stat().st_size / 1e6:.0f} MB")
        for name, program in (("load", LOAD), ("CSV", CSV)):
            cost = measure(program, path, Path(directory) / "large.csv")
            print(f"{name:5} wall {cost.wall:.1f} s, CPU {cost.cpu:.1f} s, peak {cost.peak_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
