"""A measurement is a Record. A run is a JSON Lines file of records, written during the run."""

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, Required, TypedDict

import msgspec

from colt5_bench.files import append, atomic_write, open_exclusively
from colt5_bench.process.garbage import no_garbage_collection
from colt5_bench.records.lines import decode, encode, entries, figures, is_simple, lines
from colt5_bench.texts import Plain

SCHEMA_VERSION = 2

Status = Literal["ok", "wrong", "refused", "out_of_memory", "error", "skipped"]
STATUSES: tuple[Status, ...] = ("ok", "wrong", "refused", "out_of_memory", "error", "skipped")
FAILED: tuple[Status, ...] = ("wrong", "refused", "out_of_memory", "error")
"""`refused`: results may be right, but times are meaningless."""

SuiteName = Annotated[str, msgspec.Meta(pattern=r"^[^/\\.][^/\\]*\Z", max_length=100)]
"""Also the name of a directory."""


@dataclass(slots=True)
class Timing:
    """Samples of a time column of an implementation for a case and direction."""

    column: str
    """Columns of times. `cold`: GPU time, L2 flushed before each sample; `warm`: GPU time right after another run of
    the call; `graph`: GPU time of a CUDA-graph replay, L2 flushed; `wall`: host time; `eager`:
    time per call in a train of eager calls, until the GPU has finished them."""

    samples: list[float]
    """Seconds, in the order taken."""

    stopped: str
    """Reason why sampling ended or never began. It ended as `confident` (interval under the target), `max_samples`,
    `max_seconds` or `throttled` (the hardware was slowed down too often). It never began with `not capturable: ...`.
    With `refused: ...` the samples are impossible."""

    relative_interval: float
    """Width of the 95 % confidence interval of the median over the median."""

    discarded: int = 0
    """Samples repeated because the GPU was throttled while they were taken."""

    sm_clock_mhz: float | None = None
    """Median SM clock read around the samples; None without NVML."""

    sm_clock_range_mhz: list[float] | None = None
    """The lowest and the highest of these clocks. They differ if the clocks are not locked."""

    power_w: float | None = None
    """Median power draw read around the samples."""

    temperature_c: float | None = None
    """The highest temperature read around the samples."""

    throttle_reasons: dict[str, int] = field(default_factory=dict)
    """Number of rounds, including repeated ones, that ended with a reason to run below the full clock, by reason."""

    refused: list[float] = field(default_factory=list)
    """Samples in seconds that are impossible with this bandwidth, kept for a search for the fault."""


@dataclass(slots=True)
class Divergence:
    """Distance of a tensor from its fp64 truth, over the elements that are not at a kink."""

    largest: float
    """Largest absolute difference."""

    relative: float
    """Euclidean norm of the difference over the norm of the truth."""

    fraction_above: float
    """Fraction of elements that differ by more than 1e-3."""

    kinks: int = 0
    """Elements at a kink, left out of the figures above."""

    largest_at_kink: float = 0.0
    """Largest absolute difference among these."""

    budget: float | None = None
    """Allowed error of the element with the largest one. It is set from plain PyTorch on the same inputs. None: not
    gated."""

    worst: float | None = None
    """Error of the element with the largest ratio of error to allowed error; None: not gated."""

    allowed: float | None = None
    """Allowed error of that element."""

    worst_at: list[int] | None = None
    """Index of that element, or of the first NaN that only the result has. None: all are exact, or not gated."""

    off: int | None = None
    """Number of elements whose error is larger than allowed; None: not gated."""


class Group(NamedTuple):
    """A point, whose implementations are measured together."""

    suite: str
    case: str
    direction: str


@dataclass(slots=True)
class Record:
    """Results of an implementation for a case and direction, with their conditions and status."""

    suite: SuiteName
    case: str
    fields: dict[str, Plain]
    """The fields of the case, so that its id need not be parsed."""

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
    """Most memory allocated at once during the call, in addition to the memory before it."""

    saved_bytes: int | None = None
    """Bytes kept for the backward pass, without inputs and outputs."""

    accuracy: dict[str, Divergence] = field(default_factory=dict)
    """By tensor: `output`, and the gradient of each differentiable input under the name of the input."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Other figures of the suite by name. The docstring of the suite explains them."""

    curves: dict[str, list[float]] = field(default_factory=dict)
    """Curves of a training run by name, with one value per evaluation, and figures by position."""

    data: str = ""
    """Hash of the data of a training run."""

    minimum_bytes: int | None = None
    minimum_exponentials: int | None = None
    minimum_flops: int | None = None
    limit_seconds: float | None = None
    """The least time that the device needs for these, by its measured ceilings."""

    changed_settings: list[str] = field(default_factory=list)
    """Settings of the process that the implementation changed. They were restored."""

    kernels: list[dict[str, object]] = field(default_factory=list)
    """Static facts of each Triton kernel launched: name, registers, spills, shared memory, warps."""

    environment: str = ""
    """Key of the run's environment line."""

    schema: int = SCHEMA_VERSION

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Suite, case, direction and implementation. It is unique in a run."""
        return *self.group, self.implementation

    @property
    def digest(self) -> str:
        """Name for a file of this record: a hash of its key and data."""
        return hashlib.sha256("\n".join((*self.key, self.data)).encode()).hexdigest()[:16]

    @property
    def group(self) -> Group:
        return Group(self.suite, self.case, self.direction)

    def seconds(self, column: str) -> float | None:
        """Median of a time column."""
        timing = self.timings.get(column)
        return median(timing.samples) if timing and timing.samples else None


class Writer:
    """Appends lines to a results file, each in one write. An interrupted run keeps its results.

    Raises:
        BlockingIOError: another process writes to the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_exclusively(path)

    def environment(self, environment: dict[str, object]) -> None:
        """Write the first line, the environment of the records."""
        append(self._file, encode({"kind": "environment", **environment}))

    def record(self, record: Record) -> None:
        append(self._file, encode({"kind": "record", **entries(record)}))

    def rewrite(self, environments: Iterable[dict[str, object]], records: Iterable[Record]) -> None:
        """Replace the content of the file by these lines, and go on."""
        with atomic_write(self.path) as unfinished:
            successor = Writer.of(unfinished, environments, records)
        self.close()
        self._file = successor._file

    def close(self) -> None:
        """Close the file, and remove it if nothing was written."""
        if not self._file.tell():
            self.path.unlink(missing_ok=True)
        self._file.close()

    @classmethod
    def of(cls, path: Path, environments: Iterable[dict[str, object]], records: Iterable[Record]) -> "Writer":
        """A writer that has written these records."""
        writer = cls(path)
        try:
            for environment in environments:
                writer.environment(environment)
            for record in records:
                writer.record(record)
        except BaseException:
            writer._file.close()
            raise
        return writer


