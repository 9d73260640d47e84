"""Layers whose calls are recorded, and then played from tapes.

Each call of a layer is one autograd function, which includes the inner layers. Within it, the first call with tensors
of some shape runs the code of the layer. So does the second one, while it is recorded: its forward and its backward
pass become tapes. Later calls are played. All calls give the same bits, because gradients are added up within the
function before they are added to others. Besides the values of tensors, a call depends only on arguments, metadata of
tensors, modes of PyTorch, and the modules of the layer with their attributes. These are in its key, or are compared. If
an observer needs to see inside a layer, its calls are not such a function. A call that no tape can repeat is one, but
is never played.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from threading import local
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from kernels._common.launch import PLAIN_VALUES, is_watched
from kernels._common.operation import is_traced
from kernels._common.tape import Pass, Recorder, Tape
from kernels._common.tensors import multiprocessors, runs_triton

MOST_TAPES = 32
"""Most kinds of calls that a layer can play. Above it, the kind that was played longest ago is dropped."""

MOST_KEYS = 256
"""Most kinds of calls that a layer counts before it records them."""

PACKAGES = ("torch.nn.modules.", "reference.", "kernels.")
"""Packages whose modules only compute, without side effects."""

Forward = Callable[..., Tensor]


class _Modules:
    """The modules of a layer with all of their attributes except tensors, at the time of creation."""

    def __init__(self, layer: nn.Module) -> None:
        modules = [*layer.modules()]
        # Weak references: the layer is the key under which this object is stored.
        self._modules = [ref(each) for each in modules]
        self._types = [type(each) for each in modules]
        self._attributes = [d for each in modules for d in (vars(each), each._modules)]
        # Held, so that no other object gets the id of one of them.
        self._objects = [value for each in self._attributes for value in each.values()]
        self._numbers = [*map(id, self._objects)]
        self._tensors = [d for each in modules for d in (each._parameters, each._buffers)]
        self._names = [*chain.from_iterable(self._tensors)]
        inner = [vars(each).items() for each in modules if each is not layer]
        self._hooks = [value for items in inner for name, value in items if name.endswith("_hooks")]
        self._are_known = all(map(_is_known, modules))

    def are_unchanged(self) -> bool:
        return (
            [*map(id, chain.from_iterable(map(dict.values, self._attributes)))] == self._numbers
            and [type(each()) for each in self._modules] == self._types
            and [*chain.from_iterable(self._tensors)] == self._names
        )

    def are_plain(self) -> bool:
        """True if calls of the modules have no effect other than their computation."""
        return self._are_known and not any(self._hooks) and not _has_any_global_hook()

    def tensors(self) -> list[Tensor | None]:
        """Parameters and buffers."""
        return [each for held in self._tensors for each in held.values()]


def _is_known(module: nn.Module) -> bool:
    """True if a module computes with its parameters and buffers as its class defines, with no function replaced."""
    kind = type(module)
    return kind.__module__.startswith(PACKAGES) and not any(
        isinstance(value, Tensor) or not getattr(value, "are_own", True) or (callable(value) and hasattr(kind, name))
        for name, value in vars(module).items()
    )


class _Call:
    """A call of a layer. Its tensors are the arguments, followed by the tensors of the layer."""

    def __init__(
        self,
        forward: Forward,
        layer: nn.Module,
        modules: _Modules,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
    ) -> None:
        self._forward, self._layer, self._modules = forward, layer, modules
        self._arguments, self._options = arguments, options
        given = [*arguments, *options.values()]
        self.kinds = [Tensor if isinstance(each, Tensor) else type(each) for each in given]
        self._places: dict[int, int] = {}
        self.tensors: list[Tensor] = []
        """Each tensor once."""

        self.values: list[Any] = [*options, *self._numbered(given, self._places)]
        """Arguments and values of the layer, with numbers in place of tensors."""

        self.n_given = len(self.tensors)
        self._held = modules.tensors()
        self.values += self._numbered(self._held, {})
        self.device = self.tensors[0].get_device()
        self.autocast = _autocast(self.tensors[0].device.type)
        self.differentiates = torch.is_grad_enabled() and any(each.requires_grad for each in self.tensors)
        self._versions = self._changes() if self.differentiates else []

    def _numbered(self, values: list[Any], places: dict[int, int]) -> Iterator[Any]:
        for each in values:
            if isinstance(each, Tensor):
                if id(each) not in places:
                    places[id(each)] = len(self.tensors)
                    self.tensors.append(each)
                yield places[id(each)]
            else:
                yield each

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """Run the code of the layer, including inner layers, on these tensors instead of the original ones."""

        def stand_in(argument: Any) -> Any:
            return tensors[self._places[id(argument)]] if isinstance(argument, Tensor) else argument

        arguments = [stand_in(each) for each in self._arguments]
        options = {name: stand_in(each) for name, each in self._options.items()}
        # A cached cast of a weight from another call would not be a tensor of this one.
        kind, enabled, dtype, _ = self.autocast
        with _calling_one(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
            return self._forward(self._layer, *arguments, **options)

    def differentiate(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients by autograd, from a pass that runs once more: for a second derivative, or for several gradients.

        Raises:
            RuntimeError: a tensor of the call has changed since.
        """
        if self._changes() != self._versions:
            raise RuntimeError("a tensor that a layer needs for its gradient has been modified by an inplace operation")
        if any(now is not then for now, then in zip(self._modules.tensors(), self._held, strict=True)):
            raise RuntimeError(
                "a layer has other parameters than when it was called: call it again before a second derivative, or "
                "before a backward pass for several gradients"
            )
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            out = self.run(self.tensors)
        return gradients(out, self.tensors, grad, create_graph=create_graph)

    def _changes(self) -> list[int]:
        """Version of each tensor. Tensors of inference mode have none."""
        return [0 if each.is_inference() else each._version for each in self.tensors]


