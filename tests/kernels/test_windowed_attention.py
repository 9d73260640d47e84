import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

import reference
from colt5_bench.measuring.static_facts import compiled_kernels
from kernels._common.tensors import triton_for_cpu_tensors
from kernels.windowed_attention import pairs_in_reach, windowed_attention
from reference.layers.light_attention import WindowedAttention
from tests.correct import check_correct
from tests.kernels.devices import DEVICES, capture

INTERPRETED = triton.knobs.runtime.interpret

# If a query has seen no key within reach yet, the interpreter's NumPy warns of infinities that are not used.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.parametrize("device", DEVICES)]

in_a_kernel = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="a CPU tensor gets the definition"
)
around_the_kernels = pytest.mark.skipif(INTERPRETED, reason="about what is around the kernels")


def dense(qkv, heads, window_size, causal, mask=None, theta=None, bias=None):
    """By the definition, with all pairs of tokens."""
    batch, n, _ = qkv.shape
    query, key, value = qkv.view(batch, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    if theta is not None:
        half = query.shape[-1] // 2
        frequencies = theta ** -(torch.arange(half, device=qkv.device, dtype=qkv.dtype) / half)
        angles = torch.arange(n, device=qkv.device)[:, None] * frequencies
        rotations = torch.polar(torch.ones_like(angles), angles)
        query, key = (torch.view_as_real(torch.complex(*x.chunk(2, -1)) * rotations) for x in (query, key))
        query, key = (x.transpose(-1, -2).flatten(-2) for x in (query, key))
    i, j = torch.arange(n, device=qkv.device)[:, None], torch.arange(n, device=qkv.device)
    near = (j <= i) & (j // window_size >= i // window_size - 1) if causal else (i - j).abs() <= window_size
    near = near.expand(batch, 1, n, n) if mask is None else near & mask[:, None, None]
    similarity = query @ key.mT / query.shape[-1] ** 0.5
    if bias is not None:
        reach = bias.shape[1] // 2
        similarity = similarity + bias[:, reach + (j - i).clamp(-reach, reach)]
    similarity = similarity.masked_fill(~near, -torch.inf)
    weight = torch.where(near.any(dim=-1, keepdim=True), similarity.softmax(dim=-1), 0.0)
    return (weight @ value).transpose(1, 2).flatten(-2)


def with_gradient(operation, qkv, grad, bias=None):
    leaves = {"qkv": qkv.detach().requires_grad_()}
    if bias is not None:
        leaves["bias"] = bias.detach().requires_grad_()
    out = operation(*leaves.values())
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(qkv, heads, window_size, causal=False, mask=None, theta=None, bias=None):
    """Values and gradients are as close to the definition in fp64 as a correct computation in the same dtype."""
    batch, n, width = qkv.shape
    grad = torch.randn(batch, n, width // 3, device=qkv.device).to(qkv.dtype)
    options = {"heads": heads, "window_size": window_size, "causal": causal, "mask": mask, "rotary_theta": theta}

    def by(operation):
        return with_gradient(lambda x, bias=None: operation(x, **options, position_bias=bias), qkv, grad, bias)

    def exactly(x, bias=None):
        return dense(x, heads, window_size, causal, mask, theta, bias)

    ours = by(windowed_attention)
    expected = with_gradient(exactly, qkv.double(), grad, None if bias is None else bias.double())
    assert {name: found.dtype for name, found in ours.items() if name != "bias"} == dict.fromkeys(
        ("output", "qkv"), qkv.dtype
    )
    assert bias is None or ours["bias"].dtype == bias.dtype
    check_correct(ours, lambda: by(reference.windowed_attention), expected)


def tokens(batch, n, heads, dim_head, device, dtype=torch.float32):
    return torch.randn(batch, n, 3 * heads * dim_head, device=device).to(dtype)


@pytest.mark.parametrize(
    ("heads", "n", "window_size", "causal", "masked"),
    [
        (2, 1, 3, False, False),
        (2, 2, 1, True, True),
        (2, 37, 5, False, True),
        (1, 70, 10**9, False, False),
        (1, 70, 10**9, True, True),
        (1, 100, 15, True, False),
        (1, 131, 64, False, True),
    ],
)
def test_follows_the_definition(device, heads, n, window_size, causal, masked):
    """With as many sequences as heads."""
    mask = None
    if masked:
        mask = torch.rand(heads, n, device=device) > 0.3
        # More consecutive tokens than are within reach.
        mask[0, n // 4 : n // 2 + 1] = False
    check(tokens(heads, n, heads, 16, device), heads, window_size, causal, mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("dim_head", "causal"), [(1, False), (24, True), (64, False), (72, True), (136, False)])
def test_dtypes_and_dimensions_of_heads(device, dtype, dim_head, causal):
    check(tokens(1, 45, 1, dim_head, device, dtype), 1, 12, causal, torch.rand(1, 45, device=device) > 0.2)


@pytest.mark.parametrize(
    ("dtype", "dim_head", "n", "window_size", "causal"),
    [
        (torch.float32, 2, 45, 12, False),
        (torch.float16, 24, 70, 10**9, True),
        (torch.bfloat16, 64, 150, 20, True),
        (torch.float32, 72, 60, 9, False),
        (torch.bfloat16, 128, 131, 64, False),
        (torch.float64, 64, 150, 20, True),
    ],
)
def test_rotary_position_embedding(device, dtype, dim_head, n, window_size, causal):
    qkv, mask = tokens(2, n, 2, dim_head, device, dtype), torch.rand(2, n, device=device) > 0.2
    check(qkv, 2, window_size, causal, mask, theta=10000.0)


@pytest.mark.parametrize(
    ("dtype", "batch", "dim_head", "n", "window_size", "causal", "reach"),
    [
        (torch.float16, 2, 1, 45, 12, False, 1),
        (torch.float32, 2, 24, 70, 10**9, True, 100),
        (torch.bfloat16, 2, 64, 150, 20, True, 40),
        (torch.float32, 2, 72, 50, 30, False, 5),
        # More blocks than programs for a tile and head.
        (torch.float32, 70, 16, 3, 2, False, 1),
        (torch.float64, 2, 64, 150, 20, True, 40),
    ],
)
def test_position_bias(device, dtype, batch, dim_head, n, window_size, causal, reach):
    """Also its gradient, for distances that do not occur, and for those that share the last entry."""
    qkv, mask = tokens(batch, n, 2, dim_head, device, dtype), torch.rand(batch, n, device=device) > 0.2
    bias = torch.randn(2, 2 * reach + 1, device=device).to(torch.promote_types(dtype, torch.float32))
    check(qkv, 2, window_size, causal, mask, bias=bias)


@pytest.mark.parametrize("causal", [False, True])
def test_extreme_similarities(device, causal):
    """Whole numbers, whose products are exact in fp32: up to 6400 and down to -6400."""
    qkv = torch.randint(-40, 41, (1, 50, 3 * 16), device=device).float()
    grad = torch.randint(-2, 3, (1, 50, 16), device=device).float()
    ours = with_gradient(lambda x: windowed_attention(x, heads=1, window_size=20, causal=causal), qkv, grad)
    exact = with_gradient(lambda x: dense(x, 1, 20, causal), qkv.double(), grad)
    # Relevant exponents are small and exact, and p is rounded a few times; values are up to 40.
    torch.testing.assert_close(
        ours["output"].double(), exact["output"], rtol=0, atol=40 * 8 * torch.finfo(torch.float32).eps
    )
    # The backward pass starts from the lse, one number per query, rounded at the size of logits. This is the relative
    # error of each p. The gradient of a logit is up to 2 x 16 x 40, and that of keys and queries 40 / 4 times more.
    log_rounding = 6400 * 1.44 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours["qkv"].double(), exact["qkv"], rtol=0, atol=2 * log_rounding * 2 * 16 * 40 * 10)


def test_equal_similarities_make_a_mean(device):
    qkv = tokens(1, 40, 1, 16, device)
    qkv[..., :16] = 0
    out = windowed_attention(qkv, heads=1, window_size=3)
    means = [qkv[0, max(i - 3, 0) : i + 4, 32:].mean(dim=0) for i in range(40)]
    torch.testing.assert_close(out[0], torch.stack(means), rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_a_token_with_nothing_to_attend_to_gives_zero(device, causal):
    qkv = tokens(2, 50, 1, 16, device).requires_grad_()
    mask = torch.ones(2, 50, dtype=torch.bool, device=device)
    mask[0] = mask[1, 10:40] = False
    out = windowed_attention(qkv, heads=1, window_size=5, causal=causal, mask=mask)
    (dqkv,) = torch.autograd.grad(out, qkv, torch.randn_like(out))
    assert (out[0] == 0).all()
    assert (dqkv[0] == 0).all()
    # By 5 to either side, and by windows of 5 with the one before.
    empty = slice(20, 40) if causal else slice(15, 35)
    assert (out[1, empty] == 0).all()
    assert (dqkv[1, empty] == 0).all()
    assert (dqkv[1, 10:40, 16:] == 0).all()
    assert (out[1, empty.stop + 1] != 0).all()
    assert dqkv.isfinite().all()


def test_layouts(device):
    """Strided, misaligned and expanded tensors, and an expanded gradient."""
    n, width = 21, 3 * 16
    storage = torch.randn(4 * n * width + 1, device=device)
    mask = (torch.rand(n, 2, device=device) > 0.2).t()
    for qkv in (
        storage[1 : 1 + 2 * n * width].view(2, n, width),
        storage[: 4 * n * width].view(2, n, 2 * width)[..., width:],
        storage[: 2 * n * width].view(n, 2, width).transpose(0, 1),
        storage[: n * width].view(1, n, width).expand(2, n, width),
    ):
        qkv = qkv.detach().requires_grad_()
        out = windowed_attention(qkv, heads=1, window_size=4, mask=mask)
        wide = qkv.detach().double().requires_grad_()
        expected = dense(wide, 1, 4, False, mask)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
        (gradient,), (wanted,) = (torch.autograd.grad(x.sum(), each) for x, each in ((out, qkv), (expected, wide)))
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=4e-6)


@around_the_kernels
@pytest.mark.parametrize("shape", [(0, 5, 48), (2, 0, 48)])
def test_no_tokens(device, shape):
    qkv = torch.randn(shape, device=device, requires_grad=True)
    out = windowed_attention(qkv, heads=1, window_size=4)
    assert out.shape == (*shape[:2], 16)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == shape


@around_the_kernels
@pytest.mark.parametrize("causal", [False, True])
def test_fp64_gradients(device, causal):
    qkv = torch.randn(2, 7, 3 * 2 * 3, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.rand(2, 7, device=device) > 0.3
    assert gradcheck(lambda x: windowed_attention(x, heads=2, window_size=2, causal=causal, mask=mask), qkv)


@around_the_kernels
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qkv": torch.ones(2, 5, 20)}, r"qkv must be of shape \(b, n, 6 \* d\) for 2 heads, got shape \(2, 5, 20\)"),
        ({"qkv": torch.ones(5, 24)}, "qkv must be of shape"),
        ({"qkv": torch.ones(2, 5, 0)}, "qkv must be of shape"),
        ({"qkv": torch.ones(2, 5, 24, dtype=torch.int32)}, "qkv must be a tensor of a float dtype, got torch.int32"),
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"window_size": 0}, "window_size must be >= 1, got 0"),
        (
            {"position_bias": torch.ones(2, 4)},
            r"position_bias must be of shape \(2, 2 \* r \+ 1\) for 2 heads",
        ),
        ({"position_bias": torch.ones(3, 5)}, r"position_bias must be of shape \(2, 2 \* r \+ 1\)"),
        (
            {"position_bias": torch.ones(2, 5), "rotary_theta": 1.0},
            "position_bias must be None if rotary_",
        ),
        ({"position_bias": torch.ones(2, 5).int()}, "position_bias must be a tensor of a float dtype"),
        ({"rotary_theta": 1.0, "qkv": torch.ones(2, 5, 18)}, "qkv must be of an even d for rotary position embedding"),
        ({"mask": torch.ones(2, 5)}, "mask must be a tensor of dtype torch.bool"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, r"mask must be of shape \(2, 5\)"),
    ],
)
def test_wrong_arguments(device, arguments, message):
    for operation in (windowed_attention, reference.windowed_attention):
        with pytest.raises(ValueError, match=message):
            operation(**{"qkv": torch.ones(2, 5, 24), "heads": 2, "window_size": 4, **arguments})


