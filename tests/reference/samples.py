"""A small call of every operation and layer: its differentiable tensors, and its other arguments."""

from contextlib import contextmanager
from itertools import product

import torch

from tests.calls import results
from tests.reference.conftest import build

MASK = torch.tensor([[True, False, True, True, True, True, False], [True] * 7])
DESCENT = {"n_iters": 3, "eps": 0.3, "eps_init": 1.0, "eps_decay": 0.7}
GATHERED = {
    "indices": torch.tensor([[[0, 3, 4]], [[5, 1, 0]]])[None],
    "mask": torch.tensor([[[True, True, False]], [[True, True, True]]])[None],
}

OPERATIONS = {
    "biased_gelu": ({"x": (2, 3, 5), "bias": (5,)}, {}),
    "combine": (
        {
            "routed": (2, 3, 4),
            "scores": (2, 3),
            "null": (4,),
            "light": (2, 6, 4),
            "residual": (2, 6, 4),
            "bias": (4,),
            "routed_bias": (4,),
        },
        {"indices": torch.tensor([[0, 2, 5], [1, 3, 6]]), "length": 6},
    ),
    "coor_descent": ({"scores": (2, 7)}, {"k": 2.3, "mask": MASK, **DESCENT}),
    "gathered_attention": (
        {"query": (1, 2, 2, 3, 4), "key_value": (1, 1, 6, 16), "weights": (1, 2, 1, 3), "null_kv": (2, 2, 4)},
        {"multiply_keys_by_score": True, **GATHERED},
    ),
    "normalize": ({"x": (2, 3, 5), "weight": (5,), "bias": (5,)}, {"center": True}),
    "normalize_and_route": (
        {"x": (2, 7, 4), "routing_tokens": (1, 2, 4), "weight": (4,), "bias": (4,)},
        {"num_selected": 2, "k": 2.3, "mask": MASK, "center": True, **DESCENT},
    ),
    "route": (
        {"x": (2, 7, 4), "routing_tokens": (2, 2, 4)},
        {"num_selected": 1, "k": 1.3, "block_size": 3, "mask": MASK, "cosine_sim_scale": 0.7, **DESCENT},
    ),
    "route_prefixes": ({"scores": (2, 1, 7)}, {"window_size": 2, "num_selected": 3, "k": 1.3, **DESCENT}),
    "routed_attention": (
        {"query": (2, 3, 8), "key_value": (2, 2, 7, 8), "weights": (2, 2, 7), "null_kv": (2, 2, 4)},
        {"mask": MASK[:, None].expand(-1, 2, -1), "multiply_keys_by_score": True},
    ),
    "routing_scores": ({"x": (2, 7, 4), "routing_tokens": (2, 2, 4)}, {"cosine_sim_scale": 0.7}),
    "segmented_coor_descent": ({"scores": (2, 7)}, {"k": 2.3, "mask": MASK, "checkpoint_segments": 2, **DESCENT}),
    "select": ({"scores": (2, 7)}, {"num_selected": 3, "mask": MASK}),
    "soft_topk": ({"scores": (2, 7)}, {"k": 2.3, "eps": 0.3, "mask": MASK}),
    "topk": ({"x": (2, 7)}, {"k": 2, "coor_descent_k_ratio": 1.3, "mask": MASK, **DESCENT}),
    "windowed_attention": ({"qkv": (2, 7, 12)}, {"heads": 2, "window_size": 2, "mask": MASK}),
}

INPUTS = {
    "ConditionalRoutedCrossAttention": ((1, 12, 16), (1, 14, 16)),
    "ConditionalRoutedImageAttention": ((1, 3, 5, 16),),
    "ConditionalRoutedViT": ((1, 3, 32, 32),),
}
"""Inputs of layers that take more than tokens `b n d`."""


def call(package, name, dtype=torch.float64, device="cpu", **more):
    """An operation as a function of its differentiable tensors, and these."""
    shapes, options = OPERATIONS[name]
    options = {**options, **more}
    names = list(shapes)
    tensors = [torch.randn(shape, dtype=torch.float64, device="cpu").to(device, dtype) for shape in shapes.values()]
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}

    def function(*tensors):
        return getattr(package, name)(**dict(zip(names, tensors, strict=True)), **on_device)

    return function, [tensor.requires_grad_() for tensor in tensors]


def layer(name, dtype=torch.float64, device="cpu", **options):
    """A layer without a straight-through gradient, and tokens or images for it."""
    straight_through = "straight_through" if name == "CoordinateDescentRouter" else "router_straight_through"
    module = build(name, **{straight_through: False, **options}).to(device, dtype)
    shapes = INPUTS.get(name, ((1, 18, 16),))
    tensors = [torch.randn(shape, dtype=torch.float64, device="cpu").to(device, dtype) for shape in shapes]
    return module, [tensor.requires_grad_() for tensor in tensors]


def leaves(result):
    """The float tensors of a result."""
    return [each for each in results(result) if each.is_floating_point()]


ROTARY = {
    f"ConditionalRouted{name}Attention": {"rotary_emb": True, "light_rotary_emb": True}
    for name in ("", "Autoregressive", "Image")
}
"""Options of layers that make new tensors in each call."""

EVERY_DEFAULT = list(product((torch.bfloat16, torch.float16, torch.float32, torch.float64), (None, "meta")))
"""Default dtypes, and devices; on a CPU, `meta` shows the effect of a wrong device."""


@contextmanager
def defaults(dtype, device):
    """PyTorch's default dtype and device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def check_defaults(function, tensors, others=EVERY_DEFAULT):
    """Results and gradients are equal, to the bit, for any defaults."""

    def results():
        found = function(*tensors)
        parts = [each for each in leaves(found) if each.requires_grad]
        upstream = [torch.linspace(-1, 2, each.numel(), dtype=each.dtype, device=each.device) for each in parts]
        upstream = [each.view_as(part) for each, part in zip(upstream, parts, strict=True)]
        gradients = torch.autograd.grad(parts, tensors, upstream, materialize_grads=True) if parts else ()
        return [*(found if isinstance(found, tuple) else (found,)), *gradients]

    expected = results()
    for dtype, device in others:
        with defaults(dtype, device):
            actual = results()
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
