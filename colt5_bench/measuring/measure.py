"""One case in one direction, every implementation of it side by side: accuracy first, then memory, then time."""

import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from colt5_bench.case import Case
from colt5_bench.measuring import energy, memory, roofline, static_facts, timing, training
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.inputs import Inputs, same_bits, shares_memory
from colt5_bench.measuring.oracle import Oracle
from colt5_bench.measuring.refusal import RefusedError
from colt5_bench.measuring.roofline import Ceilings
from colt5_bench.measuring.rounds import CPU_COLUMNS, GPU_COLUMNS
from colt5_bench.measuring.watch import Watch, unusual, works_elsewhere
from colt5_bench.measuring.work import left_out_in_repeats
from colt5_bench.process.functions import Functions
from colt5_bench.process.settings import preserved
from colt5_bench.records import environment
from colt5_bench.records.results import Divergence, Record, Status
from colt5_bench.suite import Grid, Implementation, Suite, Trainee, TrainingSuite
from colt5_bench.texts import describe_error, printable

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
"""Texts of the errors after which every call to CUDA fails in the process that had one. The CUDA Runtime API's page on
`cudaError_t` says of these that the process must be terminated and relaunched. PyTorch and Triton pass them on."""


OUT_OF_MEMORY = re.compile(
    r"\w+: (\[enforce fail at alloc_cpu\.cpp:\d+\] .*)?DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|\w+: (CUDA error|Triton Error \[CUDA\]): out of memory"
)
"""Beginnings of errors, after their type, whose reason is lack of memory."""

Tell = Callable[[str], None]
"""Shows a line to the user while a run goes on."""


def silent(text: str) -> None:
    """Shows nothing."""


NOT_MEASURED = "not measured"
"""The reason of a record until something happens to it."""


class BrokenContextError(RuntimeError):
    """The CUDA context is lost: whatever is not measured yet needs another process."""

    def __init__(self, why: str, finished: Sequence[Record] = ()) -> None:
        super().__init__(why)
        self.finished = list(finished)
        """Records that stay valid: skipped or failed ones, and the one that broke the context, if it is known."""


@dataclass(frozen=True)
class Conditions:
    """Conditions of all records of a run."""

    device: torch.device
    device_name: str

    environment: str
    """Key of the run's environment line."""

    ceilings: Ceilings

    max_seconds: float = 2.0
    """The longest that sampling one time column of a case may take."""

    targets: tuple[int, ...] = ()
    """Compute capabilities times ten for which kernels are compiled if there is no such GPU."""

    energy: bool = False
    """True if the energy of calls on a GPU is measured as well."""

    corpus: Path | None = None
    """Data for suites that train, if the user names it."""

    checkpoints: Path | None = None
    """Directory of the checkpoints from which training is resumed."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The time columns; the first one gives the figure of a case."""
        return GPU_COLUMNS if self.device.type == "cuda" else CPU_COLUMNS

    @classmethod
    def on(cls, device: torch.device, environment_key: str, ceilings: str = "", **options: Any) -> "Conditions":
        """The conditions on a device. Its ceilings are read from the JSON if that is for this device, else measured.
        The options are the other fields."""
        name = environment.device_name(device)
        found = roofline.read_ceilings(ceilings, name) or roofline.measure_ceilings(device)
        return cls(device, name, environment_key, found, **options)


def measure(
    suite: Grid,
    case: Case,
    direction: str,
    implementations: Sequence[str],
    conditions: Conditions,
    begin: Callable[[str], None] = lambda name: None,
    tell: Tell = silent,
) -> list[Record]:
    """One record for each named implementation, also after an error.

    An implementation that cannot run here is skipped. One beyond its accuracy bound is wrong and is not timed. An
    exception ends only its own implementation; an exception in the fp64 truth ends those that need this truth. Times
    are taken interleaved. `begin` is called with the name of an implementation before its code runs, and with "" before
    code for several. A suite that trains runs one implementation after the other, and shows its progress.

    Raises:
        BrokenContextError: nothing more can be measured in this process.
    """
    records = {name: unmeasured(suite, case, direction, name, conditions) for name in implementations}
    try:
        with _exit_refused():
            if isinstance(suite, TrainingSuite):
                _train_all(suite, case, records, conditions, begin, tell)
            else:
                assert isinstance(suite, Suite)
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
        with _failing([record], "the check whether it is available failed: "):
            implementation = suite.implementations[name]
            if implementation.refused:
                raise RefusedError(implementation.refused)
            if why := not_applicable(implementation, case, direction, conditions.device):
                record.status, record.reason = "skipped", printable(str(why))
            else:
                running[name] = record
    oracles = _consult(suite, case, direction, running, conditions)
    _measure_each(suite, case, direction, {name: running[name] for name in oracles}, oracles, conditions, begin)


