"""Parts that the suites of layers share: layers as functions of inputs and parameters, their fp64 truth and cost.

Parameters are inputs of a problem like tokens, under their names in the module. So implementations with the same names
get the same parameters, and the gradient of each one is computed, compared with fp64 and timed. Masks are all True, so
that every implementation does the work for a mask.

Under autocast, the tolerance comes from the plain layer under autocast, and the truth is fp64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.suite import Implementation
from suites._dense import Attend
from suites._descent import lenient
from suites._ours import by_kernels, guest
from suites._pieces import in_pieces

SCORE_STD = 0.25
"""Standard deviation of the scores of normally distributed tokens. It is large enough to distinguish tokens, and so
small that fewer entries than are selected saturate at 1. Otherwise a package that ranks saturated entries would select
other tokens."""

TRAINING_PRODUCTS = 3
"""Matrix products of forward+backward divided by those of forward: each has a gradient for either factor."""


@dataclass(frozen=True)
class Layer:
    """A layer and the shapes of its arguments."""

    make: Callable[[Any, bool], nn.Module]
    """From a package with the classes of colt5-attention, and whether to use Triton, to the module."""

    inputs: Mapping[str, tuple[int, ...]]
    """Shapes of the tensors of a call, by the names of its arguments."""

    output: tuple[int, ...]
    masks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: str = "float32"
    """Dtype of inputs and parameters. With `autocast` these are float32, and the layer runs under autocast to bfloat16.
    """

    sparing: Callable[[nn.Module], Callable[..., Tensor]] = in_pieces
    """From the plain module to a function of the same inputs that holds less memory at a time. It computes the fp64
    truth, and the tolerance, for any size."""

    settle: Callable[["Layer", Problem], Problem] | None = None
    """From a problem to one in which no rounding changes the routing, if rounding can do so within the layer."""

    dense: Callable[[Attend], nn.Module] | None = None
    """From an attention function to the layer that this one replaces, if there is such a layer."""

    dense_pairs: int = 0
    """Number of pairs of query and key that this has to compute."""

    colt5_raises: str | None = None
    """Reason why colt5-attention 0.11.2 cannot be compared."""

    @property
    def autocast(self) -> bool:
        return self.dtype == "autocast"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of inputs and parameters."""
        return torch.float32 if self.autocast else getattr(torch, self.dtype)


@dataclass(frozen=True)
class LayerCase(Case):
    """A case of a layer, which a subclass defines."""

    @property
    def layer(self) -> Layer:
        raise NotImplementedError


