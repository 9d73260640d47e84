"""Checks of timed calls of an implementation, made while the clock is stopped."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from time import process_time, sleep, thread_time
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from colt5_bench.measuring.call import Call
from colt5_bench.measuring.inputs import Inputs, Plan, same_bits, shares_memory
from colt5_bench.measuring.refusal import RefusedError
from colt5_bench.process.functions import Functions
from colt5_bench.process.settings import RANDOM, Settings

LONGEST_WAIT = 0.1
"""Seconds to wait for a thread that a call has started, before its results are checked again."""

SHORT_WAIT = 0.005
"""Seconds to wait for threads that existed before the call."""

MOST_REPEATS, REPEATS_SECONDS = 20, 0.1
"""Limits of calls and, roughly, of seconds of the calling thread after the times are taken. The first call during which
no other thread works is the last. In any other call, a thread may finish before its results are copied, as on a busy
machine, where the calling thread waits for a core."""

ALONE = 1e-6
"""Most seconds of other threads if none works. A thread that wakes up takes ten times as long."""

SPIN_CYCLES = 20_000_000
"""Cycles for which other streams are blocked: about ten milliseconds."""

STREAMS_OF_A_POOL = 32
"""Number of streams in the pool of each priority. PyTorch gives them out in turn."""


class Kept(NamedTuple):
    """Copies of results, by name, and the factor of the inputs that they were computed from."""

    factor: float
    results: Mapping[str, Tensor]
    later: Mapping[str, Tensor] = MappingProxyType({})
    """Results of another call, after all times were taken."""


class Watch:
    """Gives each call new inputs, and checks its results and side effects.

    Args:
        call: the call that is timed between `before` and `after`.
        inputs: the inputs of all calls that are timed together.
        functions: their state before anything was called.
        changed: settings that the call is known to change.
    """

    def __init__(self, call: Call, inputs: Inputs, functions: Functions, changed: Iterable[str]) -> None:
        self.call, self._inputs, self.functions = call, inputs, functions
        self._settings, self._changed = Settings(left_out=RANDOM), {*changed}
        self._calls = 0
        self._plan = inputs.plan(0)
        self._threads: set[threading.Thread] = set()
        self._latest: list[tuple[Tensor, Tensor]] = []
        """The results that were kept last, and their copies. Nothing may change them any more."""
        self.kept: Kept | None = None
        self.replayed: Kept | None = None
        """The results of the first replay of a CUDA graph, if a call with the same inputs had other results."""
        self._has_replayed = False
        self.spoilt = ""
        self.noticed = ""

    def before(self) -> None:
        """Set new inputs for the next call.

        Raises:
            RefusedError: shared state was changed. If several calls are timed, it is unknown by which one.
        """
        plan = self._inputs.plan(self._calls)
        self._calls += 1
        self._begin(plan)
        if plan.kept and (changes := self._changes(self.functions.restore_clock())):
            raise RefusedError(changes)

    def after(self, results: Sequence[Tensor], replayed: bool = False) -> None:
        """Check the side effects of a call whose results are kept. The first finding is kept, too."""
        strange = unusual(results) if self._latest or self._plan.kept else ""
        if self._latest and not strange and shares_memory(results[:1], [latest for latest, _ in self._latest]):
            self._notice("its output overwrites the results of an earlier call")
        self._latest.clear()
        if self._plan.kept:
            # Copied at once, in the stream of the call: late results are then not in the copies.
            copies = [] if strange else [each.detach().clone() for each in results]
            self._notice(self._changes(self.functions.restore_clock()))
            self._notice(strange)
            if copies:
                self._keep(results, copies)
        if replayed and not self._has_replayed:
            self._has_replayed = True
            if not all(map(same_bits, self.call(), results)):
                self.replayed = Kept(self._plan.factor, self.call.named(results))

    def look_around(self) -> None:
        """Restore shared state.

        Raises:
            RefusedError: it was changed.
        """
        if changes := self._changes(self.functions.restore()):
            raise RefusedError(changes)

    def finish(self) -> None:
        """Repeat the call that was kept with the same inputs, until no other thread works during it.

        A cheat may begin after the call that was kept, and a thread may have been fast in that call.

        Raises:
            RefusedError: something was noticed.
        """
        self.wait(0)
        if self.kept is None:
            return
        timed, begun = self.kept, thread_time()
        for _ in range(MOST_REPEATS):
            others = _seconds_of_other_threads()
            self._begin(Plan(timed.factor, kept=True))
            with torch.autograd.set_multithreading_enabled(False):
                results = self.call()
            self.after(results)
            self.wait(SHORT_WAIT)
            self.kept = Kept(timed.factor, timed.results, later=self.kept.results)
            if _seconds_of_other_threads() - others < ALONE or thread_time() - begun > REPEATS_SECONDS:
                return

    def wait(self, seconds: float = LONGEST_WAIT) -> None:
        """Look again at the last results, for a while if threads may be at work on them.

        Raises:
            RefusedError: something was noticed.
        """
        self._look_again()
        for _ in range(round(seconds / SHORT_WAIT)):
            if self.noticed or threading.active_count() == 1:
                break
            sleep(SHORT_WAIT)
            self._look_again()
        if self.noticed:
            raise RefusedError(self.noticed)

    def _begin(self, plan: Plan) -> None:
        self._look_again()
        self.call.renew()
        self._plan = plan
        self._inputs.renew(plan.factor)
        self._threads = {*threading.enumerate()} if plan.kept else set()

    def _keep(self, results: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
        self.kept = Kept(self._plan.factor, self.call.named(copies))
        # A gradient may be the upstream gradient itself, whose values are replaced.
        self._latest = [pair for pair in zip(results, copies, strict=True) if not self._inputs.are_in(pair[0])]
        if results[0].is_cuda:
            torch.cuda.synchronize(results[0].device)
            self._look_again()
            # The output of a CUDA graph is valid until the graph is replayed.
            self._latest.clear()
        for thread in {*threading.enumerate()} - self._threads:
            thread.join(LONGEST_WAIT)
        self.spoilt = self.spoilt or self._inputs.spoilt()

    def _look_again(self) -> None:
        if not all(same_bits(latest, copy) for latest, copy in self._latest):
            self._notice(
                "its results change after it has returned: a thread or a stream of its own still works on them"
            )

    def _changes(self, replaced: str) -> str:
        """Changes of settings, which are restored, and of functions."""
        changed = ", ".join(name for name in self._settings.restore() if name not in self._changed)
        if replaced:
            return f"it replaces {replaced} while it is timed"
        return f"it changes settings only while it is timed: {changed}" if changed else ""

    def _notice(self, what: str) -> None:
        self.noticed = self.noticed or what


def _seconds_of_other_threads() -> float:
    """CPU time of all threads of this process except the calling one, including ended ones."""
    return process_time() - thread_time()


def unusual(results: Sequence[Tensor]) -> str:
    """Reason why a result is no plain tensor in memory; an empty text if all results are."""
    for result in results:
        if type(result) not in (Tensor, torch.nn.Parameter):
            return f"it must return plain tensors, got a {type(result).__name__}, whose values may be computed later"
        if result.is_meta or result.layout != torch.strided:
            return f"it must return dense tensors with values, got {result.layout} on {result.device}"
    return ""


def works_elsewhere(call: Call, device: torch.device) -> bool:
    """True if the stream of a call on a GPU ends before the results are complete.

    Other streams are blocked first. If the call waits for them, its results are late but right, otherwise incomplete.
    """
    own = torch.cuda.current_stream(device)
    pools = (torch.cuda.Stream(device, priority=priority) for priority in (0, -1) for _ in range(STREAMS_OF_A_POOL))
    for stream in {each.cuda_stream: each for each in pools if each != own}.values():
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SPIN_CYCLES)
    results = call()
    copies = [each.detach().clone() for each in results]
    torch.cuda.synchronize(device)
    return not all(same_bits(result, copy) for result, copy in zip(results, copies, strict=True))
