from functools import partial

import pytest
import torch
import triton
from torch.utils.flop_counter import FlopCounterMode

import reference
from kernels.coor_descent import forward as descent_forward
from kernels.route import route
from kernels.routing_scores import routing_scores
from kernels.select import triton as select_kernels
from tests.kernels.devices import DEVICES, capture

INTERPRETED = triton.knobs.runtime.interpret
OPTIONS = {"num_selected": 6, "k": 6.75, "n_iters": 4, "eps": 0.3, "eps_init": 2.0, "eps_decay": 0.7}

# In branches that are not taken, tensors have values that the interpreter's NumPy warns of.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.parametrize("device", DEVICES)]


def inputs(device, b=1, n=37, d=20, r=2, shared=True, dtype=torch.float32):
    """Tokens and routing tokens, whose scores have a standard deviation of 1."""
    x = torch.randn(b, n, d, device=device).to(dtype)
    routing_tokens = torch.randn(1 if shared else b, r, d, device=device) / d**0.5
    return x.requires_grad_(), routing_tokens.requires_grad_()


def check(x, routing_tokens, **options):
    """Indices, weights and tokens, and both gradients, against the reference in fp64.

    Gradients of the relaxed selection are up to 1 / eps, with a promised error of at most 1e-4.
    """
    options = {**OPTIONS, **options}
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, routing_tokens)]
    found = route(x, routing_tokens, **options)
    expected = reference.route(*wide, **options)
    assert torch.equal(found.indices, expected.indices)
    assert found.weights.dtype == torch.promote_types(x.dtype, torch.float32)
    torch.testing.assert_close(found.weights.double(), expected.weights, rtol=0, atol=1e-5)
    assert torch.equal(found.tokens.double(), expected.tokens)
    assert found.tokens.dtype == x.dtype

    upstream = torch.randn_like(found.weights), torch.randn_like(found.tokens)
    actual = torch.autograd.grad(found[1:], (x, routing_tokens), upstream)
    truth = torch.autograd.grad(expected[1:], wide, [tensor.double() for tensor in upstream])
    for gradient, wanted in zip(actual, truth, strict=True):
        # The last token's gradient may be a sum of several rounded ones.
        rounding = torch.finfo(gradient.dtype).eps if gradient.dtype.itemsize == 2 else 0.0
        size = wanted.abs().max().item() if wanted.numel() else 1.0
        bound = 1e-4 * max(size, 1.0) + 2 * rounding * size
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize(("solver", "cosine_sim_scale"), [("coor_descent", 3.0), ("exact", None)])
def test_follows_the_reference(device, solver, cosine_sim_scale):
    mask = torch.rand(2, 37, device=device) > 0.3
    mask[1, 4:] = False
    check(*inputs(device, b=2), solver=solver, cosine_sim_scale=cosine_sim_scale, mask=mask)


@pytest.mark.parametrize(("block_size", "masked"), [(12, True), (32, False), (40, True)])
def test_blocks(device, block_size, masked):
    """Tails of one token and of five, from which six cannot be selected, and a block that is not full."""
    mask = torch.rand(1, 37, device=device) > 0.5 if masked else None
    check(*inputs(device), block_size=block_size, mask=mask)


