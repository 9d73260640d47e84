import copy
import pickle
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import kernels
from reference import CoordinateDescentRouter, RouterReturn, coor_descent, soft_topk

SCHEDULE = {"n_iters": 20, "eps": 0.03, "eps_init": 4.0, "eps_decay": 0.7}
X = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.arange(40) < torch.tensor([[40], [25], [3]])


def scores_of(router, x=X):
    return torch.einsum("bnd,rd->brn", x, router.routing_token)


@pytest.fixture
def router(build):
    def make(**options):
        return build("CoordinateDescentRouter", **options).double()

    return make


def test_selects_the_largest_scores_with_the_gradient_of_the_relaxation(router):
    route = router()
    indices, scores, tokens, mask = route(X, num_tokens=6)
    raw = scores_of(route).squeeze(1)
    assert torch.equal(indices, raw.topk(6).indices)
    assert torch.equal(tokens, torch.stack([x[i] for x, i in zip(X, indices, strict=True)]))
    assert mask is None
    torch.testing.assert_close(scores, torch.ones_like(scores), rtol=1e-15, atol=0)

    upstream = torch.randn_like(scores)
    (gradient,) = torch.autograd.grad(scores, route.routing_token, upstream)
    relaxed = coor_descent(raw, k=6 * 9 / 8, **SCHEDULE).gather(-1, indices)
    (expected,) = torch.autograd.grad(relaxed, route.routing_token, upstream)
    assert expected.any()
    torch.testing.assert_close(gradient, expected)


def test_without_straight_through_scores_are_the_relaxation(router):
    route = router(straight_through=False)
    relaxed = coor_descent(scores_of(route).squeeze(1), k=6.75, **SCHEDULE)
    routed = route(X, num_tokens=6)
    torch.testing.assert_close(routed.scores, relaxed.gather(-1, routed.indices))


@pytest.mark.parametrize(
    "changed", [{"n_iters": 3}, {"eps": 0.2}, {"eps_init": 0.5}, {"eps_decay": 0.9}, {"fetch_k_ratio": 1.5}], ids=str
)
def test_settings_of_coordinate_descent(router, changed):
    route = router(straight_through=False, **changed)
    routed = route(X, num_tokens=6)
    schedule = {**SCHEDULE, **changed}
    k = 6 * schedule.pop("fetch_k_ratio", 9 / 8)
    raw = scores_of(route).squeeze(1)
    torch.testing.assert_close(routed.scores, coor_descent(raw, k=k, **schedule).gather(-1, routed.indices))
    assert (routed.scores - coor_descent(raw, k=6.75, **SCHEDULE).gather(-1, routed.indices)).abs().max() > 1e-3


def test_the_relaxation_sums_to_no_more_than_there_is(router):
    route = router(straight_through=False)
    raw = scores_of(route).squeeze(1)
    routed = route(X, num_tokens=39)
    torch.testing.assert_close(routed.scores, coor_descent(raw, k=40, **SCHEDULE).gather(-1, routed.indices))


@pytest.mark.parametrize("straight_through", [True, False])
def test_masked_tokens(router, straight_through):
    route = router(straight_through=straight_through)
    x = X.masked_fill(~MASK[..., None], 1e3)
    indices, scores, _, mask = route(x, num_tokens=6, mask=MASK)
    assert torch.equal(mask, MASK.gather(-1, indices))
    assert mask.sum(-1).tolist() == [6, 6, 3]
    assert torch.equal(scores != 0, mask)
    for row in range(2):
        expected = route(x[row : row + 1, : MASK[row].sum()], num_tokens=6)
        assert torch.equal(indices[row], expected.indices[0])
        torch.testing.assert_close(scores[row], expected.scores[0])


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("n", [0, 1, 5, 6])
def test_no_more_tokens_than_asked_for(router, mask, n):
    x, mask = X[:, :n], None if mask is None else mask[:, :n]
    indices, scores, tokens, routed_mask = router()(x, num_tokens=6, mask=mask)
    assert indices is None
    assert torch.equal(scores, x.new_ones(3, n))
    assert torch.equal(tokens, x)
    assert routed_mask is mask is None or torch.equal(routed_mask, mask)

    several = router(num_routing_tokens=2)(x, num_tokens=6, mask=mask)
    assert several.scores.shape == (3, 2, n)
    assert all(torch.equal(several.routed_tokens[:, i], x) for i in range(2))
    assert mask is None or all(torch.equal(several.routed_mask[:, i], mask) for i in range(2))


