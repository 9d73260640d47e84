import pytest
import torch
import triton

import reference
from kernels.routing_scores import routing_scores
from tests.kernels.devices import DEVICES

pytestmark = pytest.mark.parametrize("device", DEVICES)


def inputs(device, b=2, n=13, d=20, r=2, shared=True, dtype=torch.float32):
    """Tokens and routing tokens."""
    x = torch.randn(b, n, d, device=device).to(dtype)
    return x, torch.randn(1 if shared else b, r, d, device=device)


def check(x, routing_tokens, scale=None):
    """Values and gradients against the reference in fp64; each is a sum of products, rounded in fp32.

    The error of a sum of m products is at most m roundings of the sum of their sizes, and typically the square root of
    m: 8 of them are for sums of up to 64.
    """
    x, routing_tokens = x.requires_grad_(), routing_tokens.requires_grad_()
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, routing_tokens)]
    scores = routing_scores(x, routing_tokens, cosine_sim_scale=scale)
    expected = reference.routing_scores(*wide, cosine_sim_scale=scale)
    rounding = 8 * torch.finfo(scores.dtype).eps
    size = 1.0 if expected.numel() == 0 else expected.abs().max().item()
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=rounding * size)

    grad = torch.randn_like(scores)
    found = torch.autograd.grad(scores, (x, routing_tokens), grad)
    for actual, wanted, of in zip(found, torch.autograd.grad(expected, wide, grad.double()), wide, strict=True):
        assert actual.dtype == (x.dtype if of is wide[0] else routing_tokens.dtype)
        size = 1.0 if wanted.numel() == 0 else wanted.abs().max().item()
        own_rounding = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual.double(), wanted, rtol=own_rounding, atol=2 * rounding * size)


@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("shape", [{}, {"b": 1, "d": 133, "r": 5}, {"shared": False, "d": 7}])
def test_follows_the_reference(device, scale, shape):
    check(*inputs(device, **shape), scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(device, dtype):
    check(*inputs(device, dtype=dtype))


def test_more_routes_than_a_program_has_room_for(device):
    check(*inputs(device, r=9))


def test_layouts(device):
    x, routing_tokens = inputs(device)
    check(x[:, ::3].detach(), routing_tokens)
    check(x.mT.contiguous().mT, routing_tokens)
    check(x[:1].expand(3, -1, -1).detach(), routing_tokens)
    check(x[:, :, :1].detach(), routing_tokens[..., :1].detach())
    check(x[:0], routing_tokens)
    check(x[:, :0], routing_tokens)


def test_cosines_of_nothing_and_of_little(device):
    """A token below the smallest norm is divided by it, which is then a constant."""
    x, routing_tokens = inputs(device, n=3)
    x[:, 0], x[:, 1] = 0.0, x[:, 1] * 1e-14
    x, wide = x.requires_grad_(), x.detach().double().requires_grad_()
    scores = routing_scores(x, routing_tokens, cosine_sim_scale=2.0)
    expected = reference.routing_scores(wide, routing_tokens.double(), cosine_sim_scale=2.0)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    (dx,), (wanted,) = torch.autograd.grad(scores.sum(), x), torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(dx.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("needs", ["x", "routing_tokens"])
def test_one_gradient_alone(device, needs):
    x, routing_tokens = inputs(device)
    named = {"x": x, "routing_tokens": routing_tokens}
    both = torch.autograd.grad(
        routing_scores(x.requires_grad_(), routing_tokens.requires_grad_()).sum(), (x, routing_tokens)
    )
    named = {name: tensor.detach().requires_grad_(name == needs) for name, tensor in named.items()}
    (alone,) = torch.autograd.grad(routing_scores(**named).sum(), named[needs])
    assert torch.equal(alone, both[0 if needs == "x" else 1])


def test_autocast_changes_nothing(device):
    x, routing_tokens = inputs(device, dtype=torch.bfloat16)
    with torch.autocast(device, dtype=torch.bfloat16):
        scores = routing_scores(x, routing_tokens)
    assert torch.equal(scores, routing_scores(x, routing_tokens))


def test_second_derivative_is_refused(device):
    x, routing_tokens = inputs(device)
    scores = routing_scores(x.requires_grad_(), routing_tokens)
    (dx,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.routing_scores"):
        dx.sum().backward()


def test_wrong_arguments(device):
    with pytest.raises(ValueError, match=r"^routing_tokens must be of shape .*, got shape \(3, 2, 20\)"):
        routing_scores(*inputs("cpu")[:1], torch.ones(3, 2, 20))


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="says nothing about kernels")
@pytest.mark.parametrize("cosine", [False, True])
def test_is_an_operator(device, cosine):
    x, routing_tokens = inputs(device, n=5, d=4)
    arguments = (x.requires_grad_(), routing_tokens.requires_grad_(), cosine)
    torch.library.opcheck(torch.ops.colt5.routing_scores, arguments)
    compiled = torch.compile(routing_scores, backend="aot_eager", fullgraph=True)
    scores = compiled(x, routing_tokens), routing_scores(x, routing_tokens)
    torch.testing.assert_close(*scores)
    # Products on a CPU may be summed in another order from call to call.
    assert device == "cpu" or torch.equal(*scores)
