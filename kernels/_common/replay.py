"""Layers whose calls are recorded, and played from tapes from then on.

The first call of a layer with tensors of some shape runs as it is written. The second one is recorded: its forward and
its backward pass become tapes. Later ones are played, each as one autograd function. Arguments, metadata of tensors,
modes of PyTorch, and the modules of the layer with their attributes are all that a call depends on, beside the values
of tensors. They are in its key, or are compared. A layer that somebody watches, or that does what no tape can repeat,
runs as it is written.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from kernels._common.launch import PLAIN_VALUES, is_watched, multiprocessors, runs_triton
from kernels._common.operation import is_traced
from kernels._common.tape import Pass, Recorder, Tape

MOST_KEPT = 256
"""Calls that a layer keeps. It begins anew when there are more."""

PACKAGES = ("torch.nn.modules.", "reference.", "kernels.")
"""Packages of modules that do nothing but compute."""

Forward = Callable[..., Tensor]


class _Modules:
    """The modules of a layer with all of their attributes, as they are when this is made."""

    def __init__(self, layer: nn.Module) -> None:
        modules = [*layer.modules()]
        # Weak references: the layer is the key of what this is a part of.
        self._modules = [ref(each) for each in modules]
        self._types = [type(each) for each in modules]
        self._attributes = [d for each in modules for d in (vars(each), each._parameters, each._buffers, each._modules)]
        # Held, so that no other object gets the number of one of them.
        self._objects = [value for each in self._attributes for value in each.values()]
        self._numbers = [*map(id, self._objects)]
        inner = [vars(each).items() for each in modules if each is not layer]
        self._hooks = [value for items in inner for name, value in items if name.endswith("_hooks")]
        known = all(each.__module__.startswith(PACKAGES) for each in self._types)
        self._are_known = known and not any("forward" in each for each in self._attributes)
        held = [value for each in modules for value in (*each._parameters.values(), *each._buffers.values())]
        self.tensors = list({id(each): each for each in held if each is not None}.values())

    def are_unchanged(self) -> bool:
        numbers = [*map(id, chain.from_iterable(map(dict.values, self._attributes)))]
        return numbers == self._numbers and [type(each()) for each in self._modules] == self._types

    def are_plain(self) -> bool:
        """True if nobody can tell a call of them from their computing."""
        return self._are_known and not any(self._hooks) and not _has_any_global_hook()


class _Call:
    """A call of a layer. Its tensors are arguments, and then what the layer holds."""

    def __init__(
        self,
        forward: Forward,
        layer: nn.Module,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        held: list[Tensor],
    ) -> None:
        self._forward, self._layer, self._arguments, self._options = forward, layer, arguments, options
        self._places: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        self.kinds: list[type] = []
        self.values: list[Any] = [*options]
        """The arguments, and numbers in the places of tensors."""

        for each in (*arguments, *options.values()):
            if isinstance(each, Tensor):
                if id(each) not in self._places:
                    self._places[id(each)] = len(self.tensors)
                    self.tensors.append(each)
                self.values.append(self._places[id(each)])
                self.kinds.append(Tensor)
            else:
                self.values.append(each)
                self.kinds.append(type(each))
        self.n_given = len(self.tensors)
        self.tensors += held
        self.device = self.tensors[0].get_device()
        self.autocast = _autocast(self.tensors[0].device.type)
        self.differentiates = torch.is_grad_enabled() and any(each.requires_grad for each in self.tensors)

    def run(self, stand_ins: Sequence[Tensor] | None = None) -> Tensor:
        """Run it as it is written, with others in the place of the tensors that it is given."""
        tensors = self.tensors if stand_ins is None else stand_ins

        def stand_in(argument: Any) -> Any:
            return tensors[self._places[id(argument)]] if isinstance(argument, Tensor) else argument

        arguments = map(stand_in, self._arguments)
        return self._forward(self._layer, *arguments, **{name: stand_in(each) for name, each in self._options.items()})

    def differentiate(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients as autograd makes them, of a pass that runs once more: for a second derivative, or for many."""
        kind, enabled, dtype, caches = self.autocast
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled, caches):
            out = self.run()
        return self.gradients(out, self.tensors, grad, create_graph=create_graph)

    def gradients(self, out: Tensor, tensors: Sequence[Tensor], grad: Tensor, **options: Any) -> list[Tensor | None]:
        """Gradients of tensors, or of others in their place; None where there is none."""
        wanted = [each for each in tensors if each.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, **options))
        return [next(found) if each.requires_grad else None for each in tensors]