def gradients(out: Any, tensors: Sequence[Tensor], grad: Tensor, **options: Any) -> list[Tensor | None]:
    """Gradients of tensors; None for a tensor without one."""
    wanted = [each for each in tensors if each.requires_grad]
    with _unhooked(wanted):
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, **options))
    return [next(found) if each.requires_grad else None for each in tensors]


@contextmanager
def _unhooked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Suspend the hooks of tensors: a hook needs the whole gradient, and that of a call is only a part."""
    hooked = [(each, each._backward_hooks) for each in tensors if each._backward_hooks]
    for each, _ in hooked:
        each._backward_hooks = None
    try:
        yield
    finally:
        for each, hooks in hooked:
            each._backward_hooks = hooks


class _Thread(local):
    is_calling = False
    """True while a layer, with its inner layers, runs in one autograd function."""


_thread = _Thread()


@contextmanager
def _calling_one() -> Iterator[None]:
    before, _thread.is_calling = _thread.is_calling, True
    try:
        yield
    finally:
        _thread.is_calling = before


def _autocast(kind: str) -> tuple[str, bool, torch.dtype, bool]:
    if not torch.amp.is_autocast_available(kind):
        # For example for meta tensors.
        return kind, False, torch.float32, False
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


class _Tapes(NamedTuple):
    """The passes of a call."""

    forward: Tape
    backward: Tape | None = None

    saved: Sequence[int] = ()
    """Tensors of the call that the backward pass needs."""

    autocast: tuple[str, bool, torch.dtype, bool] | None = None
    """State of autocast in the backward pass."""


_calls: WeakKeyDictionary[nn.Module, "_Calls"] = WeakKeyDictionary()


def replay(forward: Forward, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """`forward(layer, *arguments, **options)`, a tensor, in one autograd function, from tapes if there are any."""
    if is_compiling() or torch._C._get_tracing_state() is not None or _thread.is_calling:
        return forward(layer, *arguments, **options)
    calls = _calls.get(layer)
    if calls is None or not calls.modules.are_unchanged():
        calls = _calls[layer] = _Calls(layer)
    if not calls.modules.are_plain() or _is_seen():
        return forward(layer, *arguments, **options)
    if torch.is_inference_mode_enabled():
        # In inference mode, PyTorch computes a linear layer in another way while it is recorded.
        with torch.inference_mode(False), torch.no_grad():
            return replay(forward, layer, arguments, options)
    call = _Call(forward, layer, calls.modules, arguments, options)
    key = _key_of(call)
    return forward(layer, *arguments, **options) if key is None else calls.call(key, call)


def _is_seen() -> bool:
    """True if a mode of PyTorch has to see each operator, or each saved tensor."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or any(type(each) is not DeviceContext for each in _function_modes())
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or torch.is_anomaly_enabled()
    )


