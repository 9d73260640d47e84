"""PyTorch's default dtype and device change no result of a kernel or of its CPU path."""

import pytest
import torch
import triton

import kernels
from tests.calls import KERNELS
from tests.kernels.devices import DEVICE
from tests.reference import samples

INTERPRETED = triton.knobs.runtime.interpret


# The interpreter is slow.
DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float32, torch.float64]
DEFAULTS = [(torch.bfloat16, "meta"), (torch.float64, None)] if INTERPRETED else samples.EVERY_DEFAULT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_operations(name, dtype):
    fused = {"fused": True} if name == "topk" else {}
    samples.check_defaults(*samples.call(kernels, name, dtype, DEVICE, **fused), DEFAULTS)
