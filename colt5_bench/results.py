"""One measurement is one Record; a run is a JSON Lines file of them, written as it goes."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal, NamedTuple

import pandas as pd

SCHEMA_VERSION = 2

Status = Literal["ok", "wrong", "out_of_memory", "error", "skipped"]
STATUSES: tuple[Status, ...] = ("ok", "wrong", "out_of_memory", "error", "skipped")
FAILED: tuple[Status, ...] = ("wrong", "out_of_memory", "error")


@dataclass
class Timing:
    """Samples of one time column of one implementation on one case and direction."""

    column: str
    """`cold`: GPU time, L2 flushed before each sample; `warm`: GPU time right after another run of the call; `graph`:
    GPU time of a CUDA-graph replay, L2 flushed; `wall`: host time."""

    samples: list[float]
    """Seconds, in the order taken."""

    stopped: str
    """Why sampling ended: `confident` (interval under the target), `max_samples`, `max_seconds` or `throttled` (the
    hardware was slowed down too often); or why it never began: `not capturable: ...`; or why the samples are not to be
    believed: `refused: ...`."""

    relative_interval: float
    """Width of the 95 % confidence interval of the median over the median."""

    discarded: int = 0
    """Samples repeated because the GPU was throttled while they were taken."""

    sm_clock_mhz: float | None = None
    """Median SM clock read around the samples; None without NVML."""

    sm_clock_range_mhz: list[float] | None = None
    """The lowest and the highest of these: apart, if the clocks are not locked."""

    power_w: float | None = None
    """Median power draw read around the samples."""

    temperature_c: float | None = None
    """The highest temperature read around the samples."""

    throttle_reasons: dict[str, int] = field(default_factory=dict)
    """By name, how many rounds ended with this reason to run below the full clock, repeated ones included."""

    refused: list[float] = field(default_factory=list)
    """Samples, in seconds, that no device of this bandwidth can have taken: kept for whoever looks for the fault."""


@dataclass
class Divergence:
    """Distance of one tensor from its fp64 truth, over the elements that are not at a kink."""

    largest: float
    """Largest absolute difference."""

    relative: float
    """Euclidean norm of the difference over that of the truth."""

    fraction_above: float
    """Fraction of elements that differ by more than 1e-3."""

    kinks: int = 0
    """Elements at a kink, left out of the figures above."""

    largest_at_kink: float = 0.0
    """Largest absolute difference among these."""

    budget: float | None = None
    """What the element that may be off the farthest may be off by: set from plain PyTorch on the same inputs; None: not
    gated."""

    worst: float | None = None
    """The difference of the element that is off the farthest for what it may be off by; None as before."""

    allowed: float | None = None
    """What that element may be off by."""


class Group(NamedTuple):
    """What is measured together, in each of its implementations."""

    suite: str
    case: str
    direction: str


@dataclass
class Record:
    """One implementation on one case in one direction: what was measured, under what, and how it ended."""

    suite: str
    case: str
    fields: dict[str, object]
    """The fields of the case: nobody has to parse its id."""

    implementation: str
    direction: str
    device: str
    """Model name of the device."""

    status: Status
    reason: str = ""
    """Why the status is not ok, in one line."""

    timings: dict[str, Timing] = field(default_factory=dict)
    """By column."""

    peak_bytes: int | None = None
    """Most memory allocated at once during the call, beyond what was allocated before it."""

    saved_bytes: int | None = None
    """Bytes kept for the backward pass, inputs and outputs not counted."""

    accuracy: dict[str, Divergence] = field(default_factory=dict)
    """By tensor: `output`, and the gradient of each differentiable input under the name of the input."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Further figures that the suite asks for, by name: its docstring says what they are."""

    minimum_bytes: int | None = None
    minimum_exponentials: int | None = None
    minimum_flops: int | None = None
    limit_seconds: float | None = None
    """The least time the device needs for these, from its measured ceilings."""

    changed_settings: list[str] = field(default_factory=list)
    """Settings of the process that the implementation changed. They were put back."""

    kernels: list[dict[str, object]] = field(default_factory=list)
    """Static facts of each Triton kernel launched: name, registers, spills, shared memory, warps."""

    environment: str = ""
    """Key of the run's environment line."""

    schema: int = SCHEMA_VERSION

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Suite, case, direction and implementation: no two records of a run share it."""
        return *self.group, self.implementation

    @property
    def group(self) -> Group:
        return Group(self.suite, self.case, self.direction)

    def seconds(self, column: str) -> float | None:
        """Median of a time column."""
        timing = self.timings.get(column)
        return float(pd.Series(timing.samples).median()) if timing and timing.samples else None


class Writer:
    """Appends lines to a results file and flushes each, so that an interrupted run keeps what it has measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def environment(self, environment: dict[str, object]) -> None:
        """The first line: what the records were measured under."""
        self._line({"kind": "environment", **environment})

    def record(self, record: Record) -> None:
        self._line({"kind": "record", **asdict(record)})

    def close(self) -> None:
        self._file.close()

    def _line(self, content: dict[str, object]) -> None:
        self._file.write(json.dumps(content, allow_nan=True) + "\n")
        self._file.flush()