def _function_modes() -> list[Any]:
    """Modes that see calls of PyTorch's functions. A `DeviceContext` only sets the device of new tensors."""
    return [torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())]


class _Recent(OrderedDict[Any, Any]):
    """The most recently used values. The oldest is dropped if there are more than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def use(self, key: Any) -> Any:
        # Another thread may have dropped it in between.
        with suppress(KeyError):
            self.move_to_end(key)
            return self[key]
        return None

    def keep(self, key: Any, value: Any) -> None:
        self[key] = value
        self.move_to_end(key)
        if len(self) > self._most:
            self.popitem(last=False)


class _Calls:
    """The calls of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.modules = _Modules(layer)
        self.tapes = _Recent(MOST_TAPES)
        self.runs = _Recent(MOST_KEYS)
        """Number of runs of each call without tapes, or the reason why it has none."""

    def call(self, key: tuple[Any, ...], call: _Call) -> Tensor:
        tapes = self.tapes.use(key)
        if tapes is None:
            run = self._run(key, call)
            if call.differentiates:
                return _Written.apply(run, *call.tensors)  # type: ignore[attr-defined]
            return run.forward()
        if tapes.backward is not None:
            return _Played.apply(call, tapes, *call.tensors)  # type: ignore[attr-defined]
        (out,), _ = tapes.forward.play([*call.tensors], call.device)
        return out

    def _run(self, key: tuple[Any, ...], call: _Call) -> "_Run":
        runs = self.runs.use(key)
        if isinstance(runs, str):
            return _Run(call, None)
        runs = (runs or 0) + 1
        self.runs.keep(key, runs)
        # If no backward pass follows, the recording was in vain, so attempts become less and less frequent.
        if runs == 1 or runs & (runs - 1):
            return _Run(call, None)

        def keep(made: _Tapes | str) -> None:
            (self.runs if isinstance(made, str) else self.tapes).keep(key, made)

        return _Run(call, keep)


def _key_of(call: _Call) -> tuple[Any, ...] | None:
    """All that a call depends on besides modules and values. None if the call has to run the code of the layer."""
    tensors = call.tensors
    of_this_device = call.device < 0 or call.device == torch._C._cuda_getDevice()
    if not of_this_device or not runs_triton(tensors[0]) or is_traced(tuple(tensors)):
        return None
    if not all(kind is Tensor or kind in PLAIN_VALUES for kind in call.kinds):
        return None
    devices = tuple(each.device for each in _function_modes())
    modes = torch.is_grad_enabled(), is_watched(), multiprocessors(tensors[0].device), devices
    key: list[Any] = [*call.kinds, *call.values, *call.autocast, *modes]
    for each in tensors:
        aligned = each.data_ptr() % 16 == 0
        key += (each.shape, each.stride(), each.dtype, each.get_device(), aligned, each.requires_grad)
    return tuple(key)