@pytest.mark.parametrize("solver", ["coor_descent", "exact"])
@pytest.mark.parametrize("block_size", [None, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_straight_through(device, masked, block_size, solver):
    """A mask leaves fewer tokens than are selected, and so does the last block."""
    mask = torch.rand(2, 37, device=device) > 0.5 if masked else None
    if masked:
        mask[1, 4:] = False
    options = {"mask": mask, "block_size": block_size, "solver": solver, "straight_through": True}
    x, routing_tokens = inputs(device, b=2)
    check(x, routing_tokens, **options)
    found = route(x, routing_tokens, **OPTIONS | options).weights
    assert set(found.unique().tolist()) == ({0, 1} if masked or block_size else {1})


def test_nan_passes_through(device):
    x, routing_tokens = inputs(device, b=2)
    with torch.no_grad():
        x[0, 3] = torch.nan
    for package_route in (route, reference.route):
        weights = package_route(x, routing_tokens, **OPTIONS, straight_through=True).weights
        assert weights[0].isnan().all()
        assert (weights[1] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(device, dtype):
    check(*inputs(device, dtype=dtype))


@pytest.mark.parametrize(
    "shape", [{"n": 6, "d": 1, "r": 1}, {"b": 2, "shared": False, "r": 3, "d": 33}, {"r": 9, "n": 7}, {"b": 0}]
)
def test_shapes(device, shape):
    check(*inputs(device, **shape))


def test_layouts(device):
    x, routing_tokens = inputs(device)
    for view in (x[:, ::3].mT.contiguous().mT, x[:1, ::2].expand(2, -1, -1)):
        check(view.detach().requires_grad_(), routing_tokens)


def test_of_a_router(device):
    """With blocks, routes, cosines and a mask, compared with the plain one."""
    options = {"num_routing_tokens": 2, "cosine_sim_routing": True, "route_block_size": 16, "n_iters": 3, "eps": 0.3}
    plain, fused = (
        reference.CoordinateDescentRouter(20, use_triton=use_triton, straight_through=False, **options).to(device)
        for use_triton in (False, True)
    )
    fused.load_state_dict(plain.state_dict())
    x, mask = torch.randn(1, 37, 20, device=device), torch.rand(1, 37, device=device) > 0.3
    expected, found = (router(x, num_tokens=9, mask=mask) for router in (plain, fused))
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.routed_tokens, expected.routed_tokens)
    assert torch.equal(found.routed_mask, expected.routed_mask)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)


def test_a_fully_masked_row(device):
    x, routing_tokens = inputs(device, b=2)
    mask = torch.tensor([[True], [False]], device=device).expand(2, 37)
    routed = route(x, routing_tokens, mask=mask, **OPTIONS)
    assert not routed.weights[1].any()
    assert routed.indices[1].tolist() == [list(range(6))] * 2
    dx, _ = torch.autograd.grad(routed.weights.square().sum(), (x, routing_tokens))
    assert dx[0].any()
    assert not dx[1].any()


def test_a_token_that_several_routes_select(device):
    """Its gradient is the sum of those of all its copies."""
    x, routing_tokens = inputs(device, r=1)
    same = routing_tokens.detach().expand(1, 3, 20)
    _, _, tokens = route(x, same, **OPTIONS)
    upstream = torch.randn_like(tokens)
    (together,) = torch.autograd.grad(tokens, x, upstream)
    alone = route(x, same[:, :1], **OPTIONS).tokens
    (summed,) = torch.autograd.grad(alone, x, upstream.sum(dim=1, keepdim=True))
    assert together.any()
    torch.testing.assert_close(together, summed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needs", ["x", "routing_tokens"])
@pytest.mark.parametrize("of", ["weights", "tokens"])
def test_one_gradient_alone(device, needs, of):
    named = dict(zip(("x", "routing_tokens"), inputs(device), strict=True))
    output = getattr(route(**named, **OPTIONS), of)
    upstream = torch.randn_like(output)
    both = torch.autograd.grad(output, list(named.values()), upstream)
    named = {name: tensor.detach().requires_grad_(name == needs) for name, tensor in named.items()}
    (alone,) = torch.autograd.grad(getattr(route(**named, **OPTIONS), of), named[needs], upstream)
    torch.testing.assert_close(alone, both[0 if needs == "x" else 1], rtol=1e-5, atol=1e-7)


def test_without_a_gradient_nothing_is_saved(device):
    x, routing_tokens = inputs(device)
    with torch.no_grad():
        routed = route(x, routing_tokens, **OPTIONS)
    assert not routed.weights.requires_grad
    for tensor, again in zip(routed, route(x, routing_tokens, **OPTIONS), strict=True):
        assert torch.equal(tensor, again)


@pytest.fixture
def long_rows(set_sizes):
    """Rows that several programs share in each kernel."""
    set_sizes(select_kernels, CHUNK=1024, LONGEST_ALONE=1024)
    set_sizes(descent_forward, RESIDENT=4096)


@pytest.mark.skipif(INTERPRETED, reason="one program after the other is")
@pytest.mark.usefixtures("long_rows")
def test_is_bitwise_reproducible(device):
    x, routing_tokens = inputs(device, n=5000)

    def step():
        routed = route(x, routing_tokens, **OPTIONS)
        loss = routed.weights.square().sum() + routed.tokens.square().sum()
        return (*routed, *torch.autograd.grad(loss, (x, routing_tokens)))

    assert all(map(torch.equal, step(), step()))


def test_second_derivative_is_refused(device):
    x, routing_tokens = inputs(device, n=8)
    weights = route(x, routing_tokens, **OPTIONS).weights
    (dx,) = torch.autograd.grad(weights.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.route"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_selected": 38}, "num_selected"),
        ({"k": -1.0}, "k"),
        ({"n_iters": 0}, "n_iters"),
        ({"solver": "newton"}, "solver"),
        ({"block_size": 0}, "block_size"),
        ({"mask": torch.ones(37).bool()}, "mask"),
        ({"routing_tokens": torch.ones(2, 20)}, "routing_tokens"),
    ],
)
def test_wrong_arguments(device, arguments, named):
    x, routing_tokens = inputs("cpu")
    with pytest.raises(ValueError, match=rf"^{named} must be .*, got "):
        route(**{"x": x, "routing_tokens": routing_tokens, **OPTIONS, **arguments})


