"""The class that connects operations to PyTorch: operators, gradients, and the shortest way to them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, NoReturn, get_args, get_origin

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _dispatch_tls_is_dispatch_key_included
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels._common.launch import taker
from kernels._common.tape import current_recorder
from reference._shared.arguments import require

_library = torch.library.Library("colt5", "FRAGMENT")

_BATCHES_OF_GRADIENTS = torch._C._dispatch_key_parse("VmapMode")
"""Dispatch key while `torch.autograd.grad` has `is_grads_batched`, which is not one of the transforms of
`torch.func`."""

_PLAIN = (Tensor, torch.nn.Parameter)


class Operation:
    """An operation has two operators in PyTorch, `colt5::name` and `colt5::name_backward`, and the gradient between
    them.

    `forward` and `backward` allocate and compute. If `has_values` is False, they only allocate, which gives a compiler
    the shapes. Their annotations make the schemas of the operators. The parameters of `backward` are in this order, and
    their names define their values:

    - `grad_<output>`: the gradient of that output, None if it has none. Other outputs have no gradient;
    - tensors, and then numbers: inputs and outputs of `forward` by their names, or entries of `chosen`;
    - `needs_<input>`: whether that input needs a gradient.

    A last parameter `save` of `forward` is not an argument of a call: it is True if a backward pass may follow. One
    policy holds for all operations:

    - Eager. A call bypasses PyTorch's dispatcher, whose way through Python takes longer than some kernels. It goes to
      `forward`, through an autograd function if a gradient is needed.
    - Traced. A call goes to the operator if an observer has to see the operator, not only its result; see `is_traced`.
    - CPU. `forward` and `backward` use PyTorch if no kernel accepts the tensors. An operation that autograd can
      differentiate in plain PyTorch does not use them for such tensors at all, and has every derivative there.
    - Second derivatives and forward mode raise a NotImplementedError that names the reference.
    - `torch.func` has a gradient at each of its levels, and `torch.vmap` computes its examples one by one.

    Args:
        outputs: names of the results of `forward`.
        gradients: names of the inputs whose gradients `backward` returns. A result may be None, or of any shape, if its
            input needs no gradient.
        chosen: other arguments of `backward`, each as a function whose parameters are names of inputs and outputs.
        hand_back: makes the gradients from those of outputs and the results of `backward`. An operator may not do this:
            its results must not share memory with each other or with its arguments.
        reference: the operation of `reference` that has all derivatives, if it has another name.

    Raises:
        TypeError: `backward` has a parameter whose name is none of these.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        *,
        outputs: Sequence[str] = (),
        gradients: Sequence[str] = (),
        chosen: Mapping[str, Callable[..., Any]] | None = None,
        hand_back: Callable[..., tuple[Any, ...]] | None = None,
        reference: str | None = None,
    ) -> None:
        parameters = signature(forward).parameters
        self._forward = forward
        self._operator = _define(name, forward)
        self._saves = "save" in parameters
        # The operator saves whenever it needs a gradient.
        self._save_nothing = (False,) if self._saves else ()
        places = [place for place, each in enumerate(parameters.values()) if _is_tensor(each.annotation)]
        self._take_tensors = taker(places)
        self._differentiable = forward
        if backward is not None:
            refuse = partial(_refuse, name, reference or name)
            operator = _define_backward(f"{name}_backward", backward, refuse)
            known = (*parameters, *outputs)
            differentiated = [known.index(each) for each in gradients]
            gradient = _Gradient(backward, operator, known, len(parameters), differentiated, chosen, hand_back)
            _define_gradient(self._operator, gradient.keep, gradient.differentiate, refuse, saves=self._saves)
            self._differentiable = _eager(forward, gradient)

    def __call__(self, *inputs: Any) -> Any:
        """The results of `forward`, by the shortest way that still shows the operation to all observers."""
        if is_compiling():
            return self._operator(*inputs, *self._save_nothing)
        tensors = self._take_tensors(inputs)
        wanted = False
        if torch.is_grad_enabled():
            for each in tensors:
                if each is not None and each.requires_grad:
                    wanted = True
                    break
        if self._saves:
            inputs = (*inputs, wanted)
        if is_traced(tensors):
            return self._operator(*inputs)
        return self._differentiable(*inputs) if wanted else self._forward(*inputs)