@around_the_kernels
@in_a_kernel
def test_second_derivative_is_refused(device):
    qkv = tokens(1, 5, 1, 16, device).requires_grad_()
    out = windowed_attention(qkv, heads=1, window_size=2)
    (dqkv,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.windowed_attention"):
        dqkv.sum().backward()


@around_the_kernels
def test_is_bitwise_reproducible(device):
    qkv, grad = tokens(1, 1000, 1, 16, device, torch.bfloat16), torch.randn(1, 1000, 16, device=device)
    runs = [with_gradient(lambda x: windowed_attention(x, heads=1, window_size=20), qkv, grad) for _ in range(2)]
    assert all(torch.equal(result, runs[1][name]) for name, result in runs[0].items())


@around_the_kernels
@in_a_kernel
def test_is_an_operator(device):
    qkv, mask = tokens(1, 9, 1, 16, device).requires_grad_(), torch.rand(1, 9, device=device) > 0.2
    bias = torch.randn(1, 5, device=device)
    for theta, position_bias in ((None, None), (10000.0, None), (None, bias), (None, bias.clone().requires_grad_())):
        torch.library.opcheck(torch.ops.colt5.windowed_attention, (qkv, 1, 3, False, mask, theta, position_bias, True))


@around_the_kernels
def test_compiles_into_one_graph(device):
    def function(qkv, mask):
        return windowed_attention(qkv * 2, heads=1, window_size=3, causal=True, mask=mask).square()

    qkv, mask = tokens(1, 20, 1, 16, device), torch.rand(1, 20, device=device) > 0.2
    grad = torch.randn(1, 20, 16, device=device)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for autocast in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            ours, eager = (with_gradient(lambda x, f=f: f(x, mask), qkv, grad) for f in (compiled, function))
        torch.testing.assert_close(ours, eager)


@around_the_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_lowers_what_it_lowers_in_plain_pytorch(device, dtype):
    qkv = tokens(1, 9, 1, 16, device, dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        ours, plain = (op(qkv, heads=1, window_size=3) for op in (windowed_attention, reference.windowed_attention))
    assert ours.dtype == plain.dtype == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    (dqkv,) = torch.autograd.grad(ours.sum(), qkv)
    assert dqkv.dtype == dtype


@pytest.mark.parametrize("rotary_emb", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_computes_the_same_with_it(device, causal, rotary_emb):
    options = {"causal": causal, "rotary_emb": rotary_emb}
    plain, fused = (WindowedAttention(8, 4, 16, 1, **options, use_triton=use).to(device) for use in (False, True))
    fused.load_state_dict(plain.state_dict())
    assert "kernels.windowed_attention" in repr(fused)
    x, mask = torch.randn(2, 30, 8, device=device), torch.rand(2, 30, device=device) > 0.3
    upstream = torch.randn(2, 30, 8, device=device)
    results = []
    for layer in (plain, fused):
        out = layer(x, mask)
        results.append((out, *torch.autograd.grad(out, list(layer.parameters()), upstream)))
    for found, wanted in zip(*reversed(results), strict=True):
        # Sums over 60 tokens of products of about 1, each rounded a few times.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=60 * 4 * torch.finfo(torch.float32).eps)


@around_the_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_half_precision(device, dtype):
    layer = WindowedAttention(8, 4, 16, 2, use_triton=True).to(device, dtype)
    out = layer(torch.randn(1, 30, 8, device=device, dtype=dtype))
    out.sum().backward()
    assert out.dtype == dtype
    assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_is_captured_in_a_cuda_graph(device, causal):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    qkv = tokens(2, 1000, 4, 64, device, torch.bfloat16).requires_grad_()
    grad = torch.randn(2, 1000, 256, device=device, dtype=torch.bfloat16)

    def step():
        out = windowed_attention(qkv, heads=4, window_size=64, causal=causal)
        return out.detach(), *torch.autograd.grad(out, qkv, grad)

    graph, captured = capture(step)
    with torch.no_grad():
        qkv.copy_(torch.randn_like(qkv))
    graph.replay()
    for replayed, eager in zip(captured, step(), strict=True):
        assert torch.equal(replayed, eager)


@settings(max_examples=4 if INTERPRETED else 40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(2, 90), st.integers(1, 100), st.booleans(), st.sampled_from([None, 100.0]), st.data())
def test_what_is_out_of_reach_does_not_matter(device, n, window_size, causal, theta, data):
    """Another token at one position changes the output within reach of it, and no bit elsewhere."""
    at = data.draw(st.integers(0, n - 1))
    qkv = tokens(1, n, 1, 16, device)
    other = qkv.clone()
    other[0, at] = torch.randn(48, device=device)
    options = {"heads": 1, "window_size": window_size, "causal": causal, "rotary_theta": theta}
    before, after = (windowed_attention(x, **options)[0] for x in (qkv, other))
    i = torch.arange(n, device=device)
    reached = (i >= at) & (i // window_size <= at // window_size + 1) if causal else (i - at).abs() <= window_size
    assert torch.equal((before != after).any(dim=-1), reached)


@around_the_kernels
@given(st.integers(0, 60), st.integers(1, 70), st.booleans())
def test_flops_are_those_of_the_pairs_in_reach(device, n, window_size, causal):
    pairs = pairs_in_reach(n, window_size, causal)
    i, j = torch.arange(n)[:, None], torch.arange(n)
    near = (j <= i) & (j // window_size >= i // window_size - 1) if causal else (i - j).abs() <= window_size
    assert pairs == near.sum()


@around_the_kernels
def test_a_flop_counter_sees_it(device):
    with triton_for_cpu_tensors(), FakeTensorMode(), FlopCounterMode(display=False) as counter:
        qkv = torch.randn(2, 50, 3 * 2 * 16, device=device, requires_grad=True)
        windowed_attention(qkv, heads=2, window_size=8).sum().backward()
    products_and_their_gradients = 2 + 5
    assert counter.get_total_flops() == products_and_their_gradients * 2 * 2 * 2 * pairs_in_reach(50, 8, False) * 16


@pytest.mark.compiled
@pytest.mark.parametrize(("theta", "biased"), [(None, False), (10000.0, False), (None, True)])
@pytest.mark.parametrize(
    ("dtype", "dim_head", "causal", "target"),
    [
        (torch.bfloat16, 64, False, 90),
        (torch.bfloat16, 64, True, 80),
        (torch.float16, 128, True, 90),
        (torch.float32, 64, True, 80),
    ],
)
def test_no_register_spills(device, dtype, dim_head, causal, target, theta, biased):
    mask = torch.ones(1, 300, dtype=torch.bool, device=device) if causal else None

    def launch():
        qkv = tokens(1, 300, 2, dim_head, device, dtype).requires_grad_()
        with triton_for_cpu_tensors():
            options = {"window_size": 64, "causal": causal, "mask": mask, "rotary_theta": theta}
            bias = torch.zeros(2, 129, device=device, requires_grad=True) if biased else None
            windowed_attention(qkv, heads=2, **options, position_bias=bias).sum().backward()

    kernels = compiled_kernels(launch, target=target)
    assert all(kernel["spilled_bytes"] == 0 for kernel in kernels)
    multiplying = {kernel["name"] for kernel in kernels if kernel["instructions"].get("matrix", 0) > 0}
    expected = {"_forward_kernel", "_backward_kernel"} | ({"_bias_gradient_kernel"} if biased else set())
    assert multiplying == expected
