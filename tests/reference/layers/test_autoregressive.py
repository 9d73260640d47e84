from math import ceil

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from reference import coor_descent

X = torch.randn(2, 44, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def layer(build):
    def make(**options):
        return build("ConditionalRoutedAutoregressiveAttention", **options).double()

    return make


def light_by_hand(attention, x, size, by_hand, light_rotary_emb=False, **_):
    position = torch.arange(len(x))
    query, key = position[:, None], position
    return by_hand.light(
        attention.light_attn,
        x,
        (key <= query) & (query // size - key // size <= 1),
        position if light_rotary_emb else None,
    )


def heavy_by_hand(attention, x, size, num_q, num_kv, by_hand, **options):
    """Window by window, each with all the tokens before it; the sequence is padded to whole windows."""
    windows = ceil(len(x) / size)
    padded = F.pad(x, (0, 0, 0, windows * size - len(x)))
    exists = torch.arange(len(padded)) < len(x)
    outs = [torch.zeros(size, x.shape[-1], dtype=x.dtype)]
    for start in range(size, len(padded), size):
        window = slice(start, start + size)
        before = torch.arange(len(padded)) < start
        valid_q = exists[window] if num_q < size else None
        numbers = (num_q, num_kv, valid_q, before, start)
        outs.append(by_hand.heavy(attention, padded[window], padded, *numbers, **options))
    return torch.cat(outs)[: len(x)]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 44])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_routed_kv": 2},
        {"multiply_keys_by_score": True},
        {"multiply_queries_by_score": True},
        {"use_null_q_tokens": False},
        {"rotary_emb": True},
        {"rotary_emb": True, "num_routed_kv": 2, "use_flash_attn": True},
        {"router_straight_through": True},
        {"heavy_window_size": 5},
        {"heavy_window_size": 11, "rotary_emb": True},
        {"light_rotary_emb": True},
    ],
    ids=str,
)
def test_by_hand(layer, by_hand, options, n):
    attention = layer(**{"router_straight_through": False, **options})
    out = attention(X[:, :n])
    size = options.get("heavy_window_size", 8)
    for b in range(2):
        x = X[b, :n]
        expected = light_by_hand(attention, x, 8, by_hand, **options)
        torch.testing.assert_close(attention.light_attn(X[:, :n])[b], expected)
        expected = expected + heavy_by_hand(attention, x, size, 3, 10, by_hand, **options)
        torch.testing.assert_close(out[b], expected)


@pytest.mark.parametrize(("num_q", "num_kv"), [(5, None), (None, 4), (8, 5), (3, 44), (99, 99), (99, 20)])
@pytest.mark.parametrize("options", [{}, {"rotary_emb": True, "num_routed_kv": 2}], ids=str)
def test_numbers_of_tokens_of_a_call(layer, by_hand, num_q, num_kv, options):
    attention = layer(router_straight_through=False, **options)
    x = X[:, :40]
    out = attention(x, num_heavy_tokens_q=num_q, num_heavy_tokens_kv=num_kv)
    for b in range(2):
        heavy = heavy_by_hand(attention, x[b], 8, num_q or 3, num_kv or 10, by_hand, **options)
        torch.testing.assert_close(out[b], attention.light_attn(x)[b] + heavy)


@pytest.mark.parametrize("causal_query_routing", [False, True])
def test_nothing_before_the_first_window(layer, causal_query_routing):
    attention = layer(causal_query_routing=causal_query_routing)
    torch.testing.assert_close(attention(X)[:, :8], attention.light_attn(X)[:, :8])
    assert torch.equal(attention(X[:, :8]), attention.light_attn(X[:, :8]))


def causal_by_hand(attention, x, size, num_q):
    """Computes token by token which tokens are routed, and their weights."""
    router = attention.q_router
    scores = (x @ router.routing_token[0]).detach()
    weights = torch.zeros(len(x), dtype=x.dtype)
    schedule = {
        "n_iters": router.n_iters,
        "eps": router.eps,
        "eps_init": router.eps_init,
        "eps_decay": router.eps_decay,
    }
    for start in range(size, len(x), size):
        before = scores[start - size : start]
        limit = before.sort(descending=True).values[num_q - 1]
        routed = 0
        for i in range(start, min(start + size, len(x))):
            if scores[i] > limit and routed < num_q:
                routed += 1
                row = torch.cat((before, scores[i : i + 1]))
                weights[i] = coor_descent(row, k=min(num_q * router.fetch_k_ratio, size + 1), **schedule)[-1]
    return weights


