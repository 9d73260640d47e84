from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from reference import biased_gelu
from reference._shared.sizes import WIDEST_BIASED_GELU
from reference.layers.operations import Operations

X = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.arange(30) < torch.tensor([[30], [21]])


@pytest.fixture
def layer(build):
    def make(**options):
        return build("ConditionalRoutedFeedForward", **options).double()

    return make


def feed_forward(branch, x, rms_norm):
    norm, into, _, out = branch
    return F.gelu(rms_norm(x, norm.gamma) @ into.weight.T + into.bias) @ out.weight.T + out.bias


@pytest.mark.parametrize("router_straight_through", [True, False])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("num_heavy_tokens", [None, 3, 29, 30, 99])
def test_light_for_all_and_heavy_for_the_routed(layer, by_hand, router_straight_through, mask, num_heavy_tokens):
    ff = layer(router_straight_through=router_straight_through)
    out = ff(X, mask=mask, num_heavy_tokens=num_heavy_tokens)
    count = 8 if num_heavy_tokens is None else num_heavy_tokens
    for b, x in enumerate(X):
        valid = torch.ones(30, dtype=torch.bool) if mask is None or count >= 30 else mask[b]
        weights, places = by_hand.route(ff.router, ff.router.routing_token[0], x, valid, count)
        expected = feed_forward(ff.light_ff, x, by_hand.rms_norm)
        expected[places] += feed_forward(ff.heavy_ff, x[places], by_hand.rms_norm) * weights[:, None]
        torch.testing.assert_close(out[b], expected)


def test_hidden_sizes(layer):
    ff = layer(light_ff_mult=0.75, heavy_ff_mult=3)
    assert ff.light_ff[1].weight.shape == (12, 16)
    assert ff.heavy_ff[1].weight.shape == (48, 16)


def test_router_kwargs_and_use_triton_reach_the_router(layer):
    router = layer(use_triton=True, router_kwargs={"n_iters": 3, "cosine_sim_routing": True}).router
    assert (router.n_iters, router.cosine_sim_routing, router.use_triton) == (3, True, True)


def test_routing_tokens(layer):
    ff = layer(router_kwargs={"learned_routing_tokens": True})
    token = torch.randn(2, 16, dtype=X.dtype, requires_grad=True)
    with_own = layer(router_kwargs={"learned_routing_tokens": False})
    with_own.load_state_dict(ff.state_dict(), strict=False)
    out = ff(X, routing_tokens=token / 40)
    for b in range(2):
        with torch.no_grad():
            with_own.router.routing_token.copy_(token[b] / 40)
        torch.testing.assert_close(out[b], with_own(X)[b])
    out.square().sum().backward()
    assert token.grad.any(-1).all()


def test_every_parameter_has_a_gradient(layer):
    ff = layer()
    ff(X, mask=MASK).square().sum().backward()
    assert all(parameter.grad.any() for parameter in ff.parameters())


@pytest.mark.parametrize("mask", [None, MASK[:, :9] & MASK[:, 15:24]])
def test_gradcheck(build, mask):
    options = {"router_straight_through": False, "light_ff_mult": 0.5, "heavy_ff_mult": 1}
    kwargs = {"eps": 0.3, "n_iters": 4}
    ff = build("ConditionalRoutedFeedForward", dim=4, num_heavy_tokens=3, spread=1.0, router_kwargs=kwargs, **options)
    names, parameters = zip(*ff.double().named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(ff, dict(zip(names, parameters, strict=True)), (x,), {"mask": mask})

    assert gradcheck(function, (X[:, :9, :4].clone().requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("n", [0, 1, 8])
def test_short_sequences(layer, n):
    ff = layer()
    out = ff(X[:, :n], mask=MASK[:, :n])
    torch.testing.assert_close(out, ff.light_ff(X[:, :n]) + ff.heavy_ff(X[:, :n]))


def test_an_empty_batch(layer):
    assert layer()(X[:0]).shape == (0, 30, 16)


def test_wrong_arguments_are_named(layer):
    with pytest.raises(ValueError, match=r"mask must be of shape \(2, 30\), one entry per token of x, got .*\(30,\)"):
        layer()(X, mask=MASK[0])
    with pytest.raises(ValueError, match=r"x must be of shape \(b, n, 16\), got shape \(2, 30, 15\)"):
        layer()(X[..., :15])
    with pytest.raises(ValueError, match="num_heavy_tokens must be >= 1, got 0"):
        layer()(X, num_heavy_tokens=0)
    with pytest.raises(ValueError, match="num_heavy_tokens must be >= 1, got -1"):
        layer(num_heavy_tokens=-1)


@pytest.mark.parametrize("use_triton", [False, True])
@pytest.mark.parametrize("watched", [None, "1", "2"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_and_gelu_are_one_operation_where_nobody_sees_them(build, use_triton, watched, approximate):
    seen, fused = [], []

    def activate(x, bias):
        fused.append(bias)
        return biased_gelu(x, bias)

    operations = replace(Operations.of(use_triton), biased_gelu=activate)
    ff = build("ConditionalRoutedFeedForward", use_triton=operations)
    for branch in (ff.light_ff, ff.heavy_ff):
        branch[2].approximate = approximate
        if watched is not None:
            branch.get_submodule(watched).register_forward_hook(lambda module, args, out: seen.append(module))
    with torch.autocast("cpu", torch.bfloat16):
        ff(X.float())
    is_fused = use_triton and watched is None and approximate == "none"
    assert len(fused) == 2 * is_fused
    assert len(seen) == (0 if watched is None else 2)


def test_no_operation_is_called_with_wider_rows_than_it_has_kernels_for(build):
    widths = []

    def activate(x, bias):
        widths.append(x.shape[-1])
        return biased_gelu(x, bias)

    operations = replace(Operations.of(True), biased_gelu=activate)
    for multiple in (512, 513):
        ff = build("ConditionalRoutedFeedForward", use_triton=operations, light_ff_mult=1, heavy_ff_mult=multiple)
        with torch.autocast("cpu", torch.bfloat16):
            ff(X.float())
    assert widths == [16, WIDEST_BIASED_GELU, 16]
