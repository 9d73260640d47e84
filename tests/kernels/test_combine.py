"""The fused sum of branches against the plain one in fp64. It runs on the CPU path, in Triton's interpreter and on a
GPU."""

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kernels import combine
from tests.kernels.devices import DEVICE, capture

INTERPRETED = triton.knobs.runtime.interpret
ON_CPU_PATH = DEVICE == "cpu" and not INTERPRETED
OPTIONAL = ("null", "light", "residual", "bias", "routed_bias")
AUTOCAST = {"routed": torch.bfloat16, "light": torch.bfloat16}


def problem(batch, k, n, d, *, names=OPTIONAL, dtypes=None, past=0):
    """Tensors by name; the first `past` routed tokens of each sequence have no place."""
    shapes = {"routed": (batch, k, d), "scores": (batch, k), **dict.fromkeys(("null", "bias", "routed_bias"), (d,))}
    shapes |= dict.fromkeys(("light", "residual"), (batch, n, d))
    tensors = {
        name: torch.randn(shape, device=DEVICE).to((dtypes or {}).get(name, torch.float32))
        for name, shape in shapes.items()
        if name in ("routed", "scores", *names)
    }
    indices = torch.rand(batch, n, device=DEVICE).topk(k).indices
    indices[:, :past] = n + torch.arange(past, device=DEVICE) % 2
    return tensors, indices


def check(tensors, indices, n, **options):
    fused, plain = (
        {name: tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_() for name, tensor in tensors.items()}
        for dtype in (None, torch.float64)
    )
    out = combine(**fused, indices=indices, length=n, **options)
    start = options.get("start", 0)
    expected = reference.combine(**plain, indices=indices, length=n, start=start)
    assert out.shape == expected.shape
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, list(fused.values()), upstream)
    truths = torch.autograd.grad(expected, list(plain.values()), upstream.double())
    for actual, truth in zip((out, *gradients), (expected, *truths), strict=True):
        largest = truth.abs().max().item() if truth.numel() else 0.0
        # A few sums in fp32, and one rounding to the dtype of the result.
        eps = 8 * torch.finfo(torch.float32).eps + (torch.finfo(actual.dtype).eps if actual.dtype.itemsize < 4 else 0)
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=eps * largest)
    return out


@pytest.mark.parametrize(
    "names",
    [(), ("null",), ("light",), ("null", "light"), OPTIONAL, ("residual",), ("bias",), ("routed_bias",)],
    ids=str,
)
@pytest.mark.parametrize("past", [0, 2])
def test_matches_plain_pytorch(names, past):
    out = check(*problem(2, 5, 23, 12, names=names, past=past), 23)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("start", [1, 7, 23])
@pytest.mark.parametrize("names", [("null",), OPTIONAL], ids=str)
def test_null_from_a_start_on(names, start):
    check(*problem(2, 5, 23, 12, names=names), 23, start=start)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 7, 33), (3, 1, 9, 2100), (0, 2, 4, 8), (2, 0, 4, 8)], ids=str)
def test_any_shape(shape):
    check(*problem(*shape), shape[2])


