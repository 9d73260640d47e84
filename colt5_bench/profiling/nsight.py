"""Nsight Compute and Nsight Systems, which start a profiled run. Their results are joined with the cases."""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pandas as pd

from colt5_bench.profiling.profiler import Point


class NsightError(RuntimeError):
    """The tool gave no results; the message has its error."""


@dataclass(frozen=True)
class Seen:
    """Results of a tool."""

    files: list[Path]
    complete: bool
    """True if every point was profiled or skipped. The log, which is the last file, names failed points."""


def ncu(selection: Sequence[str], wanted: Sequence[Point], directory: Path) -> Seen:
    """Hardware metrics of every kernel of the profiled calls, replayed one by one with a cold cache.

    Args:
        selection: options of `run` that select points.
        wanted: the selected points.
        directory: directory for files.

    Returns:
        `ncu.csv` with a row per kernel; `ncu.ncu-rep` for the graphical program; the log.

    Raises:
        NsightError: there are no metrics of kernels.
    """
    report, table, log = (directory / name for name in ("ncu.ncu-rep", "ncu.csv", "ncu.log"))
    # The clocks are not locked, so that profiles explain times measured without a profiler.
    options = ["--set", "detailed", "--nvtx", "--profile-from-start", "off", "--clock-control", "none"]
    complete = _start(["ncu", *options, "--force-overwrite", "--export", str(report)], selection, report, log)
    shown = _output(["ncu", "--import", str(report), "--page", "raw", "--csv", "--print-units", "base"])
    _write(read_ncu(shown, wanted), table, log)
    return Seen([table, report, log], complete)


def nsys(selection: Sequence[str], wanted: Sequence[Point], directory: Path) -> Seen:
    """A timeline, and the time of every kernel in it. Arguments, results and errors are those of `ncu`."""
    report, table, log = (directory / name for name in ("nsys.nsys-rep", "nsys.csv", "nsys.log"))
    options = ["--trace", "cuda,nvtx", "--force-overwrite", "true", "--output", str(report)]
    complete = _start(["nsys", "profile", *options], selection, report, log)
    what = ["--report", "nvtx_kern_sum", "--format", "csv", "--force-export", "true", "--output", "-"]
    _write(read_nsys(_output(["nsys", "stats", *what, str(report)]), wanted), table, log)
    return Seen([table, report, log], complete)


def read_ncu(text: str, wanted: Sequence[Point]) -> pd.DataFrame:
    """The raw page of a report: a line of names, one of units, and one per kernel, mixed with messages."""
    csv = _from_header(text, '"ID"')
    if csv is None:
        return pd.DataFrame()
    units = pd.read_csv(StringIO(csv), nrows=1, dtype=str).iloc[0]
    kernels = pd.read_csv(StringIO(csv), skiprows=[1], thousands=",")
    ranges = [name for name in kernels if "Push/Pop_Range" in name]
    where = pd.Series([" ".join(map(str, row)) for row in kernels[ranges].to_numpy()], dtype=object)
    joined = _joined(kernels, where, wanted)
    return joined.rename(columns={name: f"{name} [{unit}]" for name, unit in units.dropna().items()})


def read_nsys(text: str, wanted: Sequence[Point]) -> pd.DataFrame:
    """The report `nvtx_kern_sum`, with a line for each range and kernel."""
    csv = _from_header(text, "NVTX Range")
    if csv is None:
        return pd.DataFrame()
    kernels = pd.read_csv(StringIO(csv))
    return _joined(kernels, kernels["NVTX Range"].astype(str), wanted)


def _joined(kernels: pd.DataFrame, where: pd.Series, wanted: Sequence[Point]) -> pd.DataFrame:
    """The kernels in ranges of points, with columns for the point in front."""
    labels = {point.label(phase): (*point, phase) for point in wanted for phase in point.phases}
    found = where.map(lambda text: next((label for label in labels if label in text), None))
    kernels = kernels[found.notna()].reset_index(drop=True)
    columns = (*Point._fields, "phase")
    described = pd.DataFrame([labels[label] for label in found.dropna()], columns=pd.Index(columns))
    return pd.concat([described, kernels], axis=1)


def _from_header(text: str, first: str) -> str | None:
    """The text from the line with this beginning to an empty line."""
    match = re.search(rf"^{re.escape(first)}.*?(?=^\s*$|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    return match[0] if match else None


def _start(tool: Sequence[str], selection: Sequence[str], report: Path, log: Path) -> bool:
    """Run the selection under a tool. Return True if it succeeded; partial results are kept otherwise."""
    directory = report.parent
    directory.mkdir(parents=True, exist_ok=True)
    run = [sys.executable, "-m", "colt5_bench", "run", *selection, "--profile", "nvtx", "--out", str(directory)]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([*tool, *run], stdout=file, stderr=subprocess.STDOUT, check=False)
    if not report.is_file():
        raise NsightError(f"{tool[0]} ended with status {done.returncode} and wrote no report; {_last_word(log)}")
    return done.returncode == 0


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NsightError(f"{' '.join(command[:2])} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _write(kernels: pd.DataFrame, table: Path, log: Path) -> None:
    if kernels.empty:
        raise NsightError(f"{table.stem} contains no kernel of the profiled calls; {_last_word(log)}")
    kernels.to_csv(table, index=False)


def _last_word(log: Path) -> str:
    """The error in a log, or its last line."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line]
    return f"{log} says: {(errors or lines or ['nothing'])[-1].strip()}"
