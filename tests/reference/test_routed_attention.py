from math import sqrt

import pytest
import torch
from torch.autograd import gradcheck

from reference import routed_attention
from reference.routed_attention import attend_to_routed

GENERATOR = torch.Generator().manual_seed(1)
QUERY, KEY_VALUE, WEIGHTS, NULL_KV = (
    torch.randn(shape, generator=GENERATOR, dtype=torch.float64)
    for shape in ((2, 3, 4 * 5), (2, 2, 6, 2 * 2 * 5), (2, 2, 6), (2, 4, 5))
)
"""Four heads of 5 dimensions, two for each of two routes."""

MASK = torch.rand(2, 2, 6, generator=GENERATOR) > 0.4


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("multiply_keys_by_score", [False, True])
@pytest.mark.parametrize("use_flash", [False, True])
def test_one_query_at_a_time(mask, multiply_keys_by_score, use_flash):
    options = {"mask": mask, "multiply_keys_by_score": multiply_keys_by_score}
    out = attend_to_routed(QUERY, KEY_VALUE, WEIGHTS, NULL_KV, use_flash=use_flash, **options)
    if not use_flash:
        assert torch.equal(routed_attention(QUERY, KEY_VALUE, WEIGHTS, NULL_KV, **options), out)
    for b in range(2):
        for head in range(4):
            route, within = divmod(head, 2)
            keys, values = [NULL_KV[0, head]], [NULL_KV[1, head]]
            for j in range(6):
                if mask is None or mask[b, route, j]:
                    weight = WEIGHTS[b, route, j]
                    pair = KEY_VALUE[b, route, j].view(2, 2, 5)[within]
                    keys.append(pair[0] * weight if multiply_keys_by_score else pair[0])
                    values.append(pair[1] * weight)
            for i in range(3):
                query = QUERY[b, i].view(4, 5)[head]
                attention = torch.stack([query @ key / sqrt(5) for key in keys]).softmax(-1)
                torch.testing.assert_close(out[b, i].view(4, 5)[head], attention @ torch.stack(values))


def test_gradients():
    def function(*inputs):
        return routed_attention(*inputs, mask=MASK, multiply_keys_by_score=True)

    inputs = tuple(each.clone().requires_grad_() for each in (QUERY, KEY_VALUE, WEIGHTS, NULL_KV))
    assert gradcheck(function, inputs, fast_mode=True)
