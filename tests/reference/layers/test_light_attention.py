"""The attention itself is tested with its operations, and the layers with those that have them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reference.layers.light_attention import SelfAttention, WindowedAttention


@pytest.mark.parametrize(
    "make", [lambda **way: WindowedAttention(8, 4, 4, 2, **way), lambda **way: SelfAttention(8, 4, 2, **way)]
)
def test_the_layer_chooses_the_kernel(make):
    assert "use_triton=False" in repr(make())
    plain, fused = (make(use_triton=use_triton).double() for use_triton in (None, True))
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(1, 10, 8, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        out = fused(x)
    assert torch.ops.colt5.windowed_attention in counter.get_flop_counts()["Global"]
    torch.testing.assert_close(out, plain(x))
