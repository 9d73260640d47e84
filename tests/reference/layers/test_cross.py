import pytest
import torch
from torch.autograd import gradcheck

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(2, 20, 16, generator=GENERATOR, dtype=torch.float64)
CONTEXT = torch.randn(2, 35, 16, generator=GENERATOR, dtype=torch.float64)
MASK = torch.arange(20) < torch.tensor([[20], [13]])
CONTEXT_MASK = torch.arange(35) < torch.tensor([[24], [35]])


@pytest.fixture
def layer(build):
    def make(**options):
        return build("ConditionalRoutedCrossAttention", **options).double()

    return make


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_routing_tokens": 2},
        {"kv_routing_tokens": 2, "num_sets_kv": 2},
        {"multiply_keys_by_score": True},
        {"use_null_q_tokens": False},
        {"use_flash_attn": True, "kv_routing_tokens": 4},
        {"router_straight_through": True},
        {"rotary_emb": True, "kv_routing_tokens": 2},
    ],
    ids=str,
)
def test_routed_queries_attend_to_the_routed_context(layer, by_hand, options, masked):
    attention = layer(**{"router_straight_through": False, **options})
    mask, context_mask = (MASK, CONTEXT_MASK) if masked else (None, None)
    out = attention(X, context=CONTEXT, mask=mask, context_mask=context_mask)
    for b in range(2):
        valid = (MASK[b], CONTEXT_MASK[b]) if masked else (None, None)
        torch.testing.assert_close(out[b], by_hand.heavy(attention, X[b], CONTEXT[b], 8, 10, *valid, **options))


def test_queries_that_are_not_routed_get_the_null_token(layer):
    attention = layer()
    out = attention(X, CONTEXT)
    unrouted = (out == attention.null_q_token).all(-1)
    assert unrouted.sum(-1).tolist() == [12, 12]


@pytest.mark.parametrize(("num_q", "num_kv"), [(3, None), (None, 4), (20, 5), (5, 35), (99, 99)])
def test_numbers_of_tokens_of_a_call(layer, by_hand, num_q, num_kv):
    attention = layer(router_straight_through=False)
    out = attention(X, CONTEXT, num_tokens_q=num_q, num_tokens_kv=num_kv)
    for b in range(2):
        torch.testing.assert_close(out[b], by_hand.heavy(attention, X[b], CONTEXT[b], num_q or 8, num_kv or 10))


def test_blocks_are_of_the_context_alone(layer, by_hand):
    """Blocks of 16, 16 and 3: the context's keys are those that each block selects, including its tail."""
    attention = layer(route_block_size=16, num_tokens_kv=12)
    assert (attention.q_router.route_block_size, attention.kv_router.route_block_size) == (None, 16)
    out = attention(X, CONTEXT)

    token = attention.kv_router.routing_token[0]
    kept = []
    for x in CONTEXT:
        raw = x @ token
        blocks = [raw[:16].topk(4).indices, raw[16:32].topk(4).indices + 16, raw[32:].topk(3).indices + 32]
        kept.append(x[torch.cat(blocks)])
    whole = layer()
    whole.load_state_dict(attention.state_dict())
    torch.testing.assert_close(out, whole(X, torch.stack(kept), num_tokens_kv=11))


def test_a_context_shorter_than_a_block(layer):
    blocks, whole = layer(route_block_size=64), layer()
    whole.load_state_dict(blocks.state_dict())
    assert torch.equal(blocks(X, CONTEXT), whole(X, CONTEXT))


def test_routing_tokens(layer):
    attention = layer(kv_routing_tokens=2, router_kwargs={"learned_routing_tokens": True})
    q = (torch.randn(2, 16, dtype=X.dtype) / 40).requires_grad_()
    kv = (torch.randn(2, 2, 16, dtype=X.dtype) / 40).requires_grad_()
    out = attention(X, CONTEXT, routing_tokens_q=q, routing_tokens_kv=kv)
    with_own = layer(kv_routing_tokens=2)
    with_own.load_state_dict(attention.state_dict(), strict=False)
    for b in range(2):
        with torch.no_grad():
            with_own.q_router.routing_token.copy_(q[b])
            with_own.kv_router.routing_token.copy_(kv[b])
        torch.testing.assert_close(out[b], with_own(X, CONTEXT)[b])
    out.square().sum().backward()
    assert q.grad.any(-1).all()
    assert kv.grad.any(-1).all()


def test_every_parameter_has_a_gradient(layer):
    attention = layer(kv_routing_tokens=2, route_block_size=16)
    attention(X, CONTEXT, mask=MASK, context_mask=CONTEXT_MASK).square().sum().backward()
    assert all(parameter.grad.any() for parameter in attention.parameters())


def test_a_masked_context_is_not_attended_to(layer):
    attention = layer()
    changed = CONTEXT.masked_fill(~CONTEXT_MASK[..., None], 1e3)
    mask = {"context_mask": CONTEXT_MASK}
    assert torch.equal(attention(X, CONTEXT, **mask), attention(X, changed, **mask))
    # Only the null key to attend to.
    nothing = attention(X, CONTEXT, context_mask=torch.zeros_like(CONTEXT_MASK), num_tokens_q=20)
    value = attention.heavy_attn.null_kv[1].flatten() @ attention.heavy_attn.to_out.weight.T
    torch.testing.assert_close(nothing, value.expand_as(X))


@pytest.mark.parametrize(("n", "m"), [(0, 35), (20, 0), (1, 1), (0, 0)])
def test_short_sequences(layer, n, m):
    out = layer()(X[:, :n], CONTEXT[:, :m])
    assert out.shape == (2, n, 16)
    assert out.isfinite().all()


@pytest.mark.parametrize("route_block_size", [None, 5])
def test_gradcheck(build, route_block_size):
    options = {"dim": 4, "num_tokens_q": 3, "num_tokens_kv": 4, "heads": 2, "kv_routing_tokens": 2, "dim_head": 2}
    attention = build(
        "ConditionalRoutedCrossAttention",
        spread=1.0,
        router_straight_through=False,
        route_block_size=route_block_size,
        router_kwargs={"eps": 0.3, "n_iters": 4},
        **options,
    ).double()
    names, parameters = zip(*attention.named_parameters(), strict=True)
    masks = {"mask": MASK[:, 8:16], "context_mask": CONTEXT_MASK[:, 15:26]}

    def function(x, context, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, values, (x, context), masks)

    inputs = (each[..., :4].clone().requires_grad_() for each in (X[:, :8], CONTEXT[:, :11]))
    assert gradcheck(function, (*inputs, *parameters), fast_mode=True)


def test_wrong_arguments_are_named(build, layer):
    for name in ("num_tokens_q", "num_tokens_kv"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            layer()(X, CONTEXT, **{name: 0})
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            layer(**{name: 0})
    with pytest.raises(ValueError, match="num_sets_kv must be 1 or kv_routing_tokens = 1, got 2"):
        build("ConditionalRoutedCrossAttention", num_sets_kv=2)
    with pytest.raises(ValueError, match=r"context must be of shape \(b, n, 16\), got shape \(2, 35, 15\)"):
        layer()(X, CONTEXT[..., :15])
    with pytest.raises(ValueError, match=r"context_mask must be of shape \(2, 35\), one entry per token of context"):
        layer()(X, CONTEXT, context_mask=MASK)