@pytest.mark.parametrize("mask", [None, MASK])
def test_each_route_is_a_router_of_its_own(router, mask):
    several = router(num_routing_tokens=3, straight_through=False)
    together = several(X, num_tokens=6, mask=mask)
    for i in range(3):
        single = router(straight_through=False)
        single.routing_token = torch.nn.Parameter(several.routing_token[i : i + 1].detach())
        alone = single(X, num_tokens=6, mask=mask, keep_one_route_dim=True)
        assert alone.scores.shape == (3, 1, 6)
        valid = torch.ones(3, 6, dtype=torch.bool) if mask is None else alone.routed_mask[:, 0]
        assert torch.equal(together.indices[:, i][valid], alone.indices[:, 0][valid])
        assert torch.equal(together.routed_tokens[:, i][valid], alone.routed_tokens[:, 0][valid])
        torch.testing.assert_close(together.scores[:, i], alone.scores[:, 0])
        assert mask is None or torch.equal(together.routed_mask[:, i], valid)


@pytest.mark.parametrize("n", [24, 40, 33, 8, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks(router, n, masked):
    """Each block of 8 selects as a separate row, the last one with its remaining tokens."""
    route, x = router(route_block_size=8, straight_through=False), X[:, :n]
    mask = torch.rand(3, n) > 0.4 if masked else None
    num_tokens = 4 if n == 5 else min(n - 1, 7)
    indices, scores, tokens, routed_mask = route(x, num_tokens=num_tokens, mask=mask)
    blocks = ceil(n / 8)
    each = ceil(num_tokens / blocks)
    assert indices.shape == (3, blocks * each)
    whole = router(straight_through=False)
    whole.load_state_dict(route.state_dict())
    for b in range(3):
        for block in range(blocks):
            start, part = block * 8, slice(block * each, (block + 1) * each)
            piece = x[b : b + 1, start : start + 8]
            there = (
                torch.ones(piece.shape[:2], dtype=torch.bool) if mask is None else mask[b : b + 1, start : start + 8]
            )
            raw = scores_of(whole, piece)[0, 0]
            count = min(each, int(there.sum()))
            places = raw.masked_fill(~there[0], -torch.inf).topk(count).indices
            assert torch.equal(indices[b, part][:count], places + start)
            # The tail is padded to a block, which affects the sum of the relaxation.
            k = min(each * 9 / 8, 8 if n > 8 else n)
            relaxed = coor_descent(raw, k=k, mask=there[0], **SCHEDULE)
            torch.testing.assert_close(scores[b, part][:count], relaxed[places])
            assert not scores[b, part][count:].any()
            if routed_mask is not None:
                assert routed_mask[b, part].tolist() == [True] * count + [False] * (each - count)
            else:
                assert count == each
    assert tokens.isfinite().all()


def test_a_tail_of_fewer_tokens_than_its_share(router):
    route = router(route_block_size=16)
    indices, scores, tokens, mask = route(X[:, :34], num_tokens=12)
    assert mask.sum(-1).tolist() == [4 + 4 + 2] * 3
    assert (indices[mask] < 34).all()
    assert not scores[~mask].any()
    back = route.route_back(torch.zeros(3, 34, 16, dtype=X.dtype), tokens, indices)
    placed = torch.zeros(3, 34, dtype=torch.bool).scatter(1, torch.where(mask, indices, indices[:, :1]), True)
    assert torch.equal(back, torch.where(placed[..., None], X[:, :34], 0.0))


@pytest.mark.parametrize("cosine_sim_scale", [8, 3.0])
def test_cosine_similarity(router, cosine_sim_scale):
    route = router(cosine_sim_routing=True, cosine_sim_scale=cosine_sim_scale, straight_through=False)
    raw = F.cosine_similarity(X, route.routing_token, dim=-1) * cosine_sim_scale
    routed = route(X, num_tokens=6)
    assert torch.equal(routed.indices, raw.topk(6).indices)
    relaxed = coor_descent(raw, k=6.75, **SCHEDULE)
    torch.testing.assert_close(routed.scores, relaxed.gather(-1, routed.indices))


@pytest.mark.parametrize("routes", [1, 2])
@pytest.mark.parametrize("own", [False, True])
def test_routing_tokens_that_are_passed(router, routes, own):
    """One per batch element; they replace the router's own."""
    route = router(num_routing_tokens=routes, learned_routing_tokens=not own, straight_through=False)
    assert (route.routing_token is None) == (not own)
    tokens = (torch.randn(3, routes, 16, dtype=X.dtype) / 40).requires_grad_()
    routed = route(X, num_tokens=6, routing_tokens=tokens, keep_one_route_dim=True)
    raw = torch.einsum("bnd,brd->brn", X, tokens)
    assert torch.equal(routed.indices, raw.topk(6).indices)
    relaxed = coor_descent(raw, k=6.75, **SCHEDULE).gather(-1, routed.indices)
    torch.testing.assert_close(routed.scores, relaxed)
    (gradient,) = torch.autograd.grad(routed.scores.square().sum(), tokens)
    assert gradient.flatten(1).any(-1).all()
    if routes == 1:
        flat = route(X, num_tokens=6, routing_tokens=tokens[:, 0])
        assert torch.equal(flat.indices, routed.indices[:, 0])


@pytest.mark.parametrize("mask", [None, MASK])
def test_random_route(router, mask):
    route = router()
    x = X.clone()
    x[:, :6] += 1e3 * route.routing_token.detach().sign()
    counts = torch.zeros(3, 40)
    for _ in range(200):
        indices, scores, _, routed_mask = route(x, num_tokens=6, mask=mask, random_route=True)
        chosen = torch.ones_like(scores) if routed_mask is None else routed_mask.float()
        counts.scatter_add_(1, indices, chosen.float())
    valid = torch.ones(3, 40, dtype=torch.bool) if mask is None else mask
    assert not counts[~valid].any()
    # Every valid token is selected about equally often, including the largest: 200 draws of 6 from 40 give 30 +- 5.
    expected = 200 * (6 / valid.sum(-1, keepdim=True)).clamp(max=1)
    assert ((counts - expected).abs()[valid] <= 6 * expected.sqrt().expand(3, 40)[valid]).all()


def test_the_control_of_random_routes_is_random_in_what_it_selects_alone(router):
    route = router(straight_through=False)
    routed = route(X, num_tokens=6, random_route=True)
    relaxed = coor_descent(scores_of(route).squeeze(1), k=6.75, **SCHEDULE)
    torch.testing.assert_close(routed.scores, relaxed.gather(-1, routed.indices))


def test_normalized_to_what_is_selected(router):
    """As in the paper: the relaxation sums to k, and 9/8 of k have weights."""
    route = router(normalize_to="selected", straight_through=False)
    routed = route(X, num_tokens=10)
    raw = scores_of(route).squeeze(1)
    assert torch.equal(routed.indices, raw.topk(12).indices)
    relaxed = coor_descent(raw, k=10, **SCHEDULE)
    torch.testing.assert_close(routed.scores, relaxed.gather(-1, routed.indices))
    # No more than there are.
    assert route(X[:, :11], num_tokens=10).indices.shape == (3, 11)
    assert route(X, num_tokens=10, mask=MASK).routed_mask.sum(-1).tolist() == [12, 12, 3]


@pytest.mark.parametrize("normalize_to", ["fetched", "selected"])
def test_the_exact_solution(router, normalize_to):
    route = router(solver="exact", eps=0.05, straight_through=False, normalize_to=normalize_to)
    routed = route(X, num_tokens=8, mask=MASK)
    k = 9 if normalize_to == "fetched" else 8
    exact = soft_topk(scores_of(route).squeeze(1), k=k, eps=0.05, mask=MASK)
    torch.testing.assert_close(routed.scores, exact.gather(-1, routed.indices).masked_fill(~routed.routed_mask, 0.0))


@pytest.mark.parametrize(
    ("solver", "normalize_to", "trains"),
    [
        ("coor_descent", "fetched", False),
        ("coor_descent", "selected", False),
        ("exact", "fetched", False),
        ("exact", "selected", True),
    ],
)
def test_which_settings_train_at_the_scores_of_an_untrained_router(solver, normalize_to, trains):
    """Scores have a standard deviation of 22.6. 20 iterations leave all selected entries at 1. If a sum of 9/8 k is
    exact, the k largest are at 1."""
    router = CoordinateDescentRouter(512, solver=solver, normalize_to=normalize_to)
    scores = router(torch.randn(1, 4096, 512), num_tokens=256).scores
    (gradient,) = torch.autograd.grad(scores, router.routing_token, torch.randn_like(scores))
    assert gradient.any() == trains


@pytest.mark.parametrize("solver", ["coor_descent", "exact"])
def test_use_triton(router, solver):
    """The kernels have a CPU path, whose bits differ from the definition."""
    x = X.float()
    plain = router(straight_through=False, solver=solver).float()
    raw = scores_of(plain, x).squeeze(1)
    if solver == "exact":
        of_kernel = kernels.soft_topk(raw, k=6.75, eps=0.03)
    else:
        of_kernel = kernels.coor_descent(raw, k=6.75, **SCHEDULE)
    results = {}
    for use_triton in (False, True, None):
        route = router(straight_through=False, solver=solver, use_triton=use_triton).float()
        route.load_state_dict(plain.state_dict())
        results[use_triton] = route(x, num_tokens=6)
    for routed in results.values():
        torch.testing.assert_close(routed.scores, results[False].scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(results[True].scores, of_kernel.gather(-1, results[True].indices))
    assert torch.equal(results[None].scores, results[False].scores)
    assert not torch.equal(results[True].scores, results[False].scores)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"straight_through": False, "num_routing_tokens": 3},
        {"cosine_sim_routing": True, "cosine_sim_scale": 3.0, "straight_through": False},
        {"route_block_size": 16, "num_routing_tokens": 2, "straight_through": False},
        {"route_block_size": 32, "solver": "exact", "eps": 0.05, "straight_through": False},
        {"route_block_size": 40, "normalize_to": "selected", "straight_through": False},
        {"solver": "exact", "normalize_to": "selected", "eps": 0.05, "straight_through": False},
        {"n_iters": 3, "eps_init": 1.0, "fetch_k_ratio": 1.5, "straight_through": False},
        {"learned_routing_tokens": True, "num_routing_tokens": 2},
        {"random_route": True, "num_routing_tokens": 2, "straight_through": False},
        {"triton_checkpoint_segments": 2, "route_block_size": 16},
    ],
    ids=str,
)
def test_kernels_do_what_the_definition_says(router, options, masked):
    """Each option of a router: results, and the gradients of tokens and routing tokens, in fp64."""
    options = dict(options)
    random_route = options.pop("random_route", False)
    mask = torch.rand(3, 40) > 0.3 if masked else None
    tokens = None
    if options.get("learned_routing_tokens"):
        tokens = (torch.randn(3, 2, 16, dtype=X.dtype) / 40).requires_grad_()
    plain = router(**options)
    results = []
    for use_triton in (False, True):
        route = router(**options, use_triton=use_triton)
        route.load_state_dict(plain.state_dict())
        x = X.clone().requires_grad_()
        torch.manual_seed(1)
        routed = route(x, num_tokens=7, mask=mask, routing_tokens=tokens, random_route=random_route)
        upstream = [torch.randn_like(tensor) for tensor in routed[1:3]]
        inputs = (x, route.routing_token if tokens is None else tokens)
        results.append((*routed, *torch.autograd.grad(routed[1:3], inputs, upstream)))
    (indices, *values, routed_mask, dx, dtoken), (of_kernels, *others, other_mask, other_dx, other_dtoken) = results
    assert torch.equal(of_kernels, indices)
    assert routed_mask is other_mask is None or torch.equal(other_mask, routed_mask)
    # The segmented kernel is fp32.
    tolerance = 1e-4 if "triton_checkpoint_segments" in options else 1e-9
    for value, other in zip((*values, dx, dtoken), (*others, other_dx, other_dtoken), strict=True):
        torch.testing.assert_close(other, value, rtol=tolerance, atol=tolerance)


