"""The fused attention to routed tokens against the plain one in fp64. It runs on the CPU path, in Triton's interpreter
and on a GPU."""

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kernels import routed_attention
from tests.kernels.devices import DEVICE, capture

INTERPRETED = triton.knobs.runtime.interpret
ON_CPU_PATH = DEVICE == "cpu" and not INTERPRETED


def problem(batch, n_queries, heads, dim, routes, n_keys, dtype=torch.float32, masked=False):
    tensors = {
        "query": torch.randn(batch, n_queries, heads * dim).to(DEVICE, dtype),
        "key_value": torch.randn(batch, routes, n_keys, 2 * heads // routes * dim).to(DEVICE, dtype),
        "weights": (torch.rand(batch, routes, n_keys) + 0.5).to(DEVICE),
        "null_kv": torch.randn(2, heads, dim).to(DEVICE),
    }
    mask = None
    if masked:
        mask = torch.rand(batch, routes, n_keys, device=DEVICE) > 0.4
        mask[:1, :1] = False
    return tensors, mask


def results(operation, tensors, mask, upstream, dtype=None, **options):
    tensors = {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in tensors.items()}
    out = operation(**tensors, mask=mask, **options)
    gradients = torch.autograd.grad(out, list(tensors.values()), upstream.to(out.dtype))
    return {"out": out, **dict(zip(tensors, gradients, strict=True))}


def check(tensors, mask=None, **options):
    upstream = torch.randn_like(tensors["query"])
    if not upstream.numel():
        assert routed_attention(**tensors, mask=mask, **options).shape == upstream.shape
        return
    actual = results(routed_attention, tensors, mask, upstream, **options)
    plain = results(reference.routed_attention, tensors, mask, upstream, **options)
    expected = results(reference.routed_attention, tensors, mask, upstream, torch.float64, **options)
    width = tensors["query"].shape[-1]
    for name, truth in expected.items():
        assert actual[name].dtype == plain[name].dtype
        if not truth.numel():
            continue
        error, of_plain = ((each[name].double() - truth).abs().max().item() for each in (actual, plain))
        # If terms cancel, as in the gradient of a query with one key, their roundings remain.
        scale = max(truth.abs().max().item(), upstream.abs().max().item() * width**0.5 / 10)
        rounding = torch.finfo(tensors["query"].dtype).eps
        assert error <= max(2 * of_plain, 8 * rounding * scale), (name, error, of_plain, scale)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 5, 2, 4, 1, 7), (1, 40, 4, 16, 2, 37), (2, 3, 2, 20, 2, 1), (1, 3, 2, 8, 1, 0), (0, 3, 2, 4, 1, 5)],
    ids=str,
)  # fmt: skip
def test_matches_plain_pytorch(shape, masked):
    check(*problem(*shape, masked=masked))
    check(*problem(*shape, masked=masked), multiply_keys_by_score=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("multiply_keys_by_score", [False, True])
def test_half_precision(dtype, multiply_keys_by_score):
    tensors, mask = problem(2, 70, 4, 16, 2, 70, dtype, masked=True)
    check(tensors, mask, multiply_keys_by_score=multiply_keys_by_score)


def test_fp64_and_wide_heads_stay_what_they_are():
    tensors, mask = problem(1, 3, 2, 200, 1, 5, masked=True)
    check(tensors, mask)
    out = routed_attention(**{name: tensor.double() for name, tensor in tensors.items()}, mask=mask)
    expected = reference.routed_attention(**{name: tensor.double() for name, tensor in tensors.items()}, mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_strides():
    tensors, _ = problem(2, 6, 4, 8, 2, 9)
    # The layout of one product for all routes.
    key_value = tensors["key_value"].transpose(1, 2).contiguous().transpose(1, 2)
    tensors |= {"key_value": key_value, "query": tensors["query"].mT.contiguous().mT}
    check(tensors)
    check(tensors | {"key_value": key_value.mT.contiguous().mT, "weights": tensors["weights"][:, :1].expand(2, 2, 9)})


def test_extreme_similarities():
    tensors, mask = problem(1, 4, 2, 8, 1, 6, masked=True)
    mask[:] = True
    tensors["query"] *= 1e4
    upstream = torch.randn_like(tensors["query"])
    actual = results(routed_attention, tensors, mask, upstream)
    expected = results(reference.routed_attention, tensors, mask, upstream, torch.float64)
    torch.testing.assert_close(actual["out"].double(), expected["out"], rtol=1e-5, atol=1e-5)
    assert all(each.isfinite().all() for each in actual.values())


def test_a_query_with_nothing_else_attends_to_the_learned_pair():
    tensors, mask = problem(1, 3, 2, 4, 1, 5, masked=True)
    assert not mask.any()
    out = routed_attention(**tensors, mask=mask)
    torch.testing.assert_close(out, tensors["null_kv"][1].flatten().expand(1, 3, 8))


def test_masked_keys_have_no_gradient_and_no_say():
    tensors, _ = problem(1, 3, 2, 4, 1, 6)
    mask = (torch.arange(6, device=DEVICE) < 4).view(1, 1, 6)
    upstream = torch.randn(1, 3, 8, device=DEVICE)
    before = results(routed_attention, tensors, mask, upstream)
    tensors["key_value"][:, :, 4:] = 1e4
    after = results(routed_attention, tensors, mask, upstream)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not after["key_value"][:, :, 4:].any()
    assert not after["weights"][:, :, 4:].any()


@settings(max_examples=4 if INTERPRETED else 20)
@given(seed=st.integers(0, 2**20), n_keys=st.integers(1, 20))
def test_the_order_of_keys_is_nothing(seed, n_keys):
    torch.manual_seed(seed)
    tensors, mask = problem(1, 3, 2, 4, 1, n_keys, masked=True)
    order = torch.randperm(n_keys, device=DEVICE)
    turned = tensors | {name: tensors[name][:, :, order] for name in ("key_value", "weights")}
    outs = [routed_attention(**each, mask=m) for each, m in ((tensors, mask), (turned, mask[:, :, order]))]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query": torch.zeros(2, 8)}, r"query must be of shape \(b, i, h \* d\)"),
        ({"query": torch.zeros(1, 3, 8).int()}, "query must be a tensor of a float dtype"),
        ({"null_kv": torch.zeros(2, 3, 4)}, r"null_kv must be of shape \(2, h, d\) with h \* d = 8"),
        ({"key_value": torch.zeros(1, 5, 16)}, r"key_value must be of shape \(b, r, j, 2 \* h / r \* d\)"),
        ({"key_value": torch.zeros(1, 1, 5, 8)}, r"key_value must be of shape \(1, r, j, 2 \* 2 / r \* 4\)"),
        (
            {"key_value": torch.zeros(1, 1, 5, 16).half()},
            "key_value must be of dtype torch.float32, that of query",
        ),
        ({"weights": torch.zeros(1, 5)}, r"weights must be of shape \(1, 1, 5\)"),
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, r"mask must be of shape \(1, 1, 5\)"),
        ({"mask": torch.ones(1, 1, 5)}, "mask must be a tensor of dtype torch.bool"),
    ],
)
@pytest.mark.parametrize("operation", [routed_attention, reference.routed_attention])
def test_wrong_arguments_are_named(operation, wrong, message):
    shapes = {"query": (1, 3, 8), "key_value": (1, 1, 5, 16), "weights": (1, 1, 5), "null_kv": (2, 2, 4)}
    with pytest.raises(ValueError, match=message):
        operation(**{name: torch.zeros(shape) for name, shape in shapes.items()} | wrong)