class _Run:
    """A call that runs the code of the layer, in a separate autograd graph.

    Args:
        keep: is called with the tapes of the call, or with the reason why there are none. None: it is not recorded.
    """

    def __init__(self, call: _Call, keep: Callable[[_Tapes | str], None] | None) -> None:
        self._call, self._keep = call, keep
        self._recorder = Recorder()
        # Gradients stop at these tensors.
        given = [each.detach().requires_grad_(each.requires_grad) for each in call.tensors[: call.n_given]]
        self._tensors = [*given, *call.tensors[call.n_given :]]
        self._edge: GradientEdge | None = None

    @property
    def has_gradient(self) -> bool:
        return self._edge is not None

    def forward(self) -> Tensor:
        recorder, differentiates = self._recorder, self._call.differentiates
        with torch.set_grad_enabled(differentiates), self._running(self._tensors) as self._forward:
            out = self._call.run(self._tensors)
        if out.requires_grad:
            # The result itself is not kept: the backward pass may not need it.
            self._edge = get_gradient_edge(out)
        if self._keep is not None:
            if not recorder.has_made(out):
                recorder.fail("it returns an input")
            self._result = recorder.place_of(out)
        if not differentiates:
            self._end(lambda: _Tapes(self._tape_of_forward()))
        elif not self.has_gradient:
            self._end(lambda: "its result has no gradient")
        return out.detach()

    def backward(self, grad: Tensor) -> list[Tensor | None]:
        if torch.is_grad_enabled():
            self._end(lambda: "it has a second derivative")
            return self._call.differentiate(grad)
        keep_graph = _keeps_graph()
        if is_traced((grad,)):
            self._end(lambda: "its backward pass is seen")
            return gradients(self._edge, self._tensors, grad, retain_graph=keep_graph)
        grad = _as_recorded(grad)
        with self._running([grad]) as backward:
            grads = gradients(self._edge, self._tensors, grad, retain_graph=keep_graph)
        self._end(lambda: self._tapes(backward, grads))
        return grads

    def _running(self, inputs: Sequence[Tensor]) -> AbstractContextManager[Pass]:
        return nullcontext(Pass([])) if self._keep is None else self._recorder.running(inputs)

    def _end(self, tapes: Callable[[], _Tapes | str]) -> None:
        keep, self._keep = self._keep, None
        if keep is not None:
            keep(self._recorder.failure or tapes())

    def _tapes(self, backward: Pass, grads: Sequence[Tensor | None]) -> _Tapes | str:
        recorder, inputs = self._recorder, self._forward.inputs
        places = [None if each is None else recorder.place_of(each) for each in grads]
        needed = backward.reads | {each.owner for each in places if each is not None}
        if self._result.owner in needed:
            return "the backward pass takes its result"
        saved = [place for place, number in enumerate(inputs) if number in needed]
        kept = sorted(needed & self._forward.made)
        given = [*(inputs[place] for place in saved), *kept, *backward.inputs]
        tape = Tape(recorder, given, backward, places)
        return _Tapes(self._tape_of_forward(kept), tape, saved, _autocast(self._call.autocast[0]))

    def _tape_of_forward(self, kept: Sequence[int] = ()) -> Tape:
        return Tape(self._recorder, self._forward.inputs, self._forward, [self._result], kept)


class _Written(_SingleLevelFunction):
    """A call that is not played. Gradients are added up, and laid out in memory, as in a played call."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.run, out = run, run.forward()
        if not run.has_gradient:
            ctx.mark_non_differentiable(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.run is None:
            raise RuntimeError(
                "trying to backward through a layer a second time: set retain_graph=True in the first backward pass"
            )
        grads = ctx.run.backward(grad)
        if not _keeps_graph():
            ctx.run = None
        return None, *grads


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
            return (None,) * len(ctx.needs_input_grad)
        # PyTorch raises an error here if they have changed, or are not kept any more.
        given = [*ctx.saved_tensors]
        call, tapes = ctx.call, ctx.tapes
        if torch.is_grad_enabled() or is_traced((grad,)) or _autocast(call.autocast[0]) != tapes.autocast:
            return *nothing, *call.differentiate(grad)
        given += ctx.kept
        if not _keeps_graph():
            ctx.kept = ctx.call = None
        given.append(_as_recorded(grad))
        grads, _ = tapes.backward.play(given, call.device)
        return *nothing, *grads


def _as_recorded(grad: Tensor) -> Tensor:
    grad = grad.contiguous()
    return grad if grad.data_ptr() % 16 == 0 else grad.clone()


def _keeps_graph() -> bool:
    keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return keeps


def known_calls(layer: nn.Module) -> list[Any]:
    """Tapes of the calls of a layer, followed by the reasons or numbers of runs of calls without tapes."""
    calls = _calls.get(layer)
    return [] if calls is None else [*calls.tapes.values(), *calls.runs.values()]
