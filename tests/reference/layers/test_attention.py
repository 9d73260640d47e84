from math import tau

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

X = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.arange(30) < torch.tensor([[30], [21]])


class Largest(TorchDispatchMode):
    """Finds the size of the largest tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in (out if isinstance(out, tuple | list) else [out]) if isinstance(each, torch.Tensor)]
        self.numel = max(self.numel, *(each.untyped_storage().nbytes() // each.itemsize for each in tensors), 0)
        return out


@pytest.fixture
def layer(build):
    def make(**options):
        return build("ConditionalRoutedAttention", **options).double()

    return make


OPTIONS = [
    {},
    {"num_routed_kv": 2},
    {"num_routed_kv": 4},
    {"multiply_keys_by_score": True},
    {"multiply_queries_by_score": True},
    {"use_null_q_tokens": False},
    {"rotary_emb": True},
    {"rotary_emb": True, "num_routed_kv": 2},
    {"use_flash_attn": True},
    {"use_flash_attn": True, "num_routed_kv": 2, "rotary_emb": True},
    {"router_straight_through": True},
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_heavy_branch(layer, by_hand, options, masked):
    """Straight-through is off, so that products with a score are visible."""
    attention = layer(has_light_attn=False, **{"router_straight_through": False, **options})
    out = attention(X, mask=MASK if masked else None)
    for b, x in enumerate(X):
        valid = MASK[b] if masked else None
        expected = by_hand.heavy(attention, x, x, 8, 10, valid, valid, **options)
        torch.testing.assert_close(out[b], expected)
        # The option has an effect: without it, the result is different.
        without = by_hand.heavy(attention, x, x, 8, 10, valid, valid)
        visible = {"multiply_keys_by_score", "multiply_queries_by_score", "rotary_emb"} & set(options)
        assert not visible or (without - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("num_q", "num_kv"), [(3, None), (None, 4), (30, 5), (5, 30), (99, 99)])
@pytest.mark.parametrize("options", [{}, {"num_routed_kv": 2, "rotary_emb": True}], ids=str)
def test_numbers_of_tokens_of_a_call(layer, by_hand, num_q, num_kv, options):
    attention = layer(has_light_attn=False, router_straight_through=False, **options)
    out = attention(X, num_heavy_tokens_q=num_q, num_heavy_tokens_kv=num_kv)
    for b, x in enumerate(X):
        torch.testing.assert_close(out[b], by_hand.heavy(attention, x, x, num_q or 8, num_kv or 10, **options))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 17, 30])
@pytest.mark.parametrize(("light_window_size", "rotary"), [(2, False), (8, True), (9, False), (128, True)])
def test_light_attention_reaches_exactly_half_a_window_to_either_side(
    layer, by_hand, light_window_size, rotary, n, masked
):
    light = layer(light_window_size=light_window_size, light_rotary_emb=rotary).light_attn
    # A mask in the middle leaves some tokens without tokens to attend to: they get 0.
    mask = MASK[:, :n] & ((torch.arange(n) < 2) | (torch.arange(n) > 12)) if masked else None
    position = torch.arange(n)
    near = (position[:, None] - position).abs() <= light_window_size // 2
    out = light(X[:, :n], mask)
    for b in range(2):
        reachable = near & (True if mask is None else mask[b])
        expected = by_hand.light(light, X[b, :n], reachable, position if rotary else None)
        torch.testing.assert_close(out[b], expected)


def test_both_branches_are_added(layer):
    both = layer()
    heavy = layer(has_light_attn=False)
    heavy.load_state_dict({k: v for k, v in both.state_dict().items() if not k.startswith("light_attn.")})
    assert heavy.light_attn is None
    torch.testing.assert_close(both(X, mask=MASK), both.light_attn(X, mask=MASK) + heavy(X, mask=MASK))


@pytest.mark.parametrize("causal", [False, True])
def test_light_attention_is_linear_in_memory(build, causal):
    name = "ConditionalRoutedAutoregressiveAttention" if causal else "ConditionalRoutedAttention"
    light = build(name).light_attn
    largest = []
    for n in (1000, 4000):
        with Largest() as seen:
            light(torch.randn(1, n, 16, requires_grad=True)).sum().backward()
        largest.append(seen.numel)
    assert largest[0] < 1000**2 // 4
    assert largest[1] < 4.1 * largest[0]


def test_the_watch_sees_an_attention_matrix():
    with Largest() as seen:
        torch.randn(1000, 4) @ torch.randn(4, 1000)
    assert seen.numel == 1000**2


@pytest.mark.parametrize("routes", [1, 2])
def test_routing_tokens(layer, routes):
    attention = layer(num_routed_kv=routes, router_kwargs={"learned_routing_tokens": True})
    with_own = layer(num_routed_kv=routes)
    with_own.load_state_dict(attention.state_dict(), strict=False)
    q = (torch.randn(2, 16, dtype=X.dtype) / 40).requires_grad_()
    kv = (torch.randn(2, routes, 16, dtype=X.dtype) / 40).requires_grad_()
    out = attention(X, routing_tokens_q=q, routing_tokens_kv=kv if routes > 1 else kv[:, 0])
    for b in range(2):
        with torch.no_grad():
            with_own.q_router.routing_token.copy_(q[b])
            with_own.kv_router.routing_token.copy_(kv[b])
        torch.testing.assert_close(out[b], with_own(X)[b])
    out.square().sum().backward()
    assert q.grad.any(-1).all()
    assert kv.grad.any(-1).all()


def test_router_kwargs_and_use_triton_reach_both_routers(layer):
    attention = layer(use_triton=True, num_routed_kv=2, router_kwargs={"n_iters": 3, "cosine_sim_routing": True})
    for router, routes in ((attention.q_router, 1), (attention.kv_router, 2)):
        assert (router.n_iters, router.cosine_sim_routing, router.use_triton) == (3, True, True)
        assert router.num_routing_tokens == routes


def test_blocks_and_the_exact_solver_through_router_kwargs(layer):
    """One block of 32 for 30 tokens gives the same as no blocks; blocks of 8 give something else."""
    base = layer(has_light_attn=False)
    results = {}
    for size in (None, 32, 8):
        attention = layer(has_light_attn=False, router_kwargs={"route_block_size": size, "solver": "exact"})
        attention.load_state_dict(base.state_dict())
        results[size] = attention(X, mask=MASK)
    torch.testing.assert_close(results[32], results[None])
    assert (results[8] - results[None]).abs().max() > 1e-3
    assert results[8].isfinite().all()


def test_every_parameter_has_a_gradient(layer):
    attention = layer(num_routed_kv=2, rotary_emb=True)
    attention(X, mask=MASK).square().sum().backward()
    assert all(parameter.grad.any() for parameter in attention.parameters())


def test_a_masked_token_changes_no_other(layer):
    attention = layer(num_routed_kv=2)
    changed = X.masked_fill(~MASK[..., None], 1e3)
    before, after = attention(X, mask=MASK), attention(changed, mask=MASK)
    assert torch.equal(before[MASK], after[MASK])


def test_a_batch_element_that_is_masked_altogether(layer):
    attention = layer(num_routed_kv=2)
    mask = MASK.clone()
    mask[1] = False
    x = X.clone().requires_grad_()
    out = attention(x, mask=mask)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(out[0], attention(X[:1])[0])


@pytest.mark.parametrize("n", [0, 1, 3, 9, 11])
@pytest.mark.parametrize("masked", [False, True])
def test_short_sequences(layer, by_hand, n, masked):
    attention = layer(has_light_attn=False, router_straight_through=False)
    mask = MASK[:, 15 : 15 + n] if masked else None
    x = X[:, :n]
    out = attention(x, mask=mask)
    for b in range(2):
        valid = None if mask is None else mask[b]
        expected = by_hand.heavy(attention, x[b], x[b], 8, 10, None if n <= 8 else valid, valid)
        kept = torch.ones(n, dtype=torch.bool) if mask is None else mask[b]
        torch.testing.assert_close(out[b][kept], expected[kept])


def test_an_empty_batch(layer):
    assert layer()(X[:0]).shape == (0, 30, 16)


def test_rotary_positions_are_exact_in_half_precision(build):
    """In bf16, positions after 256 and the frequencies would be wrong by several turns."""
    wide = build("ConditionalRoutedAttention", rotary_emb=True)
    narrow = build("ConditionalRoutedAttention", rotary_emb=True).bfloat16()
    assert torch.equal(narrow.rotary_emb(5000), wide.rotary_emb(5000))
    exact = wide.double().rotary_emb(5000)
    assert exact[4999, 1].item() == pytest.approx(4999 * 10000 ** -(2 / 4) % tau, rel=1e-12)


@pytest.mark.parametrize("mask", [None, MASK[:, 14:23]])
@pytest.mark.parametrize("options", [{}, {"num_routed_kv": 2, "rotary_emb": True}], ids=str)
def test_gradcheck(build, mask, options):
    sizes = {"dim": 4, "num_heavy_tokens_q": 3, "num_heavy_tokens_kv": 4, "light_window_size": 4}
    sizes |= {"light_heads": 1, "light_dim_head": 2, "heavy_heads": 2, "heavy_dim_head": 2}
    scores = {"multiply_keys_by_score": True, "multiply_queries_by_score": True, "router_straight_through": False}
    kwargs = {"eps": 0.3, "n_iters": 4}
    attention = build("ConditionalRoutedAttention", spread=1.0, router_kwargs=kwargs, **sizes, **scores, **options)
    names, parameters = zip(*attention.double().named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (x,), {"mask": mask})

    assert gradcheck(function, (X[:, :9, :4].clone().requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heavy_tokens_q": 0}, "num_heavy_tokens_q must be >= 1, got 0"),
        ({"num_heavy_tokens_kv": 0}, "num_heavy_tokens_kv must be >= 1, got 0"),
        ({"heavy_heads": 0}, "heads must be >= 1, got 0"),
        ({"num_routed_kv": 3}, "heads must be a multiple of the 3 key/value routes, got 4"),
        ({"light_window_size": 1}, "light_window_size must be >= 2, got 1"),
        ({"heavy_dim_head": 3, "rotary_emb": True}, "heavy_dim_head must be even for a rotary embedding, got 3"),
        (
            {"position_bias": True, "light_rotary_emb": True},
            "position_bias must be False if light_rotary",
        ),
        ({"light_dim_head": 3, "light_rotary_emb": True}, "light_dim_head must be even for a rotary embedding, got 3"),
        ({"router_kwargs": {"solver": "x"}}, "solver must be coor_descent or exact, got x"),
    ],
)
def test_wrong_options_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build("ConditionalRoutedAttention", **options)


def test_wrong_arguments_are_named(layer):
    for name in ("num_heavy_tokens_q", "num_heavy_tokens_kv"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            layer()(X, **{name: 0})
    with pytest.raises(ValueError, match=r"mask must be of shape \(2, 30\), one entry per token of x, got .*\(30,\)"):
        layer()(X, mask=MASK[0])
    with pytest.raises(ValueError, match=r"x must be of shape \(b, n, 16\), got shape \(2, 30, 15\)"):
        layer()(X[..., :15])
