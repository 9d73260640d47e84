"""Layers with kernels against plain ones in fp64: on the CPU path, in Triton's interpreter and on a GPU."""

import copy
import inspect
import pickle

import pytest
import torch
import triton

import kernels
import reference
from tests.calls import LAYERS as NAMES
from tests.calls import inputs_of
from tests.calls import results as parts
from tests.correct import check_correct
from tests.kernels.devices import DEVICE
from tests.reference.conftest import build

INTERPRETED = triton.knobs.runtime.interpret

ROUTER = {"n_iters": 2, "eps": 0.3}
"""Few iterations at a temperature so warm that no score is near a kink."""

MASK = torch.arange(30) < torch.tensor([[30], [21]])

LAYERS = [
    ("FeedForward", {"mask": MASK}),
    ("Attention", {"mask": MASK, "num_routed_kv": 2, "rotary_emb": True, "light_rotary_emb": True}),
    ("Attention", {"use_null_q_tokens": False, "multiply_keys_by_score": True, "multiply_queries_by_score": True}),
    ("Attention", {"num_heavy_tokens_q": 30, "num_heavy_tokens_kv": 40, "has_light_attn": False}),
    ("Attention", {"router_kwargs": {"eps": 0.3, "solver": "exact", "normalize_to": "selected"}}),
    ("CrossAttention", {"mask": MASK, "kv_routing_tokens": 2, "router_kwargs": {**ROUTER, "cosine_sim_routing": True}}),
    ("CrossAttention", {"route_block_size": 16, "rotary_emb": True}),
    ("AutoregressiveAttention", {"num_routed_kv": 2}),
    ("AutoregressiveAttention", {"causal_query_routing": True, "rotary_emb": True, "multiply_keys_by_score": True}),
    ("ImageAttention", {"mask": MASK.view(2, 5, 6), "num_routed_kv": 2}),
    ("ImageAttention", {"channel_first": True, "residual": True, "rotary_emb": True, "light_rotary_emb": True}),
]
# These contain other layers, and are slow in the interpreter.
LAYERS += [] if INTERPRETED else [("TransformerBlock", {"mask": MASK}), ("ViT", {})]

SINGLE = ["FeedForward", "Attention", "CrossAttention", "AutoregressiveAttention", "ImageAttention"]
"""Layers whose routers all see the input itself, so that rounding changes no selection."""


def inputs_for(name, options):
    shape = {"ImageAttention": (2, 5, 6, 16), "ViT": (2, 3, 32, 32)}.get(name, (2, 30, 16))
    if options.get("channel_first"):
        shape = (2, 16, 5, 6)
    tensors = [torch.randn(shape)]
    if name == "CrossAttention":
        tensors.append(torch.randn(2, 40, 16))
    return tensors


def results(layer, inputs, arguments, upstream, autocast=False):
    inputs = [each.clone().requires_grad_() for each in inputs]
    if "residual" in arguments:
        arguments = {**arguments, "residual": inputs[0]}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = layer(*inputs, **arguments)
    # If all tokens are routed, no router has a gradient.
    sources = [*inputs, *layer.parameters()]
    gradients = torch.autograd.grad(out, sources, upstream.to(out.dtype), materialize_grads=True)
    names = ["out", *map(str, range(len(inputs))), *(name for name, _ in layer.named_parameters())]
    return dict(zip(names, (out, *gradients), strict=True))


def three(name, options, autocast=False):
    """Results of the layer with kernels, a function that gives those of the plain one, and these in fp64."""
    arguments = {key: options[key] for key in ("mask", "residual") if key in options}
    options = {key: value for key, value in options.items() if key not in arguments}
    if name != "ViT":
        options.setdefault("router_kwargs", ROUTER)
    use_triton = "router_use_triton" if name == "ViT" else "use_triton"
    torch.manual_seed(1)
    fused = build(f"ConditionalRouted{name}", router_straight_through=False, **{use_triton: True}, **options)
    plain = build(f"ConditionalRouted{name}", router_straight_through=False, **options)
    plain.load_state_dict(fused.state_dict())
    fused, plain = fused.to(DEVICE), plain.to(DEVICE)
    inputs = [each.to(DEVICE) for each in inputs_for(name, options)]
    arguments = {key: value.to(DEVICE) if key == "mask" else value for key, value in arguments.items()}
    with torch.no_grad():
        upstream = torch.randn_like(plain(*inputs, **(arguments | dict.fromkeys({"residual"} & {*arguments}))))
    wide = copy.deepcopy(plain).double()
    return (
        results(fused, inputs, arguments, upstream, autocast),
        lambda: results(plain, inputs, arguments, upstream, autocast),
        results(wide, [each.double() for each in inputs], arguments, upstream),
    )


