"""One case in one direction, every implementation of it side by side: accuracy first, then memory, then time."""

from collections.abc import Callable, Iterable, Sequence
from math import inf
from secrets import token_hex

import torch
from torch import Tensor

from colt5_bench.case import Case
from colt5_bench.measuring import energy, memory, roofline, static_facts
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.conditions import Conditions, Tell, silent
from colt5_bench.measuring.failures import BrokenContextError, exit_refused, failing, free_memory
from colt5_bench.measuring.fairness import time_correct
from colt5_bench.measuring.inputs import Inputs, shares_memory
from colt5_bench.measuring.oracle import Oracle
from colt5_bench.measuring.refusal import RefusedError
from colt5_bench.measuring.roofline import Ceilings
from colt5_bench.measuring.training import record_training
from colt5_bench.measuring.watch import Watch, unusual
from colt5_bench.process.functions import Functions
from colt5_bench.process.settings import preserved
from colt5_bench.records import environment
from colt5_bench.records.results import Divergence, Record
from colt5_bench.suite import Grid, Implementation, Suite, Trainee, TrainingSuite
from colt5_bench.texts import printable

NOT_MEASURED = "not measured"
"""The reason of a record until something happens to it."""


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
        with exit_refused():
            if isinstance(suite, TrainingSuite):
                _train_all(suite, case, records, conditions, begin, tell)
            else:
                assert isinstance(suite, Suite)
                _measure_all(suite, case, direction, records, conditions, begin)
    except BrokenContextError as error:
        begun = [record for record in records.values() if record.reason != NOT_MEASURED]
        # Times are taken last, so an `ok` record of a timed suite may lack them.
        finished = [record for record in begun if record.status != "ok" or not suite.timed]
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
    applicable: dict[str, Record] = {}
    for name, record in records.items():
        with failing([record], "the check whether it is available failed: "):
            implementation = suite.implementations[name]
            if implementation.refused:
                raise RefusedError(implementation.refused)
            if why := reason_to_skip(implementation, case, direction, conditions.device):
                record.status, record.reason = "skipped", printable(str(why))
            else:
                applicable[name] = record
    oracles = _consult(suite, case, direction, applicable, conditions)
    _measure_each(suite, case, direction, {name: applicable[name] for name in oracles}, oracles, conditions, begin)


def _consult(
    suite: Suite, case: Case, direction: str, applicable: dict[str, Record], conditions: Conditions
) -> dict[str, Oracle]:
    """The oracle that judges each implementation, made before any of them is called."""
    oracles: dict[str, Oracle] = {}
    # One for all operations, so that they draw the same numbers.
    secret = token_hex() if suite.timed else None
    operations = {name: suite.implementations[name].operation for name in applicable}
    for operation in dict.fromkeys(operations.values()):
        own = [name for name in applicable if operations[name] is operation]
        with failing([applicable[name] for name in own], "fp64 truth: ", out_of_memory="error"):
            _describe_cost(suite, case, direction, [applicable[name] for name in own], conditions.ceilings)
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
        with failing([record]), preserved() as record.changed_settings:
            if why := reason_to_skip(trainee, case, record.direction, conditions.device):
                record.status, record.reason = "skipped", printable(str(why))
            else:
                record_training(suite, case, trainee, record, conditions, tell)
        if conditions.device.type == "cuda":
            # The next model needs the memory of this one.
            free_memory()


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


def reason_to_skip(
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
        with failing([record]), preserved() as changed:
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
            # A new call: `_describe_call` may leave kernels compiled but never launched, and a CUDA graph of those is
            # empty.
            call = Call(function, inputs.problem, direction)
            watches[name] = Watch(call, inputs, functions, record.changed_settings)
    time_correct(suite, watches, records, oracles, conditions, begin)
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
        with failing([records[name]], "energy: "), preserved():
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


def _static_facts(implementation: Implementation, call: Call, conditions: Conditions) -> list[dict[str, object]]:
    if conditions.device.type == "cuda":
        return static_facts.compiled_kernels(call)
    if implementation.launching is None:
        return []
    with implementation.launching():
        return [facts for target in conditions.targets for facts in static_facts.compiled_kernels(call, target)]
