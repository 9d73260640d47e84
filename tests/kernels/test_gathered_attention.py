import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import reference
from colt5_bench.measuring.static_facts import compiled_kernels
from kernels._common.tensors import triton_for_cpu_tensors
from kernels.gathered_attention import backward as gathered_backward
from kernels.gathered_attention import gathered_attention
from kernels.gathered_attention import inverse as inverses
from tests.correct import check_correct
from tests.kernels.devices import DEVICES, capture

INTERPRETED = triton.knobs.runtime.interpret
pytestmark = pytest.mark.parametrize("device", DEVICES)


def make(device, b=2, w=2, h=2, i=5, d=16, r=2, n=40, s=20, dtype=torch.float32, masked=True):
    """Random tensors, and lists of different tokens. Masked lists may be empty, as all lists of one window are."""
    indices = torch.rand(b, w, r, n).argsort(dim=-1)[..., :s]
    mask = torch.rand(b, w, r, s) > 0.3 if masked else None
    if masked and w and b:
        mask[0, -1] = False
        indices = torch.where(mask, indices, torch.tensor([10**6, -(10**6)])[torch.randint(2, indices.shape)])
    tensors = {
        "query": torch.randn(b, w, h, i, d).to(dtype),
        "key_value": torch.randn(b, r, n, 2 * d * h // r).to(dtype),
        "indices": indices,
        "weights": torch.rand(b, w, r, s) + 0.25,
        "null_kv": torch.randn(2, h, d),
        "mask": mask,
    }
    return {name: tensor if tensor is None else tensor.to(device) for name, tensor in tensors.items()}


DIFFERENTIABLE = ("query", "key_value", "weights", "null_kv")


def run(function, tensors, grad, dtype=None, **options):
    """Output and gradients, in fp64 if that is the dtype."""
    tensors = {name: tensor if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    for name in DIFFERENTIABLE:
        tensors[name] = tensors[name].to(dtype or tensors[name].dtype).requires_grad_()
    out = function(**tensors, **options)
    gradients = torch.autograd.grad(out, [tensors[name] for name in DIFFERENTIABLE], grad.to(out.dtype))
    return dict(zip(("output", *DIFFERENTIABLE), (out.detach(), *gradients), strict=True))


def check(tensors, **options):
    """Results are as close to fp64 as a correct computation in the same dtype."""
    query = tensors["query"]
    grad = torch.randn(query.shape, device=query.device).to(query.dtype)
    actual = run(gathered_attention, tensors, grad, **options)
    truth = run(reference.gathered_attention, tensors, grad, torch.float64, **options)
    for name, result in run(reference.gathered_attention, tensors, grad, **options).items():
        assert actual[name].dtype == result.dtype
    check_correct(actual, lambda: run(reference.gathered_attention, tensors, grad, **options), truth)


@pytest.mark.parametrize("multiply_keys_by_score", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"masked": False, "b": 1, "w": 1, "h": 1, "i": 1, "r": 1, "n": 1, "s": 1},
        {"i": 33, "d": 20, "s": 35, "n": 70, "b": 1},
        {"b": 1, "w": 3, "h": 4, "n": 70, "s": 3},
    ],
    ids=str,
)
def test_follows_the_reference(device, sizes, multiply_keys_by_score):
    check(make(device, **sizes), multiply_keys_by_score=multiply_keys_by_score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16")
    check(make(device, b=1, w=3, dtype=dtype), multiply_keys_by_score=True)


@pytest.mark.parametrize("dim", [64, 128])
def test_large_heads(device, dim):
    check(make(device, b=1, w=1, h=1, r=1, d=dim, masked=False))


def test_more_queries_than_a_program_takes(device, monkeypatch):
    few = {size: kept._replace(tile=16) for size, kept in gathered_backward.KEYS.items()}
    monkeypatch.setattr(gathered_backward, "KEYS", few)
    check(make(device, b=1, i=37), multiply_keys_by_score=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prefixes(device, dtype):
    """Routed lists: the largest scores of longer and longer prefixes. In half precision windows are processed in
    pairs."""
    tensors = make(device, b=1, w=5, s=20, n=80, i=3, dtype=dtype)
    scores = torch.randn(1, 1, 2, 80, device=device).expand(1, 5, 2, 80)
    before = torch.arange(80, device=device) < 16 * torch.arange(1, 6, device=device)[:, None, None]
    largest = scores.masked_fill(~before, -torch.inf).topk(20, dim=-1)
    check({**tensors, "indices": largest.indices, "mask": largest.values > -torch.inf})


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("by_stretches", [False, True])
def test_tokens_in_order_of_stretches_or_all_of_them(device, set_sizes, n, by_stretches):
    """Each block of tokens has a program, in any order."""
    set_sizes(inverses, BLOCK=64, LISTED=0 if by_stretches else 10**6)
    check(make(device, b=2, w=3, n=n, s=min(n, 20), masked=False))


def test_nothing_listed_leaves_the_learned_pair(device):
    tensors = make(device)
    out = gathered_attention(**tensors)
    expected = tensors["null_kv"][1].unsqueeze(1).expand(2, 5, 16)
    assert torch.equal(out[0, -1], expected)
    alone = gathered_attention(**{**tensors, "mask": torch.zeros_like(tensors["mask"])})
    assert torch.equal(alone, expected.expand(alone.shape))


@pytest.mark.parametrize("empty", [{"b": 0}, {"w": 0}, {"i": 0}, {"s": 0}, {"s": 0, "n": 0}], ids=str)
def test_nothing_to_do(device, empty):
    tensors = make(device, masked=False, **empty)
    results = run(gathered_attention, tensors, torch.ones_like(tensors["query"]))
    expected = run(reference.gathered_attention, tensors, torch.ones_like(tensors["query"]))
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name])