@pytest.mark.parametrize("dtypes", [AUTOCAST, dict.fromkeys(("routed", "scores", *OPTIONAL), torch.float16)], ids=str)
def test_half_precision(dtypes):
    tensors, indices = problem(2, 4, 11, 10, dtypes=dtypes)
    assert check(tensors, indices, 11).dtype == (torch.float32 if dtypes is AUTOCAST else torch.float16)
    assert check(tensors, indices.int(), 11, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_strides():
    tensors, indices = problem(2, 4, 12, 10)
    tensors["light"] = tensors["light"].mT.contiguous().mT
    tensors["residual"] = tensors["residual"][:, :1].expand(2, 12, 10)
    tensors["routed"] = torch.cat((tensors["routed"],) * 2, dim=1)[:, ::2]
    check(tensors, indices.mT.contiguous().mT, 12)


def test_tokens_without_a_place_have_no_gradient():
    tensors, indices = problem(1, 3, 8, 4, past=3)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    out = combine(**tensors, indices=indices, length=8)
    torch.testing.assert_close(out, sum(tensors[name] for name in ("null", "light", "residual", "bias")))
    for gradient in torch.autograd.grad(out.sum(), (tensors["routed"], tensors["scores"])):
        assert not gradient.any()


def test_the_null_token_has_the_gradient_of_what_is_not_routed():
    """It is not the small difference of large numbers, which belong to routed tokens."""
    tensors, indices = problem(1, 3, 8, 4, names=("null",))
    null = tensors["null"].requires_grad_()
    upstream = torch.ones(1, 8, 4, device=DEVICE).index_fill(1, indices[0], 1e30)
    (gradient,) = torch.autograd.grad(combine(**tensors, indices=indices, length=8), null, upstream)
    assert gradient.tolist() == [5.0] * 4


@settings(max_examples=6 if INTERPRETED else 30)
@given(data=st.data())
def test_each_token_gets_its_own(data):
    n = data.draw(st.integers(1, 12))
    places = data.draw(st.lists(st.integers(0, n + 2), min_size=1, max_size=n, unique=True))
    k = len(places)
    routed = torch.arange(1.0, k + 1, device=DEVICE).view(1, k, 1)
    out = combine(
        routed,
        torch.full((1, k), 2.0, device=DEVICE),
        torch.tensor([places], device=DEVICE),
        length=n,
        null=torch.tensor([-1.0], device=DEVICE),
    )
    expected = [2.0 * (places.index(i) + 1) if i in places else -1.0 for i in range(n)]
    assert out.flatten().tolist() == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"routed": torch.zeros(3, 4)}, r"routed must be of shape \(b, k, d\)"),
        ({"routed": torch.zeros(1, 3, 4).int()}, "routed must be a tensor of a float dtype"),
        ({"scores": torch.zeros(1, 4)}, r"scores must be of shape \(1, 3\)"),
        ({"indices": torch.zeros(1, 3)}, "indices must be a tensor of int32 or int64"),
        ({"length": 0}, "length must be >= 1, got 0"),
        ({"null": torch.zeros(1, 4)}, r"null must be of shape \(4,\)"),
        ({"light": torch.zeros(1, 6, 4)}, r"light must be of shape \(1, 5, 4\)"),
        ({"residual": torch.zeros(5, 4)}, r"residual must be of shape \(1, 5, 4\)"),
        ({"bias": torch.zeros(1, 4)}, r"bias must be of shape \(4,\)"),
        ({"dtype": torch.int64}, "dtype must be None or a float dtype"),
    ],
)
@pytest.mark.parametrize("operation", [combine, reference.combine])
def test_wrong_arguments_are_named(operation, wrong, message):
    right = {"routed": torch.zeros(1, 3, 4), "scores": torch.zeros(1, 3), "indices": torch.arange(3)[None], "length": 5}
    with pytest.raises(ValueError, match=message):
        operation(**{**right, **wrong})


def test_opcheck():
    if ON_CPU_PATH:
        pytest.skip("the CPU path composes PyTorch's operators")
    tensors, indices = problem(2, 3, 7, 6, dtypes=AUTOCAST, past=1)
    routed, scores, null, *biases, light, residual = (tensor.requires_grad_() for tensor in tensors.values())
    arguments = (routed, scores, indices, null, light, residual, *biases, 7, 2, torch.float32)
    torch.library.opcheck(torch.ops.colt5.combine.default, arguments)


@pytest.mark.skipif(INTERPRETED, reason="what is compiled is PyTorch's part; the interpreter adds nothing but time")
def test_compiles_as_one_graph():
    tensors, indices = problem(2, 3, 7, 6, dtypes=AUTOCAST)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    compiled = torch.compile(combine, fullgraph=True, backend="aot_eager")
    outs = [function(**tensors, indices=indices, length=7) for function in (compiled, combine)]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), list(tensors.values())) for out in outs))


@pytest.mark.skipif(ON_CPU_PATH, reason="the CPU path has derivatives of any order")
def test_there_is_no_second_derivative():
    tensors, indices = problem(1, 3, 7, 6)
    scores = tensors["scores"].requires_grad_()
    out = combine(**tensors, indices=indices, length=7)
    (gradient,) = torch.autograd.grad(out.square().sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_and_equal_from_run_to_run():
    tensors, indices = problem(2, 60, 3000, 96, dtypes=AUTOCAST)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    upstream = torch.randn(2, 3000, 96, device=DEVICE)

    def step():
        out = combine(**tensors, indices=indices, length=3000)
        return out.detach(), *torch.autograd.grad(out, list(tensors.values()), upstream)

    graph, captured = capture(step)
    indices.copy_(indices.roll(1, dims=0))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))
