"""Random cases of all operations and layers, and proof that they find faults. `fuzz/` defines cases.

`FUZZ_SECONDS`, `FUZZ_SEED` and `FUZZ_WORKERS` are for the test on a GPU; `FUZZ_CASE` is a line from a failure.
"""

import inspect
import os
import sys
from collections import defaultdict
from dataclasses import replace
from itertools import islice
from math import log

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_utils import CrossRefFakeMode
from torch.utils._pytree import tree_map

import kernels
import reference
from kernels._common.tape import Tape
from reference._shared.arguments import epsilon_schedule, result_dtype
from tests.calls import KERNELS
from tests.kernels.devices import DEVICE, DEVICES
from tests.kernels.fuzz import check, run
from tests.kernels.fuzz.cases import EXCLUDED, LAYERS, NAMES, OPERATIONS, SCALES, Case, build, cases, draw_case
from tests.kernels.fuzz.check import Verdict, examine, execute
from tests.kernels.fuzz.definition import Watched, definition, ours
from tests.kernels.fuzz.kinks import LOST, UNIT, error_handed_on, rows_at_kink

INTERPRETED = triton.knobs.runtime.interpret
CPU = torch.device("cpu")
SCALE = "interpreter" if INTERPRETED else "cpu"
ROUNDS = 2 if INTERPRETED else 3
"""Number of cases per name in CI."""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MADE_OF_OTHERS = ("ConditionalRoutedTransformerBlock", "ConditionalRoutedViT") if INTERPRETED else ()
"""Layers that are slow in the interpreter."""

CASES = [case for case in islice(cases(0, SCALES[SCALE]), ROUNDS * len(NAMES)) if case.name not in MADE_OF_OTHERS]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_follows_the_definition(case):
    verdict = examine(case, CPU)
    if verdict.status == "undecided":
        pytest.skip(str(verdict))
    assert verdict.status == "ok", verdict


SHAPES = [
    draw_case(5, index, SCALES[SCALE], name)
    for name in sorted(OPERATIONS)
    # More of them if more arguments may be left out.
    for index in range(2 + 2 * str(inspect.signature(getattr(kernels, name))).count("Tensor | None = None"))
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SHAPES, ids=[case.name for case in SHAPES])
def test_a_compiler_is_told_the_shapes_of_results(case, device):
    """Shapes, strides and dtypes of an operator's results, without values and with them."""
    function, parameters = ours(case, torch.device(device), Watched())
    tensors = {**build(case, torch.device(device)).tensors, **parameters}
    with CrossRefFakeMode(lambda operator: operator.namespace != "colt5", check_aliasing=False):
        execute(function, tensors, replace(case, grad=True))


