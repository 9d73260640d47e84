"""Only the operation: other tests cover its use in layers, and the tests of the kernel cover its arguments."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from reference import windowed_attention


def turned(x, theta):
    """Tokens `n h d` by complex numbers: the plane of dimensions i and i + d / 2 rotates by its frequency per token."""
    first, second = x.chunk(2, dim=-1)
    half = first.shape[-1]
    angles = torch.arange(len(x))[:, None, None] * torch.tensor([theta ** (-i / half) for i in range(half)])
    plane = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((plane.real, plane.imag), dim=-1)


def dense(qkv, heads, window_size, causal, mask, theta=None, bias=None):
    """By the definition, token by token."""
    rows = []
    for row, present in zip(qkv, mask, strict=True):
        query, key, value = row.unflatten(-1, (3, heads, -1)).unbind(1)
        if theta is not None:
            query, key = turned(query, theta), turned(key, theta)
        out = torch.zeros_like(value)
        for i in range(len(row)):
            start, end = max(i - window_size, 0), i + window_size + 1
            if causal:
                start, end = max(i // window_size - 1, 0) * window_size, i + 1
            near = torch.arange(start, min(end, len(row)))[present[start:end]]
            if len(near):
                similarity = torch.einsum("hd,jhd->hj", query[i], key[near]) / query.shape[-1] ** 0.5
                if bias is not None:
                    middle = bias.shape[1] // 2
                    similarity = similarity + bias[:, middle + (near - i).clamp(-middle, middle)]
                out[i] = torch.einsum("hj,jhd->hd", similarity.softmax(dim=-1), value[near])
        rows.append(out.flatten(1))
    return torch.stack(rows)


@pytest.mark.parametrize(("theta", "reach"), [(None, None), (100.0, None), (None, 2), (None, 9)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "window_size"), [(1, 1), (7, 3), (12, 4), (9, 20), (0, 2)])
def test_is_softmax_attention_to_what_is_within_reach(n, window_size, causal, theta, reach):
    qkv = torch.randn(2, n, 3 * 2 * 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, n) > 0.3
    mask[1, n // 2 :] = False
    options = {"window_size": window_size, "causal": causal, "mask": mask}
    bias = None if reach is None else torch.randn(2, 2 * reach + 1, dtype=torch.float64)
    out = windowed_attention(qkv, heads=2, **options, rotary_theta=theta, position_bias=bias)
    torch.testing.assert_close(out, dense(qkv, 2, window_size, causal, mask, theta, bias))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    qkv = torch.randn(1, 6, 3 * 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, False, False, True, True]])
    assert gradcheck(lambda x: windowed_attention(x, heads=2, window_size=1, causal=causal, mask=mask), qkv)


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_gradients(causal):
    qkv = torch.randn(1, 6, 3 * 2 * 2, dtype=torch.float64, requires_grad=True)
    options = {"heads": 2, "window_size": 2, "causal": causal, "rotary_theta": 10.0}
    assert gradcheck(lambda x: windowed_attention(x, **options), qkv)


@pytest.mark.parametrize("causal", [False, True])
def test_position_bias_gradients(causal):
    qkv, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 6, 12), (2, 5)))

    def function(qkv, bias):
        return windowed_attention(qkv, heads=2, window_size=2, causal=causal, position_bias=bias)

    assert gradcheck(function, (qkv, bias), check_forward_ad=True)
    assert gradgradcheck(function, (qkv, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotary_sees_distances_alone(dtype):
    """Tokens that are moved far beyond earlier positions are attended to as before."""
    qkv = torch.randn(1, 20, 3 * 8, dtype=dtype)
    moved = torch.cat((torch.randn(1, 200_000, 3 * 8, dtype=dtype), qkv), dim=1)
    early, late = (windowed_attention(x, heads=1, window_size=4, rotary_theta=10000) for x in (qkv, moved))
    torch.testing.assert_close(late[:, -16:], early[:, -16:])