def _autocast(kind: str) -> tuple[str, bool, torch.dtype, bool]:
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


class _Tapes(NamedTuple):
    """The passes of a call."""

    forward: Tape
    backward: Tape | None = None

    saved: Sequence[int] = ()
    """Tensors of the call that the backward pass takes."""


_calls: WeakKeyDictionary[nn.Module, "_Calls"] = WeakKeyDictionary()


def replay(forward: Forward, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """`forward(layer, *arguments, **options)`, a tensor, from tapes if there are some for this call."""
    if is_compiling() or torch._C._get_tracing_state() is not None:
        return forward(layer, *arguments, **options)
    calls = _calls.get(layer)
    if calls is None or not calls.modules.are_unchanged():
        calls = _calls[layer] = _Calls(layer)
    if not calls.modules.are_plain() or _is_seen():
        return forward(layer, *arguments, **options)
    return calls.call(_Call(forward, layer, arguments, options, calls.modules.tensors))


def _is_seen() -> bool:
    """True if a mode of PyTorch has to see each operator, or each tensor that is saved."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or torch.is_anomaly_enabled()
    )


class _Calls:
    """The calls of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.modules = _Modules(layer)
        self._known: dict[tuple[Any, ...], _Tapes | str | int] = {}
        """Tapes, or why there are none, or how often the call has run."""

    def call(self, call: _Call) -> Tensor:
        key = _key_of(call)
        if key is None:
            return call.run()
        known = self._known.get(key)
        if isinstance(known, _Tapes):
            if known.backward is not None:
                return _Played.apply(call, known, *call.tensors)  # type: ignore[attr-defined]
            (out,), _ = known.forward.play([*call.tensors], call.device)
            return out
        if isinstance(known, str):
            return call.run()
        runs = (known or 0) + 1
        self._keep(key, runs)
        # Where no backward pass has followed, the forward pass was recorded in vain: ever less often.
        return self._record(key, call) if runs > 1 and runs & (runs - 1) == 0 else call.run()

    def _keep(self, key: tuple[Any, ...], known: _Tapes | str | int) -> None:
        if len(self._known) >= MOST_KEPT:
            self._known.clear()
        self._known[key] = known

    def _record(self, key: tuple[Any, ...], call: _Call) -> Tensor:
        """Run a call and take it down."""
        if any(each._backward_hooks for each in call.tensors[call.n_given :]):
            # Hooks of parameters would run for the gradients of `_Recorded`, and once more.
            return call.run()
        recording = _Recording(call, lambda tapes: self._keep(key, tapes))
        if call.differentiates:
            return _Recorded.apply(recording, *call.tensors)  # type: ignore[attr-defined]
        return recording.forward()


def _key_of(call: _Call) -> tuple[Any, ...] | None:
    """All that a call depends on beside modules and values; None where it has to run as it is written."""
    tensors = call.tensors
    of_this_device = call.device < 0 or call.device == torch._C._cuda_getDevice()
    if not of_this_device or not runs_triton(tensors[0]) or is_traced(tuple(tensors)):
        return None
    if not all(kind is Tensor or kind in PLAIN_VALUES for kind in call.kinds):
        return None
    modes = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        is_watched(),
        multiprocessors(tensors[0].device),
    )
    key: list[Any] = [*call.kinds, *call.values, *call.autocast, *modes]
    for each in tensors:
        aligned = each.data_ptr() % 16 == 0
        key += (each.shape, each.stride(), each.dtype, each.get_device(), aligned, each.requires_grad)
    return tuple(key)


