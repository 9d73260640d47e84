import pytest
import torch

from reference import ConditionalRoutedAttention, ConditionalRoutedFeedForward

X = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.arange(30) < torch.tensor([[30], [21]])


@pytest.fixture
def block(build):
    def make(**options):
        return build("ConditionalRoutedTransformerBlock", **options).double()

    return make


def test_attention_then_feed_forward_each_with_a_residual(block):
    layer = block(num_routed_kv=2)
    attended = layer.conditional_attn(X, mask=MASK) + X
    assert torch.equal(layer(X, mask=MASK), layer.conditional_ff(attended, mask=MASK) + attended)
    assert not torch.equal(layer(X, mask=MASK)[1], layer(X)[1])


def test_numbers_of_tokens_of_a_call(block):
    layer = block()
    numbers = {"num_heavy_attn_tokens_q": 3, "num_heavy_attn_tokens_kv": 5, "num_heavy_ff_tokens": 2}
    attended = layer.conditional_attn(X, num_heavy_tokens_q=3, num_heavy_tokens_kv=5) + X
    assert torch.equal(layer(X, **numbers), layer.conditional_ff(attended, num_heavy_tokens=2) + attended)


def test_routing_tokens(block):
    layer = block(num_routed_kv=2, router_kwargs={"learned_routing_tokens": True})
    q, ff = (torch.randn(2, 16, dtype=X.dtype, requires_grad=True) for _ in range(2))
    kv = torch.randn(2, 2, 16, dtype=X.dtype, requires_grad=True)
    out = layer(X, attn_routing_tokens_q=q / 40, attn_routing_tokens_kv=kv / 40, ff_routing_tokens=ff / 40)
    attended = layer.conditional_attn(X, routing_tokens_q=q / 40, routing_tokens_kv=kv / 40) + X
    assert torch.equal(out, layer.conditional_ff(attended, routing_tokens=ff / 40) + attended)
    out.square().sum().backward()
    assert all(each.grad.any() for each in (q, kv, ff))


def test_options_reach_both_layers(monkeypatch):
    """Each argument has the layer's own name for it."""
    import reference.layers.block as module

    received = {}

    def record(name, cls):
        class Recorder(torch.nn.Module):
            def __init__(self, dim, **options):
                super().__init__()
                received[name] = (dim, options)

        monkeypatch.setattr(module, cls.__name__, Recorder)

    record("attention", ConditionalRoutedAttention)
    record("feed-forward", ConditionalRoutedFeedForward)
    shared = {"router_straight_through": False, "router_kwargs": {"eps": 1.0}, "use_triton": None, "init": "zero"}
    attention = {
        "num_routed_kv": 2,
        "light_dim_head": 3,
        "light_rotary_emb": True,
        "position_bias": True,
        "light_heads": 5,
        "light_window_size": 6,
        "heavy_dim_head": 7,
        "heavy_heads": 8,
        "multiply_keys_by_score": True,
        "multiply_queries_by_score": True,
        "use_null_q_tokens": False,
        "use_flash_attn": True,
    }
    feed_forward = {"light_ff_mult": 0.25, "heavy_ff_mult": 2}
    numbers = {"num_heavy_attn_tokens_q": 11, "num_heavy_attn_tokens_kv": 12, "num_heavy_ff_tokens": 13}
    module.ConditionalRoutedTransformerBlock(16, **numbers, **shared, **attention, **feed_forward)
    operations = [options["use_triton"] for _, options in received.values()]
    assert operations[0] is operations[1]
    assert operations[0].use_triton is shared["use_triton"]
    shared["use_triton"] = operations[0]
    assert received == {
        "attention": (16, {"num_heavy_tokens_q": 11, "num_heavy_tokens_kv": 12, **shared, **attention}),
        "feed-forward": (16, {"num_heavy_tokens": 13, **shared, **feed_forward}),
    }


def test_every_parameter_has_a_gradient(block):
    layer = block(num_routed_kv=2)
    layer(X, mask=MASK).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize("n", [0, 1, 7])
def test_short_sequences(block, n):
    out = block()(X[:, :n], mask=MASK[:, :n])
    assert out.shape == (2, n, 16)
    assert out.isfinite().all()


@pytest.mark.parametrize("watched", [None, "conditional_attn", "conditional_ff"])
def test_weights_of_both_layers_are_rounded_together(build, count_casts, watched):
    """One kernel rounds the weights, and one widens their gradients. A layer with an observer rounds its own."""
    layer = build("ConditionalRoutedTransformerBlock")
    seen = []
    if watched is not None:
        layer.get_submodule(watched).register_forward_hook(lambda module, args, out: seen.append(module))
    x = X.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        attended = layer.conditional_attn(x, residual=x)
        expected = layer.conditional_ff(attended, residual=attended)
        seen.clear()
        with count_casts() as casts:
            out = layer(x)
    assert torch.equal(out, expected)
    parameters = [*layer.parameters()]
    theirs = torch.autograd.grad(expected.sum(), parameters)
    with casts:
        mine = torch.autograd.grad(out.sum(), parameters)
    assert all(map(torch.equal, mine, theirs))
    assert casts.found.count("_foreach_copy_") == (2 if watched is None else 4)
    assert len(seen) == (watched is not None)
