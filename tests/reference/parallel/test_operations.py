"""Operations on sharded rows have the bits of one process, in values and in gradients."""

import random
import re
from functools import partial

import pytest
import torch
from torch import Tensor

import kernels
import reference
from reference import parallel
from reference.parallel import shards
from tests.calls import arguments_of
from tests.reference.parallel import sharded

SIZES = [1, 2, 3]
SEEDS = range(6)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG = [None, 5_000, 100_003, 2_000_003]
"""Lengths of rows on a GPU, where several programs may share one; None for a few entries."""


def lengthened(rng, arguments, dims, device, lengths=LONG):
    """Arguments with rows of other lengths if they are on a GPU.

    Args:
        dims: the dimension, by name, of arguments that are sharded.
    """
    n = None if device.type == "cpu" else rng.choice(lengths)
    for name, dim in dims.items() if n is not None else ():
        shape = [*arguments[name].shape]
        shape[dim] = n
        is_mask = arguments[name].dtype == torch.bool
        arguments[name] = torch.rand(shape) < 0.8 if is_mask else torch.randn(shape)
    return arguments


def sharded_dims(arguments, name, dim):
    return {name: dim} if arguments["mask"] is None else {name: dim, "mask": dim}


def cut(rng, n, size):
    """Lengths of shards of n entries; some are as short as possible."""
    ends = sorted(rng.sample(range(1, n), size - 1))
    return [end - start for start, end in zip([0, *ends], [*ends, n], strict=True)]


def exact(*shape):
    """Numbers whose products and sums are exact in any order."""
    return torch.randint(-8, 9, shape) / 8.0


def loss_of_parts(grad, dim, group, lengths, out):
    return (out * sharded.part(group, lengths, grad, dim)).sum()


def loss_of_all(grads, group, lengths, out):
    """Each rank uses a different part of the values that all ranks have."""
    if out.gates is None:
        return (out.values * grads["values"][group.rank()]).sum()
    return sum((getattr(out, name) * each[group.rank()]).sum() for name, each in grads.items())


def check_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def whole_of(name, arguments, use_triton=False):
    leaves = sharded.leaves(dict(arguments))
    return getattr(kernels if use_triton else reference, name)(**leaves), leaves


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["coor_descent", "soft_topk"])
def test_relaxed_selection(ranks, name, size, seed):
    rng = random.Random(seed)
    arguments = arguments_of(name, rng)
    arguments = lengthened(rng, arguments, sharded_dims(arguments, "scores", -1), ranks.device)
    arguments["scores"] = arguments["scores"].to(rng.choice([torch.float64, *DTYPES]))
    use_triton = rng.random() < 0.5
    n = arguments["scores"].shape[-1]
    lengths = cut(rng, n, size)
    if rng.random() < 0.5:
        # A rank without valid entries.
        arguments["mask"] = torch.arange(n) >= lengths[0]
    grad = torch.randn(arguments["scores"].shape).to(arguments["scores"].dtype)

    whole, leaves = whole_of(name, arguments, use_triton)
    whole.backward(grad)
    dims = sharded_dims(arguments, "scores", -1)
    loss = partial(loss_of_parts, grad, -1)
    outs = ranks(size, sharded.operation, name, lengths, {**arguments, "use_triton": use_triton}, dims, loss)
    check_same(torch.cat([out for (out,), _ in outs], dim=-1), whole.detach())
    check_same(torch.cat([grads["scores"] for _, grads in outs], dim=-1), leaves["scores"].grad)
    if isinstance(arguments["k"], Tensor):
        shares = sum(grads["k"] for _, grads in outs)
        torch.testing.assert_close(shares, leaves["k"].grad)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES)
def test_select(ranks, size, seed):
    rng = random.Random(seed)
    arguments = arguments_of("select", rng)
    dims = sharded_dims(arguments, "scores", -1)
    arguments = lengthened(rng, arguments, dims, ranks.device)
    # Equal scores are common.
    arguments["scores"] = arguments["scores"].round().to(rng.choice(DTYPES))
    arguments["num_selected"] = rng.randint(1, arguments["scores"].shape[-1])
    lengths = cut(rng, arguments["scores"].shape[-1], size)
    options = {**arguments, "use_triton": rng.random() < 0.5}
    for (indices,), _ in ranks(size, sharded.operation, "select", lengths, options, dims, sharded.no_loss):
        check_same(indices, reference.select(**arguments))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", SIZES)
def test_topk(ranks, size, seed):
    rng = random.Random(seed)
    arguments = arguments_of("topk", rng)
    dims = sharded_dims(arguments, "x", -1)
    arguments = lengthened(rng, arguments, dims, ranks.device)
    arguments["x"] = arguments["x"].to(rng.choice(DTYPES))
    lengths = cut(rng, arguments["x"].shape[-1], size)
    whole, leaves = whole_of("topk", arguments)
    grads = {name: exact(3, *whole.values.shape) for name in ("values", "coor_descent_values", "gates")}
    every = {name: each[:size].sum(dim=0)[None].expand_as(each) for name, each in grads.items()}
    loss_of_all(every, sharded.Alone(), lengths, whole).backward()
    outs = ranks(size, sharded.operation, "topk", lengths, arguments, dims, partial(loss_of_all, grads))
    for out, _ in outs:
        check_same(out, [None if each is None else each.detach() for each in whole])
    check_same(torch.cat([grads["x"] for _, grads in outs], dim=-1), leaves["x"].grad)