class _Gradient:
    """The part of an operation between its two operators: `keep` and `differentiate` of an autograd function."""

    def __init__(
        self,
        backward: Callable[..., Any],
        operator: Callable[..., Any],
        known: Sequence[str],
        n_inputs: int,
        differentiated: Sequence[int],
        chosen: Mapping[str, Callable[..., Any]] | None,
        hand_back: Callable[..., tuple[Any, ...]] | None,
    ) -> None:
        self._backward, self._operator = backward, operator
        self._differentiated, self._hand_back = differentiated, hand_back
        self._nothing = (None,) * n_inputs
        place_of = {name: place for place, name in enumerate(known)}
        self._chosen = []
        for name, choose in (chosen or {}).items():
            self._chosen.append((choose, taker([place_of[each] for each in signature(choose).parameters])))
            place_of[name] = len(place_of)

        grads: list[int] = []
        kept: list[int] = []
        numbers: list[int] = []
        self._needs: list[int] = []
        for name, parameter in signature(backward).parameters.items():
            for prefix, places in (("grad_", grads), ("needs_", self._needs)):
                if name.startswith(prefix) and name.removeprefix(prefix) in place_of:
                    places.append(place_of[name.removeprefix(prefix)])
                    break
            else:
                if name not in place_of:
                    raise TypeError(
                        f"arguments of {backward.__qualname__} must be among {', '.join(place_of)}, got {name!r}"
                    )
                (kept if _is_tensor(parameter.annotation) else numbers).append(place_of[name])
        self._take_kept, self._take_numbers = taker(kept), taker(numbers)
        self._take_constants = taker(sorted({*range(n_inputs, len(known))} - {*grads}))
        self._take_grads = taker([place - n_inputs for place in grads])

    def keep(self, ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        """Save the inputs of `differentiate`, except for the gradients of outputs."""
        given = (*inputs, outputs) if isinstance(outputs, Tensor) else (*inputs, *outputs)
        for choose, take in self._chosen:
            given = (*given, choose(*take(given)))
        ctx.save_for_backward(*self._take_kept(given))
        ctx.numbers = self._take_numbers(given)
        ctx.mark_non_differentiable(*self._take_constants(given))
        ctx.set_materialize_grads(False)

    def differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of all inputs. PyTorch casts each of them to the dtype of its input."""
        grads = self._take_grads(grads)
        if _all_none(grads):
            return self._nothing
        needs = ctx.needs_input_grad
        # The caller may ask for a second derivative, which only the operator can refuse.
        is_seen = torch.is_grad_enabled() or is_traced(grads)
        backward = self._operator if is_seen else self._backward
        results = backward(*grads, *ctx.saved_tensors, *ctx.numbers, *[needs[place] for place in self._needs])
        if isinstance(results, Tensor):
            results = (results,)
        if self._hand_back is not None:
            results = self._hand_back(*grads, *results)
        made: list[Tensor | None] = list(self._nothing)
        for place, result in zip(self._differentiated, results, strict=True):
            if needs[place]:
                made[place] = result
        return tuple(made)


def is_traced(tensors: tuple[Tensor | None, ...]) -> bool:
    """True if an observer needs the operator that tensors go through, not only its result. Observers are a compiler, a
    dispatch mode, a function transform, whose tensors may outlive it, forward mode, and a subclass of Tensor. A meta
    tensor, which is only a shape, needs the operator too."""
    if (
        is_compiling()
        or (is_in_torch_dispatch_mode() and current_recorder() is None)
        or _are_functorch_transforms_active()
        or _dispatch_tls_is_dispatch_key_included(_BATCHES_OF_GRADIENTS)
        or forward_ad._current_level >= 0
    ):
        return True
    for each in tensors:
        if each is not None and (type(each) not in _PLAIN or each.is_meta or is_functorch_wrapped_tensor(each)):
            return True
    return False


def _all_none(grads: tuple[Tensor | None, ...]) -> bool:
    for each in grads:  # noqa: SIM110
        if each is not None:
            return False
    return True


def _is_tensor(annotation: Any) -> bool:
    return annotation in (Tensor, Tensor | None)


def _eager(compute: Callable[..., Any], gradient: _Gradient) -> Callable[..., Any]:
    class Eager(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, *inputs):
            # Not in a `setup_context`, for which PyTorch inspects the signature of `forward` in each call.
            outputs = compute(*inputs)
            gradient.keep(ctx, inputs, outputs)
            return outputs

        backward = staticmethod(gradient.differentiate)

    return Eager.apply  # type: ignore[attr-defined]


def _define(name: str, function: Callable[..., Any]) -> Any:
    """An operator `colt5::name` for CPU and CUDA, from a function that chooses between kernels and PyTorch."""
    _library.define(_schema(name, function))
    operator = getattr(torch.ops.colt5, name)
    torch.library.register_fake(f"colt5::{name}", function, lib=_library)
    torch.library.register_vmap(f"colt5::{name}", partial(_one_by_one, operator.default), lib=_library)
    for device in ("CPU", "CUDA"):
        _library.impl(name, function, device)
    return operator


def _define_backward(name: str, function: Callable[..., Any], refuse: Callable[[str], NoReturn]) -> Any:
    """The operator of a backward pass, which has no gradient itself and returns empty tensors instead of None."""

    def without_none(*inputs: Any) -> Any:
        results = function(*inputs)
        if isinstance(results, Tensor):
            return results
        some = next(each for each in inputs if isinstance(each, Tensor))
        return tuple(some.new_empty(0) if each is None else each for each in results)

    without_none.__signature__ = signature(function)  # type: ignore[attr-defined]
    operator = _define(name, without_none)

    def differentiate(ctx: Any, *_: Tensor | None) -> NoReturn:
        refuse("second derivative")

    _define_gradient(operator, lambda ctx, inputs, outputs: None, differentiate, refuse)
    return operator


def _schema(name: str, function: Callable[..., Any]) -> str:
    """The schema from the annotations of a function; an operator returns only tensors."""
    annotated = signature(function)
    results = annotated.return_annotation
    n_results = len(get_args(results)) if get_origin(results) is tuple else 1

    def prototype() -> None: ...

    returned = Tensor if n_results == 1 else tuple[(Tensor,) * n_results]  # type: ignore[misc]
    prototype.__signature__ = annotated.replace(return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=(), op_name=name)


def _define_gradient(
    operator: Any,
    keep: Callable[..., None],
    differentiate: Callable[..., Any],
    refuse: Callable[[str], NoReturn],
    *,
    saves: bool = False,
) -> None:
    """The gradient of an operator, with the arguments of `torch.library.register_autograd`. PyTorch's version works
    only for autograd; this one works at each level of `torch.func`, and refuses forward mode.

    Args:
        saves: set the last argument whenever a gradient is needed: the caller of the operator does not know of
            gradients outside of `torch.vmap`.
    """

    def run(keyset: torch._C.DispatchKeySet, inputs: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.default.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Differentiable(_SingleLevelFunction):
        @staticmethod
        def forward(ctx, *arguments):
            # The keyset is last, so that `needs_input_grad` has the places of the inputs.
            *inputs, keyset = arguments
            # PyTorch turns off gradients and forward mode in this function. The outer levels of `torch.func` run
            # inside, and need both.
            outer = _are_functorch_transforms_active()
            with torch.set_grad_enabled(outer), forward_ad._set_fwd_grad_enabled(outer):
                outputs = run(keyset, inputs)
            keep(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            return *differentiate(ctx, *grads), None

    def dispatch(keyset: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(each).tangent is not None for each in tensors):
            refuse("forward mode")
        if not torch.is_grad_enabled() or not any(each.requires_grad for each in tensors):
            return run(keyset, inputs)
        if saves:
            # The last input is `save`.
            inputs = (*inputs[:-1], True)
        with enable_single_level_autograd_function():
            return Differentiable.apply(*inputs, keyset)  # type: ignore[attr-defined]

    _library.impl(operator.__name__, dispatch, "Autograd", with_keyset=True)


def _refuse(name: str, reference: str, derivative: str) -> NoReturn:
    raise NotImplementedError(f"kernels.{name} has no {derivative}: use reference.{reference}")


def _one_by_one(operator: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
    """The operator under `torch.vmap`, whose results have the new dimension in front."""
    size = info.batch_size
    require(size > 0, "the size of what torch.vmap maps over", size, ">= 1")
    examples = zip(
        *([each] * size if dim is None else each.unbind(dim) for each, dim in zip(inputs, in_dims, strict=True)),
        strict=True,
    )
    # Contiguous as from other callers of operators, because kernels may rely on it.
    results = [operator(*(_contiguous(each) for each in example)) for example in examples]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(map(torch.stack, zip(*results, strict=True)))
    return stacked, (0,) * len(stacked)


def _contiguous(argument: Any) -> Any:
    return argument.contiguous() if isinstance(argument, Tensor) else argument