def test_kernels_in_one_graph(router):
    route = router(use_triton=True, num_routing_tokens=2, route_block_size=16).float()
    x = X.float().requires_grad_()
    compiled = torch.compile(route, backend="aot_eager", fullgraph=True)
    results = [function(x, num_tokens=6, mask=MASK) for function in (route, compiled)]
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)
    grads = [torch.autograd.grad(r.scores.sum() + r.routed_tokens.square().sum(), x)[0] for r in results]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_under_autocast(build, dtype):
    route = build("CoordinateDescentRouter", use_triton=True, straight_through=False)
    x = torch.randn(2, 300, 16).to(dtype)
    outside = route(x, num_tokens=30)
    with torch.autocast("cpu", dtype=dtype):
        inside = route(x, num_tokens=30)
        back = inside.scores.sum()
    back.backward()
    assert inside.scores.dtype == inside.routed_tokens.dtype == dtype
    assert torch.equal(inside.indices, outside.indices)
    assert torch.equal(inside.scores, outside.scores)
    assert route.routing_token.grad.dtype == torch.float32


@pytest.mark.gpu
def test_automatic_takes_the_kernels_for_cuda_tensors(router):
    route = router(straight_through=False, use_triton=None).float().cuda()
    x = X.float().cuda()
    raw = route.score(x).squeeze(1)
    routed = route(x, num_tokens=6)
    assert torch.equal(routed.scores, kernels.coor_descent(raw, k=6.75, **SCHEDULE).gather(-1, routed.indices))