@dataclass
class Run:
    """What results files hold."""

    path: Path
    environments: dict[str, dict[str, object]] = field(default_factory=dict)
    """What records were measured under, by the key that they name: one, unless several runs were put together."""

    records: list[Record] = field(default_factory=list)

    cut_off: list[Path] = field(default_factory=list)
    """Files whose last line was cut off, as by a process that was killed while it wrote."""


def write(path: Path, environments: Iterable[dict[str, object]], records: Iterable[Record]) -> None:
    """A results file in one go: whatever happens, `path` holds what it held before or all of this."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    writer = Writer(unfinished)
    for environment in environments:
        writer.environment(environment)
    for record in records:
        writer.record(record)
    writer.close()
    unfinished.replace(path)


def load(path: Path, *, fault: Callable[[Record], str] = lambda record: "") -> Run:
    """A results file, or all that are below a directory; a last line that was cut off is left out.

    Args:
        path: the file or directory.
        fault: says why a record is refused, or nothing.

    Raises:
        ValueError: there is no file, it is of another schema, or a line before the last cannot be read or is refused.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ValueError(f"{path} is no results file and no directory with any: those that a run writes end in .jsonl")
    run = Run(path)
    for file in files:
        _read(file, run, fault)
    return run


def _read(path: Path, run: Run, fault: Callable[[Record], str]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                run.cut_off.append(path)
                break
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        try:
            if content.pop("kind") == "environment":
                run.environments[content["key"]] = content
                continue
            run.records.append(_record(content, f"{path}:{number}"))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no line of a results file: {error!r}") from error
        if why := fault(run.records[-1]):
            raise ValueError(f"{path}:{number}: {why}")


def _record(content: dict, where: str) -> Record:
    if content.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"{where} has schema {content.get('schema')}, this version reads {SCHEMA_VERSION}")
    content["timings"] = {name: Timing(**timing) for name, timing in content["timings"].items()}
    content["accuracy"] = {name: Divergence(**divergence) for name, divergence in content["accuracy"].items()}
    return Record(**content)


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """A row a record: the fields of the case as columns, `<column>_ms` for each time column, `<tensor>_error`, and
    the metrics under their names."""
    rows = []
    for record in records:
        row = {**record.fields, **{k: v for k, v in asdict(record).items() if not isinstance(v, dict | list)}}
        row.update({f"{column}_ms": 1e3 * (record.seconds(column) or float("nan")) for column in record.timings})
        row.update({f"{tensor}_error": divergence.largest for tensor, divergence in record.accuracy.items()})
        row.update(record.metrics)
        rows.append(row)
    return pd.DataFrame(rows)
