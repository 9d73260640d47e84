"""Times of implementations that are correct, and that stay correct and fair while they are timed."""

from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from colt5_bench.measuring import roofline, timing
from colt5_bench.measuring.call import Call
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.failures import breaks_context, failing, free_memory
from colt5_bench.measuring.inputs import Inputs, same_bits
from colt5_bench.measuring.oracle import Oracle
from colt5_bench.measuring.refusal import RefusedError
from colt5_bench.measuring.watch import Watch, works_elsewhere
from colt5_bench.measuring.work import left_out_in_repeats
from colt5_bench.process.settings import preserved
from colt5_bench.records.results import Record
from colt5_bench.suite import Implementation, Suite
from colt5_bench.texts import describe_error


def time_correct(
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
            with failing([record], "after it was timed: "), preserved():
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
    # The caller reports inputs that a call has written to. New values would hide that.
    if device.type == "cuda" and not inputs.spoilt():
        inputs.renew()
        if works_elsewhere(watch.call, device):
            raise RefusedError(
                "its results are not complete when its stream has finished: another stream still works on them"
            )
    watch.look_around()


def _time_apart(watches: dict[str, Watch], records: dict[str, Record], conditions: Conditions) -> None:
    """Take times interleaved. Calls that change settings are timed alone, as the settings would affect all calls."""
    alone = [name for name in watches if records[name].changed_settings]
    for names in ([name for name in watches if name not in alone], *([name] for name in alone)):
        if names:
            with failing([records[name] for name in names], "timing: "), preserved():
                _time({name: watches[name] for name in names}, records, conditions)
    for name, watch in watches.items():
        if records[name].status == "ok":
            with failing([records[name]], "timing: "):
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
        if breaks_context(describe_error(error)):
            raise
        if len(watches) == 1:
            # This may have caused the error.
            first.look_around()
            raise
        taken = None
    if taken is None:
        with suppress(RefusedError):
            first.look_around()
        free_memory()
        for name, watch in watches.items():
            with failing([records[name]], "timing: "):
                _time({name: watch}, records, conditions)
        return
    for name, timings in taken.items():
        records[name].timings = timings


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