def test_segments(router):
    route = router(straight_through=False, use_triton=True, triton_checkpoint_segments=4).float()
    x = X.float()
    routed = route(x, num_tokens=6)
    raw = scores_of(route, x).squeeze(1)
    segmented = kernels.segmented_coor_descent(raw, k=6.75, checkpoint_segments=4, **SCHEDULE)
    assert torch.equal(routed.scores, segmented.gather(-1, routed.indices))
    with pytest.raises(ValueError, match="checkpoint_segments"):
        router(use_triton=True, triton_checkpoint_segments=21)(X, num_tokens=6)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cosine_sim_routing", [False, True])
def test_scores_are_not_rounded_to_half_precision(build, autocast, cosine_sim_routing):
    dtype = torch.bfloat16 if autocast is None else torch.float32
    route = build("CoordinateDescentRouter", cosine_sim_routing=cosine_sim_routing).to(dtype)
    x = torch.randn(2, 3000, 16).to(dtype)
    wide = copy.deepcopy(route).double()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        routed = route(x, num_tokens=300)
    # So close together that in bf16 hundreds of them would be equal.
    expected = wide.score(x.double()).squeeze(1)
    assert routed.scores.dtype == routed.routed_tokens.dtype == dtype
    torch.testing.assert_close(expected.gather(-1, routed.indices), expected.topk(300).values, rtol=0, atol=1e-5)


