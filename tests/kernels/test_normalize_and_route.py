import random

import pytest
import torch
import triton

import reference
from kernels.normalize import normalize
from kernels.normalize_and_route import normalize_and_route
from tests.kernels.devices import DEVICES

INTERPRETED = triton.knobs.runtime.interpret
OPTIONS = {"k": 6.75, "n_iters": 4, "eps": 0.3, "eps_init": 2.0, "eps_decay": 0.7, "norm_eps": 1e-5}
RESULTS = ("weights", "tokens", "normalized", "x")

# In branches that are not taken, tensors have values that the interpreter's NumPy warns of.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.parametrize("device", DEVICES)]


def inputs(device, b=2, n=37, d=20, r=2, biased=True, shared=True, dtype=torch.float32):
    """Tokens, routing tokens whose scores have a standard deviation of 1, and weight and bias of a norm."""
    made = [
        torch.randn(b, n, d, device=device).to(dtype),
        torch.randn(1 if shared else b, r, d, device=device) / d**0.5,
        1 + 0.3 * torch.randn(d, device=device),
    ]
    return [each.requires_grad_() for each in (*made, *([torch.randn(d, device=device)] if biased else []))]


def check(tensors, wanted=RESULTS, **options):
    """Results, and the gradients of all inputs through the wanted ones, against the reference in fp64."""
    options = {"num_selected": 6, **OPTIONS, **options}
    x = tensors[0]
    wide = [each.detach().double().requires_grad_() for each in tensors]
    found, expected = normalize_and_route(*tensors, **options), reference.normalize_and_route(*wide, **options)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.tokens.double(), expected.tokens)
    assert found.tokens.dtype == x.dtype
    torch.testing.assert_close(found.weights.double(), expected.weights, rtol=0, atol=1e-5)
    eps = torch.finfo(found.normalized.dtype).eps
    torch.testing.assert_close(found.normalized.double(), expected.normalized.double(), rtol=2 * eps, atol=1e-5)

    upstream = [torch.randn_like(getattr(found, name)) for name in wanted]
    actual, truth = (
        torch.autograd.grad([getattr(results, name) for name in wanted], leaves, grads, materialize_grads=True)
        for results, leaves, grads in ((found, tensors, upstream), (expected, wide, [g.double() for g in upstream]))
    )
    for gradient, exact in zip(actual, truth, strict=True):
        size = max(exact.abs().max().item() if exact.numel() else 1.0, 1.0)
        bound = (1e-4 + torch.finfo(gradient.dtype).eps) * size
        torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("seed", range(12))
def test_follows_the_reference(device, seed):
    """Any number of routes and features, masked or not, with gradients of any results."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    b, n, shared = rng.randint(1, 3), rng.randint(1, 40), rng.random() < 0.8
    sizes = {"b": b, "n": n, "d": rng.choice([1, 5, 16, 33]), "r": rng.randint(1, 5)}
    selected = rng.randint(1, min(n, 6))
    check(
        inputs(device, **sizes, biased=rng.random() < 0.5, shared=shared),
        rng.sample(RESULTS, rng.randint(1, 4)),
        num_selected=selected,
        k=float(selected),
        solver=rng.choice(["coor_descent", "exact"]),
        straight_through=rng.random() < 0.5,
        center=rng.random() < 0.5,
        mask=torch.rand(b, n, device=device) > 0.4 if rng.random() < 0.5 else None,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(device, dtype):
    check(inputs(device, dtype=dtype), center=True)


def test_normalized_tokens_have_the_dtype_that_is_asked_for(device):
    check(inputs(device), dtype=torch.bfloat16)


@pytest.mark.parametrize("b", [0, 1])
def test_no_tokens_and_one(device, b):
    check(inputs(device, b=b, n=1), num_selected=1, k=1.0)


def test_layouts(device):
    x, *others = inputs(device)
    for view in (x[:, ::3].mT.contiguous().mT, x[:1, ::2].expand(2, -1, -1), x[..., ::2].repeat(1, 1, 2)):
        check([view.detach().requires_grad_(), *others])


def test_normalizes_as_the_norm_alone(device):
    x, routing_tokens, weight, bias = inputs(device)
    for center in (False, True):
        options = {"num_selected": 6, **OPTIONS, "center": center, "dtype": torch.bfloat16}
        found = normalize_and_route(x, routing_tokens, weight, bias, **options).normalized
        assert torch.equal(found, normalize(x, weight, bias, center=center, eps=1e-5, dtype=torch.bfloat16))


def test_each_route_lies_by_itself(device):
    """Dividing the routes then gives tensors that need no copy."""
    found = normalize_and_route(*inputs(device, r=3), num_selected=6, **OPTIONS)
    for each in found[:3]:
        assert all(of_route.is_contiguous() for of_route in each.unbind(1)) or not INTERPRETED


def test_repeats_bitwise(device):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        tensors = inputs(device)
        found = normalize_and_route(*tensors, num_selected=6, **OPTIONS)
        wanted = [getattr(found, name) for name in RESULTS]
        results.append([*wanted, *torch.autograd.grad(wanted, tensors, [torch.ones_like(each) for each in wanted])])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not INTERPRETED, reason="the CPU path composes other operations")
def test_operator(device):
    """PyTorch's checks of an operator; its gradient is checked above."""
    x, routing_tokens, weight, bias = (each.detach() for each in inputs(device, n=9, d=4))
    mask = torch.rand(x.shape[:2], device=device) > 0.2
    norm, routing = (True, 1e-5, torch.float32), (2, 2.0, 2, 0.3, 2.0, 0.7, False, True, False)
    for given in (None, mask):
        arguments = (x, routing_tokens, weight, bias, given, *norm, *routing, True)
        torch.library.opcheck(torch.ops.colt5.normalize_and_route, arguments)


def test_arguments(device):
    x, routing_tokens, weight, bias = inputs(device)
    for options, named in (
        ({"num_selected": 38}, "num_selected must be from 1 to n = 37, got 38"),
        ({"norm_eps": 0.0}, "eps must be"),
        ({"mask": torch.ones(2, 36, dtype=torch.bool, device=device)}, "mask must be"),
    ):
        with pytest.raises(ValueError, match=named):
            normalize_and_route(x, routing_tokens, weight, bias, **{"num_selected": 6, **OPTIONS, **options})
