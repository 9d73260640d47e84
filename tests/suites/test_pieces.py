"""A layer in pieces gives the result of the layer. Its memory does not grow with the number of windows."""

import pytest
import torch

from colt5_bench.case import FORWARD_BACKWARD
from suites import _layers, _pieces
from suites.layers import ModelLayerCase

CPU = torch.device("cpu")


def truths(monkeypatch, kind, sparing, tokens):
    """The fp64 truth of a tiny case by the layer itself, and in pieces of a number of tokens."""
    case = ModelLayerCase(kind, "tiny")
    problem = _layers.problem(case, CPU)
    whole = _layers.truth_of(_layers.ours(case, use_triton=False), problem, FORWARD_BACKWARD)
    monkeypatch.setattr(_pieces, "TOKENS", tokens)
    layer = case.layer
    pieces = _layers.truth_of(_layers.sparingly(layer, sparing, autocast=False), problem, FORWARD_BACKWARD)
    return whole, pieces


@pytest.mark.parametrize(
    ("kind", "sparing", "tokens"),
    [
        ("attention", _pieces.in_pieces, 1),
        ("block", _pieces.in_pieces, 100),
        ("autoregressive", _pieces.in_pieces, 1),
        ("autoregressive", _pieces.by_window, 1),
        ("image", _pieces.in_pieces, 512),
    ],
)
def test_pieces_make_the_whole(monkeypatch, kind, sparing, tokens):
    whole, pieces = truths(monkeypatch, kind, sparing, tokens)
    torch.testing.assert_close(pieces.output, whole.output)
    assert pieces.gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(pieces.gradients[name], gradient, msg=name)
        assert gradient.any(), name
