import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from reference import routing_scores

X = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_is_a_product_of_each_token_with_each_routing_token():
    torch.testing.assert_close(routing_scores(X, TOKENS), torch.einsum("bnd,brd->brn", X, TOKENS))
    torch.testing.assert_close(routing_scores(X, TOKENS[:1]), torch.einsum("bnd,rd->brn", X, TOKENS[0]))


def test_is_a_cosine_times_a_scale():
    cosines = F.cosine_similarity(X[:, None], TOKENS[:, :, None], dim=-1)
    torch.testing.assert_close(routing_scores(X, TOKENS, cosine_sim_scale=3.0), 3.0 * cosines)
    assert not routing_scores(torch.zeros_like(X), TOKENS, cosine_sim_scale=3.0).any()


@pytest.mark.parametrize("scale", [None, 2.0])
def test_gradcheck(scale):
    inputs = X.clone().requires_grad_(), TOKENS.clone().requires_grad_()
    assert gradcheck(lambda x, tokens: routing_scores(x, tokens, cosine_sim_scale=scale), inputs)


def test_half_precision_is_not_rounded():
    x, tokens = X.bfloat16(), TOKENS.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = routing_scores(x, tokens)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), routing_scores(x.double(), tokens.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 7, 5, dtype=torch.int64)}, "x must be a tensor of a float dtype, got torch.int64"),
        ({"x": torch.ones(7, 5)}, r"x must be of shape \(b, n, d\) with d >= 1, got shape \(7, 5\)"),
        ({"routing_tokens": torch.ones(3, 3, 5)}, r"routing_tokens must be of shape .* got shape \(3, 3, 5\)"),
        ({"routing_tokens": torch.ones(1, 3, 4)}, r"routing_tokens must be of shape .* got shape \(1, 3, 4\)"),
        ({"routing_tokens": torch.ones(3, 5)}, r"routing_tokens must be of shape .* got shape \(3, 5\)"),
        ({"routing_tokens": torch.ones(1, 3, 5).long()}, "routing_tokens must be a tensor of a float dtype"),
        (
            {"routing_tokens": torch.ones(1, 3, 5, device="meta")},
            "must be on cpu, the device of x, got on meta",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        routing_scores(**{"x": X, "routing_tokens": TOKENS, **arguments})
