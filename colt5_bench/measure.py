"""One case in one direction, every implementation of it side by side: accuracy first, then memory, then time."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isnan

import torch
from torch import Tensor

from colt5_bench import accuracy, environment, memory, roofline, static_facts, timing
from colt5_bench.accuracy import Tolerance
from colt5_bench.case import FORWARD, Case, Problem, Truth
from colt5_bench.results import Divergence, Record, Status
from colt5_bench.roofline import Ceilings
from colt5_bench.rounds import CPU_COLUMNS, GPU_COLUMNS
from colt5_bench.suite import Implementation, Operation, Suite

LONGEST_REASON = 300
"""Characters of an error message that go into a record."""

BREAKS_THE_CONTEXT = (
    "an illegal memory access was encountered",
    "the launch timed out and was terminated",
    "device-side assert triggered",
    "hardware stack error",
    "an illegal instruction was encountered",
    "misaligned address",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "unspecified launch failure",
    "uncorrectable ECC error encountered",
)
"""Texts of the errors after which every call to CUDA fails in the process that had one: those of which the CUDA Runtime
API's page on `cudaError_t` says that the process must be terminated and relaunched. PyTorch and Triton pass them on."""


NOT_MEASURED = "not measured"
"""The reason of a record until something happens to it."""


class BrokenContextError(RuntimeError):
    """The CUDA context is lost: what is not measured yet can be measured in another process only."""

    def __init__(self, why: str, finished: Sequence[Record] = ()) -> None:
        super().__init__(why)
        self.finished = list(finished)
        """The records that stand: of what was skipped or failed before, and of what broke the context, if known."""


@dataclass(frozen=True)
class Conditions:
    """What all records of a run are measured under."""

    device: torch.device
    device_name: str

    environment: str
    """Key of the run's environment line."""

    ceilings: Ceilings

    max_seconds: float = 2.0
    """The longest that sampling one time column of a case may take."""

    targets: tuple[int, ...] = ()
    """Compute capabilities times ten that kernels are compiled for where there is no GPU that they run on."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The time columns; the first is the one that the figure of a case is."""
        return GPU_COLUMNS if self.device.type == "cuda" else CPU_COLUMNS

    @classmethod
    def on(
        cls, device: torch.device, environment_key: str, *, max_seconds: float = 2.0, targets: Sequence[int] = ()
    ) -> "Conditions":
        """The conditions on a device, whose ceilings are measured for it."""
        ceilings = roofline.measure_ceilings(device)
        return cls(device, environment.device_name(device), environment_key, ceilings, max_seconds, tuple(targets))


@dataclass(frozen=True)
class _Oracle:
    """The inputs of a case, what they should give, and how far from it plain PyTorch is."""

    problem: Problem
    pristine: dict[str, Tensor]
    """A copy of the inputs."""

    truth: Truth
    tolerances: dict[str, Tolerance]


def measure(
    suite: Suite,
    case: Case,
    direction: str,
    implementations: Sequence[str],
    conditions: Conditions,
    begin: Callable[[str], None] = lambda name: None,
) -> list[Record]:
    """One record for each named implementation, whatever happens to it.

    An implementation that cannot run here is skipped; one that misses its accuracy bound is wrong and is not timed; an
    exception ends that implementation only, and one in the fp64 truth those that are judged by it. Times are taken
    interleaved. `begin` is told the name of an implementation before anything of it runs, and "" before what
    concerns several.

    Raises:
        BrokenContextError: nothing more can be measured in this process.
    """
    records = {name: unmeasured(suite, case, direction, name, conditions) for name in implementations}
    try:
        _measure_all(suite, case, direction, records, conditions, begin)
    except BrokenContextError as error:
        finished = [record for record in records.values() if record.status != "ok" and record.reason != NOT_MEASURED]
        raise BrokenContextError(str(error), finished) from None
    return list(records.values())


def _measure_all(
    suite: Suite,
    case: Case,
    direction: str,
    records: dict[str, Record],
    conditions: Conditions,
    begin: Callable[[str], None],
) -> None:
    running: dict[str, Record] = {}
    for name, record in records.items():
        if why := not_applicable(suite.implementations[name], case, direction, conditions.device):
            record.status, record.reason = "skipped", why
        else:
            running[name] = record

    oracles: dict[str, _Oracle] = {}
    operations = {name: suite.implementations[name].operation for name in running}
    for operation in dict.fromkeys(operations.values()):
        own = [name for name in running if operations[name] is operation]
        with _failing([running[name] for name in own], "fp64 truth: ", out_of_memory="error"):
            _describe_cost(suite, case, direction, [running[name] for name in own], conditions.ceilings)
            oracles.update(dict.fromkeys(own, _consult_oracle(operation or suite, case, direction, conditions.device)))
    _measure_each(suite, case, direction, {name: running[name] for name in oracles}, oracles, conditions, begin)


