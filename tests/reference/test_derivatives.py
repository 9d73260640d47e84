"""Everything in `reference` has a second derivative, and one in forward mode. Errors of kernels, which lack both, refer
to them."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import reference
from tests.calls import LAYERS, REFERENCES
from tests.reference import samples

# PyTorch's own rules of forward mode are such scripts.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

OPTIONS = {
    "ConditionalRoutedAttention": [{"use_flash_attn": True, "rotary_emb": True, "light_rotary_emb": True}],
    "ConditionalRoutedAutoregressiveAttention": [{"use_flash_attn": True, "causal_query_routing": True}],
    "ConditionalRoutedCrossAttention": [{"use_flash_attn": True, "rotary_emb": True}],
    "ConditionalRoutedImageAttention": [{"use_flash_attn": True, "rotary_emb": True, "light_rotary_emb": True}],
    "ConditionalRoutedTransformerBlock": [{"use_flash_attn": True}],
    "ConditionalRoutedViT": [{"flash_attn": False}],
    "CoordinateDescentRouter": [{"solver": "exact"}],
}
"""Options of layers, besides the defaults."""


def test_everything_has_a_sample():
    classes = {name: getattr(reference, name) for name in reference.__all__ if name not in REFERENCES}
    assert sorted(name for name, found in classes.items() if issubclass(found, nn.Module)) == LAYERS
    assert set(REFERENCES) == set(samples.OPERATIONS) - {"segmented_coor_descent"}


def differentiable(name, result):
    """Differentiable results; of the hard top-k those that are not passed straight through."""
    return (result.coor_descent_values,) if name == "topk" else tuple(samples.leaves(result))


@DEVICES
@pytest.mark.parametrize("name", [name for name in REFERENCES if name != "select"])
def test_operations(name, device):
    function, tensors = samples.call(reference, name, device=device)
    check(lambda *tensors: differentiable(name, function(*tensors)), tensors)


@DEVICES
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in LAYERS for options in [{}, *OPTIONS.get(name, [])]]
)
def test_layers(name, options, device):
    """For all inputs and all of their parameters."""
    layer, tensors = samples.layer(name, device=device, **options)
    parameters = dict(layer.named_parameters())
    more = {"num_tokens": 8} if name == "CoordinateDescentRouter" else {}

    def function(*tensors):
        given, own = tensors[: -len(parameters)], dict(zip(parameters, tensors[-len(parameters) :], strict=True))
        return differentiable(name, functional_call(layer, own, given, more))

    check(function, [*tensors, *parameters.values()])


def check(function, tensors):
    """In one random direction in the space of all tensors, which takes a few calls and no matrix."""

    def of_one_vector(vector):
        parts = vector.split([tensor.numel() for tensor in tensors])
        return function(*(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)))

    vector = torch.cat([tensor.detach().flatten() for tensor in tensors]).requires_grad_()
    assert gradcheck(of_one_vector, vector, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(of_one_vector, vector, fast_mode=True)


@DEVICES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_second_derivative_is_that_of_fp64(dtype, autocast, device):
    """Kernels of scaled_dot_product_attention differ by dtype: users do not have the ones for fp64."""
    function, (qkv,) = samples.call(reference, "windowed_attention", dtype, device)
    first, second = [], []
    for x in (qkv, qkv.detach().double().requires_grad_()):
        with torch.autocast(device, torch.bfloat16, enabled=autocast and x is qkv):
            out = function(x)
            (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        first.append(gradient)
        second += torch.autograd.grad(gradient.square().sum(), x)
    # About twenty consecutive roundings, the coarsest of which is the cast to the dtype of autocast.
    rounding = 20 * torch.finfo(torch.bfloat16 if autocast else dtype).eps
    for actual, expected in (first, second):
        assert ((actual.double() - expected).norm() / expected.norm()).item() < rounding


def test_meta_tensors_have_a_second_derivative():
    function, tensors = samples.call(reference, "windowed_attention", torch.float32, "meta")
    gradients = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in gradients), tensors)
    assert [each.shape for each in second] == [each.shape for each in tensors]


def test_an_ordinary_gradient_is_the_kernels_own():
    """Equal to the bit, and with no additional saved tensors."""
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    kept, outs = [], []
    for function in (lambda x: reference._attention.attend(x, x, x, use_flash=True), lambda x: attend(x, x, x)):
        storages = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=storages: s.add(x.data_ptr()) or x, lambda x: x):
            out = function(query)
        kept.append(len(storages))
        outs.append((out, *torch.autograd.grad(out.square().sum(), query)))
    assert kept[0] == kept[1]
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))