def loss_of_routed(by_place, group, lengths, out):
    """Weights and tokens times numbers that depend on their places in the whole; past the end of a rank, 0."""
    sums = 0.0
    for name, grads in by_place.items():
        own = sharded.part(group, lengths, grads, 2)
        own = torch.cat((own, torch.zeros_like(own[:, :, :1])), dim=2)
        places = out.indices.clamp(max=own.shape[2] - 1)
        places = places if own.dim() == 3 else places[..., None].expand(*places.shape, own.shape[-1])
        sums = sums + (getattr(out, name) * own.gather(2, places)).sum()
    return sums


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", SIZES)
def test_route(ranks, size, seed):
    """Scores of one process and of several have the same bits if sums are exact in any order."""
    rng = random.Random(seed)
    arguments = arguments_of("route", rng)
    dims = sharded_dims(arguments, "x", 1)
    arguments = lengthened(rng, arguments, dims, ranks.device, LONG[:-1])
    arguments |= {"straight_through": rng.random() < 0.5, "cosine_sim_scale": None}
    x, tokens = arguments["x"], arguments["routing_tokens"]
    dtype = rng.choice(DTYPES)
    arguments |= {"x": exact(*x.shape).to(dtype), "routing_tokens": exact(*tokens.shape).to(dtype)}
    (batch, n, d), routes = x.shape, tokens.shape[1]
    if rng.random() < 0.5:
        arguments["num_selected"] = rng.randint(1, arguments["block_size"] or n)
    lengths = cut(rng, n, size)
    by_place = {"weights": torch.randn(batch, routes, n), "tokens": torch.randn(batch, routes, n, d)}

    use_triton = rng.random() < 0.5
    whole, leaves = whole_of("route", arguments, use_triton)
    loss_of_routed(by_place, sharded.Alone(), [n], whole).backward()
    loss = partial(loss_of_routed, by_place)
    outs = ranks(size, sharded.operation, "route", lengths, {**arguments, "use_triton": use_triton}, dims, loss)
    longest = max((owned(whole.indices, rank, lengths)).sum(-1).max() for rank in range(size))
    for rank, ((indices, weights, routed), _) in enumerate(outs):
        assert indices.shape[-1] == longest
        for b in range(batch):
            for r in range(routes):
                own, there = owned(whole.indices[b, r], rank, lengths), indices[b, r] < lengths[rank]
                check_same(there, torch.arange(longest) < own.sum())
                check_same(indices[b, r][there] + sum(lengths[:rank]), whole.indices[b, r][own])
                check_same(weights[b, r][there], whole.weights[b, r][own].detach())
                check_same(routed[b, r][there], whole.tokens[b, r][own].detach())
                assert not weights[b, r][~there].any()
    # Sums of the same numbers, which one process may round only once.
    atol = max(1e-5, torch.finfo(dtype).eps * leaves["x"].grad.abs().max().item())
    torch.testing.assert_close(
        torch.cat([grads["x"] for _, grads in outs], dim=1), leaves["x"].grad, rtol=1e-5, atol=atol
    )
    shares = torch.stack([grads["routing_tokens"] for _, grads in outs])
    # Each is rounded, and is a sum over its tokens.
    atol = torch.finfo(dtype).eps * shares.abs().sum(dim=0).max().item() + 1e-6 * n**0.5
    torch.testing.assert_close(shares.sum(dim=0), leaves["routing_tokens"].grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("n", "selected"), [(21, 7), (9, 8)])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("solver", ["coor_descent", "exact"])
def test_route_of_more_than_the_last_block_has(ranks, size, n, selected, straight_through, solver):
    """Padding is selected, too. It belongs to no rank, and passes no gradient on."""
    x, tokens = exact(2, n, 8), exact(1, 2, 8)
    arguments = {"x": x, "routing_tokens": tokens, "num_selected": selected, "k": 4.0, "n_iters": 5, "eps": 1.0}
    arguments |= {"block_size": 8, "straight_through": straight_through, "solver": solver}
    whole, leaves = whole_of("route", arguments)
    assert (whole.indices >= n).any()
    by_place = {"weights": torch.randn(2, 2, n), "tokens": torch.randn(2, 2, n, 8)}
    loss_of_routed(by_place, sharded.Alone(), [n], whole).backward()
    lengths = cut(random.Random(0), n, size)
    loss = partial(loss_of_routed, by_place)
    outs = ranks(size, sharded.operation, "route", lengths, arguments, {"x": 1}, loss)
    torch.testing.assert_close(
        torch.cat([grads["x"] for _, grads in outs], dim=1), leaves["x"].grad, rtol=1e-5, atol=1e-5
    )