def test_layouts(device):
    tensors = make(device, b=1, d=8, n=41)
    grad = torch.randn(1, 2, 2, 5, 8, device=device)
    expected = run(gathered_attention, tensors, grad)
    query = tensors["query"].transpose(2, 3).contiguous().transpose(2, 3)
    storage = torch.zeros(tensors["key_value"].numel() + 1, device=device)
    key_value = storage[1:].view(tensors["key_value"].shape).copy_(tensors["key_value"])
    mask = tensors["mask"].mT.contiguous().mT
    indices = tensors["indices"].to(torch.int32)
    null_kv = tensors["null_kv"].mT.contiguous().mT
    strided = {**tensors, "query": query, "key_value": key_value, "mask": mask, "indices": indices, "null_kv": null_kv}
    results = run(gathered_attention, strided, grad.mT.contiguous().mT)
    for name, result in results.items():
        torch.testing.assert_close(result, expected[name], rtol=0, atol=0)
    assert results["output"].transpose(2, 3).is_contiguous()


def test_lists_that_windows_share(device):
    """Expanded indices, weights and mask, as for a sequence no longer than a list."""
    tensors = make(device, b=1)
    for name in ("indices", "weights", "mask"):
        tensors[name] = tensors[name][:, :1].expand(1, 2, 2, 20)
    check(tensors)


def test_extreme_logits(device):
    tensors = make(device, b=1)
    tensors["query"] = tensors["query"] * 1e3
    grad = torch.randn(1, 2, 2, 5, 16, device=device)
    results = run(gathered_attention, tensors, grad)
    expected = run(reference.gathered_attention, tensors, grad, torch.float64)
    # An exponent of this size has the rounding error of a sum this large. It is the relative error of the softmax.
    largest = tensors["query"].norm(dim=-1).max() * tensors["key_value"].abs().max()
    rounding = (largest * torch.finfo(torch.float32).eps).item()
    assert 1e-5 < rounding < 1e-2
    for name in ("output", "null_kv"):
        bound = 4 * rounding * expected[name].abs().max().item()
        torch.testing.assert_close(results[name].double(), expected[name], rtol=0, atol=bound)
    assert all(result.isfinite().all() for result in results.values())


