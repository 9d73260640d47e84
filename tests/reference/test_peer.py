"""Checkpoints of colt5-attention load, and where that package works its results are equal to ours."""

import inspect
from functools import partial

import pytest
import torch

import reference

peer = pytest.importorskip("colt5_attention")
peer_vit = pytest.importorskip("colt5_attention.vit")
peer_block = pytest.importorskip("colt5_attention.transformer_block")

PEERS = {
    "CoordinateDescentRouter": peer_block,
    "ConditionalRoutedViT": peer_vit,
    **dict.fromkeys(
        [
            "ConditionalRoutedFeedForward",
            "ConditionalRoutedAttention",
            "ConditionalRoutedCrossAttention",
            "ConditionalRoutedAutoregressiveAttention",
            "ConditionalRoutedImageAttention",
            "ConditionalRoutedTransformerBlock",
        ],
        peer,
    ),
}
OURS_ALONE = {"causal_query_routing", "init", "normalize_to", "self", "solver"}
OURS_ALONE |= {"attn_light_rotary_emb", "attn_rotary_emb", "light_rotary_emb", "position_bias", "rotary_emb"}
"""Options that only some of our layers have. Other layers of the peer may have some of them."""

DEFAULT = {"router_kwargs": None}
"""Options whose default in the peer is a dictionary that all layers share."""


@pytest.mark.parametrize("name", PEERS)
def test_constructor_arguments_and_their_defaults(name):
    theirs = inspect.signature(getattr(PEERS[name], name)).parameters
    ours = inspect.signature(getattr(reference, name)).parameters
    expected = [(each.name, each.kind, DEFAULT.get(each.name, each.default)) for each in theirs.values()]
    compared = [each for each in ours.values() if each.name not in OURS_ALONE - {*theirs}]
    assert [(each.name, each.kind, each.default) for each in compared] == expected


