"""The norms that come before linear layers."""

import torch
from torch import Tensor, nn

from reference._shared.autocast import autocast_dtype
from reference.layers.operations import Operations, UseTriton


class RMSNorm(nn.Module):
    """Tokens `... d` divided by their root mean square, times a learned gain, for a linear layer to come next."""

    def __init__(self, dim: int, use_triton: UseTriton = False) -> None:
        super().__init__()
        self.operations = Operations.of(use_triton)
        self.gamma = nn.Parameter(torch.ones(dim))

    def extra_repr(self) -> str:
        return self.operations.path("normalize")

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.operations.normalize(x, weight=self.gamma, dtype=autocast_dtype(x))
        return normalized


class LayerNorm(nn.LayerNorm):
    """PyTorch's, for a linear layer to come next."""

    def __init__(self, dim: int, use_triton: UseTriton = False) -> None:
        super().__init__(dim)
        self.operations = Operations.of(use_triton)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operations.path('normalize')}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        options = {"weight": self.weight, "bias": self.bias, "center": True, "eps": self.eps}
        return self.operations.normalize(input, **options, dtype=autocast_dtype(input))