@dataclass
class Run:
    """Content of results files."""

    path: Path
    environments: dict[str, dict[str, object]] = field(default_factory=dict)
    """Environments of records, by their keys. There is one, unless several runs were joined."""

    records: list[Record] = field(default_factory=list)

    cut_off: list[Path] = field(default_factory=list)
    """Files whose last line is cut off, because a process was killed in a write."""


def write(path: Path, environments: Iterable[dict[str, object]], records: Iterable[Record]) -> None:
    """Write a whole results file. After any error, `path` has either its old content or all of the new content."""
    with atomic_write(path) as unfinished:
        Writer.of(unfinished, environments, records)._file.close()


def load(path: Path, *, fault: Callable[[Record], str] = lambda record: "") -> Run:
    """The content of a results file, or of all below a directory, without a last line that is cut off.

    Characters that cannot be printed are read as escapes.

    Args:
        path: the file or directory.
        fault: returns why a record is refused, or an empty text.

    Raises:
        ValueError: there is no file, it has another schema, or a line before the last cannot be read or is refused.
    """
    files = sorted(filter(Path.is_file, path.rglob("*.jsonl"))) if path.is_dir() else [path]
    if not files or not path.exists():
        raise ValueError(f"{path} is neither a results file nor a directory with results files, which end in .jsonl")
    run = Run(path)
    with no_garbage_collection():
        for file in files:
            _read(file, run, fault)
    return run


class _Git(TypedDict, total=False):
    revision: str
    dirty: bool | str
    unknown: str


class _Options(TypedDict, total=False):
    suite: str
    shard: str


class _Environment(TypedDict, total=False):
    """Entries of an environment line that are read by name. All others are only shown."""

    key: Required[str]
    utc: str
    command: str
    expected: int
    git: _Git | None
    harness: _Git | None
    gpu: dict[str, Any] | None
    options: _Options


_FIGURES = ("fields", "timings", "accuracy", "metrics", "curves", "limit_seconds", "kernels", "ceilings", "host")
"""Fields of a line that contain numbers."""

_TEXTS = tuple(each.name for each in fields(Timing) if each.type is str)
"""Names of fields that contain no numbers, even if a text looks like one."""

_RECORD = b'{"kind": "record", '
"""Beginning of a record that this module wrote."""

_records = msgspec.json.Decoder(Record)


def _read(path: Path, run: Run, fault: Callable[[Record], str]) -> None:
    for number, line in enumerate(lines(path), start=1):
        try:
            read = _parsed(line)
        except msgspec.ValidationError as error:
            raise ValueError(f"{path}:{number}: not a line of a results file: {error}") from error
        except ValueError as error:
            if line.endswith(b"\n"):
                raise ValueError(f"{path}:{number}: {error}") from error
            run.cut_off.append(path)
        else:
            if not isinstance(read, Record):
                run.environments[read["key"]] = read
                continue
            if why := fault(read):
                raise ValueError(f"{path}:{number}: {why}")
            run.records.append(read)


def _parsed(line: bytes) -> Record | dict[str, Any]:
    """A record or an environment.

    Raises:
        msgspec.ValidationError: the line is neither.
        ValueError: the line is not JSON, or has another schema.
    """
    if line.startswith(_RECORD) and is_simple(line):
        with suppress(msgspec.MsgspecError):
            if (record := _records.decode(line)).schema == SCHEMA_VERSION:
                return record
    return _converted(decode(line))


def _converted(content: Any) -> Record | dict[str, Any]:
    line = msgspec.convert(content, dict[str, Any])
    kind = line.pop("kind", None)
    if kind == "record" and line.get("schema") != SCHEMA_VERSION:
        raise ValueError(f"schema must be {SCHEMA_VERSION} for this version, got {line.get('schema')}")
    line |= {name: figures(line[name], _TEXTS) for name in _FIGURES if name in line}
    if kind == "record":
        return msgspec.convert(line, Record)
    if kind != "environment":
        raise msgspec.ValidationError(f"kind must be record or environment, got {kind!r}")
    msgspec.convert(line, _Environment)
    return line