FOUND = [
    # In half precision the CPU path rounded weights to half precision.
    (
        '{"name": "route_prefixes", "seed": 1771501593, "dtype": "bfloat16", "autocast": null, "grad": true, '
        '"layout": "contiguous", "data": {"scores": [1, 1, 176], "std": 1.0, "ties": false}, '
        '"options": {"n_iters": 10, "eps": 0.1, "eps_init": 4.0, "eps_decay": 0.7, '
        '"window_size": 31, "num_selected": 14, "k": 14}}'
    ),
    # With one feature, a GPU has a rounding error of the product where the gate had found exactly 0.
    (
        '{"name": "normalize", "seed": 1833130297, "dtype": "float32", "autocast": null, "grad": true, '
        '"layout": "mixed", "data": {"x": [965, 128, 1], "weight": "float32", "bias": "float32", "std": 0.001}, '
        '"options": {"center": true, "eps": 0.1, "dtype": "float16"}}'
    ),
    # Queries see one key. The rounding error of their gradient becomes 0 in fp16 in some orders, but not in others.
    (
        '{"name": "ConditionalRoutedImageAttention", "seed": 1189887800, "dtype": "float32", "autocast": "float16", '
        '"grad": true, "layout": "transposed", "data": {"x": [4, 3, 2, 16], "dim": 16, "routes": 1, "std": 0.1, '
        '"given": {"num_heavy_tokens_q": null, "num_heavy_tokens_kv": null, "mask": "rows", '
        '"routing_tokens_q": false, "routing_tokens_kv": false, "residual": false, "routing_tokens": false}}, '
        '"options": {"dim": 16, "num_heavy_tokens_q": 1, "num_heavy_tokens_kv": 2, "num_routed_kv": 1, '
        '"light_dim_head": 32, "light_heads": 4, "light_window_size": 4, "heavy_dim_head": 32, "heavy_heads": 4, '
        '"router_straight_through": true, "router_kwargs": {"n_iters": 5, "fetch_k_ratio": 1.0, "eps": 0.1, '
        '"eps_decay": 1.0, "eps_init": 4.0, "cosine_sim_routing": false, "cosine_sim_scale": 1.5, '
        '"route_block_size": null, "triton_checkpoint_segments": null, "solver": "exact", '
        '"normalize_to": "fetched"}, "multiply_keys_by_score": true, "multiply_queries_by_score": true, '
        '"use_null_q_tokens": true, "use_flash_attn": false, "channel_first": false}}'
    ),
    # The truth was rounded to fp16, where small gradients are 0.
    (
        '{"name": "combine", "seed": 1, "dtype": "float32", "autocast": null, "grad": true, '
        '"layout": "contiguous", "data": {"routed": [30, 2, 64], "length": 3, "past": false, "index": "int64", '
        '"power": 8, "null": null, "light": "float32", "residual": null, "scores": null}, '
        '"options": {"length": 3, "dtype": "float16"}}'
    ),
    # A single route had a dimension in one of two paths, but not in the other.
    (
        '{"name": "ConditionalRoutedAutoregressiveAttention", "seed": 395859943, "dtype": "float32", '
        '"autocast": null, "grad": true, "layout": "transposed", "data": {"x": [2, 4, 64], "dim": 64, '
        '"routes": 1, "std": 0.25, "given": {"num_heavy_tokens_q": 1, "num_heavy_tokens_kv": null, '
        '"random_route": false, "routing_tokens_q": false, "routing_tokens_kv": false, '
        '"routing_tokens": false}}, "options": {"dim": 64, "num_heavy_tokens_q": 1, '
        '"num_heavy_tokens_kv": 1, "num_routed_kv": 1, "light_dim_head": 64, "light_heads": 2, '
        '"light_window_size": 3, "heavy_window_size": null, "heavy_dim_head": 32, "heavy_heads": 2, '
        '"router_straight_through": true, "router_kwargs": {"n_iters": 2, "fetch_k_ratio": 1.0, "eps": 0.3, '
        '"eps_decay": 0.7, "eps_init": null, "cosine_sim_routing": false, "cosine_sim_scale": 1.5, '
        '"route_block_size": null, "triton_checkpoint_segments": 2, "solver": "exact", '
        '"normalize_to": "fetched"}, "multiply_keys_by_score": false, "multiply_queries_by_score": true, '
        '"use_null_q_tokens": false, "use_flash_attn": true, "rotary_emb": true, '
        '"causal_query_routing": false}}'
    ),
    # If there were no rows, the gate could not infer a dimension of -1.
    (
        '{"name": "route", "seed": 419173495, "dtype": "float32", "autocast": null, "grad": true, '
        '"layout": "transposed", "data": {"x": [0, 6, 20], "routing_tokens": [1, 1, 20], "std": 0.05, "mask": null}, '
        '"options": {"n_iters": 3, "eps": 1.0, "eps_init": null, "eps_decay": 0.7, "num_selected": 1, '
        '"solver": "exact", "cosine_sim_scale": null, "block_size": null, "straight_through": false, "k": 1.125}}'
    ),
    # The first token sees only itself: terms of its query's gradient cancel, and the gate had nearly found 0.
    (
        '{"name": "windowed_attention", "seed": 2122722642, "dtype": "float32", "autocast": null, "grad": true, '
        '"layout": "transposed", "data": {"qkv": [2, 73, 384], "mask": "all"}, '
        '"options": {"heads": 2, "window_size": 8192, "causal": true}}'
    ),
    # Ours routed in segments, router by router, and the definition routed for all at once.
    (
        '{"name": "ConditionalRoutedTransformerBlock", "seed": 23676721, "dtype": "bfloat16", "autocast": null, '
        '"grad": false, "layout": "contiguous", "data": {"x": [3, 4, 16], "dim": 16, "routes": 2, "std": 0.1, '
        '"given": {"mask": null, "num_heavy_attn_tokens_q": null, "num_heavy_attn_tokens_kv": null, '
        '"num_heavy_ff_tokens": 2, "attn_routing_tokens_q": false, "attn_routing_tokens_kv": false, '
        '"ff_routing_tokens": false, "routing_tokens": false}}, "options": {"dim": 16, "num_heavy_attn_tokens_q": '
        '1, "num_heavy_attn_tokens_kv": 1, "num_routed_kv": 2, "num_heavy_ff_tokens": 1, "light_dim_head": 64, '
        '"light_heads": 4, "light_window_size": 4, "heavy_dim_head": 32, "heavy_heads": 2, "light_ff_mult": 0.5, '
        '"heavy_ff_mult": 4, "router_straight_through": true, "router_kwargs": {"n_iters": 20, "fetch_k_ratio": '
        '1.125, "eps": 0.1, "eps_decay": 1.0, "eps_init": 4.0, "cosine_sim_routing": false, "cosine_sim_scale": '
        '1.5, "route_block_size": null, "triton_checkpoint_segments": 2, "solver": "coor_descent", "normalize_to": '
        '"fetched"}, "multiply_keys_by_score": false, "multiply_queries_by_score": false, "use_null_q_tokens": '
        'true, "use_flash_attn": false, "init": "published", "light_rotary_emb": false}}'
    ),
    # An entry 1e-6 from a kink, in the last of 50 iterations: roundings of all of them add up.
    (
        '{"name": "segmented_coor_descent", "seed": 460242498, "dtype": "bfloat16", "autocast": null, "grad": true, '
        '"layout": "strided", "data": {"scores": [513, 511], "mask": null, "std": 5.0, "ties": false, "k": [1], '
        '"k_of": 304.46}, "options": {"n_iters": 50, "eps": 0.3, "eps_init": null, "eps_decay": 0.9, '
        '"checkpoint_segments": 36}}'
    ),
]
"""Lines of cases that failed once, with reasons."""