def test_route_back_leaves_everything_else(router):
    src, tokens = torch.randn(3, 9, 16), torch.randn(3, 4, 16)
    indices = torch.tensor([[0, 8, 3, 9], [1, 2, 9, 9], [5, 4, 3, 2]])
    before = src.clone()
    out = router().route_back(src, tokens, indices)
    assert torch.equal(src, before)
    for b in range(3):
        for i, token in zip(indices[b], tokens[b], strict=True):
            if i < 9:
                assert torch.equal(out[b, i], token)
        others = [i for i in range(9) if i not in indices[b]]
        assert torch.equal(out[b, others], before[b, others])


@pytest.mark.parametrize("solver", ["coor_descent", "exact"])
@pytest.mark.parametrize("route_block_size", [None, 8])
def test_gradcheck(router, solver, route_block_size):
    options = {"solver": solver, "route_block_size": route_block_size, "eps": 0.3, "n_iters": 5}
    route = router(dim=4, straight_through=False, num_routing_tokens=2, spread=1.0, **options)
    x = X[:2, :19, :4].clone().requires_grad_()
    mask = torch.arange(19) < torch.tensor([[19], [12]])
    token = route.routing_token.detach().clone().requires_grad_()

    def function(x, token):
        routed = route(x, num_tokens=4, mask=mask, routing_tokens=token.expand(2, 2, 4))
        return routed.scores, routed.routed_tokens.masked_fill(~routed.routed_mask[..., None], 0.0)

    assert gradcheck(function, (x, token))


