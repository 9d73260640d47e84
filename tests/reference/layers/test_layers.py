"""Tests of all layers: half precision, compilation, copies."""

import copy
import pickle

import pytest
import torch

SHAPES = {
    "ConditionalRoutedFeedForward": (2, 60, 16),
    "ConditionalRoutedAttention": (2, 60, 16),
    "ConditionalRoutedCrossAttention": (2, 60, 16),
    "ConditionalRoutedAutoregressiveAttention": (2, 60, 16),
    "ConditionalRoutedImageAttention": (2, 7, 11, 16),
    "ConditionalRoutedTransformerBlock": (2, 60, 16),
    "ConditionalRoutedViT": (2, 3, 32, 32),
}
SINGLE = [name for name in SHAPES if name not in ("ConditionalRoutedTransformerBlock", "ConditionalRoutedViT")]
"""Layers whose routers all see the input itself, so that half precision changes no selection."""


def inputs_for(name, dtype=torch.float32):
    x = torch.randn(SHAPES[name]).to(dtype)
    return (x, torch.randn(2, 70, 16).to(dtype)) if "Cross" in name else (x,)


def distance(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_autocast(build, name, dtype, flash):
    option = {"ConditionalRoutedFeedForward": {}, "ConditionalRoutedViT": {"flash_attn": flash}}
    layer = build(name, **option.get(name, {"use_flash_attn": flash}))
    inputs = inputs_for(name)
    expected = layer(*inputs)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(*inputs)
    if name in SINGLE:
        # A few consecutive roundings to half precision.
        assert distance(out, expected) < 4 * torch.finfo(dtype).eps
    out.float().square().mean().backward()
    assert out.isfinite().all()
    for key, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_modules_in_half_precision(build, name, dtype):
    layer = build(name).to(dtype)
    inputs = inputs_for(name, dtype)
    inputs[0][:, :2] = 0
    out = layer(*inputs)
    assert out.dtype == dtype
    if name in SINGLE:
        expected = copy.deepcopy(layer).float()(*(each.float() for each in inputs))
        assert distance(out, expected) < 8 * torch.finfo(dtype).eps
    out.float().square().mean().backward()
    assert out.isfinite().all()
    for key, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ConditionalRoutedCrossAttention", {"kv_routing_tokens": 2, "route_block_size": 32, "use_triton": True}),
        (
            "ConditionalRoutedAutoregressiveAttention",
            {
                "causal_query_routing": True,
                "rotary_emb": True,
                "light_rotary_emb": True,
                "router_kwargs": {"n_iters": 2},
            },
        ),
        ("ConditionalRoutedViT", {"depth": 1, "router_use_triton": True}),
        ("ConditionalRoutedTransformerBlock", {"num_routed_kv": 2, "light_rotary_emb": True, "use_triton": True}),
    ],
)
def test_compiles_in_one_graph(build, name, options):
    """Routed in plain PyTorch and by the operators of `kernels`, also within the ViT and the block."""
    layer = build(name, **options)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, *rest = inputs_for(name)
    gradients = []
    for each in (layer, compiled):
        entry = x.clone().requires_grad_()
        out = each(entry, *rest)
        gradients.append((out.detach(), *torch.autograd.grad(out.square().mean(), (entry, *layer.parameters()))))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


# Its cache keys with symbolic sizes cost more time than the cache saves.
@torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
@pytest.mark.parametrize("name", [name for name in SINGLE if "Image" not in name])
def test_compiles_once_for_any_length(build, name):
    layer = build(name, use_triton=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, *rest = inputs_for(name)
    torch._dynamo.mark_dynamic(x, 1)
    results = {each: each(x, *rest) for each in (layer, compiled)}
    torch.testing.assert_close(results[compiled], results[layer], rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        longer = torch.cat((x, x[:, :27]), dim=1)
        torch.testing.assert_close(compiled(longer, *rest), layer(longer, *rest), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_triton", [False, True, None])
@pytest.mark.parametrize("name", SHAPES)
def test_copies(build, name, use_triton):
    option = {"router_use_triton" if name == "ConditionalRoutedViT" else "use_triton": use_triton}
    layer = build(name, **option)
    inputs = inputs_for(name)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(duplicate(*inputs), layer(*inputs))