def sum_of_routed(group, lengths, out):
    return out.weights.sum() + out.tokens.sum()


@pytest.mark.parametrize("size", SIZES)
def test_route_of_an_empty_batch(ranks, size):
    each = 60 // size
    arguments = {"x": torch.randn(0, 60, 8), "routing_tokens": torch.randn(1, 2, 8), "num_selected": 4}
    arguments |= {"k": 4.5, "n_iters": 5}
    for (indices, *_), grads in ranks(
        size, sharded.operation, "route", size * [each], arguments, {"x": 1}, sum_of_routed
    ):
        assert indices.shape[:2] == (0, 2)
        assert grads["x"].shape == (0, each, 8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("routes", [1, 3])
def test_one_gradient_is_as_large_as_the_tokens(ranks, routes, size):
    """Neither gathered tokens nor their sum with scored ones need another one."""
    x, tokens = torch.randn(2, 90, 64), torch.randn(1, routes, 64)
    options = {"num_selected": 5, "k": 6.0, "n_iters": 3}
    for made in ranks(size, sharded.made_in_backward, size * [90 // size], x, tokens, options):
        assert len(made) == 1, made


def owned(indices, rank, lengths):
    start = sum(lengths[:rank])
    return (indices >= start) & (indices < start + lengths[rank])


@pytest.mark.parametrize("name", ["coor_descent", "soft_topk", "select", "topk", "route"])
def test_a_mesh_is_taken_as_its_group_is(ranks, name):
    rng = random.Random(0)
    arguments = arguments_of(name, rng)
    arguments["mask"] = None
    tensor, dim = ("x", 1) if name == "route" else ("x", -1) if name == "topk" else ("scores", -1)
    lengths = cut(rng, arguments[tensor].shape[dim], 2)
    call = (name, lengths, arguments, {tensor: dim}, sharded.no_loss)
    check_same(ranks(2, sharded.operation, *call, True), ranks(2, sharded.operation, *call))


@pytest.mark.parametrize("masked", [0, 1])
def test_ranks_without_a_mask_have_all_entries(ranks, masked):
    scores, lengths = torch.randn(2, 9), [4, 5]
    mask = torch.rand(2, 9) < 0.7
    outs = ranks(2, sharded.masked_by_one, scores, mask, lengths, masked)
    own = slice(0, 4) if masked == 0 else slice(4, 9)
    everything = torch.ones_like(mask)
    everything[:, own] = mask[:, own]
    check_same(torch.cat(outs, dim=-1), reference.coor_descent(scores, n_iters=5, k=2, mask=everything))


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        (
            [(2, 4), (2, 0)],
            2 * [torch.float32],
            r"scores must be of at least one entry on each rank, got lengths \[4, 0\]",
        ),
        (
            [(2, 4), (3, 4)],
            2 * [torch.float32],
            "scores must be of the same dtype and, except for dimension -1, of the same shape",
        ),
        (
            [(4,), (2, 4)],
            2 * [torch.float32],
            "scores must be of the same dtype and, except for dimension -1, of the same shape",
        ),
        ([(4,), (4,)], [torch.float32, torch.float64], "scores must be of the same dtype"),
        ([(), ()], 2 * [torch.float32], "scores must be of a shape with the sharded dimension -1"),
    ],
)
def test_all_ranks_refuse_what_does_not_fit(ranks, shapes, dtypes, message):
    outcomes = ranks.outcomes(2, sharded.of_shapes, shapes, dtypes)
    assert all(failed and re.search(message, text) for failed, text in outcomes), outcomes


def test_a_mesh_has_one_dimension(ranks):
    outcomes = ranks.outcomes(3, sharded.on_mesh_of_two_dimensions)
    assert all("mesh must be of one dimension" in text for _, text in outcomes), outcomes


@pytest.mark.parametrize("mesh", [None, "cp", 2])
def test_a_mesh_is_a_mesh(mesh):
    with pytest.raises(ValueError, match="mesh must be a DeviceMesh or a ProcessGroup"):
        parallel.coor_descent(torch.randn(4), n_iters=1, k=1, mesh=mesh)


@pytest.mark.parametrize(
    ("backends", "device"),
    [("cpu:gloo", "cpu"), ("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "meta")],
)
def test_lengths_travel_between_hosts_if_a_group_can_send_them(monkeypatch, backends, device):
    """A meta tensor stands for one on a GPU."""

    def all_gather(header, group, name):
        assert header.device.type == device
        return [torch.tensor([3, 0, 7]), torch.tensor([2, 0, 7])]

    monkeypatch.setattr(shards, "group_of", lambda mesh: mesh)
    monkeypatch.setattr(shards, "all_gather", all_gather)
    monkeypatch.setattr(shards.dist, "get_backend_config", lambda group: backends)
    assert shards.Shards.of(torch.empty(2, 3, device="meta"), -1, None).lengths == (3, 2)