@pytest.mark.parametrize(("name", "options"), LAYERS, ids=[f"{name}-{'-'.join(map(str, o))}" for name, o in LAYERS])
def test_matches_the_plain_layer(name, options):
    actual, plain, expected = three(name, options)
    assert {result.dtype for result in actual.values()} == {torch.float32}
    check_correct(actual, plain, expected)


@pytest.mark.parametrize("name", ["FeedForward", "Attention"] if INTERPRETED else SINGLE)
def test_under_autocast(name):
    actual, plain, expected = three(name, {}, autocast=True)
    for key, result in plain().items():
        assert actual[key].dtype == result.dtype, key
    check_correct(actual, plain, expected)


def test_a_layer_says_which_way_it_goes():
    fused, plain = (build("ConditionalRoutedTransformerBlock", use_triton=use_triton) for use_triton in (True, False))
    for operation in ("normalize", "combine", "routed_attention", "windowed_attention"):
        assert f"kernels.{operation}" in repr(fused)
        assert f"kernels.{operation}" not in repr(plain)
        assert f"reference.{operation} (use_triton=False)" in repr(plain)


class TestLayersOfKernels:
    """`kernels` has the layers of `reference`, with kernels for CUDA tensors."""

    @pytest.mark.parametrize("name", NAMES)
    def test_arguments_are_those_of_the_reference_but_for_one_default(self, name):
        ours, theirs = (inspect.signature(getattr(package, name)).parameters for package in (kernels, reference))
        differing = {key: each.default for key, each in ours.items() if each != theirs[key]}
        assert [*ours] == [*theirs]
        assert differing == {"router_use_triton" if name == "ConditionalRoutedViT" else "use_triton": None}

    @pytest.mark.parametrize("given", [True, False, None])
    @pytest.mark.parametrize("name", NAMES)
    def test_an_argument_that_is_given_counts(self, name, given):
        option = "router_use_triton" if name == "ConditionalRoutedViT" else "use_triton"
        layer = build(name, kernels, **{option: given})
        assert {each.operations.use_triton for each in layer.modules() if hasattr(each, "operations")} == {given}

    @pytest.mark.parametrize("given", [True, False, None])
    def test_an_argument_that_is_given_by_its_position_counts(self, given):
        parameters = inspect.signature(kernels.CoordinateDescentRouter).parameters
        _, *defaults = (each.default for each in parameters.values())
        before = defaults[: [*parameters].index("use_triton") - 1]
        assert kernels.CoordinateDescentRouter(16, *before, given).use_triton is given

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("name", NAMES)
    def test_results_and_checkpoints_are_those_of_the_reference(self, name, seed, device):
        option = "router_use_triton" if name == "ConditionalRoutedViT" else "use_triton"
        ours = build(name, kernels).to(device)
        theirs = build(name, **{option: device == "cuda"}).to(device)
        torch.manual_seed(seed)
        inputs, options = inputs_of(name, ours)
        inputs = [each.to(device).requires_grad_() for each in inputs]
        for target, source in ((ours, theirs), (theirs, ours)):
            target.load_state_dict(source.state_dict(), strict=True)
        assert isinstance(ours, type(theirs))
        found = []
        for layer in (ours, theirs, pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            outs = [each for each in parts(layer(*inputs, **options)) if each.is_floating_point()]
            loss = sum(each.square().sum() for each in outs)
            found.append((*outs, *torch.autograd.grad(loss, [*inputs, *layer.parameters()], materialize_grads=True)))
        for other in found[1:]:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ConditionalRouted")])
    def test_trains(self, name, device):
        layer = build(name, kernels).to(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        inputs, options = inputs_of(name, layer)
        losses = []
        for _ in range(3):
            out = layer(*(each.to(device) for each in inputs), **options)
            losses.append((out - 1).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]
