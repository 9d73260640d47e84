"""Faults of colt5-attention 0.11.2: each test passes here and fails there, as the text next to it says.

Only parts of that package that need a GPU are tested on a GPU.
"""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

import reference

MODULES = {
    "CoordinateDescentRouter": "colt5_attention.transformer_block",
    "ConditionalRoutedViT": "colt5_attention.vit",
}


def packages(fails_with, *, cuda=False):
    """Both packages, with the expected failure of the peer. With cuda, the peer runs on a GPU, and ours is tested on
    the CPU."""
    marks = [pytest.mark.xfail(raises=fails_with, strict=True), *([pytest.mark.gpu] if cuda else [])]
    return pytest.mark.parametrize("package", ["reference", pytest.param("colt5_attention", marks=marks)])


@pytest.fixture
def create(build, package):
    def make(name, **options):
        if package == "reference":
            return build(name, **options)
        return build(name, pytest.importorskip(MODULES.get(name, package)), **options)

    return make


@packages(NameError)
def test_1_cross_attention(create):
    cross = create("ConditionalRoutedCrossAttention")
    assert cross(torch.randn(2, 20, 16), context=torch.randn(2, 30, 16)).shape == (2, 20, 16)


@packages(IndexError)
def test_2_blocks(create):
    router = create("CoordinateDescentRouter", route_block_size=8)
    x = torch.randn(2, 32, 16)
    indices = router(x, num_tokens=8).indices
    assert torch.equal(indices // 8, torch.arange(4).repeat_interleave(2).expand(2, 8))


@packages(AssertionError)
def test_2_the_tail_past_the_last_whole_block(create):
    router = create("CoordinateDescentRouter", route_block_size=16)
    x = torch.randn(1, 20, 16)
    x[:, 18] = 100 * router.routing_token.detach()
    assert 18 in router(x, num_tokens=4).indices


@packages(ZeroDivisionError)
def test_2_a_sequence_shorter_than_a_block(create):
    assert (
        create("CoordinateDescentRouter", route_block_size=32)(torch.randn(2, 20, 16), num_tokens=4).indices.max() < 20
    )


@packages(AssertionError)
def test_3_several_routes_and_batch_elements(create):
    x = torch.randn(3, 20, 16)
    routed = create("CoordinateDescentRouter", num_routing_tokens=2)(x, num_tokens=4)
    for b in range(3):
        assert torch.equal(routed.routed_tokens[b], x[b][routed.indices[b]])


@packages(AssertionError)
def test_3_several_routes_and_masks(create):
    mask = torch.arange(20) < torch.tensor([[20], [3], [10]])
    routed = create("CoordinateDescentRouter", num_routing_tokens=2)(torch.randn(3, 20, 16), num_tokens=4, mask=mask)
    for b in range(3):
        assert torch.equal(routed.routed_mask[b], mask[b][routed.indices[b]])


@pytest.mark.parametrize("window", [3, 4, 5])
@packages(AssertionError)
def test_3_several_routes_and_windows(create, window):
    """A later window sees all windows before it. All tokens except the last one are routed, so none is left."""
    options = {"num_heavy_tokens_kv": 8 * (window + 1) - 1, "num_routed_kv": 2}
    attention = create("ConditionalRoutedAutoregressiveAttention", **options)
    torch.nn.init.zeros_(attention.light_attn.to_out.weight)
    x = torch.randn(1, 8 * (window + 1), 16)
    changed = torch.cat([x[:, : -2 * 8], torch.randn(1, 8, 16), x[:, -8:]], dim=1)
    assert (attention(x)[:, -8:] != attention(changed)[:, -8:]).any()


@packages(RuntimeError)
def test_4_the_vit(create):
    """As in its example, the number of routed tokens is the size of a window."""
    options = {"attn_num_heavy_tokens_q": 16, "attn_num_heavy_tokens_kv": 16}
    assert create("ConditionalRoutedViT", flash_attn=False, **options)(torch.randn(1, 3, 32, 32)).shape == (1, 5)


@packages(AssertionError)
def test_4_the_image_layer_routes_over_the_whole_map(create):
    """8 positions of the map as queries, not of each of its 16 windows."""
    attention = create("ConditionalRoutedImageAttention")
    torch.nn.init.zeros_(attention.light_attn.to_out.weight)
    out = attention(torch.randn(1, 16, 16, 16))
    assert (out != attention.null_q_token).any(-1).sum() == 8


@packages(RuntimeError)
def test_4_the_image_example(create):
    """As in its example, the number of routed tokens is the size of a window."""
    options = {"num_heavy_tokens_q": 16, "num_heavy_tokens_kv": 16, "channel_first": True}
    assert create("ConditionalRoutedImageAttention", **options)(torch.randn(1, 16, 16, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("ConditionalRoutedFeedForward", (2, 64, 16)),
        ("ConditionalRoutedAttention", (2, 64, 16)),
        ("ConditionalRoutedTransformerBlock", (2, 64, 16)),
        ("ConditionalRoutedAutoregressiveAttention", (2, 64, 16)),
        ("ConditionalRoutedImageAttention", (2, 4, 4, 16)),
    ],
)
@packages(RuntimeError)
def test_5_autocast(create, name, shape):
    layer = create(name)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    assert x.grad.isfinite().all()


@packages(AssertionError)
def test_6_what_is_selected_are_the_largest(create):
    """With default settings, for which the relaxation leaves hundreds of entries at exactly 1."""
    router = create("CoordinateDescentRouter", dim=512, spread=512**0.5)
    x = torch.randn(1, 4096, 512)
    largest = (x @ router.routing_token[0]).topk(256).indices
    assert set(router(x, num_tokens=256).indices[0].tolist()) == set(largest[0].tolist())


@packages(AssertionError)
def test_7_topk_and_masked_entries(package):
    topk = reference.topk if package == "reference" else pytest.importorskip(package).topk
    x, mask = torch.randn(4, 30), torch.rand(4, 30) > 0.4
    indices = topk(x, k=5, mask=mask).indices
    assert mask.gather(-1, indices).all()


@packages(RuntimeError)
def test_8_a_sequence_shorter_than_the_window(create):
    assert create("ConditionalRoutedAutoregressiveAttention")(torch.randn(2, 5, 16)).shape == (2, 5, 16)


@packages(TypeError)
def test_9_random_routes_without_a_mask(create):
    assert create("CoordinateDescentRouter")(torch.randn(2, 20, 16), num_tokens=4, random_route=True).indices.shape == (
        2,
        4,
    )


@packages(TypeError)
def test_10_routing_tokens_through_a_layer(create):
    layer = create("ConditionalRoutedFeedForward", router_kwargs={"learned_routing_tokens": True})
    token = torch.randn(2, 16, requires_grad=True)
    layer(torch.randn(2, 40, 16), routing_tokens=token / 40).square().sum().backward()
    assert token.grad.any()


@packages(AssertionError, cuda=True)
def test_11_a_row_that_is_masked_altogether(create, package):
    device = "cpu" if package == "reference" else "cuda"
    router = create("CoordinateDescentRouter", use_triton=True, straight_through=False).to(device)
    x = torch.randn(2, 40, 16, device=device, requires_grad=True)
    mask = torch.ones(2, 40, dtype=torch.bool, device=device)
    mask[1] = False
    scores = router(x, num_tokens=4, mask=mask).scores
    scores.square().sum().backward()
    assert scores.isfinite().all()
    assert not scores[1].any()
    assert x.grad.isfinite().all()
    assert router.routing_token.grad.isfinite().all()


@pytest.mark.parametrize("n_iters", [1, 4])
@packages(AssertionError, cuda=True)
def test_12_fewer_than_five_iterations(create, package, n_iters):
    device = "cpu" if package == "reference" else "cuda"
    router = create("CoordinateDescentRouter", use_triton=True, n_iters=n_iters).to(device)
    assert router(torch.randn(2, 40, 16, device=device), num_tokens=4).scores.isfinite().all()


@packages(AssertionError, cuda=True)
def test_13_flash_attention_is_left_on(create, package, monkeypatch):
    """PyTorch chooses among all of its kernels, on any GPU."""
    if package != "reference" and torch.cuda.get_device_capability() == (8, 0):
        pytest.skip("that GPU is the one where it is on")
    device = "cpu" if package == "reference" else "cuda"
    left_on = []
    attend = F.scaled_dot_product_attention

    def watch(*arguments, **options):
        flags = torch.backends.cuda
        left_on.append(flags.flash_sdp_enabled() and flags.mem_efficient_sdp_enabled() and flags.math_sdp_enabled())
        return attend(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    layer = create("ConditionalRoutedAttention", use_flash_attn=True, has_light_attn=False).to(device)
    with pytest.warns(FutureWarning) if package != "reference" else torch.no_grad():
        layer(torch.randn(2, 40, 16, device=device))
    assert left_on == [True]


@packages(AssertionError)
@torch.no_grad()
def test_14_a_later_token_changes_nothing_before_it(create, package):
    """Here with `causal_query_routing`; without it, as there."""
    options = {"causal_query_routing": True} if package == "reference" else {}
    attention = create("ConditionalRoutedAutoregressiveAttention", **options)
    x = torch.randn(1, 32, 16)
    before = attention(x)
    for j in range(32):
        for change in (-30, 30):
            changed = x.clone()
            changed[:, j] += change * attention.q_router.routing_token[0].detach().sign()
            assert torch.equal(attention(changed)[:, :j], before[:, :j])


@packages(AssertionError)
def test_15_light_attention_sees_no_padding(create):
    """The same without a mask as with one that masks nothing."""
    light = create("ConditionalRoutedAttention").light_attn
    x = torch.randn(2, 30, 16)
    torch.testing.assert_close(light(x), light(x, mask=torch.ones(2, 30, dtype=torch.bool)))


def test_the_peer_that_is_tested_is_the_one_that_is_named():
    pytest.importorskip("colt5_attention")
    assert import_module("importlib.metadata").version("colt5-attention") == "0.11.2"
