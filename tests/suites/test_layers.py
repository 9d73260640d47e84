from dataclasses import replace
from functools import partial

import pytest
import torch

import reference
from colt5_bench.case import FORWARD, FORWARD_BACKWARD
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from colt5_bench.suite import Implementation
from suites import _dense, _descent, _layers, heads, layers, peers
from suites.layers import SUITE, ModelLayerCase
from suites.sequence_length import BLOCK, LengthCase

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = [ModelLayerCase(kind, "tiny") for kind in layers.LAYERS]


@pytest.fixture(scope="module")
def conditions():
    return Conditions(CPU, "cpu", "abc", measure_ceilings(CPU))


def on_meta(kind, model):
    return _layers.without_memory(lambda: layers.LAYERS[kind](model).make(reference, False))


@pytest.mark.parametrize("case", TINY, ids=str)
def test_a_module_is_a_function_of_its_inputs_and_parameters(case):
    module = case.layer.make(reference, False)
    problem = _layers.problem(case, CPU)
    parameters = {name: problem.inputs[name] for name, _ in module.named_parameters()}
    module.load_state_dict(parameters, strict=False)
    arguments = {name: tensor for name, tensor in problem.inputs.items() if name not in parameters}
    assert set(arguments) == {*case.layer.inputs, *case.layer.masks}

    output = _layers.plain(case)(**problem.inputs)
    assert torch.equal(output, module(**arguments))
    assert output.shape == problem.upstream.shape == case.layer.output


@pytest.mark.parametrize("case", TINY, ids=str)
def test_every_input_but_masks_has_a_gradient(case):
    problem = _layers.problem(case, CPU)
    truth = _layers.truth(case, problem, FORWARD_BACKWARD)
    assert set(truth.gradients) == set(problem.differentiable) == {*problem.inputs} - {*case.layer.masks}
    assert all(gradient.dtype == torch.float64 for gradient in truth.gradients.values())
    assert any(name.endswith("routing_token") and gradient.any() for name, gradient in truth.gradients.items())
    assert _layers.truth(case, problem, FORWARD).gradients == {}


def test_scores_are_narrow_enough_that_fewer_saturate_than_are_selected():
    case = ModelLayerCase("attention", "document-2k")
    problem = _layers.problem(case, CPU)
    router = on_meta("attention", "document-2k").q_router
    scores = problem.inputs["q_router.routing_token"] @ problem.inputs["x"].mT
    assert scores.std().item() == pytest.approx(_layers.SCORE_STD, rel=0.2)
    assert ((router.relax(scores, 64) == 1).sum(-1) < 64).all()


def test_gradients_of_parameters_are_of_one_size_however_many_tokens_there_are():
    sizes = [
        _layers.truth(case, _layers.problem(case, CPU), FORWARD_BACKWARD).gradients["light_ff.1.weight"].std().item()
        for case in (ModelLayerCase("feed_forward", model) for model in ("tiny", "document-2k"))
    ]
    assert all(0.03 < size < 3 for size in sizes)


@pytest.mark.parametrize(
    ("size", "hidden", "heads"),
    [("base", (1024, 8096), (4, 8)), ("large", (1408, 11264), (4, 12)), ("xl", (2560, 20480), (8, 24))],
)
@pytest.mark.parametrize(("n", "routed", "routed_kv"), [(4, 256, 512), (16, 1024, 2048)])
def test_sizes_are_those_of_the_paper(size, hidden, heads, n, routed, routed_kv):
    block = on_meta("block", f"{size}-{n}k")
    feed_forward, attention = block.conditional_ff, block.conditional_attn
    assert (feed_forward.light_ff[1].out_features, feed_forward.heavy_ff[1].out_features) == hidden
    assert (attention.light_attn.heads, attention.heavy_attn.heads) == heads
    assert attention.light_attn.window_size == 127
    assert feed_forward.num_heavy_tokens == attention.num_heavy_tokens_q == routed
    assert attention.num_heavy_tokens_kv == routed_kv