@pytest.mark.parametrize("n", [9, 16, 44])
@pytest.mark.parametrize("rotary_emb", [False, True])
def test_causal_query_routing_by_hand(layer, n, rotary_emb):
    options = {"router_straight_through": False, "rotary_emb": rotary_emb}
    attention = layer(causal_query_routing=True, **options)
    everywhere = layer(**options)
    everywhere.load_state_dict(attention.state_dict())
    x = X[:, :n]
    heavy = attention(x) - attention.light_attn(x)
    # With all tokens as queries with a weight of 1, the routed ones, times their weights.
    dense = everywhere(x, num_heavy_tokens_q=8) - attention.light_attn(x)
    for b in range(2):
        weights = causal_by_hand(attention, x[b], 8, 3)[:, None]
        assert n < 44 or 4 <= (weights > 0).sum() <= 15
        expected = torch.where(weights > 0, dense[b] * weights, attention.null_q_token)
        expected[:8] = 0
        torch.testing.assert_close(heavy[b], expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_routed_kv": 2, "rotary_emb": True},
        {"heavy_window_size": 5, "multiply_queries_by_score": True, "router_straight_through": False},
        {"use_flash_attn": True, "use_null_q_tokens": False},
        {"router_kwargs": {"solver": "exact", "normalize_to": "selected"}, "router_straight_through": False},
        {"router_kwargs": {"use_triton": True, "route_block_size": 16}},
        {"use_triton": True, "num_routed_kv": 2, "rotary_emb": True},
        {"light_rotary_emb": True},
        {"position_bias": True},
        {"random_route": True},
    ],
    ids=str,
)
def test_causal_query_routing_is_causal(build, options):
    """Bit for bit: no change of a token changes an output before it."""
    random_route = "random_route" in options
    options = {name: value for name, value in options.items() if name != "random_route"}
    attention = build("ConditionalRoutedAutoregressiveAttention", causal_query_routing=True, **options)
    x = X[:, :21].float()
    with torch.no_grad():
        torch.manual_seed(3)
        before = attention(x, random_route=random_route)
        changes = 0
        for j in range(x.shape[1]):
            changed = x.clone()
            # Alternately to the top and to the bottom of its window.
            change = 30 if j % 2 else -30
            changed[:, j] += change * attention.q_router.routing_token[0].sign() + torch.randn(16)
            torch.manual_seed(3)
            after = attention(changed, random_route=random_route)
            assert torch.equal(after[:, :j], before[:, :j]), j
            changes += not torch.equal(after[:, j:], before[:, j:])
        assert changes == x.shape[1]


def test_by_default_the_choice_of_a_window_looks_at_all_of_it(layer):
    """As published: a late token replaces an earlier one."""
    attention = layer()
    scores = X[0, 8:16] @ attention.q_router.routing_token[0]
    x = X[:1, torch.cat((torch.arange(8), 8 + scores.argsort(descending=True)))]
    changed = x.clone()
    changed[:, 15] += 30 * attention.q_router.routing_token[0].detach().sign()
    before, after = attention(x), attention(changed)
    different = (before != after).any(-1)[0].nonzero()[:, 0]
    # It was the last of its window by score, becomes the first, and the third is no longer routed.
    assert different.tolist() == [10, 15]


@pytest.mark.parametrize("causal_query_routing", [False, True])
def test_random_route(layer, causal_query_routing):
    """The routed tokens vary, but windows still attend only to tokens before them."""
    attention = layer(causal_query_routing=causal_query_routing)
    routed = []
    for seed in range(40):
        torch.manual_seed(seed)
        heavy = attention(X, random_route=True) - attention.light_attn(X)
        routed.append(((heavy - attention.null_q_token).abs() > 1e-9).any(-1)[:, 8:])
    share = torch.stack(routed).double().mean(0)
    assert (share > 0).all()
    assert (share < 1).all()
    # 3 of 8, and 3 of the 4 in the last window; the first to exceed a threshold are early ones.
    if not causal_query_routing:
        assert share[:, :32].mean().item() == pytest.approx(3 / 8, abs=1e-9)
        assert share[:, 32:].mean().item() == pytest.approx(3 / 4, abs=1e-9)


@pytest.mark.parametrize("causal_query_routing", [False, True])
def test_routing_tokens(layer, causal_query_routing):
    options = {"num_routed_kv": 2, "causal_query_routing": causal_query_routing}
    attention = layer(router_kwargs={"learned_routing_tokens": True}, **options)
    q = (torch.randn(2, 16, dtype=X.dtype) / 40).requires_grad_()
    kv = (torch.randn(2, 2, 16, dtype=X.dtype) / 40).requires_grad_()
    out = attention(X, routing_tokens_q=q, routing_tokens_kv=kv)
    with_own = layer(**options)
    with_own.load_state_dict(attention.state_dict(), strict=False)
    for b in range(2):
        with torch.no_grad():
            with_own.q_router.routing_token.copy_(q[b])
            with_own.kv_router.routing_token.copy_(kv[b])
        torch.testing.assert_close(out[b], with_own(X)[b])
    out.square().sum().backward()
    assert q.grad.any(-1).all()
    assert kv.grad.any(-1).all()


@pytest.mark.parametrize("causal_query_routing", [False, True])
def test_every_parameter_has_a_gradient(layer, causal_query_routing):
    attention = layer(num_routed_kv=2, rotary_emb=True, causal_query_routing=causal_query_routing)
    attention(X).square().sum().backward()
    assert all(parameter.grad.any() for parameter in attention.parameters())


