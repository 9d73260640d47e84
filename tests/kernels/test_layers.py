"""Layers with kernels against plain ones in fp64: on the CPU path, in Triton's interpreter and on a GPU."""

import copy

import pytest
import torch
import triton

from tests.correct import check_correct
from tests.reference.conftest import build

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

ROUTER = {"n_iters": 2, "eps": 0.3}
"""Few iterations, and so warm that no score is near a kink."""

MASK = torch.arange(30) < torch.tensor([[30], [21]])

LAYERS = [
    ("FeedForward", {"mask": MASK}),
    ("Attention", {"mask": MASK, "num_routed_kv": 2, "rotary_emb": True}),
    ("Attention", {"use_null_q_tokens": False, "multiply_keys_by_score": True, "multiply_queries_by_score": True}),
    ("Attention", {"num_heavy_tokens_q": 30, "num_heavy_tokens_kv": 40, "has_light_attn": False}),
    ("Attention", {"router_kwargs": {"eps": 0.3, "solver": "exact", "normalize_to": "selected"}}),
    ("CrossAttention", {"mask": MASK, "kv_routing_tokens": 2, "router_kwargs": {**ROUTER, "cosine_sim_routing": True}}),
    ("CrossAttention", {"route_block_size": 16}),
    ("AutoregressiveAttention", {"num_routed_kv": 2}),
    ("AutoregressiveAttention", {"causal_query_routing": True, "rotary_emb": True, "multiply_keys_by_score": True}),
    ("ImageAttention", {"mask": MASK.view(2, 5, 6), "num_routed_kv": 2}),
    ("ImageAttention", {"channel_first": True, "residual": True}),
]
# These are made of the others, and take long in the interpreter.
LAYERS += [] if INTERPRETED else [("TransformerBlock", {"mask": MASK}), ("ViT", {})]

SINGLE = ["FeedForward", "Attention", "CrossAttention", "AutoregressiveAttention", "ImageAttention"]
"""Where all routers see the input itself, so that rounding changes no selection."""


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
    # Where all tokens are routed, no router has a gradient.
    sources = [*inputs, *layer.parameters()]
    gradients = torch.autograd.grad(out, sources, upstream.to(out.dtype), materialize_grads=True)
    names = ["out", *map(str, range(len(inputs))), *(name for name, _ in layer.named_parameters())]
    return dict(zip(names, (out, *gradients), strict=True))


def three(name, options, autocast=False):
    """Results of the layer with kernels, a function that gives those of the plain one, and the plain one's in fp64."""
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