class _Recording:
    """A call that is taken down while it runs.

    Args:
        keep: is called with its tapes, or with the reason why there are none.
    """

    def __init__(self, call: _Call, keep: Callable[[_Tapes | str], None]) -> None:
        self.call, self.keep = call, keep
        self._recorder = Recorder()
        # No gradient goes further than to these.
        given = [each.detach().requires_grad_(each.requires_grad) for each in call.tensors[: call.n_given]]
        self._tensors = [*given, *call.tensors[call.n_given :]]

    def forward(self) -> Tensor:
        call, recorder = self.call, self._recorder
        with torch.set_grad_enabled(call.differentiates), recorder.running(self._tensors) as self._forward:
            self._out = call.run(self._tensors)
        if not recorder.has_made(self._out):
            recorder.fail("it returns an input")
        if not call.differentiates:
            self.keep(recorder.failure or _Tapes(self._tape_of_forward()))
        return self._out.detach()

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        keeps_graph = _keeps_graph()
        with self._recorder.running([grad]) as backward:
            grads = self.call.gradients(self._out, self._tensors, grad, retain_graph=keeps_graph)
        self.keep(self._recorder.failure or self._tapes(backward, grads))
        return grads

    def _tapes(self, backward: Pass, grads: Sequence[Tensor | None]) -> _Tapes | str:
        recorder, inputs = self._recorder, self._forward.inputs
        places = [None if each is None else recorder.place_of(each) for each in grads]
        needed = backward.reads | {each.owner for each in places if each is not None}
        if recorder.place_of(self._out).owner in needed:
            return "the backward pass takes its result"
        saved = [place for place, number in enumerate(inputs) if number in needed]
        kept = sorted(needed & self._forward.made)
        given = [*(inputs[place] for place in saved), *kept, *backward.inputs]
        return _Tapes(self._tape_of_forward(kept), Tape(recorder, given, backward, places), saved)

    def _tape_of_forward(self, kept: Sequence[int] = ()) -> Tape:
        place = self._recorder.place_of(self._out)
        return Tape(self._recorder, self._forward.inputs, self._forward, [place], kept)


class _Recorded(_SingleLevelFunction):
    """A call that is taken down."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.recording, ctx.call = recording, recording.call
        return recording.forward()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if grad is None:
            return None, *(None for _ in tensors)
        recording, ctx.recording = ctx.recording, None
        if recording is None:
            return None, *ctx.call.differentiate(grad)
        if _is_unusual(grad):
            recording.keep("its backward pass is not that of a training step")
            return None, *ctx.call.differentiate(grad)
        return None, *recording.backward(_as_recorded(grad))


class _Played(_SingleLevelFunction):
    """A call that is played."""

    @staticmethod
    def forward(ctx: Any, call: _Call, tapes: _Tapes, *tensors: Tensor) -> Tensor:
        (out,), ctx.kept = tapes.forward.play([*tensors], call.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(tensors[place] for place in tapes.saved))
        ctx.call, ctx.tapes = call, tapes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = None, None
        if grad is None:
            return *nothing, *(None for _ in ctx.call.tensors)
        # PyTorch refuses this where they have changed, or are not kept any more.
        given = [*ctx.saved_tensors]
        if _is_unusual(grad):
            return *nothing, *ctx.call.differentiate(grad)
        given += ctx.kept
        if not _keeps_graph():
            ctx.kept = None
        given.append(_as_recorded(grad))
        grads, _ = ctx.tapes.backward.play(given, ctx.call.device)
        return *nothing, *grads


def _is_unusual(grad: Tensor) -> bool:
    """True where a backward pass is not as it was recorded: for a second derivative, an observer, or under autocast."""
    return torch.is_grad_enabled() or is_traced((grad,)) or torch.is_autocast_enabled(grad.device.type)


def _as_recorded(grad: Tensor) -> Tensor:
    grad = grad.contiguous()
    return grad if grad.data_ptr() % 16 == 0 else grad.clone()


def _keeps_graph() -> bool:
    keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return keeps


def known_calls(layer: nn.Module) -> list[Any]:
    """Tapes of the calls of a layer, or why there are none."""
    calls = _calls.get(layer)
    return [] if calls is None else [*calls._known.values()]