@pytest.mark.parametrize("n", [9, 44])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_routed_kv": 2, "rotary_emb": True, "router_straight_through": False},
        {"light_rotary_emb": True},
        {"position_bias": True},
        {"multiply_keys_by_score": True, "multiply_queries_by_score": True, "router_straight_through": False},
        {"heavy_window_size": 5, "causal_query_routing": True, "use_null_q_tokens": False},
        {"num_heavy_tokens_q": 8, "num_heavy_tokens_kv": 44, "rotary_emb": True},
    ],
    ids=str,
)
def test_kernels_give_what_plain_pytorch_does(layer, options, n):
    plain, fused = layer(**options), layer(use_triton=True, **options)
    fused.load_state_dict(plain.state_dict())
    x = X[:, :n].clone().requires_grad_()
    results = []
    for attention in (plain, fused):
        out = attention(x)
        gradients = torch.autograd.grad(out.square().sum(), (x, *attention.parameters()), allow_unused=True)
        results.append((out.detach(), *gradients))
    # Coordinate descent of the kernels differs from the definition in the last bits.
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_the_sequence_is_not_copied_for_each_window(build):
    """Neither forward nor backward, where the gradient of `torch.gather` would be as large as all copies."""
    attention = build("ConditionalRoutedAutoregressiveAttention", num_heavy_tokens_kv=2)
    x = torch.randn(1, 1024, 16, requires_grad=True)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        attention(x).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 127 * 1024 * 16 * 4 / 2


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"num_routed_kv": 2}, "kernels.route_prefixes"),
        ({"heavy_window_size": 5, "router_straight_through": False, "rotary_emb": True}, "kernels.route_prefixes"),
        ({"router_kwargs": {"normalize_to": "selected"}, "multiply_keys_by_score": True}, "kernels.route_prefixes"),
        ({"router_kwargs": {"cosine_sim_routing": True}, "causal_query_routing": True}, "kernels.route_prefixes"),
        ({"router_kwargs": {"solver": "exact"}}, "rows with a mask"),
        ({"router_kwargs": {"route_block_size": 16}}, "rows with a mask"),
        ({"router_kwargs": {"triton_checkpoint_segments": 2}}, "rows with a mask"),
        ({"router_kwargs": {"use_triton": False}}, "rows with a mask"),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_kv", [10, 99])
def test_prefixes_are_routed_as_masked_rows_are(layer, options, path, num_kv):
    plain = layer(**options)
    routed = layer(**{"use_triton": True, **options})
    routed.load_state_dict(plain.state_dict())
    assert "kv_routing='rows with a mask'" in repr(plain)
    assert f"kv_routing='{path}" in repr(routed)
    expected, out = (attention(X, num_heavy_tokens_kv=num_kv) for attention in (plain, routed))
    torch.testing.assert_close(out, expected)
    expected.square().sum().backward()
    out.square().sum().backward()
    # If all tokens fit, nothing is selected or scored.
    assert (plain.kv_router.routing_token.grad is None) == (num_kv == 99)
    for ours, theirs in zip(routed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("causal_query_routing", [False, True])
@pytest.mark.parametrize("n", [0, 1, 8])
def test_short_sequences(layer, n, causal_query_routing):
    attention = layer(causal_query_routing=causal_query_routing)
    assert torch.equal(attention(X[:, :n]), attention.light_attn(X[:, :n]))
    assert attention(X[:0]).shape == (0, 44, 16)


@pytest.mark.parametrize("causal_query_routing", [False, True])
def test_gradcheck(build, causal_query_routing):
    sizes = {"dim": 4, "num_heavy_tokens_q": 2, "num_heavy_tokens_kv": 3, "light_window_size": 4, "num_routed_kv": 2}
    sizes |= {"light_heads": 1, "light_dim_head": 2, "heavy_heads": 2, "heavy_dim_head": 2, "rotary_emb": True}
    attention = build(
        "ConditionalRoutedAutoregressiveAttention",
        spread=1.0,
        router_straight_through=False,
        router_kwargs={"eps": 0.3, "n_iters": 4},
        causal_query_routing=causal_query_routing,
        **sizes,
    ).double()
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(function, (X[:, :11, :4].clone().requires_grad_(), *parameters), fast_mode=True)


def test_wrong_arguments_are_named(build, layer):
    with pytest.raises(ValueError, match="light_window_size must be >= 1, got 0"):
        build("ConditionalRoutedAutoregressiveAttention", light_window_size=0, heavy_window_size=4)
    with pytest.raises(ValueError, match="heavy_window_size must be >= 1, got 0"):
        build("ConditionalRoutedAutoregressiveAttention", heavy_window_size=0)
    with pytest.raises(ValueError, match="num_heavy_tokens_q must be >= 1, got 0"):
        layer()(X, num_heavy_tokens_q=0)
    with pytest.raises(ValueError, match="num_heavy_tokens_kv must be >= 1, got 0"):
        layer()(X, num_heavy_tokens_kv=0)
    with pytest.raises(ValueError, match=r"x must be of shape \(b, n, 16\), got shape \(44, 16\)"):
        layer()(X[0])
