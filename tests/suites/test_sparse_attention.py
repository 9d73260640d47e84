"""Sparse attention by the papers: the keys of each, and the equality of settings that are called equal."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_bench.measuring.call import Call
from suites._dense import attend_plainly
from suites._sparse import (
    MARGIN,
    MixtureOfDepths,
    MixtureOfSparseAttention,
    apart,
    attend_at,
    entmax,
    entmax_15,
    native_sparse,
    selection,
    to_blocks,
    to_selected,
)
from suites.sparse_attention import SPARSE, SUITE

CPU = torch.device("cpu")
CASES = SUITE.cases("smoke", CPU)
SHAPES = st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 4]), st.sampled_from([2, 4]), st.integers(1, 4))
"""Batch, heads, tokens per block, blocks."""

generated = settings(max_examples=15, deadline=None)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(shape):
    batch, count, size, blocks = shape
    return [drawn(batch, count, size * blocks, 8, seed=seed) for seed in range(3)]


@generated
@given(SHAPES)
def test_all_blocks_are_dense_attention_and_one_is_its_own(shape):
    query, key, value = heads(shape)
    *_, size, blocks = shape
    dense = attend_plainly(query, key, value, True)
    torch.testing.assert_close(to_blocks(query, key, value, True, size=size, blocks=blocks), dense)
    local = [
        attend_plainly(*parts, True)
        for parts in zip(*(each.split(size, 2) for each in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(to_blocks(query, key, value, True, size=size, blocks=1), torch.cat(local, 2))


@generated
@given(SHAPES)
def test_native_sparse_attention_is_the_sum_of_its_parts(shape):
    batch, count, size, blocks = shape
    query, key, value = heads(shape)
    key, value = key[:, :1], value[:, :1]
    n = size * blocks

    def part(which, **settings):
        gates = torch.eye(3, dtype=query.dtype)[which][:, None, None, None, None].expand(3, batch, count, n, 1)
        return native_sparse(query, key, value, gates, **{"size": size, "blocks": blocks, "window": 1, **settings})

    dense = attend_plainly(query, key.expand_as(query), value.expand_as(query), True)
    torch.testing.assert_close(part(1), dense)
    torch.testing.assert_close(part(2, window=n), dense)
    torch.testing.assert_close(part(2, window=1), value.expand_as(query))
    # Before the end of the first block there is no mean, and in the block after it there is one.
    means = part(0)
    assert (means[:, :, : size - 1] == 0).all()
    ends = slice(size - 1, 2 * size - 1)
    torch.testing.assert_close(means[:, :, ends], value[:, :, :size].mean(2, keepdim=True).expand_as(means[:, :, ends]))


@generated
@given(SHAPES, st.integers(1, 5))
def test_a_window_of_all_keys_is_dense_attention(shape, selected):
    query, key, _ = heads(shape)
    dense = attend_plainly(query, key[:, :1].expand_as(query), key[:, :1].expand_as(query), True)
    torch.testing.assert_close(to_selected(query, key[:, :1], window=query.shape[2], selected=selected), dense)


@generated
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_selected_keys_are_before_the_window_and_apart(n, window, selected):
    for position, row in enumerate(selection(torch.arange(n)[:, None], window, selected).tolist()):
        places = [place for place in row if place >= 0]
        before = max(0, position - window + 1)
        assert len(set(places)) == len(places) == min(selected, before)
        assert all(place < before for place in places)


@pytest.mark.parametrize("changed", [1, 5, 9, 15])
def test_no_query_attends_to_a_later_key(changed):
    query, key, value = heads((1, 2, 4, 4))
    gates = drawn(3, 1, 2, 16, 1).sigmoid()
    ways = {
        "moba": lambda k, v: to_blocks(query, k, v, True, size=4, blocks=2),
        "nsa": lambda k, v: native_sparse(query, k[:, :1], v[:, :1], gates, size=4, blocks=3, window=3),
        "selected": lambda k, v: to_selected(query, k[:, :1], window=3, selected=2),
        "entmax": lambda k, v: entmax(query, k, v, True),
    }
    later = (torch.arange(16) >= changed)[:, None].double()
    for name, way in ways.items():
        before, after = way(key, value), way(key + 3 * later, value - later)
        torch.testing.assert_close(after[:, :, :changed], before[:, :, :changed], msg=name)
        assert not torch.allclose(after[:, :, changed:], before[:, :, changed:]), name


@generated
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=12), st.integers(0, 3))
def test_entmax_is_the_root_of_its_condition(logits, masked):
    """The unique t for which max(x / 2 - t, 0)^2 sums to 1, found by bisection."""
    x = torch.tensor(logits + [-torch.inf] * masked, dtype=torch.float64)
    low, high = x.max() / 2 - 1, x.max() / 2
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if (x / 2 - t).clamp(min=0).square().sum() > 1 else (low, t)
    torch.testing.assert_close(entmax_15(x), (x / 2 - t).clamp(min=0).square(), atol=1e-9, rtol=0)


def test_gradients_are_those_of_finite_differences():
    query, key, value = (each.requires_grad_() for each in heads((1, 2, 2, 3)))
    gates = drawn(3, 1, 2, 6, 1).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(partial(entmax, causal=True), (query, key, value))
    assert torch.autograd.gradcheck(partial(to_blocks, causal=True, size=2, blocks=2), (query, key, value))
    shared = key[:, :1].detach().requires_grad_(), value[:, :1].detach().requires_grad_()
    assert torch.autograd.gradcheck(partial(native_sparse, size=2, blocks=3, window=2), (query, *shared, gates))


@pytest.mark.parametrize("causal", [False, True])
def test_each_head_attends_among_its_own_tokens(causal):
    """Token by token."""
    layer = MixtureOfSparseAttention(attend_plainly, 8, 2, num_tokens=3, dim_head=4, causal=causal).double()
    x, expected = drawn(1, 7, 8), torch.zeros(1, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        scores, tokens = layer.router(x)[0], layer.norm(x)[0]
        for head in range(2):
            chosen = sorted(scores[:, head].topk(3).indices.tolist())
            query, key, value = (tokens[chosen] @ weight[head] for weight in layer.to_qkv)
            for row, place in enumerate(chosen):
                seen = slice(0, row + 1 if causal else None)
                weights = (key[seen] @ query[row] / 2).softmax(0)
                out = weights @ value[seen] @ layer.to_out[head]
                expected[0, place] += scores[place, head].sigmoid() * out
        torch.testing.assert_close(layer(x), expected)


def test_tokens_that_are_not_selected_pass_by():
    layer = MixtureOfDepths(attend_plainly, 8, 2, num_tokens=3, dim_head=4).double()
    x = drawn(2, 7, 8)
    with torch.no_grad():
        out, scores = layer(x), layer.router(x)[..., 0]
        for row in range(2):
            chosen = scores[row].topk(3).indices
            expected = torch.zeros_like(x[row])
            chosen = chosen.sort().values
            weights = scores[row][chosen].sigmoid()[:, None]
            expected[chosen] = weights * layer.attention(x[row : row + 1, chosen])[0]
            torch.testing.assert_close(out[row], expected)


@generated
@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 9))
def test_scores_near_an_edge_are_moved_and_the_selection_is_not(routes, k, seed):
    routers = torch.linalg.qr(drawn(8, routes, seed=seed)).Q.mT
    # As small as roundings.
    x = drawn(1, 32, 8, seed=seed) * 1e-3
    case = CASES[0]
    problem = SUITE.problem(case, CPU)
    problem.inputs = {"x": x, "router.weight": routers}
    moved = apart(problem, k).inputs["x"]
    before, after = x @ routers.mT, moved @ routers.mT
    assert torch.equal(*(each.topk(k, dim=1).indices.sort(dim=1).values for each in (before, after)))
    edges = after.topk(k + 1, dim=1).values
    assert ((edges[:, -2] - edges[:, -1]) >= MARGIN).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_settings_that_are_called_equal_are(case):
    running = {name: each for name, each in SUITE.implementations.items() if each.unavailable(case, CPU) is None}
    found = {name: metrics["keys"] for name, each in running.items() if (metrics := each.metrics(case, None))}
    assert found.pop("dense") == case.n
    assert found.keys() >= {"ours", "mosa", "mixture_of_depths"}
    if case.settings == "equal":
        assert set(found.values()) == {case.keys}
    elif not case.causal:
        assert len(set(found.values())) > 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_routed_layer_routes_as_many_tokens_as_it_says(case):
    for name in ("mosa", "mixture_of_depths"):
        implementation = SUITE.implementations[name]
        problem = implementation.operation.problem(case, CPU)
        output = Call(implementation.build(case), problem, "forward").results()["output"]
        routes = len(problem.inputs["router.weight"])
        touched = int((output != 0).any(dim=-1).sum())
        (keys,) = implementation.metrics(case, problem).values()
        assert keys <= touched <= routes * keys
        if routes == 1:
            assert touched == keys


def test_what_runs_on_a_gpu_only_says_so():
    reasons = {each.name: each.unavailable(CASES[-2], CPU) for each in SPARSE}
    gpu = {name for name, reason in reasons.items() if reason and "GPU" in reason}
    assert gpu == {"fla_moba", "fla_nsa", "adasplash"}


def test_a_place_that_is_none_is_not_attended_to():
    query, key, value = heads((1, 2, 2, 2))
    places = torch.tensor([[0, 1], [1, -1], [2, -7], [3, 0]]).expand(1, 2, 4, 2)
    attended = attend_at(query, key, value, places)
    torch.testing.assert_close(attended[:, :, 1:3], value[:, :, 1:3])