def unmeasured(
    suite: Suite, case: Case, direction: str, name: str, conditions: Conditions, why: str = NOT_MEASURED
) -> Record:
    """The record of an implementation of which nothing is known but why."""
    return Record(
        suite=suite.name,
        case=case.id,
        fields=case.fields(),
        implementation=name,
        direction=direction,
        device=conditions.device_name,
        status="error",
        reason=why,
        environment=conditions.environment,
    )


def not_applicable(implementation: Implementation, case: Case, direction: str, device: torch.device) -> str | None:
    """Why an implementation cannot run a case in a direction on a device, or None."""
    if direction not in implementation.directions:
        return f"has no {direction}"
    return implementation.unavailable(case, device)


def _describe_cost(suite: Suite, case: Case, direction: str, records: Iterable[Record], ceilings: Ceilings) -> None:
    cost = suite.cost(case, direction)
    for record in records:
        implementation = suite.implementations[record.implementation]
        if implementation.operation is None and not implementation.partial:
            record.minimum_bytes, record.minimum_exponentials = cost.bytes, cost.exponentials
            record.minimum_flops = cost.flops
            record.limit_seconds = roofline.limit_seconds(cost, ceilings)


def _consult_oracle(operation: Operation, case: Case, direction: str, device: torch.device) -> _Oracle:
    problem = operation.problem(case, device)
    truth = operation.truth(case, problem, direction)
    pristine = {name: tensor.clone() for name, tensor in problem.inputs.items()}

    def plain() -> dict[str, Tensor]:
        return Call(operation.plain(case), problem, direction).results()

    return _Oracle(problem, pristine, truth, accuracy.tolerances(plain, truth.tensors(), truth.at_kink))


def _measure_each(
    suite: Suite,
    case: Case,
    direction: str,
    records: dict[str, Record],
    oracles: dict[str, _Oracle],
    conditions: Conditions,
    begin: Callable[[str], None],
) -> None:
    calls: dict[str, Call] = {}
    for name, record in records.items():
        begin(name)
        implementation, oracle = suite.implementations[name], oracles[name]
        with _failing([record]):
            call = Call(implementation.build(case), oracle.problem, direction)
            record.accuracy = _divergences(implementation, case, call.results(), oracle)
            record.status, record.reason = _verdict(record.accuracy)
            if spoilt := _restore(oracle.problem.inputs, oracle.pristine):
                record.status, record.reason = "wrong", f"writes to its input {spoilt}"
            record.metrics = dict(implementation.metrics(case, oracle.problem))
            if record.status == "ok" and suite.timed:
                record.peak_bytes = memory.measure_memory(call, device=conditions.device)
                record.saved_bytes = call.saved_bytes()
                record.kernels = _static_facts(implementation, call, conditions)
                calls[name] = call

    begin("")
    if calls:
        with _failing([records[name] for name in calls], "timing: "):
            _time(calls, records, conditions)
        for name, call in calls.items():
            with _failing([records[name]], "timing: "):
                _refuse_impossible(records[name], call, conditions)


def _time(calls: dict[str, "Call"], records: dict[str, Record], conditions: Conditions) -> None:
    """Interleaved. If one of several fails, nobody knows which: they are timed again, each on its own."""
    taken = None
    try:
        taken = timing.time_interleaved(
            calls,
            device=conditions.device,
            columns=conditions.columns,
            before={name: call.renew for name, call in calls.items()},
            max_seconds=conditions.max_seconds,
        )
    except Exception as error:
        if len(calls) == 1 or _breaks_context(error):
            raise
    if taken is None:
        _free_memory()
        for name, call in calls.items():
            with _failing([records[name]], "timing: "):
                _time({name: call}, records, conditions)
        return
    for name, timings in taken.items():
        records[name].timings = timings


def _static_facts(implementation: Implementation, call: "Call", conditions: Conditions) -> list[dict[str, object]]:
    if conditions.device.type == "cuda":
        return static_facts.compiled_kernels(call)
    if implementation.launching is None:
        return []
    with implementation.launching():
        return [facts for target in conditions.targets for facts in static_facts.compiled_kernels(call, target)]


def _refuse_impossible(record: Record, call: "Call", conditions: Conditions) -> None:
    """Take back what a cold cache cannot have allowed: then the measurement is broken, and the record says so."""
    for column in ("cold", "graph"):
        seconds = record.seconds(column)
        if seconds is None or record.minimum_bytes is None:
            continue
        size = min(record.minimum_bytes, call.read_bytes())
        if why := roofline.too_fast(seconds, size=size, ceilings=conditions.ceilings):
            broken = record.timings[column]
            broken.samples, broken.refused, broken.stopped = [], broken.samples, f"refused: {why}"
            record.status, record.reason = "error", f"{column} time is refused: {why}"