def _consult(
    suite: Suite, case: Case, direction: str, running: dict[str, Record], conditions: Conditions
) -> dict[str, Oracle]:
    """The oracle that judges each implementation, made before any of them is called."""
    oracles: dict[str, Oracle] = {}
    # One for all operations, so that they draw the same numbers.
    secret = token_hex() if suite.timed else None
    operations = {name: suite.implementations[name].operation for name in running}
    for operation in dict.fromkeys(operations.values()):
        own = [name for name in running if operations[name] is operation]
        with _failing([running[name] for name in own], "fp64 truth: ", out_of_memory="error"):
            _describe_cost(suite, case, direction, [running[name] for name in own], conditions.ceilings)
            oracle = Oracle.consult(operation or suite, case, direction, conditions.device, secret)
            oracles.update(dict.fromkeys(own, oracle))
    return oracles


def _train_all(
    suite: TrainingSuite,
    case: Case,
    records: dict[str, Record],
    conditions: Conditions,
    begin: Callable[[str], None],
    tell: Tell,
) -> None:
    for name, record in records.items():
        begin(name)
        trainee = suite.implementations[name]
        with preserved() as record.changed_settings, _failing([record]):
            if why := not_applicable(trainee, case, record.direction, conditions.device):
                record.status, record.reason = "skipped", printable(str(why))
            else:
                _train(suite, case, trainee, record, conditions, tell)
        if conditions.device.type == "cuda":
            # The next model needs the memory of this one.
            _free_memory()


def _train(
    suite: TrainingSuite, case: Case, trainee: Trainee, record: Record, conditions: Conditions, tell: Tell
) -> None:
    device, name = conditions.device, record.implementation
    record.data = suite.data(conditions.corpus)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    course = suite.course(case, trainee, device, conditions.corpus)
    checkpoint = None if conditions.checkpoints is None else conditions.checkpoints / f"{record.digest}.pt"
    progress = training.train(course, checkpoint, device, lambda text: tell(f"{name}: {text}"))
    final = course.finish()
    by_place = {each: list(figure) for each, figure in final.items() if isinstance(figure, Sequence)}
    record.curves = progress.curves | by_place
    record.metrics = {
        **{each: figure for each, figure in final.items() if not isinstance(figure, Sequence)},
        "seconds_per_step": progress.seconds / progress.steps,
        "parameters": sum(each.numel() for each in course.model.parameters()),
        **{each: curve[-1] for each, curve in progress.curves.items()},
    }
    if device.type == "cuda":
        record.peak_bytes = torch.cuda.max_memory_allocated(device)
    record.status, record.reason = "ok", ""


def unmeasured(
    suite: Grid, case: Case, direction: str, name: str, conditions: Conditions, why: str = NOT_MEASURED
) -> Record:
    """The record of an implementation with a status and a reason, and nothing else."""
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


def not_applicable(
    implementation: Implementation | Trainee, case: Case, direction: str, device: torch.device
) -> str | None:
    """The reason why an implementation cannot run a case in a direction on a device, or None."""
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


def _measure_each(
    suite: Suite,
    case: Case,
    direction: str,
    records: dict[str, Record],
    oracles: dict[str, Oracle],
    conditions: Conditions,
    begin: Callable[[str], None],
) -> None:
    watches: dict[str, Watch] = {}
    functions = Functions()
    for name, record in records.items():
        begin(name)
        implementation, oracle = suite.implementations[name], oracles[name]
        inputs = oracle.inputs
        with preserved() as changed, _failing([record]):
            function = implementation.build(case)
            call = Call(function, inputs.problem, direction)
            record.accuracy, record.reason = _judge_first(implementation, oracle, call.results())
            record.status = "wrong" if record.reason else "ok"
            metrics = implementation.metrics(case, inputs.problem)
            record.metrics = {str(metric): float(value) for metric, value in metrics.items()}
            if record.status == "ok" and suite.timed:
                _describe_call(implementation, call, inputs, record, conditions)
        record.changed_settings = [*dict.fromkeys((*implementation.changed_settings, *changed))]
        if spoilt := inputs.restore():
            record.status, record.reason = "wrong", f"writes to its input {spoilt}"
        if replaced := functions.restore():
            record.status, record.reason = "refused", f"it replaces {replaced}"
        if record.status == "ok" and suite.timed:
            # A new call: CUDA graphs are empty if kernels were compiled but not launched.
            call = Call(function, inputs.problem, direction)
            watches[name] = Watch(call, inputs, functions, record.changed_settings)
    _time_correct(suite, watches, records, oracles, conditions, begin)
    if conditions.energy:
        correct = {name: watch for name, watch in watches.items() if records[name].status == "ok"}
        _measure_energy(correct, oracles, records, conditions, begin)