@pytest.mark.skipif(INTERPRETED, reason="says nothing about kernels")
@pytest.mark.parametrize("exact", [False, True])
def test_is_an_operator(device, exact):
    x, routing_tokens = inputs(device, n=9, d=4)
    mask = torch.rand(1, 9, device=device) > 0.2
    arguments = (x, routing_tokens, mask, 2, 2.5, 3, 0.3, 1.0, 0.7, exact, True, 4, True, True)
    torch.library.opcheck(torch.ops.colt5.route, arguments)


@pytest.mark.skipif(INTERPRETED, reason="says nothing about kernels")
@pytest.mark.parametrize("pieces", [False, True])
def test_flops_are_counted(device, pieces):
    """Those of scores: 37 tokens of size 20, 2 routes; and twice as many for the two gradients."""
    x, routing_tokens = inputs(device)
    with FlopCounterMode(display=False) as counter:
        output = routing_scores(x, routing_tokens) if pieces else route(x, routing_tokens, **OPTIONS).weights
        assert counter.get_total_flops() == 2 * 37 * 20 * 2
        output.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 37 * 20 * 2


@pytest.mark.skipif(INTERPRETED, reason="says nothing about kernels")
def test_compiles_into_one_graph(device):
    x, routing_tokens = inputs(device)
    function = partial(route, **OPTIONS)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results = []
    for routed in (function(x, routing_tokens), compiled(x, routing_tokens)):
        loss = routed.weights.square().sum() + routed.tokens.square().sum()
        results.append((*routed, *torch.autograd.grad(loss, (x, routing_tokens))))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1000, 200_000])
def test_is_captured_in_a_cuda_graph(device, n):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    x, routing_tokens = inputs(device, n=n, d=64)

    def step():
        indices, weights, tokens = route(x, routing_tokens, **OPTIONS)
        loss = weights.square().sum() + tokens.square().sum()
        return (indices, weights.detach(), tokens.detach(), *torch.autograd.grad(loss, (x, routing_tokens)))

    graph, captured = capture(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences(device, dtype):
    if device == "cpu":
        pytest.skip("too long for a CPU")
    mask = torch.rand(2, 100_000, device=device) > 0.3
    options = {"num_selected": 1000, "k": 1125.0, "n_iters": 20}
    check(*inputs(device, b=2, n=100_000, d=100, dtype=dtype), mask=mask, **options)