class RoutedTokens(nn.Module):
    """A router alone: the tokens that it routes, in the order of their positions, times their weights.

    In the order of selection, tokens of equal weight could be in either order.
    """

    def __init__(self, router: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.router = router
        self.num_tokens = num_tokens

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens `b n d` to `b (r) k d`."""
        routed = self.router(x, num_tokens=self.num_tokens, mask=mask)
        order = routed.indices.argsort(dim=-1).unsqueeze(-1)
        weighted = routed.routed_tokens * routed.scores.unsqueeze(-1)
        return weighted.gather(-2, order.expand_as(weighted))


def as_function(
    module: nn.Module, call: Callable[..., Tensor] | None = None, *, autocast: bool = False
) -> Callable[..., Tensor]:
    """The module as a function of its inputs and, by their names, of its parameters.

    Args:
        call: a function that computes with the module, instead of the module's own call.
    """
    call = module if call is None else call
    owners = {}
    for name, _ in module.named_parameters():
        owner, _, own_name = name.rpartition(".")
        owners[name] = module.get_submodule(owner)._parameters, own_name

    def function(**tensors: Tensor) -> Tensor:
        # Permanently, because the backward pass may need them again. A second call with the same ones costs nothing
        # more.
        for name, (parameters, own_name) in owners.items():
            given = tensors.pop(name)
            if parameters[own_name] is not given:
                parameters[own_name] = given  # type: ignore[assignment]
        with torch.autocast(given.device.type, torch.bfloat16, enabled=autocast):
            return call(**tensors)

    return function


def without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose parameters are passed with each call."""
    with torch.device("meta"):
        return make()


def seeded_problem(case: LayerCase, layer: Layer, make: Callable[[], nn.Module], device: torch.device) -> Problem:
    """Normally distributed inputs, and parameters as the module initialises them, except those that make scores.

    The gradient of the output is scaled so that gradients of parameters are about 1, for any number of tokens.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.generator().initial_seed())
        module = make()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for name, parameter in parameters.items():
        if name.endswith("routing_token"):
            parameter *= SCORE_STD / parameter.shape[-1] ** 0.5
    *drawn, upstream = case.normal(device, *layer.inputs.values(), layer.output)
    differentiable = {**dict(zip(layer.inputs, drawn, strict=True)), **parameters}
    masks = {name: torch.ones(shape, dtype=torch.bool, device=device) for name, shape in layer.masks.items()}
    return Problem(
        {**{name: tensor.to(device, layer.torch_dtype) for name, tensor in differentiable.items()}, **masks},
        (upstream / prod(layer.output[:-1]) ** 0.5).to(device, layer.torch_dtype),
        tuple(differentiable),
    )


def truth_of(function: Callable[..., Tensor], problem: Problem, direction: str) -> Truth:
    """Results of a function in fp64 on the inputs of a problem, and the gradients by autograd."""
    wanted = () if direction == FORWARD else problem.differentiable
    inputs = {
        name: tensor.detach().double().requires_grad_(name in wanted) if tensor.is_floating_point() else tensor
        for name, tensor in problem.inputs.items()
    }
    with torch.set_grad_enabled(bool(wanted)):
        output = function(**inputs)
    if not wanted:
        return Truth(output)
    gradients = torch.autograd.grad(output, [inputs[name] for name in wanted], problem.upstream.double())
    return Truth(output.detach(), dict(zip(wanted, gradients, strict=True)))


def ours(case: LayerCase, *, use_triton: bool) -> Callable[..., Tensor]:
    layer = case.layer
    return as_function(without_memory(lambda: layer.make(reference, use_triton)), autocast=layer.autocast)


class _Instead:
    """The plain package with a custom class in place of its layers."""

    def __init__(self, layer: Callable[..., nn.Module]) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        found = getattr(reference, name)
        return self._layer if isinstance(found, type) and issubclass(found, nn.Module) else found


def of_class(layer: Callable[..., nn.Module]) -> Callable[[LayerCase], Callable[..., Tensor]]:
    """A custom layer with the parameters of ours, by their names and shapes.

    Raises:
        TypeError: it has other parameters.
    """

    def build(case: LayerCase) -> Callable[..., Tensor]:
        module = case.layer.make(_Instead(layer), True)
        wanted = without_memory(lambda: case.layer.make(reference, False))
        theirs, ours = ({name: tuple(p.shape) for name, p in each.named_parameters()} for each in (module, wanted))
        if theirs != ours:
            differences = sorted({*theirs.items()} ^ {*ours.items()})
            raise TypeError(
                f"{layer.__name__} must have the parameters of the layer that it replaces: "
                + ", ".join(f"{name} of shape {ours.get(name)}, got {theirs.get(name)}" for name, _ in differences[:4])
            )
        call = as_function(module, autocast=case.layer.autocast)

        def function(**tensors: Tensor) -> Tensor:
            device = next(iter(tensors.values())).device
            for name, buffer in module.named_buffers():
                if buffer.device != device:
                    owner, _, own_name = name.rpartition(".")
                    module.get_submodule(owner)._buffers[own_name] = buffer.to(device)
            return call(**tensors)

        return function

    return build


def sparingly(
    layer: Layer, sparing: Callable[[nn.Module], Callable[..., Tensor]], *, autocast: bool
) -> Callable[..., Tensor]:
    """The plain layer as `sparing` computes it, in the form of `as_function`.

    Under autocast its linear layers are PyTorch's, whose biases are rounded like weights. Ours leave some in fp32; to
    expect so of others would reject correct layers.
    """
    module = without_memory(lambda: layer.make(reference, False))
    if autocast:
        for each in module.modules():
            if isinstance(each, nn.Linear):
                # A layer with an observer is called as a module.
                each.register_forward_hook(_observe)
    return as_function(module, sparing(module), autocast=autocast)


def _observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    pass


def plain(case: LayerCase) -> Callable[..., Tensor]:
    layer = case.layer
    return sparingly(layer, layer.sparing, autocast=layer.autocast)


def problem(case: LayerCase, device: torch.device) -> Problem:
    layer = case.layer
    seeded = seeded_problem(case, layer, lambda: layer.make(reference, False), device)
    return seeded if layer.settle is None else layer.settle(layer, seeded)


def truth(case: LayerCase, problem: Problem, direction: str) -> Truth:
    layer = case.layer
    return truth_of(sparingly(layer, layer.sparing, autocast=False), problem, direction)


@cache
def _sizes(case: LayerCase) -> tuple[int, int, int]:
    """Elements of the inputs that have a gradient, bytes of the masks, and forward matrix products in flops."""
    layer = case.layer
    with FakeTensorMode(), torch.no_grad():
        module = layer.make(reference, False)
        inputs = {name: torch.empty(shape) for name, shape in layer.inputs.items()}
        masks = {name: torch.empty(shape, dtype=torch.bool) for name, shape in layer.masks.items()}
        elements = sum(tensor.numel() for tensor in (*inputs.values(), *module.parameters()))
        with FlopCounterMode(display=False) as counter:
            module(**inputs, **masks)
    return elements, sum(mask.numel() for mask in masks.values()), counter.get_total_flops()


def cost(case: LayerCase, direction: str) -> Cost:
    """Inputs and parameters read and the output written. Then these and grad_output read again, and a gradient written
    for each. Products are those of plain PyTorch; the windowed branch counts only keys within reach."""
    layer, (elements, masks, flops) = case.layer, _sizes(case)
    size, output = layer.torch_dtype.itemsize, prod(layer.output)
    forward = size * (elements + output) + masks
    flops_dtype = "bfloat16" if layer.autocast else layer.dtype
    if direction == FORWARD:
        return Cost(bytes=forward, flops=flops, flops_dtype=flops_dtype)
    return Cost(2 * forward + size * elements, flops=TRAINING_PRODUCTS * flops, flops_dtype=flops_dtype)


REFERENCE = Implementation[LayerCase]("reference", lambda case: ours(case, use_triton=False), bound=lenient)
"""The layer as a whole. The tolerance comes from the layer in pieces, which rounds in another order."""

OURS: Implementation[LayerCase] = by_kernels(lambda case: ours(case, use_triton=True), bound=lenient)

GUEST = guest(of_class, bound=lenient)