def with_few_rows(case):
    """A case for the interpreter, which takes a tenth of a second for a program of 50 iterations."""
    shape = case.data.get("scores")
    if not isinstance(shape, list):
        return case
    *rows, n = shape
    return replace(case, data={**case.data, "scores": [*(min(each, 8) for each in rows), n]})


@pytest.mark.parametrize("line", FOUND, ids=[Case.parse(line).name for line in FOUND])
def test_follows_the_definition_where_it_once_did_not(line):
    case = Case.parse(line)
    verdict = examine(with_few_rows(case) if INTERPRETED else case, torch.device(DEVICE))
    assert verdict.status == "ok", verdict


@pytest.mark.skipif("FUZZ_CASE" not in os.environ, reason="FUZZ_CASE names no case")
def test_case_of_a_line():
    case = Case.parse(os.environ["FUZZ_CASE"])
    verdict = examine(case, torch.device(DEVICE))
    assert verdict.status == "ok", verdict


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.timeout(int(os.environ.get("FUZZ_SECONDS", "60")) + 300)
def test_on_a_gpu(capsys):
    seconds = float(os.environ.get("FUZZ_SECONDS", "60"))
    workers, seed = (
        int(os.environ.get(name, default)) for name, default in (("FUZZ_WORKERS", "8"), ("FUZZ_SEED", "0"))
    )
    summary = run.fuzz(seconds, workers, seed, "gpu", "cuda")
    with capsys.disabled():
        print(f"\n{summary}")
    assert not summary.faults(run.expected(seconds)), str(summary)