def test_nan_stays_where_it_is_attended_to(device):
    tensors = make(device, masked=False)
    tensors["indices"][:, 0], tensors["indices"][:, 1] = torch.arange(20), torch.arange(20, 40)
    tensors["key_value"][1, 0, 3] = torch.nan
    nan = gathered_attention(**tensors).isnan()
    assert nan[1, 0, 0].all()
    assert nan.sum() == nan[1, 0, 0].numel()


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize("multiply_keys_by_score", [False, True])
def test_fp64_gradients(device, multiply_keys_by_score):
    tensors = make(device, w=2, h=2, i=2, d=3, n=6, s=4, dtype=torch.float64)

    def function(query, key_value, weights, null_kv):
        lists = {"indices": tensors["indices"], "mask": tensors["mask"]}
        differentiable = {"query": query, "key_value": key_value, "weights": weights, "null_kv": null_kv}
        return gathered_attention(**differentiable, **lists, multiply_keys_by_score=multiply_keys_by_score)

    inputs = [tensors[name].double().requires_grad_() for name in DIFFERENTIABLE]
    assert gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"query": torch.randn(2, 2, 2, 16)}, "query"),
        ({"query": torch.ones(2, 2, 2, 5, 16, dtype=torch.int64)}, "query"),
        ({"key_value": torch.randn(2, 2, 40, 16)}, "key_value"),
        ({"key_value": torch.randn(2, 3, 40, 32)}, "key_value"),
        ({"key_value": torch.randn(2, 2, 40, 32).half()}, "key_value"),
        ({"indices": torch.zeros(2, 2, 20, dtype=torch.int64)}, "indices"),
        ({"indices": torch.zeros(2, 2, 2, 20)}, "indices"),
        ({"weights": torch.ones(2, 2, 2, 19)}, "weights"),
        ({"weights": torch.ones(2, 2, 2, 20, dtype=torch.int64)}, "weights"),
        ({"null_kv": torch.randn(2, 2, 15)}, "null_kv"),
        ({"mask": torch.ones(2, 2, 2, 1, dtype=torch.bool)}, "mask"),
        ({"mask": torch.ones(2, 2, 2, 20)}, "mask"),
    ],
)
def test_wrong_arguments(device, arguments, named):
    for function in (gathered_attention, reference.gathered_attention):
        with pytest.raises(ValueError, match=rf"^{named} must be .*, got "):
            function(**{**make("cpu"), **arguments})