def _measure_energy(
    watches: dict[str, Watch],
    oracles: dict[str, Oracle],
    records: dict[str, Record],
    conditions: Conditions,
    begin: Callable[[str], None],
) -> None:
    """Add energy to the metrics. If an instrument fails, times stay valid and the disagreement is infinite."""
    meter = environment.EnergyMeter(conditions.device)
    for name, watch in watches.items():
        begin(name)
        oracles[name].inputs.renew()
        with preserved(), _failing([records[name]], "energy: "):
            watch.call.renew()
            try:
                metrics = energy.measure_energy(watch.call, meter, conditions.device).metrics()
            except environment.InstrumentError:
                metrics = {"energy_disagreement": inf}
            records[name].metrics |= metrics
        oracles[name].inputs.restore()


def _describe_call(
    implementation: Implementation, call: Call, inputs: Inputs, record: Record, conditions: Conditions
) -> None:
    # New inputs: the call needs as much memory for them as for the first ones.
    inputs.renew_slightly()
    record.peak_bytes = memory.measure_memory(call, device=conditions.device)
    record.saved_bytes = call.saved_bytes()
    record.kernels = _static_facts(implementation, call, conditions)


def _judge_first(
    implementation: Implementation, oracle: Oracle, results: dict[str, Tensor]
) -> tuple[dict[str, Divergence], str]:
    """The judgement on the results of the first call.

    Raises:
        RefusedError: the results are no plain tensors, or share memory with an input.
    """
    if why := unusual([*results.values()]):
        raise RefusedError(why)
    judgement = oracle.judge(implementation, results)
    for name, given in oracle.inputs.problem.inputs.items():
        if not oracle.is_view and shares_memory([results["output"]], [given]):
            raise RefusedError(f"its output shares memory with its input {name}")
    return judgement


def _time_correct(
    suite: Suite,
    watches: dict[str, Watch],
    records: dict[str, Record],
    oracles: dict[str, Oracle],
    conditions: Conditions,
    begin: Callable[[str], None],
) -> None:
    """Take the times of implementations, and keep the times of those that stay correct and fair."""
    begin("")
    _time_apart(watches, records, conditions)
    truths: dict[tuple[int, float], Oracle] = {}
    for name, watch in watches.items():
        record, oracle = records[name], oracles[name]
        if record.status == "ok":
            begin(name)
            with preserved(), _failing([record], "after it was timed: "):
                watch.finish()
                fault = _timed_fault(suite.implementations[name], watch, oracle, truths)
                oracle.inputs.restore()
                if not fault:
                    _refuse_unfair(watch, oracle.inputs, conditions.device)
                    if spoilt := oracle.inputs.restore():
                        fault = f"writes to its input {spoilt}, but not at first"
                if fault:
                    # Results may not be complete yet.
                    watch.wait()
                    record.status, record.reason = "wrong", fault
            if record.status in ("wrong", "refused"):
                record.timings = {}
        oracle.inputs.restore()


def _timed_fault(
    implementation: Implementation, watch: Watch, oracle: Oracle, truths: dict[tuple[int, float], Oracle]
) -> str:
    """The fault of an implementation that was right at first; an empty text if it has none."""
    if watch.spoilt:
        return f"writes to its input {watch.spoilt} while it is timed"
    judged: list[tuple[str, float, Mapping[str, Tensor]]] = []
    if (kept := watch.kept) is not None:
        judged.append(("while it is timed", kept.factor, kept.results))
        # A second judgement of the same results would take as long as the first.
        if not all(same_bits(later, kept.results[name]) for name, later in kept.later.items()):
            judged.append(("later", kept.factor, kept.later))
    if watch.replayed is not None:
        judged.append(("as a CUDA graph", watch.replayed.factor, watch.replayed.results))
    for when, factor, results in judged:
        key = id(oracle), factor
        if key not in truths:
            truths[key] = oracle.for_factor(factor)
        _, wrong = truths[key].judge(implementation, results)
        if wrong:
            truths[key] = truths[key].with_own_tolerances(factor)
            _, wrong = truths[key].judge(implementation, results)
        if wrong:
            _, wrong_at_first = oracle.judge(implementation, results)
            earlier = "" if wrong_at_first else "; it is the right result for the values of an earlier call"
            return f"right at first, {when} {wrong}{earlier}"
    return ""


def _refuse_unfair(watch: Watch, inputs: Inputs, device: torch.device) -> None:
    """Look for work that is left out in some calls, or done outside of the call.

    Raises:
        RefusedError: such work was found.
    """
    if operations := left_out_in_repeats(watch.call, inputs):
        raise RefusedError(
            f"a second call with the same inputs leaves out {', '.join(operations[:5])}: "
            "it keeps results of earlier calls"
        )
    inputs.renew()
    if device.type == "cuda" and works_elsewhere(watch.call, device):
        raise RefusedError(
            "its results are not complete when its stream has finished: another stream still works on them"
        )
    watch.look_around()