@pytest.mark.parametrize("name", PEERS)
def test_arguments_of_a_call(name):
    theirs = inspect.signature(getattr(PEERS[name], name).forward).parameters
    ours = inspect.signature(getattr(reference, name).forward).parameters
    compared = [each for each in ours if "routing_tokens" not in each and each != "residual"]
    assert compared == [each for each in theirs if "routing_tokens" not in each]
    assert {each: theirs[each].default for each in theirs} == {each: ours[each].default for each in theirs}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {}) for name in PEERS],
        ("CoordinateDescentRouter", {"num_routing_tokens": 3}),
        ("CoordinateDescentRouter", {"learned_routing_tokens": True}),
        ("ConditionalRoutedAttention", {"rotary_emb": True, "num_routed_kv": 2, "use_null_q_tokens": False}),
        ("ConditionalRoutedAttention", {"has_light_attn": False}),
        ("ConditionalRoutedCrossAttention", {"kv_routing_tokens": 2}),
        ("ConditionalRoutedAutoregressiveAttention", {"rotary_emb": True, "num_routed_kv": 2}),
    ],
)
def test_checkpoints_load(build, name, options):
    theirs, ours = build(name, PEERS[name], **options), build(name, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert {k: v.dtype for k, v in ours.state_dict().items()} == {k: v.dtype for k, v in theirs.state_dict().items()}
    assert {k for k, _ in ours.named_parameters()} == {k for k, _ in theirs.named_parameters()}


def watch(layer):
    """Record of each relaxation: largest number of entries of a row at 1, and the requested number."""
    records = []
    for router in layer.modules():
        if isinstance(router, reference.CoordinateDescentRouter):

            def relax(scores, num_tokens, mask=None, relax=router.relax):
                y = relax(scores, num_tokens, mask)
                records.append((int((y >= 1).sum(-1).max()), num_tokens))
                return y

            router.relax = relax
    return records


MASK = torch.arange(64) < torch.tensor([[64], [40]])
TWO_WINDOWS = {"num_routed_kv": 2, "num_heavy_tokens_kv": 6}
"""With several routes, that package has the right tokens at batch 1, but the masks of another window after the
second."""


@pytest.mark.parametrize(
    ("name", "shape", "options", "call"),
    [
        ("ConditionalRoutedFeedForward", (2, 64, 16), {}, {}),
        ("ConditionalRoutedFeedForward", (2, 64, 16), {"router_straight_through": False}, {"mask": MASK}),
        ("ConditionalRoutedFeedForward", (2, 64, 16), {"router_kwargs": {"cosine_sim_routing": True}}, {}),
        ("ConditionalRoutedFeedForward", (2, 5, 16), {}, {}),
        ("ConditionalRoutedFeedForward", (2, 64, 16), {}, {"num_heavy_tokens": 20}),
        ("ConditionalRoutedAttention", (2, 64, 16), {}, {}),
        ("ConditionalRoutedAttention", (2, 64, 16), {"router_straight_through": False}, {"mask": MASK}),
        ("ConditionalRoutedAttention", (1, 64, 16), {"rotary_emb": True, "num_routed_kv": 2}, {}),
        ("ConditionalRoutedAttention", (2, 64, 16), {"multiply_keys_by_score": True, "use_null_q_tokens": False}, {}),
        (
            "ConditionalRoutedAttention",
            (2, 64, 16),
            {"multiply_queries_by_score": True, "router_straight_through": False},
            {"num_heavy_tokens_q": 12, "num_heavy_tokens_kv": 20},
        ),
        ("ConditionalRoutedTransformerBlock", (2, 64, 16), {}, {"mask": MASK}),
        ("ConditionalRoutedAutoregressiveAttention", (1, 64, 16), {"num_heavy_tokens_kv": 16}, {}),
        ("ConditionalRoutedAutoregressiveAttention", (2, 64, 16), {"num_heavy_tokens_kv": 16}, {}),
        ("ConditionalRoutedAutoregressiveAttention", (2, 64, 16), {"num_heavy_tokens_kv": 8, "rotary_emb": True}, {}),
        ("ConditionalRoutedAutoregressiveAttention", (2, 64, 16), {"num_heavy_tokens_kv": 64}, {}),
        ("ConditionalRoutedAutoregressiveAttention", (1, 16, 16), TWO_WINDOWS, {}),
        ("ConditionalRoutedAutoregressiveAttention", (1, 16, 16), {**TWO_WINDOWS, "rotary_emb": True}, {}),
        ("ConditionalRoutedImageAttention", (2, 8, 8, 16), {"light_window_size": 8}, {}),
        ("ConditionalRoutedImageAttention", (2, 16, 8, 8), {"light_window_size": 8, "channel_first": True}, {}),
        ("ConditionalRoutedViT", (2, 3, 16, 16), {"image_size": 16, "flash_attn": False}, {}),
    ],
)
def test_outputs_and_gradients(build, name, shape, options, call):
    theirs, ours = build(name, PEERS[name], **options), build(name, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    records = watch(ours)
    x = torch.randn(shape)
    upstream = torch.randn((2, 5) if name == "ConditionalRoutedViT" else shape)
    if "mask" in call:
        # Masked tokens have no defined output.
        upstream = upstream * call["mask"][..., None]
    results = []
    for layer in (ours, theirs):
        entry = x.clone().requires_grad_()
        out = layer(entry, **call)
        out.backward(upstream)
        gradients = {key: each.grad for key, each in layer.named_parameters() if each.grad is not None}
        results.append({"output": out.detach() * (upstream != 0), "x": entry.grad, **gradients})

    # Selection is unambiguous: no more are at 1 than are selected.
    assert all(saturated <= selected for saturated, selected in records)
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        largest = max(1.0, expected.abs().max().item())
        message = partial("{}: {}".format, key)
        torch.testing.assert_close(ours[key], expected, rtol=1e-5, atol=1e-5 * largest, msg=message)


def test_random_route_of_the_router_selects_what_the_peer_may(build):
    """As a control it selects at random in both, with weights of 1."""
    ours, theirs = build("CoordinateDescentRouter"), build("CoordinateDescentRouter", peer_block)
    x, mask = torch.randn(2, 64, 16), MASK
    for layer in (ours, theirs):
        routed = layer(x, num_tokens=8, mask=mask, random_route=True)
        assert mask.gather(-1, routed.indices).all()
        torch.testing.assert_close(routed.scores, torch.ones(2, 8))