def test_second_derivative_is_refused(device):
    tensors = make(device, b=1, w=1)
    tensors["query"].requires_grad_()
    (dquery,) = torch.autograd.grad(gathered_attention(**tensors).square().sum(), tensors["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"reference\.gathered_attention"):
        dquery.sum().backward()


def test_is_bitwise_reproducible(device):
    tensors = make(device, **({"n": 300, "w": 20, "s": 150} if device == "cuda" else {"b": 1}))
    grad = torch.randn(tensors["query"].shape, device=device)
    first, second = (run(gathered_attention, tensors, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize("masked", [False, True])
def test_is_an_operator(device, masked):
    tensors = make(device, b=1, w=1, h=1, r=1, masked=masked)
    for name in DIFFERENTIABLE:
        tensors[name].requires_grad_()
    torch.library.opcheck(torch.ops.colt5.gathered_attention, (*tensors.values(), True))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("masked", [False, True])
def test_indices_are_int32_or_int64(device, kind, masked):
    tensors = make(device, masked=masked)
    expected = gathered_attention(**tensors)
    assert torch.equal(gathered_attention(**{**tensors, "indices": tensors["indices"].to(kind)}), expected)


def test_compiles_into_one_graph(device):
    tensors = make(device, b=1, w=1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(query, key_value, indices, weights, null_kv, mask):
        return gathered_attention(query, key_value * 2, indices, weights, null_kv, mask=mask)

    grad = torch.randn(tensors["query"].shape, device=device)
    doubled = {**tensors, "key_value": tensors["key_value"] * 2}
    compiled, eager = run(function, tensors, grad), run(gathered_attention, doubled, grad)
    eager["key_value"] *= 2
    torch.testing.assert_close(compiled, eager)


def test_in_its_layer(device):
    """Under autocast, with fp32 weights and parameters, and with queries and keys in half precision."""
    sizes = {"dim": 16, "num_heavy_tokens_q": 3, "num_heavy_tokens_kv": 6, "light_window_size": 8, "light_heads": 1}
    options = {**sizes, "heavy_heads": 2, "heavy_dim_head": 16, "num_routed_kv": 2, "rotary_emb": True}
    layers = [
        reference.ConditionalRoutedAutoregressiveAttention(
            **options, use_triton=use_triton, router_kwargs={"use_triton": False}
        ).to(device)
        for use_triton in (True, False, False)
    ]
    x = torch.randn(1, 27, 16, device=device)
    results = []
    for layer, half in zip(layers, (True, True, False), strict=True):
        layer.load_state_dict(layers[0].state_dict())
        with torch.autocast(device, dtype=torch.float16, enabled=half):
            out = layer(x)
        results.append((out.double(), *torch.autograd.grad(out.float().square().mean(), layer.heavy_attn.parameters())))
    for fused, plain, exact in zip(*results, strict=True):
        roundings = 4 * torch.finfo(torch.float16).eps * exact.abs().max()
        assert (fused - exact).abs().max() <= torch.maximum(2 * (plain - exact).abs().max(), roundings)


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph(device):
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    tensors = make(device, dtype=torch.bfloat16, n=300, s=100, w=8)
    grad = torch.randn(tensors["query"].shape, device=device).bfloat16()
    graph, captured = capture(lambda: run(gathered_attention, tensors, grad))
    other = make(device, dtype=torch.bfloat16, n=300, s=100, w=8)
    for name, tensor in tensors.items():
        tensor.copy_(other[name])
    graph.replay()
    eager = run(gathered_attention, tensors, grad)
    assert all(torch.equal(captured[name], eager[name]) for name in eager)


@pytest.mark.gpu
def test_nothing_is_copied_for_a_window(device):
    if device == "cpu":
        pytest.skip("a CPU tensor's windows are gathered one after the other")
    tensors = make(device, b=1, w=256, h=4, d=64, r=1, n=1024, s=512, i=2, dtype=torch.bfloat16, masked=False)
    copies = 256 * 512 * tensors["key_value"].shape[-1] * 2
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(gathered_attention, tensors, torch.ones_like(tensors["query"]))
    assert torch.cuda.max_memory_allocated() - before < copies / 10


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_lists_are_inverted(device, set_sizes, data):
    """Tokens are sorted within stretches, or all of a sequence if an average list has few of a stretch."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("a CPU has no kernels")
    block, by_stretches = data.draw(st.sampled_from([2, 4, 1024])), data.draw(st.booleans())
    set_sizes(inverses, BLOCK=block, LISTED=0 if by_stretches else 10**6)
    b, w, r, n = (data.draw(st.integers(1, most)) for most in (2, 4, 2, 9))
    s = data.draw(st.integers(1, n))
    lists = [data.draw(st.permutations(range(n)))[:s] for _ in range(b * w * r)]
    indices = torch.tensor(lists, device=device).view(b, w, r, s)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=b * w * r * s, max_size=b * w * r * s)))
    mask = mask.to(device).view(b, w, r, s)
    weights = torch.rand(b, w, r, s, device=device)
    inverse = inverses.invert(torch.where(mask, indices, -1).to(torch.int32), weights, n)
    last = []
    for flat in range(b * r * n):
        batch, route, token = flat // n // r, flat // n % r, flat % n
        places = ((indices == token) & mask)[batch, :, route].nonzero().tolist()
        entries = slice(*inverse.ends[flat : flat + 2].tolist())
        assert inverse.windows[entries].tolist() == [window for window, _ in places]
        assert inverse.weights[entries].tolist() == [weights[batch, window, route, slot] for window, slot in places]
        last.append(places[-1][0] if places else -1)
    stretch = block if by_stretches else n
    for start in range(0, b * r * n, stretch):
        tokens = range(start, min(start + stretch, b * r * n))
        expected = sorted(tokens, key=lambda token: (token // n, -last[token], token))
        assert inverse.order[start : start + stretch].tolist() == expected


@pytest.mark.parametrize("n", [2**15, 2**16 - 1, 2**16])
def test_lists_of_as_many_tokens_as_keys_can_tell_apart(device, n):
    """Keys have the smallest possible type, and use all numbers of it."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("a CPU has no kernels")
    lists = torch.tensor([n - 1, 0, n // 2, -1, n // 2 - 1], device=device, dtype=torch.int32).view(1, 1, 1, 5)
    weights = torch.arange(5.0, device=device).view(lists.shape)
    inverse = inverses.invert(lists, weights, n)
    assert inverse.weights[:4].tolist() == [1, 4, 2, 0]
    assert inverse.ends[[1, n // 2, n // 2 + 1, n - 1, n]].tolist() == [1, 2, 3, 3, 4]
    assert inverse.order[:5].tolist() == [0, n // 2 - 1, n // 2, n - 1, 1]


@pytest.mark.compiled
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.float32, 128)])
def test_no_register_spills(device, dtype, dim, target):
    def launch():
        tensors = make("cpu", b=1, w=2, h=2, i=32, d=dim, r=1, n=200, s=100, dtype=dtype)
        tensors["indices"].clamp_(0, 199)
        tensors["query"].requires_grad_()
        with triton_for_cpu_tensors():
            # Weights of keys take registers; without them the gradient of keys processes two windows at a time in bf16.
            gathered_attention(**tensors, multiply_keys_by_score=dtype == torch.float32).sum().backward()

    kernels = compiled_kernels(launch, target=target)
    assert {kernel["spilled_bytes"] for kernel in kernels} == {0}
    multiplying = [kernel["name"] for kernel in kernels if kernel["instructions"].get("matrix")]
    assert sorted(multiplying) == ["_forward_kernel", "_key_value_kernel", "_query_kernel"]
