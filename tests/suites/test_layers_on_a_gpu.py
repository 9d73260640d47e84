"""The layers with kernels on a GPU at the sizes of colt5-attention's README. They give the same bits in every call and
in CUDA graphs. Small ones are compiled."""

import pytest
import torch

import reference
from suites import _layers
from suites.layers import LAYERS, WITHOUT_PRODUCTS, ModelLayerCase
from tests.kernels.devices import capture

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
CASES = [
    *(ModelLayerCase(kind, "document", "float32" if kind in WITHOUT_PRODUCTS else "autocast") for kind in LAYERS),
    *(ModelLayerCase(kind, "document", "bfloat16") for kind in ("attention", "block", "autoregressive")),
    ModelLayerCase("attention", "document"),
    ModelLayerCase("autoregressive", "document-32k", "autocast"),
]


def results_of(function, problem):
    """The output and all gradients."""
    inputs = {
        name: tensor.detach().requires_grad_(name in problem.differentiable) for name, tensor in problem.inputs.items()
    }
    output = function(**inputs)
    gradients = torch.autograd.grad(output, [inputs[name] for name in problem.differentiable], problem.upstream)
    return {"output": output, **dict(zip(problem.differentiable, gradients, strict=True))}


def assert_same_bits(actual, expected):
    different = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not different


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_same_bits_from_run_to_run_and_from_a_cuda_graph(case):
    problem, function = _layers.problem(case, CUDA), _layers.ours(case, use_triton=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first, second = results_of(function, problem), results_of(function, problem)
    torch.cuda.current_stream().wait_stream(side)
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert_same_bits(second, first)

    graph, captured = capture(lambda: results_of(function, problem))
    for _ in range(2):
        graph.replay()
    assert_same_bits(captured, first)


# Inductor imports deprecated names of PyTorch, and warns that TF32, which would change the results, is off.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("kind", LAYERS)
def test_compiles_in_one_graph(kind):
    layer = ModelLayerCase(kind, "tiny").layer
    module = layer.make(reference, True).to(CUDA)
    inputs = {name: torch.randn(shape, device=CUDA, requires_grad=True) for name, shape in layer.inputs.items()}
    masks = {name: torch.ones(shape, dtype=torch.bool, device=CUDA) for name, shape in layer.masks.items()}
    sources = {**inputs, **dict(module.named_parameters())}
    results = []
    for call in (module, torch.compile(module, fullgraph=True)):
        output = call(**inputs, **masks)
        results.append((output.detach(), *torch.autograd.grad(output.square().mean(), list(sources.values()))))
    for name, expected, actual in zip(("output", *sources), *results, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max(), name