def _time_apart(watches: dict[str, Watch], records: dict[str, Record], conditions: Conditions) -> None:
    """Take times interleaved. Calls that change settings are timed alone, as the settings would affect all calls."""
    alone = [name for name in watches if records[name].changed_settings]
    for names in ([name for name in watches if name not in alone], *([name] for name in alone)):
        if names:
            with preserved(), _failing([records[name] for name in names], "timing: "):
                _time({name: watches[name] for name in names}, records, conditions)
    for name, watch in watches.items():
        if records[name].status == "ok":
            with _failing([records[name]], "timing: "):
                _refuse_impossible(records[name], watch.call, conditions)


def _time(watches: dict[str, Watch], records: dict[str, Record], conditions: Conditions) -> None:
    """Take times interleaved. If a call fails, it is unknown which one, so each is timed again alone."""
    first = next(iter(watches.values()))
    try:
        taken = timing.time_interleaved(
            {name: watch.call for name, watch in watches.items()},
            device=conditions.device,
            columns=conditions.columns,
            before={name: watch.before for name, watch in watches.items()},
            after={name: watch.after for name, watch in watches.items()},
            max_seconds=conditions.max_seconds,
        )
        first.look_around()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if _breaks_context(describe_error(error)):
            raise
        if len(watches) == 1:
            # This may have caused the error.
            first.look_around()
            raise
        taken = None
    if taken is None:
        with suppress(RefusedError):
            first.look_around()
        _free_memory()
        for name, watch in watches.items():
            with _failing([records[name]], "timing: "):
                _time({name: watch}, records, conditions)
        return
    for name, timings in taken.items():
        records[name].timings = timings


def _static_facts(implementation: Implementation, call: Call, conditions: Conditions) -> list[dict[str, object]]:
    if conditions.device.type == "cuda":
        return static_facts.compiled_kernels(call)
    if implementation.launching is None:
        return []
    with implementation.launching():
        return [facts for target in conditions.targets for facts in static_facts.compiled_kernels(call, target)]


def _refuse_impossible(record: Record, call: Call, conditions: Conditions) -> None:
    """Remove times that are impossible with a cold cache, and mark the record as refused."""
    for column in ("cold", "graph"):
        seconds = record.seconds(column)
        if seconds is None or record.minimum_bytes is None:
            continue
        size = min(record.minimum_bytes, call.read_bytes())
        if why := roofline.too_fast(seconds, size=size, ceilings=conditions.ceilings):
            broken = record.timings[column]
            broken.samples, broken.refused, broken.stopped = [], broken.samples, f"refused: {why}"
            record.status, record.reason = "refused", f"{column} time: {why}"


@contextmanager
def _failing(records: Sequence[Record], where: str = "", *, out_of_memory: Status = "out_of_memory") -> Iterator[None]:
    """An exception becomes the status and the reason of the records, and the run goes on.

    An exception that breaks the CUDA context ends the run in this process. If there are several records, it is unknown
    which one caused it, so they are measured again one by one.
    """
    try:
        yield
    except (BrokenContextError, KeyboardInterrupt):
        raise
    except BaseException as error:
        text = describe_error(error)
        status: Status = out_of_memory if _is_out_of_memory(error, text) else "error"
        message = where + text[:LONGEST_REASON]
        if isinstance(error, RefusedError):
            status, message = "refused", printable(str(error))
        broken = _breaks_context(text)
        if len(records) == 1 or not broken:
            for record in records:
                record.status, record.reason = status, message
        if broken:
            raise BrokenContextError(message) from None
    else:
        return
    # The traceback kept the tensors of the failed call alive until here.
    _free_memory()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # The error is from a kernel that was still running when something else failed.
            raise BrokenContextError(str(error)) from None


def _breaks_context(message: str) -> bool:
    return any(text in message for text in BREAKS_THE_CONTEXT)


def _is_out_of_memory(error: BaseException, message: str) -> bool:
    """True if memory was too small. PyTorch has a separate type for memory of a GPU. For memory of the host, and if
    CUDA or Triton allocate memory of a GPU, the error is a RuntimeError with such a beginning."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.match(message) is not None


@contextmanager
def _exit_refused() -> Iterator[None]:
    """Let `os._exit` raise, except in forked processes: it would end the run with the status of a success."""
    leave, here = os._exit, os.getpid()

    def refuse(status: int) -> None:
        if os.getpid() != here:
            leave(status)
        raise SystemExit(f"called os._exit({status})")

    os._exit = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = leave
