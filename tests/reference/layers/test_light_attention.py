"""Only properties of the module: the tests of its operations and of the layers cover the attention."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels._common.tensors import triton_for_cpu_tensors
from reference.layers.light_attention import SelfAttention, WindowedAttention


@pytest.mark.parametrize(
    "make", [lambda **way: WindowedAttention(8, 4, 4, 2, **way), lambda **way: SelfAttention(8, 4, 2, **way)]
)
def test_the_layer_chooses_the_kernel(make):
    assert "use_triton=False" in repr(make())
    with triton_for_cpu_tensors(), FakeTensorMode(), FlopCounterMode(display=False) as counter:
        make(use_triton=True)(torch.randn(1, 10, 8))
    assert torch.ops.colt5.windowed_attention in counter.get_flop_counts()["Global"]
    plain, fused = (make(use_triton=use_triton).double() for use_triton in (None, True))
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(1, 10, 8, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x))