def test_sizes_are_those_of_the_document():
    for kind in ("feed_forward", "attention", "block"):
        assert layers.LAYERS[kind]("document").inputs == {"x": (2, 32768, 512)}
    block, cross = on_meta("block", "document"), on_meta("cross_attention", "document")
    assert block.conditional_ff.num_heavy_tokens == block.conditional_attn.num_heavy_tokens_kv == 1024
    assert block.conditional_ff.heavy_ff[1].out_features == 2048
    assert layers.LAYERS["cross_attention"]("document").inputs["context"] == (1, 1_048_576, 512)
    assert (cross.num_tokens_q, cross.num_tokens_kv, cross.kv_router.num_routing_tokens) == (512, 1024, 2)
    assert layers.LAYERS["autoregressive"]("document").inputs == {"x": (2, 8192, 512)}
    assert on_meta("autoregressive", "document").num_heavy_tokens_kv == 1024
    assert layers.LAYERS["image"]("document").inputs == {"x": (1, 32, 256, 256)}
    image = on_meta("image", "document")
    assert (image.num_heavy_tokens_q, image.light_window_size) == (1024, 32)


def test_a_gpu_measures_every_layer_of_the_document_and_every_size_of_the_paper():
    measured = {(case.kind, case.model) for case in SUITE.cases("default", CUDA)}
    assert {(kind, "document") for kind in layers.LAYERS} <= measured
    models = {f"{size}-{n}k" for size in ("base", "large", "xl") for n in (4, 16)}
    assert {(kind, model) for kind in layers.OF_AN_ENCODER for model in models} <= measured


def test_cost_is_the_least_that_has_to_be_done():
    case = ModelLayerCase("feed_forward", "tiny")
    tokens, d = 128, 64
    parameters = 3 * d + (d * 32 + 32 + 32 * d + d) + (d * 256 + 256 + 256 * d + d)
    forward = 4 * (parameters + 2 * tokens * d) + tokens
    products = 2 * (tokens * d + 2 * tokens * d * 32 + 2 * 4 * d * 256)
    assert _layers.cost(case, FORWARD) == _layers.Cost(bytes=forward, flops=products)
    backward = 4 * (parameters + tokens * d)
    assert _layers.cost(case, FORWARD_BACKWARD) == _layers.Cost(bytes=2 * forward + backward, flops=3 * products)


@pytest.mark.parametrize(
    "slip", [{"fetch_k_ratio": 1.2}, {"n_iters": 17}, {"eps": 0.05}, {"normalize_to": "selected"}], ids=str
)
def test_the_gate_sees_a_small_mistake(slip, conditions):
    class Package:
        @staticmethod
        def ConditionalRoutedAttention(dim, **options):
            return reference.ConditionalRoutedAttention(dim, router_kwargs=slip, **options)

    mistaken = Implementation(
        "mistaken", lambda case: _layers.as_function(case.layer.make(Package, False)), bound=_descent.lenient
    )
    suite = replace(SUITE, implementations={"mistaken": mistaken}, timed=False)
    (record,) = measure(suite, ModelLayerCase("attention", "tiny"), FORWARD_BACKWARD, ["mistaken"], conditions)
    assert record.status == "wrong"