# The generator --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_drawn(name):
    """Each argument of an operation, and of a layer's constructor and call, gets several values."""
    seen = defaultdict(set)
    for index in range(400):
        case = draw_case(0, index, SCALES["gpu"], name)
        for option, value in (case.options | case.data | case.data.get("given", {})).items():
            seen[option].add(str(value))
    if name in OPERATIONS:
        arguments = list(inspect.signature(getattr(kernels, name)).parameters)
        # Tensors, and the numbers that share a name with them.
        made = {key for index in range(60) for key in build(draw_case(0, index, SCALES["cpu"], name), CPU).tensors}
        for key in made:
            seen[key] |= {"a tensor", "more of them"}
    else:
        layer = getattr(reference, name)
        arguments = [*inspect.signature(layer).parameters, *inspect.signature(layer.forward).parameters]
        seen["img"] = seen["x"]
    missing = [each for each in arguments if len(seen[each]) < 2 and each not in {*EXCLUDED, "self"}]
    assert not missing


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
def test_names_are_all_that_has_kernels():
    assert set(OPERATIONS) == set(KERNELS)
    takes_kernels = {
        name
        for name in reference.__all__
        if {"use_triton", "router_use_triton"} & {*inspect.signature(getattr(reference, name)).parameters}
    }
    assert set(LAYERS) == takes_kernels


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize("index", range(len(NAMES)))
def test_a_line_makes_the_same_case(index):
    case = draw_case(3, index, SCALES["cpu"])
    same = Case.parse(str(case))
    assert "\n" not in str(case)
    assert same == case
    ours, theirs = build(case, CPU).tensors, build(same, CPU).tensors
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.nan_to_num(), theirs[name].nan_to_num())
        assert tensor.stride() == theirs[name].stride()


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
def test_sizes_reach_what_kernels_do():
    """Rows of one entry and the longest, no rows at all, and more rows than a grid dimension allows."""
    drawn = [draw_case(seed, index, SCALES["gpu"]) for seed in range(20) for index in range(len(NAMES))]
    shapes = [case.data["scores"] for case in drawn if "scores" in case.data and isinstance(case.data["scores"], list)]
    assert min(shape[-1] for shape in shapes) == 1
    assert max(shape[-1] for shape in shapes) > 200_000
    assert any(0 in shape for shape in shapes)
    assert any(case.data.get("b", 0) * case.data.get("h", 0) > 65535 for case in drawn)


# Correct computations that it lets pass ------------------------------------------------------------------------------


