"""Layers of sharded sequences compute the same as on whole sequences."""

import copy
import random
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels
from tests.calls import inputs_of, layer_of
from tests.correct import check_correct
from tests.reference.conftest import build
from tests.reference.parallel import sharded
from tests.reference.parallel.test_operations import cut

LAYERS = [
    "ConditionalRoutedAttention",
    "ConditionalRoutedCrossAttention",
    "ConditionalRoutedFeedForward",
    "ConditionalRoutedTransformerBlock",
]
AUTOREGRESSIVE = "ConditionalRoutedAutoregressiveAttention"


def in_fp64(rng, device):
    """True if kernels are used for fp64. On a GPU some of them compute fp64 in fp32."""
    return rng.random() < 0.5 and device.type == "cpu"


def whole_of(layer, tensors, grad, options, context=nullcontext):
    tensors = [x.clone().requires_grad_() for x in tensors]
    with context():
        out = layer(*tensors, **options)
    out.backward(grad)
    grads = {
        name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in layer.named_parameters()
    }
    return out.detach(), [x.grad for x in tensors], grads


def check_layer(ranks, size, layer, lengths, call):
    out, x_grads, grads = whole_of(copy.deepcopy(layer), *call)
    outs = ranks(size, sharded.layer, layer, lengths, *call)
    check_close(torch.cat([each for each, _, _ in outs], dim=1), out)
    for i, expected in enumerate(x_grads):
        check_close(torch.cat([each[i] for _, each, _ in outs], dim=1), expected)
    for key, expected in grads.items():
        check_close(sum(each[key] for _, _, each in outs), expected)


def check_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", LAYERS)
def test_layer(ranks, name, seed, size):
    """Shards may be shorter than a window, and have no routed token, or only masked ones."""
    rng = random.Random(f"{name} {seed}")
    layer = layer_of(name, rng, use_triton=in_fp64(rng, ranks.device)).double()
    sizes = {"length": rng.choice([7, 23, 60]), "context": rng.choice([9, 31, 70])}
    tensors = [x.double() for x in inputs_of(name, layer, **sizes)[0]]
    lengths = [cut(rng, x.shape[1], size) for x in tensors]
    options = {}
    if rng.random() < 0.5:
        n = tensors[0].shape[1]
        options["mask"] = torch.rand(2, n) < 0.7
        options["mask"][0] = torch.arange(n) >= lengths[0][0]
        if rng.random() < 0.5:
            options["mask"][:, lengths[0][0] :] = True
    if "Cross" not in name and rng.random() < 0.5:
        options["residual"] = torch.randn_like(tensors[0])
    if "Block" in name:
        options.pop("residual", None)
    grad = torch.randn_like(tensors[0])

    call = (tensors, grad, options)
    check_layer(ranks, size, layer, lengths, call)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", [*LAYERS, AUTOREGRESSIVE])
def test_accuracy(ranks, name, autocast, use_triton):
    """By the accuracy gate for one process, whose plain PyTorch in the same dtypes gives the tolerance."""
    options = {"block_sizes": (None,), "router_straight_through": False}
    layer, plain = (layer_of(name, random.Random(0), triton, **options) for triton in (use_triton, False))
    plain.load_state_dict(layer.state_dict())
    tensors = inputs_of(name, layer)[0]
    lengths = [[24, x.shape[1] - 24] for x in tensors]
    grad = torch.randn_like(tensors[0])
    context = partial(torch.autocast, ranks.device.type, torch.bfloat16, enabled=autocast)

    def named(out, x_grads, grads):
        return {"out": out, **{f"x {i}": each for i, each in enumerate(x_grads)}, **grads}

    exact = named(*whole_of(copy.deepcopy(plain).double(), [x.double() for x in tensors], grad.double(), {}))
    outs = ranks(2, sharded.layer, layer, lengths, tensors, grad, {}, context)
    x_grads = [torch.cat(parts, dim=1) for parts in zip(*(each for _, each, _ in outs), strict=True)]
    reduced = {key: sum(each[key] for _, _, each in outs) for key in outs[0][2]}
    found = named(torch.cat([each for each, _, _ in outs], dim=1), x_grads, reduced)
    check_correct(found, lambda: named(*whole_of(copy.deepcopy(plain), tensors, grad, {}, context)), exact)


@pytest.mark.parametrize("name", [*LAYERS, AUTOREGRESSIVE])
def test_second_derivatives(ranks, name):
    layer = build(name, router_straight_through=False).double()
    tensors = [x.double().requires_grad_() for x in inputs_of(name, layer)[0]]
    lengths = [[24, 16, x.shape[1] - 40] for x in tensors]
    grad = torch.randn_like(tensors[0])
    first = torch.autograd.grad(layer(*tensors), tensors, grad, create_graph=True)
    expected = torch.autograd.grad(sum(each.square().sum() for each in first), tensors)
    outs = ranks(3, sharded.second_derivatives, layer, lengths, [x.detach() for x in tensors], grad)
    for parts, whole in zip(zip(*outs, strict=True), expected, strict=True):
        check_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("name", [*LAYERS, AUTOREGRESSIVE])