class TestDense:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("chunk", [1, 7 * 64, 2**20])
    def test_plain_attention_is_sdpa_however_it_is_cut(self, monkeypatch, chunk, causal):
        query, key, value = (torch.randn(2, 4, 32, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
        monkeypatch.setattr(_dense, "CHUNK_SIMILARITIES", chunk)
        outputs = [attend(query, key, value, causal) for attend in (_dense.attend_plainly, _dense.attend_with_sdpa)]
        torch.testing.assert_close(*outputs)
        gradients = [torch.autograd.grad(output.square().sum(), (query, key, value)) for output in outputs]
        torch.testing.assert_close(*gradients)

    def test_dense_layers_are_as_wide_as_the_heavy_branch(self):
        case = ModelLayerCase("block", "base-4k")
        dense = _layers.without_memory(lambda: case.layer.dense(_dense.attend_with_sdpa))
        assert dense.feed_forward[1].out_features == 8096
        assert dense.attention.to_q.out_features == 8 * 64

    @pytest.mark.parametrize("kind", ["feed_forward", "block", "cross_attention", "autoregressive", "image"])
    def test_each_is_judged_by_its_own_truth(self, kind, conditions):
        case = ModelLayerCase(kind, "tiny")
        doubled = replace(peers.DENSE, build=lambda case: lambda **inputs: 2 * peers.DENSE.build(case)(**inputs))
        for dense, status in ((peers.DENSE, "ok"), (doubled, "wrong")):
            suite = replace(SUITE, implementations={"dense": dense}, timed=False)
            (record,) = measure(suite, case, FORWARD, ["dense"], conditions)
            assert record.status == status

    def test_flash_is_given_bf16(self):
        problem = peers.DENSE_FLASH.operation.problem(ModelLayerCase("attention", "tiny"), CPU)
        assert {tensor.dtype for tensor in problem.inputs.values()} == {torch.bfloat16}

    def test_what_would_take_too_long_is_said_to(self):
        long = LengthCase("self_attention", 2**20, 1024, None, 512)
        assert "takes too long" in peers.DENSE.unavailable(long, CUDA)
        assert peers.DENSE.unavailable(replace(long, n=2**17), CUDA) is None
        assert "no dense counterpart" in peers.DENSE.unavailable(ModelLayerCase("vit", "tiny"), CPU)
        assert "GPU only" in peers.DENSE_FLASH.unavailable(ModelLayerCase("attention", "tiny"), CPU)
        assert "no attention" in peers.DENSE_FLASH.unavailable(ModelLayerCase("feed_forward", "tiny"), CUDA)


def test_colt5_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: "there")
    plain = partial(peers.COLT5_LAYER_PLAIN.unavailable, device=CPU)
    triton = partial(peers.COLT5_LAYER_TRITON.unavailable, device=CUDA)
    assert plain(ModelLayerCase("block", "tiny")) is triton(ModelLayerCase("block", "tiny")) is None
    assert "NameError" in plain(ModelLayerCase("cross_attention", "tiny"))
    assert "raises" in triton(ModelLayerCase("vit", "tiny"))
    assert "half precision" in plain(ModelLayerCase("block", "tiny", "bfloat16"))
    assert "IndexError" in plain(LengthCase("router", 2048, 512, 1024, 32))
    assert "takes rows of at most" in triton(LengthCase("router", 2 * BLOCK, 512, None, 32))
    assert "GPU only" in peers.COLT5_LAYER_TRITON.unavailable(ModelLayerCase("block", "tiny"), CPU)
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert "not installed" in plain(ModelLayerCase("block", "tiny"))


def test_sets_of_keys_share_heads_evenly():
    cases = [case for preset in ("smoke", "default", "full") for case in heads.SUITE.cases(preset, CUDA)]
    assert all(case.heads % case.routed_sets == 0 for case in cases)
    router = _layers.without_memory(lambda: heads.HeadsCase(4, 64, 2, 256, 64).layer.make(reference, False)).kv_router
    assert router.num_routing_tokens == 2


def compiled(case):
    """The layer as a user compiles it for training. A GPU is not needed, because its graph is run by PyTorch."""
    module = _layers.without_memory(lambda: case.layer.make(reference, False))
    return _layers.as_function(module, torch.compile(module, backend="aot_eager"), autocast=True)


@pytest.mark.parametrize("kind", ["feed_forward", "block"])
def test_linear_layers_may_be_those_of_autocast(kind, conditions):
    """It rounds a bias and its gradient to bfloat16, which ours keep in fp32 where they can."""
    alone = {"compiled": Implementation("compiled", compiled, bound=_descent.lenient)}
    suite = replace(SUITE, timed=False, implementations=alone)
    case = ModelLayerCase(kind, "tiny", "autocast")
    (record,) = measure(suite, case, FORWARD_BACKWARD, ["compiled"], conditions)
    assert record.status == "ok", record.reason