class _Contracted(torch.autograd.Function):
    """LayerNorm in fp32, whose gradient rounds a multiplication and an addition only once, as on a GPU."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        centered = x - x.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(centered * scale, scale, weight)
        y = centered * scale * weight
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        normalized, scale, weight = ctx.saved_tensors
        product = grad * weight
        others = normalized * (product * normalized).mean(-1, keepdim=True) + product.mean(-1, keepdim=True)
        dx = (grad.double() * weight.double() - others.double()).float() * scale
        dbias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, (grad * normalized).flatten(0, -2).sum(0), dbias, None


def _contracted(right, x, weight, bias=None, *, center, eps, dtype=None):
    if not center or x.dtype == torch.float64:
        return right(x, weight, bias, center=center, eps=eps, dtype=dtype)
    wide = (each if each is None else each.float() for each in (x, weight, bias))
    return _Contracted.apply(*wide, eps).to(result_dtype(dtype, x, weight, bias))


def _rounded_once(right, *args, dtype=None, **options):
    """Computed in fp64, except for the result."""
    floats = [each for each in (*args, *options.values()) if isinstance(each, Tensor) and each.is_floating_point()]
    args, options = tree_map(lambda each: each.double() if any(each is x for x in floats) else each, (args, options))
    return right(*args, **options, dtype=torch.float64).to(result_dtype(dtype, *floats))


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize(
    ("name", "correct", "of_the_kind"),
    [("normalize", _contracted, {"data": {"x": [3, 40, d]}, "options": {"center": True}}) for d in (1, 2, 3, 64)]
    + [
        (name, _rounded_once, {"options": {"dtype": dtype}})
        for name in ("combine", "normalize")
        for dtype in ("float32", "float16", "bfloat16")
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_lets_another_correct_computation_pass(monkeypatch, device, name, correct, of_the_kind):
    _planted(monkeypatch, name, correct)
    for index in range(12):
        case = draw_case(2, index, SCALES["cpu"], name)
        changed = {field: getattr(case, field) | values for field, values in of_the_kind.items()}
        verdict = examine(replace(case, grad=True, **changed), torch.device(device))
        assert verdict.status == "ok", verdict


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize("name", NAMES)
def test_the_truth_is_of_fp64_whatever_a_case_asks_for(name):
    for index in range(4):
        case = draw_case(4, index, SCALES["cpu"], name)
        watched = Watched()
        function, parameters = ours(case, CPU, watched)
        tensors = build(case, CPU).tensors | parameters
        execute(function, tensors, case)
        truth = execute(definition(case, CPU, watched, torch.float64), tensors, case, torch.float64)
        assert {x.dtype for x in truth.values() if x.is_floating_point()} <= {torch.float64}, case


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize(("eps", "eps_init", "eps_decay"), [(0.3, None, 1.0), (0.03, 4.0, 0.7), (1.0, None, 1.0)])
@pytest.mark.parametrize("n_iters", [5, 50])
@pytest.mark.parametrize("masked", [False, True])
def test_a_kink_is_wherever_fp32_may_be_on_the_other_side(eps, eps_init, eps_decay, n_iters, masked):
    generator = torch.Generator().manual_seed(0)
    s = 3 * torch.randn(400, 509, generator=generator)
    mask = torch.rand(s.shape, generator=generator) < 0.7 if masked else torch.ones_like(s, dtype=torch.bool)
    mask[:, 0] = True
    k = 1 + 300 * torch.rand(len(s), 1, generator=generator)
    options = {"n_iters": n_iters, "eps": eps, "eps_init": eps_init, "eps_decay": eps_decay}

    def descend(s, k, order):
        """-a before each iteration and at the end, with sums in a given order."""
        *temperatures, _ = epsilon_schedule(*options.values())
        a = temperatures[0] * (k.log() - mask.sum(-1, keepdim=True).to(s).log())
        for temperature in temperatures[1:]:
            yield -a
            exponent = (torch.minimum(s, -a) / temperature).masked_fill(~mask, -torch.inf)[:, order]
            a = temperature * (k.log() - exponent.logsumexp(dim=-1, keepdim=True))
        yield -a

    def kinks():
        return rows_at_kink("coor_descent", s.double(), {**options, "k": k.squeeze(-1).double(), "mask": mask}, 0.0)

    everything = torch.arange(509)
    assert kinks().float().mean() < 0.2
    # An entry of each row gets as close to a kink as the error of fp32 allows. It moves the kink as well.
    for _ in range(4):
        *_, kink = descend(s.double(), k.double(), everything)
        s[:, :1] = kink
    s[:, :1] += 1e-6 * torch.randn(len(s), 1, generator=generator)
    right = [s > kink for kink in descend(s.double(), k.double(), everything)]
    flipped = torch.zeros(len(s), dtype=torch.bool)
    for order in (everything, everything.flip(0), torch.randperm(509, generator=generator)):
        for kink, expected in zip(descend(s, k, order), right, strict=True):
            flipped |= (((s > kink) != expected) & mask).any(-1)
    assert flipped.any()
    assert not (flipped & ~kinks()).any()


@pytest.mark.parametrize("n", [3, 7, 40])
@pytest.mark.parametrize(
    ("eps", "eps_init", "eps_decay", "n_iters"), [(0.1, None, 1.0, 50), (0.03, 4.0, 0.7, 20), (0.3, 4.0, 0.9, 8)]
)
def test_roundings_of_sums_are_handed_on_to_the_output(n, eps, eps_init, eps_decay, n_iters):
    generator = torch.Generator().manual_seed(n)
    options = {"n_iters": n_iters, "eps": eps, "eps_init": eps_init, "eps_decay": eps_decay}
    *temperatures, last = epsilon_schedule(*options.values())
    ratios = []
    for std in (0.25, 5.0, 25.0):
        for k in (1.0, 1.18, n / 2, n - 0.1):
            s = std * torch.randn(100, n, generator=generator, dtype=torch.float64)

            def descend(lost, s=s, k=k):
                a = temperatures[0] * (log(k) - log(n) + lost)
                for temperature in temperatures[1:]:
                    log_sum = (s.clamp(max=-a) / temperature).logsumexp(-1, keepdim=True)
                    a = temperature * (log(k) - log_sum + lost)
                return ((s + a).clamp(max=0) / last).exp()

            # All sums have errors in the same direction, which is the worst case.
            error = (descend(LOST * UNIT) - descend(0.0)).abs().amax(-1, keepdim=True)
            ratios.append((error / error_handed_on("coor_descent", s, {**options, "k": k})).max().item())
    # The bound is also nearly reached.
    assert 0.1 < max(ratios) <= 1.01


# Faults that it finds -------------------------------------------------------------------------------------------------


def _planted(monkeypatch, name, fault):
    right = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args, **options: fault(right, *args, **options))


def _last_element_off(right, *args, **options):
    out = right(*args, **options)
    factor = torch.ones_like(out)
    factor.view(-1)[-1:] = 1.001
    return out * factor


def _mask_ignored_in_a_row(right, *args, mask=None, **options):
    if mask is not None:
        mask = mask.clone()
        mask.view(-1, mask.shape[-1])[-1:] = True
    return right(*args, mask=mask, **options)


def _eps_off(right, *args, eps=0.1, **options):
    return right(*args, eps=1.01 * eps, **options)


def _term_dropped(right, *args, **options):
    if options.get("bias") is not None:
        options["bias"] = torch.cat((options["bias"][:-1], 0 * options["bias"][-1:]))
    return right(*args, **options)


def _stride_ignored(right, *args, weight, **options):
    if weight.stride() != (1,):
        weight = torch.as_strided(weight, weight.shape, (1,))
    return right(*args, weight=weight, **options)


def _written_to(right, scores, **options):
    out = right(scores, **options)
    with torch.no_grad():
        scores.mul_(1.0 + 2**-7)
    return out


def _gradient_halved(right, *args, **options):
    out = right(*args, **options)
    return 0.5 * out + 0.5 * out.detach() if out.requires_grad else out


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize(
    ("name", "fault", "expected_message"),
    [
        ("coor_descent", _last_element_off, "output"),
        ("soft_topk", _last_element_off, "output"),
        ("routing_scores", _last_element_off, "output"),
        ("windowed_attention", _last_element_off, "output"),
        ("combine", _last_element_off, "output"),
        ("coor_descent", _mask_ignored_in_a_row, "output"),
        ("windowed_attention", _mask_ignored_in_a_row, "output"),
        ("routed_attention", _mask_ignored_in_a_row, "output"),
        ("coor_descent", _eps_off, "output"),
        ("soft_topk", _eps_off, "output"),
        ("segmented_coor_descent", _eps_off, "output"),
        ("topk", _eps_off, "coor_descent_values"),
        ("route", _eps_off, "weights"),
        ("route_prefixes", _eps_off, "weights"),
        ("normalize", _term_dropped, "output"),
        ("normalize", _stride_ignored, "output"),
        ("select", _written_to, "written to"),
        ("gathered_attention", _gradient_halved, "gradient"),
        ("coor_descent", _gradient_halved, "gradient"),
        ("combine", _gradient_halved, "gradient"),
        ("normalize", _gradient_halved, "gradient"),
    ],
)
def test_finds_a_planted_fault(monkeypatch, name, fault, expected_message):
    """Within few cases, because some have no mask, no gradient, or nothing that the fault affects."""
    _planted(monkeypatch, name, fault)
    verdicts = (examine(draw_case(1, index, SCALES["cpu"], name), CPU) for index in range(12))
    assert any(v.status == "failed" and expected_message in str(v.messages) for v in verdicts)


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
@pytest.mark.parametrize(
    ("factors", "messages"),
    [
        ((1, 1, 1.001, 1), {"output: has other bits in call 3 of a layer than in the first"}),
        ((1.1, 1.1, 1.1, 1.1), {"output, called: ", "output: has other bits where nobody watches"}),
    ],
)
def test_a_layer_whose_calls_are_wrong_is_found(monkeypatch, factors, messages):
    """The layer without observers multiplies its results by these factors."""

    def of_kernels(*arguments, right=check.by_kernels):
        function, factor = right(*arguments), iter(factors)
        return lambda tensors: {name: next(factor) * each for name, each in function(tensors).items()}

    monkeypatch.setattr(check, "by_kernels", of_kernels)
    verdict = examine(draw_case(1, 0, SCALES["cpu"], "ConditionalRoutedFeedForward"), CPU)
    assert verdict.status == "failed"
    assert all(any(found.startswith(each) for found in verdict.messages) for each in messages), verdict


@pytest.mark.skipif(not INTERPRETED, reason="tapes repeat kernels, and little of the path for a CPU")
def test_layers_are_played(monkeypatch):
    played = []
    monkeypatch.setattr(Tape, "play", lambda *arguments, right=Tape.play: played.append(1) or right(*arguments))
    cases = (draw_case(1, index, SCALES[SCALE], "ConditionalRoutedFeedForward") for index in range(12))
    assert any(examine(case, CPU).status == "ok" and played for case in cases)


@pytest.mark.skipif(INTERPRETED, reason="is not about kernels")
def test_a_broken_process_is_named_and_the_rest_runs(tmp_path, monkeypatch):
    script = tmp_path / "breaks.py"
    script.write_text(
        "import os, sys, kernels\n"
        "from tests.kernels.fuzz import cases\n"
        "from tests.kernels.fuzz.run import main\n"
        "cases.NAMES[:] = ['combine', 'select']\n"
        "kernels.combine = lambda *args, **options: os._exit(7)\n"
        "sys.exit(main())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(run.ROOT))
    monkeypatch.setattr(run, "PROGRAM", [sys.executable, str(script)])
    monkeypatch.setattr(run, "MOST_FAILURES", 2)
    summary = run.fuzz(120, 1, 0, "cpu", "cpu")
    assert {verdict.case.name for verdict in summary.failures} == {"combine"}
    assert summary.failures[0].messages == ["its process ended with 7: it said nothing"]
    assert summary.counts == {"combine": 2, "select": 1}


def test_a_summary_fails_for_failures_for_few_cases_and_for_undecided_ones():
    case = draw_case(0, 0, SCALES["cpu"])
    summary = run.Summary()
    for _ in range(10):
        summary.add(Verdict(case, "ok"))
    assert summary.faults(10) == []
    assert "expected are 11" in summary.faults(11)[0]
    for _ in range(2):
        summary.add(Verdict(case, "undecided"))
    assert "2 of 12 cases are undecided" in summary.faults(10)[0]
    summary.add(Verdict(case, "failed", ["output: off"]))
    assert summary.faults(10)[0] == "1 cases failed"
    assert f"FUZZ_CASE='{case}'" in str(summary)
