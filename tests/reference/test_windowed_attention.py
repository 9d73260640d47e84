"""What layers do with it is tested with them, and its arguments with those of the kernel."""

import pytest
import torch
from torch.autograd import gradcheck

from reference import windowed_attention


def dense(qkv, heads, window_size, causal, mask):
    """By the definition, one token after the other."""
    rows = []
    for row, present in zip(qkv, mask, strict=True):
        query, key, value = row.unflatten(-1, (3, heads, -1)).unbind(1)
        out = torch.zeros_like(value)
        for i in range(len(row)):
            start, end = max(i - window_size, 0), i + window_size + 1
            if causal:
                start, end = max(i // window_size - 1, 0) * window_size, i + 1
            near = torch.arange(start, min(end, len(row)))[present[start:end]]
            if len(near):
                similarity = torch.einsum("hd,jhd->hj", query[i], key[near]) / query.shape[-1] ** 0.5
                out[i] = torch.einsum("hj,jhd->hd", similarity.softmax(dim=-1), value[near])
        rows.append(out.flatten(1))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "window_size"), [(1, 1), (7, 3), (12, 4), (9, 20), (0, 2)])
def test_is_softmax_attention_to_what_is_within_reach(n, window_size, causal):
    qkv = torch.randn(2, n, 3 * 2 * 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, n) > 0.3
    mask[1, n // 2 :] = False
    out = windowed_attention(qkv, heads=2, window_size=window_size, causal=causal, mask=mask)
    torch.testing.assert_close(out, dense(qkv, 2, window_size, causal, mask))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    qkv = torch.randn(1, 6, 3 * 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, False, False, True, True]])
    assert gradcheck(lambda x: windowed_attention(x, heads=2, window_size=1, causal=causal, mask=mask), qkv)