def test_checkpoints_of_activations(ranks, name):
    """The forward pass within the backward pass has exchanges again."""
    layer = build(name).double()
    tensors = [x.double() for x in inputs_of(name, layer)[0]]
    lengths = [[24, x.shape[1] - 24] for x in tensors]
    call = (layer, lengths, tensors, torch.randn_like(tensors[0]), {})
    run = partial(checkpoint, use_reentrant=False)
    check_close(ranks(2, sharded.layer, *call, nullcontext, run), ranks(2, sharded.layer, *call))


@pytest.mark.parametrize("how", ["DDP", "FSDP2", "FSDP2 of parts"])
@pytest.mark.parametrize("name", [*LAYERS, AUTOREGRESSIVE])
def test_gradients_of_parameters_are_reduced(ranks, name, how):
    """By the mean over ranks: the loss is the mean of their losses."""
    layer = build(name).double()
    tensors = [x.double() for x in inputs_of(name, layer)[0]]
    lengths = [[24, x.shape[1] - 24] for x in tensors]
    grad = torch.randn_like(tensors[0])
    out, _, grads = whole_of(copy.deepcopy(layer), tensors, grad / 2, {})
    outs = ranks(2, sharded.reduced, layer, how, lengths, tensors, grad)
    check_close(torch.cat([each for each, _ in outs], dim=1), out)
    for _, reduced in outs:
        check_close(reduced, grads)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_autoregressive_layer(ranks, seed, size):
    """Shards begin with a window. The first shard may be everything before the windows of the others."""
    rng = random.Random(seed)
    heavy = rng.choice([4, 8, 12])
    layer = layer_of(AUTOREGRESSIVE, rng, use_triton=in_fp64(rng, ranks.device), heavy_window_size=heavy).double()
    windows, more = rng.randint(3, 8), rng.randrange(heavy)
    n = windows * heavy - more
    x = torch.randn(2, n, 16, dtype=torch.float64)
    lengths = [each * heavy for each in cut(rng, windows, size)]
    lengths[-1] -= more
    call = ([x], torch.randn_like(x), {})
    check_layer(ranks, size, layer, [lengths], call)


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_sequences_and_batch_are_sharded(ranks, how):
    """Parameters are the same on all four ranks, or are sharded over sequences and the same over the batch."""
    layer, x = build("ConditionalRoutedTransformerBlock").double(), torch.randn(4, 60, 16).double()
    grad = torch.randn_like(x)
    out, _, grads = whole_of(copy.deepcopy(layer), [x], grad / 4, {})
    outs = ranks(4, sharded.reduced_over_batch_and_tokens, layer, how, [37, 23], x, grad)
    first, second, third, fourth = (each for each, _ in outs)
    check_close(torch.cat((torch.cat((first, second), dim=1), torch.cat((third, fourth), dim=1))), out)
    for _, reduced in outs:
        check_close(reduced, grads)


def test_shards_begin_with_a_window(ranks):
    layer = build(AUTOREGRESSIVE)
    outcomes = ranks.outcomes(2, sharded.layer, layer, [[7, 33]], [torch.randn(1, 40, 16)], torch.randn(1, 40, 16), {})
    allowed = "NotImplementedError: heavy_window_size must divide the lengths of all shards but the last, got 8"
    assert all(failed and allowed in text for failed, text in outcomes), outcomes


@pytest.mark.parametrize("name", ["CoordinateDescentRouter", AUTOREGRESSIVE])
def test_random_routes_are_refused(ranks, name):
    layer = build(name)
    options = {"random_route": True} | ({"num_tokens": 4} if "Router" in name else {})
    outcomes = ranks.outcomes(2, sharded.call, layer, [24, 16], torch.randn(1, 40, 16), options)
    assert all("NotImplementedError: random_route must be False" in text for _, text in outcomes), outcomes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ConditionalRoutedImageAttention", {}, "model must have only layers of sequences, got one of feature maps"),
        ("ConditionalRoutedViT", {}, "model must have only layers of sequences, got one of feature maps"),
        (
            "ConditionalRoutedFeedForward",
            {"use_triton": True, "router_kwargs": {"triton_checkpoint_segments": 2}},
            "triton_checkpoint_segments of router 'router' must be None, got 2",
        ),
    ],
)
def test_layers_without_a_parallel_form(ranks, name, options, message):
    layer = build(name, **options)
    ((failed, text),) = ranks.outcomes(1, sharded.shard, layer, 1)
    assert failed
    assert f"NotImplementedError: {message}" in text


def test_a_model_is_sharded_once(ranks):
    ((failed, text),) = ranks.outcomes(1, sharded.shard, nn.Sequential(build(AUTOREGRESSIVE)), 2)
    assert failed
    assert "ValueError: model must have no layer that is sharded already, got 0" in text


def test_no_dry_run_of_a_layer_that_other_processes_take_part_in(ranks):
    layer = build("ConditionalRoutedFeedForward", package=kernels)
    assert ranks(1, sharded.dry_runs, layer, torch.randn(1, 24, 16)) == [[True, False]]
