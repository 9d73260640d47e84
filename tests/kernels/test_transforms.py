"""PyTorch's function transforms of every operation. They give the results of the reference in fp64, or an error that
names the reference, on the CPU path, in Triton's interpreter and on a GPU."""

import random
from functools import partial

import pytest
import torch
import triton
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

import kernels
from tests.calls import KERNELS, LAYERS, all_tensors_of, inputs_of, layer_of, operation, results
from tests.kernels.devices import DEVICE

NOT_DIFFERENCES = {"select", "topk"}
"""An operation without a gradient, and one whose gradient is passed straight through."""

pytestmark = [
    # PyTorch's own rules of forward mode are such scripts.
    pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning"),
    # PyTorch's warning about its own operators.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

INTERPRETED = triton.knobs.runtime.interpret
DTYPE = torch.float64 if DEVICE == "cpu" and not INTERPRETED else torch.float32
"""Not all kernels support fp64."""

ROUNDINGS = 256
"""Number of roundings of the largest result. A call has sums of at most this many terms, and a temperature of .3."""

REFERENCE = {"segmented_coor_descent": "coor_descent"}
"""Names of operations in `reference`, if they differ."""


def is_float(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point()


def two_examples(name):
    """Float tensors and others, each with a dimension of 2 in front, and options."""
    draws = [all_tensors_of(name, random.Random(name)) for _ in range(2)]
    tensors = {key: torch.stack([each[key] for each, _ in draws]).to(DEVICE) for key in draws[0][0]}
    floats = {key: x.to(DTYPE) for key, x in tensors.items() if x.is_floating_point()}
    if "k" in floats:
        floats["k"] = floats["k"] + torch.rand_like(floats["k"])
    return floats, {key: x for key, x in tensors.items() if key not in floats}, draws[0][1]


def both(name, options):
    """The operation of `kernels` and that of `reference`, as functions of tensors."""
    fixed = {"dtype": None, "non_differentiable": False}
    options = {**options, **{key: value for key, value in fixed.items() if key in options}}
    plain = {key: value for key, value in options.items() if key != "checkpoint_segments"}
    if "fused" in options:
        options, plain = {**options, "fused": True}, {**plain, "fused": False}

    def bind(function, options):
        return lambda floats, others: tuple(results(function(**floats, **others, **options)))

    theirs = operation("reference", REFERENCE.get(name, name))
    return bind(operation("kernels", name), options), bind(theirs, plain)


def loss(function, number=0):
    """A number that depends on all results."""

    def weighted(floats, others):
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for each in function(floats, others):
            weights = torch.arange(each.numel(), device=DEVICE, dtype=torch.float64).add(number).cos()
            total = total + (each * weights.view(each.shape)).sum()
        return total

    return weighted


def losses(function):
    return lambda floats, others: torch.stack([loss(function, number)(floats, others) for number in range(3)])


def first(tensors):
    return tree_map(lambda x: x[0], tensors)


def with_gradient(tensors):
    return tree_map(lambda x: x.detach().clone().requires_grad_(), tensors)


def grad(function, floats, others):
    return torch.func.grad_and_value(loss(function))(first(floats), first(others))


def vjp(function, floats, others):
    others = first(others)
    value, pull = torch.func.vjp(lambda floats: losses(function)(floats, others), first(floats))
    return value, pull(torch.ones_like(value))


def jacrev(function, floats, others):
    return torch.func.jacrev(losses(function))(first(floats), first(others))


def grads_batched(function, floats, others):
    floats = with_gradient(first(floats))
    values = losses(function)(floats, first(others))
    if not values.requires_grad:
        return ()
    rows = torch.eye(3, dtype=values.dtype, device=DEVICE)
    return torch.autograd.grad(
        values, list(floats.values()), rows, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )


def vmap(function, floats, others):
    return torch.vmap(function)(floats, others)


def vmap_of_one(function, floats, others):
    """Each argument separately, with its new dimension at the end."""
    made = []
    for name in (*floats, *others):
        arguments = {**first(floats), **first(others)}
        arguments[name] = torch.movedim({**floats, **others}[name], 0, -1)

        def alone(argument, name=name, arguments=arguments):
            return function({**arguments, name: argument}, {})

        made.append(torch.vmap(alone, in_dims=-1)(arguments[name]))
    return made


def nested_vmap(function, floats, others):
    pairs = tree_map(lambda x: torch.stack((x, 1.25 * x), dim=-1), floats)
    return torch.vmap(torch.vmap(function), in_dims=(-1, None))(pairs, others)


def vmap_of_grad(function, floats, others):
    return torch.vmap(torch.func.grad(loss(function)))(floats, others)


def grad_of_vmap(function, floats, others):
    return torch.func.grad(lambda floats: torch.vmap(loss(function))(floats, others).sum())(floats)


def backward_through_vmap(function, floats, others):
    floats = with_gradient(floats)
    value = torch.vmap(loss(function))(floats, others).sum()
    if not value.requires_grad:
        return ()
    return torch.autograd.grad(value, list(floats.values()), allow_unused=True, materialize_grads=True)


RIGHT = [grad, vjp, grads_batched, vmap, vmap_of_grad, backward_through_vmap]
# Layers with inner layers take too long in the interpreter.
RIGHT += [] if INTERPRETED else [jacrev, vmap_of_one, nested_vmap, grad_of_vmap]


def jvp(function, floats, others):
    floats, others = first(floats), first(others)
    return torch.func.jvp(lambda floats: function(floats, others), (floats,), (tree_map(torch.cos, floats),))


def dual(function, floats, others):
    with forward_ad.dual_level():
        floats = {key: forward_ad.make_dual(x, x.cos()) for key, x in first(floats).items()}
        tangents = [forward_ad.unpack_dual(each).tangent for each in function(floats, first(others)) if is_float(each)]
        assert all(each is not None for each in tangents)
        return tangents


def dual_with_gradient(function, floats, others):
    return dual(function, with_gradient(floats), others)


def jvp_of_one(function, floats, others):
    """Each argument separately."""
    made = []
    for name, each in first(floats).items():
        rest = {**first(floats), **first(others)}

        def alone(x, name=name, rest=rest):
            return function({**rest, name: x}, {})

        made.append(torch.func.jvp(alone, (each,), (each.cos(),)))
    return made


def jvp_of_grad(function, floats, others):
    floats, others = first(floats), first(others)
    pull = torch.func.grad(loss(function))
    return torch.func.jvp(lambda floats: pull(floats, others), (floats,), (tree_map(torch.cos, floats),))


def jvp_of_vmap(function, floats, others):
    return torch.func.jvp(lambda x: torch.vmap(function)(x, others), (floats,), (tree_map(torch.cos, floats),))


def vmap_of_jvp(function, floats, others):
    return torch.vmap(lambda x, y: torch.func.jvp(lambda x: function(x, y), (x,), (tree_map(torch.cos, x),)))(
        floats, others
    )


def grad_of_grad(function, floats, others):
    def squares(floats, others):
        return sum(x.square().sum() for x in torch.func.grad(loss(function))(floats, others).values())

    return torch.func.grad(squares)(first(floats), first(others))


def second_derivative(function, floats, others):
    floats = with_gradient(first(floats))
    value = loss(function)(floats, first(others))
    if not value.requires_grad:
        return ()
    gradients = torch.autograd.grad(value, list(floats.values()), create_graph=True)
    return torch.autograd.grad(
        sum(x.square().sum() for x in gradients), list(floats.values()), allow_unused=True, materialize_grads=True
    )


RIGHT_OR_REFUSED = [
    jvp,
    dual,
    dual_with_gradient,
    jvp_of_one,
    jvp_of_grad,
    jvp_of_vmap,
    vmap_of_jvp,
    grad_of_grad,
    second_derivative,
]


def check(transform, ours, theirs, floats, others):
    actual = transform(ours, floats, others)
    expected = transform(theirs, tree_map(torch.Tensor.double, floats), others)
    for one, truth in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        largest = truth.abs().max().item() if truth.numel() else 0
        atol = ROUNDINGS * torch.finfo(DTYPE).eps * largest if truth.is_floating_point() else 0
        torch.testing.assert_close(one.to(truth.dtype), truth, rtol=0, atol=atol)


@pytest.mark.parametrize("transform", RIGHT)
@pytest.mark.parametrize("name", KERNELS)
def test_is_that_of_the_reference(name, transform):
    floats, others, options = two_examples(name)
    check(transform, *both(name, options), floats, others)


@pytest.mark.parametrize("transform", RIGHT_OR_REFUSED)
@pytest.mark.parametrize("name", KERNELS)
def test_is_that_of_the_reference_or_refused(name, transform):
    floats, others, options = two_examples(name)
    try:
        check(transform, *both(name, options), floats, others)
    except NotImplementedError as error:
        if "use reference." not in str(error):
            raise


@pytest.mark.skipif(torch.float64 != DTYPE, reason="differences of fp32 say nothing")
@pytest.mark.parametrize("name", sorted({*KERNELS} - NOT_DIFFERENCES))
def test_gradcheck(name):
    floats, others, options = two_examples(name)
    function, _ = both(name, options)
    floats, others = with_gradient(first(floats)), first(others)

    def differentiable(*tensors):
        outputs = function(dict(zip(floats, tensors, strict=True)), others)
        return tuple(each for each in outputs if each.requires_grad)

    assert gradcheck(differentiable, tuple(floats.values()), fast_mode=True, check_batched_grad=True)


def layers(name, use_triton):
    """A layer and its plain twin in fp64, as functions of tensors, including the parameters; and two examples."""
    layer, plain = (layer_of(name, random.Random(name), way).to(DEVICE) for way in (use_triton, False))
    plain.load_state_dict(layer.state_dict())
    inputs, options = inputs_of(name, layer, length=24, context=30)
    examples = {number: torch.stack([x.roll(shift, 0) for shift in range(2)]) for number, x in enumerate(inputs)}
    parameters = {key: torch.stack((x, 1.125 * x)).detach() for key, x in layer.named_parameters()}
    floats = {key: x.to(DEVICE, DTYPE) for key, x in {**examples, **parameters}.items()}

    def bind(module):
        def function(floats, _):
            given = {key: floats[key] for key in parameters}
            return tuple(results(functional_call(module, given, tuple(floats[key] for key in examples), options)))

        return function

    return bind(layer.to(DTYPE)), bind(plain.double()), floats


LARGE = {"ConditionalRoutedTransformerBlock", "ConditionalRoutedViT"}
"""Layers whose routers select by results of other layers."""

FEW = ["CoordinateDescentRouter", "ConditionalRoutedFeedForward"]
"""Layers for the interpreter, in which the others take too long."""


@pytest.mark.parametrize("transform", [grads_batched, vmap_of_grad, jvp, dual_with_gradient])
@pytest.mark.parametrize("use_triton", [True] if INTERPRETED else [True, None])
@pytest.mark.parametrize("name", FEW if INTERPRETED else LAYERS)
def test_layers(name, use_triton, transform):
    if name in LARGE and torch.float64 != DTYPE:
        pytest.skip("rounding may change what is selected")
    try:
        check(transform, *layers(name, use_triton), {})
    except NotImplementedError as error:
        if transform not in RIGHT_OR_REFUSED or "use reference." not in str(error):
            raise


@pytest.mark.skipif(INTERPRETED, reason="the interpreter adds nothing but time")
def test_transforms_compile():
    floats, others, options = two_examples("coor_descent")
    function, _ = both("coor_descent", options)
    compiled = torch.compile(vmap_of_grad, backend="aot_eager", fullgraph=True)
    actual, expected = (each(function, floats, others) for each in (compiled, vmap_of_grad))
    assert all(torch.equal(actual[key], expected[key]) for key in floats)


def test_vmap_over_nothing_is_refused():
    with pytest.raises(ValueError, match=r"what torch\.vmap maps over must be >= 1, got 0"):
        torch.vmap(partial(kernels.soft_topk, k=2, eps=1.0))(torch.empty(0, 3, 5, device=DEVICE))