def _divergences(
    implementation: Implementation, case: Case, results: dict[str, Tensor], oracle: _Oracle
) -> dict[str, Divergence]:
    divergences = {}
    for tensor, expected in oracle.truth.tensors().items():
        tolerance = implementation.bound(case, tensor, expected, oracle.tolerances[tensor])
        at_kink = oracle.truth.at_kink.get(tensor)
        divergences[tensor] = accuracy.diverge(results[tensor], expected, at_kink, tolerance=tolerance)
    return divergences


def _verdict(divergences: dict[str, Divergence]) -> tuple[Status, str]:
    for tensor, divergence in divergences.items():
        if not accuracy.passes(divergence):
            what = tensor if tensor == "output" else f"gradient of {tensor}"
            return "wrong", f"{what} is off by {_excess(divergence)}"
    return "ok", ""


def _excess(divergence: Divergence) -> str:
    """The error and what is allowed in figures that differ, however near they are."""
    worst, allowed = divergence.worst, divergence.allowed
    if isnan(divergence.largest) or worst is None or allowed is None:
        return f"{divergence.largest:.3g}"
    share = f", {100 * (worst / allowed - 1):.2g} % more than allowed" if worst < 2 * allowed else ""
    return f"{worst:.3g} where {allowed:.3g} is allowed{share}"


def _restore(inputs: dict[str, Tensor], pristine: dict[str, Tensor]) -> str:
    """Undo what an implementation did to the inputs that all share, and name the input it spoilt."""
    spoilt = [name for name, tensor in inputs.items() if not torch.equal(tensor, pristine[name])]
    for name in spoilt:
        inputs[name].copy_(pristine[name])
    return ", ".join(spoilt)


class Call:
    """What is timed: one call of an implementation, with the backward pass if that is measured.

    Gradients are returned and not accumulated, so that nothing has to be reset between calls.
    """

    def __init__(self, function: Callable[..., Tensor], problem: Problem, direction: str) -> None:
        self._function = function
        self._problem = problem
        self._upstream = problem.upstream
        self._wanted = () if direction == FORWARD else problem.differentiable
        self.renew()

    def renew(self) -> None:
        """Forget the graphs of earlier calls: what they left behind belongs to the stream that they ran in, and would
        keep a call in another stream from being captured."""
        self._inputs = {
            name: tensor.detach().requires_grad_(name in self._wanted) for name, tensor in self._problem.inputs.items()
        }
        self._sources = [self._inputs[name] for name in self._wanted]

    def __call__(self) -> tuple[Tensor, ...]:
        """The output, then the gradients."""
        output = self.forward()
        return output, *self.backward(output)

    def forward(self) -> Tensor:
        if not self._sources:
            with torch.no_grad():
                return self._function(**self._inputs)
        return self._function(**self._inputs)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """The gradients; none, if the direction is forward."""
        return torch.autograd.grad(output, self._sources, self._upstream) if self._sources else ()

    def read_bytes(self) -> int:
        """Bytes of all that a call is given, memory that tensors share or repeat counted once."""
        given = [*self._inputs.values(), *([self._upstream] if self._sources else [])]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in given}
        return sum(sizes.values())

    def results(self) -> dict[str, Tensor]:
        return dict(zip(("output", *self._wanted), self(), strict=True))

    def saved_bytes(self) -> int | None:
        if not self._sources:
            return None
        return memory.saved_bytes(lambda: self._function(**self._inputs), self._inputs.values())


@contextmanager
def _failing(records: Sequence[Record], where: str = "", *, out_of_memory: Status = "out_of_memory") -> Iterator[None]:
    """An exception becomes the status and the reason of the records, and the run goes on.

    One that breaks the CUDA context ends it. Of several records one is to blame, and nobody knows which: they are left
    to be measured one by one.
    """
    try:
        yield
    except BrokenContextError:
        raise
    except Exception as error:
        status: Status = out_of_memory if _is_out_of_memory(error) else "error"
        message = where + " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON]
        broken = _breaks_context(error)
        if len(records) == 1 or not broken:
            for record in records:
                record.status, record.reason = status, message
        if broken:
            raise BrokenContextError(message) from None
    else:
        return
    # Only now is the traceback gone that kept the tensors of the failed call alive.
    _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # Of a kernel that was still running when something else failed.
            raise BrokenContextError(str(error)) from None


def _breaks_context(error: Exception) -> bool:
    return any(text in str(error) for text in BREAKS_THE_CONTEXT)


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a type of its own for a GPU's memory, and a RuntimeError with one of these texts for the host's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )
