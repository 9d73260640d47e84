import pytest
import torch
from torch.autograd import gradcheck

MAP = torch.randn(2, 10, 13, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.rand(2, 10, 13, generator=torch.Generator().manual_seed(2)) > 0.3


@pytest.fixture
def layer(build):
    def make(**options):
        return build("ConditionalRoutedImageAttention", **options).double()

    return make


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_routed_kv": 2},
        {"multiply_keys_by_score": True},
        {"multiply_queries_by_score": True},
        {"use_null_q_tokens": False},
        {"use_flash_attn": True},
        {"router_straight_through": True},
        {"light_window_size": 5},
        {"light_window_size": 128},
        {"rotary_emb": True, "num_routed_kv": 2},
        {"light_rotary_emb": True},
        {"light_rotary_emb": True, "light_window_size": 5},
    ],
    ids=str,
)
def test_windows_and_routes_over_the_whole_map(layer, by_hand, options, masked):
    attention = layer(**{"router_straight_through": False, **options})
    size = options.get("light_window_size", 4)
    mask = MASK if masked else torch.ones_like(MASK)
    out = attention(MAP, mask=mask if masked else None)
    places = torch.tensor([(row, column) for row in range(10) for column in range(13)])
    row, column = (places // size).T
    within = places if "light_rotary_emb" in options else None
    together = (row[:, None] == row) & (column[:, None] == column)
    for b in range(2):
        x, valid = MAP[b].flatten(0, 1), mask[b].flatten()
        expected = by_hand.light(attention.light_attn, x, together & valid, within)
        chosen = (valid, valid) if masked else (None, None)
        expected = expected + by_hand.heavy(attention, x, x, 8, 10, *chosen, where=places, **options)
        torch.testing.assert_close(out[b].flatten(0, 1), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_channel_first(layer, masked):
    last, first = layer(), layer(channel_first=True)
    first.load_state_dict(last.state_dict())
    mask = MASK if masked else None
    out = first(MAP.movedim(-1, 1), mask=mask)
    assert out.shape == (2, 16, 10, 13)
    assert torch.equal(out.movedim(1, -1), last(MAP, mask=mask))


@pytest.mark.parametrize(("num_q", "num_kv"), [(3, None), (None, 4), (130, 5), (5, 130), (999, 999)])
def test_numbers_of_tokens_of_a_call(layer, by_hand, num_q, num_kv):
    attention = layer(router_straight_through=False)
    light = layer(use_null_q_tokens=False)
    light.load_state_dict({k: v for k, v in attention.state_dict().items() if k != "null_q_token"})
    torch.nn.init.zeros_(light.heavy_attn.to_out.weight)
    out = attention(MAP, num_heavy_tokens_q=num_q, num_heavy_tokens_kv=num_kv) - light(MAP)
    for b in range(2):
        x = MAP[b].flatten(0, 1)
        torch.testing.assert_close(
            out[b].flatten(0, 1), by_hand.heavy(attention, x, x, num_q or 8, num_kv or 10), atol=1e-9, rtol=1e-9
        )


def test_routing_tokens(layer):
    attention = layer(num_routed_kv=2, router_kwargs={"learned_routing_tokens": True})
    q = (torch.randn(2, 16, dtype=MAP.dtype) / 40).requires_grad_()
    kv = (torch.randn(2, 2, 16, dtype=MAP.dtype) / 40).requires_grad_()
    out = attention(MAP, routing_tokens_q=q, routing_tokens_kv=kv)
    with_own = layer(num_routed_kv=2)
    with_own.load_state_dict(attention.state_dict(), strict=False)
    for b in range(2):
        with torch.no_grad():
            with_own.q_router.routing_token.copy_(q[b])
            with_own.kv_router.routing_token.copy_(kv[b])
        torch.testing.assert_close(out[b], with_own(MAP)[b])
    out.square().sum().backward()
    assert q.grad.any(-1).all()
    assert kv.grad.any(-1).all()


def test_every_parameter_has_a_gradient(layer):
    attention = layer(num_routed_kv=2)
    attention(MAP, mask=MASK).square().sum().backward()
    assert all(parameter.grad.any() for parameter in attention.parameters())


@pytest.mark.parametrize("shape", [(0, 10, 13), (2, 0, 13), (2, 1, 1), (2, 3, 2), (1, 1, 40)], ids=str)
def test_small_maps(layer, shape):
    out = layer()(torch.randn(*shape, 16, dtype=MAP.dtype))
    assert out.shape == (*shape, 16)
    assert out.isfinite().all()


@pytest.mark.parametrize("mask", [None, MASK[:1, :3, :4]])
def test_gradcheck(build, mask):
    sizes = {"dim": 4, "num_heavy_tokens_q": 3, "num_heavy_tokens_kv": 4, "light_window_size": 2, "num_routed_kv": 2}
    sizes |= {"light_heads": 1, "light_dim_head": 2, "heavy_heads": 2, "heavy_dim_head": 2}
    attention = build(
        "ConditionalRoutedImageAttention",
        spread=1.0,
        router_straight_through=False,
        router_kwargs={"eps": 0.3, "n_iters": 4},
        **sizes,
    ).double()
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(attention, dict(zip(names, parameters, strict=True)), (x,), {"mask": mask})

    assert gradcheck(function, (MAP[:1, :3, :4, :4].clone().requires_grad_(), *parameters), fast_mode=True)


def test_wrong_arguments_are_named(build, layer):
    for name in ("num_heavy_tokens_q", "num_heavy_tokens_kv"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            layer()(MAP, **{name: 0})
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            layer(**{name: 0})
    with pytest.raises(ValueError, match="light_window_size must be >= 1, got 0"):
        build("ConditionalRoutedImageAttention", light_window_size=0)
    with pytest.raises(
        ValueError, match=r"x must be a feature map of shape \(b, 16, h, w\), got shape \(2, 10, 13, 16\)"
    ):
        layer(channel_first=True)(MAP)
    with pytest.raises(ValueError, match=r"x must be a feature map of shape \(b, h, w, 16\), got shape \(10, 13, 16\)"):
        layer()(MAP[0])
    with pytest.raises(
        ValueError, match=r"mask must be of shape \(2, 10, 13\), one entry per position, got shape \(2, 130\)"
    ):
        layer()(MAP, mask=MASK.flatten(1))
    with pytest.raises(ValueError, match=r"mask must be a tensor of dtype torch\.bool, got torch\.float32"):
        layer()(MAP, mask=MASK.float())