def test_opcheck():
    if ON_CPU_PATH:
        pytest.skip("the CPU path composes PyTorch's operators")
    tensors, mask = problem(1, 3, 2, 4, 1, 5, torch.bfloat16, masked=True)
    tensors = [tensor.requires_grad_() for tensor in tensors.values()]
    torch.library.opcheck(torch.ops.colt5.routed_attention.default, (*tensors, mask, True, True))


@pytest.mark.skipif(INTERPRETED, reason="what is compiled is PyTorch's part; the interpreter adds nothing but time")
def test_compiles_as_one_graph():
    tensors, mask = problem(1, 3, 2, 4, 1, 5, masked=True)
    compiled = torch.compile(routed_attention, fullgraph=True, backend="aot_eager")
    upstream = torch.randn_like(tensors["query"])
    both = [results(function, tensors, mask, upstream) for function in (compiled, routed_attention)]
    for mine, theirs in zip(*(each.values() for each in both), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.skipif(ON_CPU_PATH, reason="the CPU path has derivatives of any order")
def test_there_is_no_second_derivative():
    tensors, _ = problem(1, 3, 2, 4, 1, 5)
    query = tensors["query"].requires_grad_()
    (gradient,) = torch.autograd.grad(routed_attention(**tensors).square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_and_equal_from_run_to_run():
    tensors, mask = problem(2, 300, 4, 64, 2, 333, torch.bfloat16, masked=True)
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    upstream = torch.randn_like(tensors["query"])

    def step():
        out = routed_attention(**tensors, mask=mask)
        return out.detach(), *torch.autograd.grad(out, list(tensors.values()), upstream)

    graph, captured = capture(step)
    with torch.no_grad():
        tensors["query"].copy_(torch.randn_like(upstream))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, step(), strict=True))