@pytest.mark.parametrize("use_triton", [False, True, None])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda router: pickle.loads(pickle.dumps(router))])
def test_copies(router, use_triton, duplicate):
    route = router(use_triton=use_triton)
    assert torch.equal(duplicate(route)(X, num_tokens=6).indices, route(X, num_tokens=6).indices)


def test_repr(router):
    assert "solver='exact'" in repr(router(solver="exact"))
    paths = {
        False: "plain PyTorch",
        True: "kernels.route",
        None: "kernels.route for CUDA tensors, else plain PyTorch",
    }
    for use_triton, path in paths.items():
        assert f"use_triton={use_triton} ({path})" in repr(router(use_triton=use_triton))
    assert "(kernels.segmented_coor_descent and others)" in repr(router(use_triton=True, triton_checkpoint_segments=2))


def test_returns_a_named_tuple(router):
    assert RouterReturn._fields == ("indices", "scores", "routed_tokens", "routed_mask")
    assert isinstance(router()(X, num_tokens=6), RouterReturn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fetch_k_ratio": 0.5}, "fetch_k_ratio must be >= 1, got 0.5"),
        ({"num_routing_tokens": 0}, "num_routing_tokens must be >= 1, got 0"),
        ({"route_block_size": 0}, "route_block_size must be None or >= 1, got 0"),
        ({"solver": "sinkhorn"}, "solver must be coor_descent or exact, got sinkhorn"),
        ({"normalize_to": "k"}, "normalize_to must be fetched or selected, got k"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CoordinateDescentRouter(16, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be >= 1, got 0"),
        ({"x": torch.ones(3, 40, 16, dtype=torch.int64)}, "x must be a tensor of a float dtype, got torch.int64"),
        ({"x": torch.ones(40, 16)}, r"x must be of shape \(b, n, 16\), got shape \(40, 16\)"),
        ({"x": torch.ones(3, 40, 15)}, r"x must be of shape \(b, n, 16\), got shape \(3, 40, 15\)"),
        ({"mask": torch.ones(3, 40)}, "mask must be a tensor of dtype torch.bool, got torch.float32"),
        (
            {"mask": torch.ones(40).bool()},
            r"mask must be of shape \(3, 40\), one entry per token of x, got shape \(40,\)",
        ),
        ({"mask": torch.ones(3, 40, device="meta").bool()}, "mask must be on cpu, the device of x, got on meta"),
        ({"routing_tokens": torch.ones(2, 16)}, r"must be of shape \(3, 2, 16\), got shape \(2, 1, 16\)"),
        ({"routing_tokens": torch.ones(3, 1, 16)}, r"must be of shape \(3, 2, 16\), got shape \(3, 1, 16\)"),
    ],
)
def test_wrong_arguments_are_named(build, arguments, message):
    router = build("CoordinateDescentRouter", num_routing_tokens=2)
    with pytest.raises(ValueError, match=message):
        router(**{"x": X.float(), "num_tokens": 6, **arguments})


def test_routing_tokens_are_missed():
    with pytest.raises(
        ValueError, match="routing_tokens must be a tensor where learned_routing_tokens is set, got None"
    ):
        CoordinateDescentRouter(16, learned_routing_tokens=True)(X.float(), num_tokens=6)
