"""Behaviour that `route` adds to its steps, which the tests of the router cover."""

import pytest
import torch
from torch.autograd import gradcheck

from reference import coor_descent, route, soft_topk

X = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
OPTIONS = {"num_selected": 3, "k": 3.5, "n_iters": 5, "eps": 0.3}


def test_a_row_of_scores_for_each_route():
    mask = torch.rand(2, 11) > 0.2
    indices, weights, tokens = route(X, TOKENS, mask=mask, **OPTIONS)
    for b in range(2):
        for r in range(2):
            scores = X[b] @ TOKENS[0, r]
            expected = scores.masked_fill(~mask[b], -torch.inf).topk(3).indices
            assert torch.equal(indices[b, r], expected)
            relaxed = coor_descent(scores, k=3.5, n_iters=5, eps=0.3, mask=mask[b])
            torch.testing.assert_close(weights[b, r], relaxed[expected])
            assert torch.equal(tokens[b, r], X[b, expected])


def test_blocks_are_rows_of_their_own_and_the_last_is_filled_up():
    indices, weights, tokens = route(X, TOKENS, block_size=5, solver="exact", **OPTIONS)
    assert indices.shape == (2, 2, 9)
    for start in (0, 5):
        scores = torch.einsum("bnd,rd->brn", X[:, start : start + 5], TOKENS[0])
        part = slice(3 * start // 5, 3 * start // 5 + 3)
        expected = scores.topk(3).indices
        assert torch.equal(indices[..., part], expected + start)
        torch.testing.assert_close(weights[..., part], soft_topk(scores, k=3.5, eps=0.3).gather(-1, expected))
    # One token is left for the last block, from which two more are selected.
    assert torch.equal(indices[..., 6:], torch.tensor([10, 11, 12]).expand(2, 2, 3))
    assert torch.equal(weights[..., 6:] == 0, torch.tensor([False, True, True]).expand(2, 2, 3))
    assert torch.equal(tokens[..., 6:, :], X[:, None, 10:].expand(2, 2, 3, 4))


@pytest.mark.parametrize("solver", ["coor_descent", "exact"])
def test_gradcheck(solver):
    inputs = X.clone().requires_grad_(), TOKENS.clone().requires_grad_()

    def function(x, tokens):
        return route(x, tokens, solver=solver, block_size=5, **OPTIONS)[1:]

    assert gradcheck(function, inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_selected": 0}, "num_selected must be >= 1, got 0"),
        ({"num_selected": 12}, "num_selected must be from 1 to n = 11, got 12"),
        ({"block_size": 2}, "num_selected must be from 1 to block_size = 2, got 3"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"k": 0}, "k must be > 0, got 0"),
        ({"k": torch.ones(2)}, "k must be a number, got a tensor"),
        ({"n_iters": 0}, "n_iters must be >= 1, got 0"),
        ({"eps": 0.0}, r"eps must be > 0, got 0\.0"),
        ({"solver": "sinkhorn"}, "solver must be coor_descent or exact, got sinkhorn"),
        ({"mask": torch.ones(2, 10).bool()}, r"mask must be of shape \(2, 11\), one entry per token of x"),
        ({"routing_tokens": torch.ones(3, 2, 4)}, "routing_tokens must be of shape"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        route(**{"x": X, "routing_tokens": TOKENS, **OPTIONS, **arguments})
