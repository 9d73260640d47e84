"""The norms before linear layers."""

from typing import Any

import torch
from torch import Tensor, nn

from reference._shared.autocast import autocast_dtype
from reference.layers.operations import Operations, UseTriton


class RMSNorm(nn.Module):
    """Tokens `... d` divided by their root mean square, times a learned gain, as input of a linear layer."""

    def __init__(self, dim: int, use_triton: UseTriton = False) -> None:
        super().__init__()
        self.operations = Operations.of(use_triton)
        self.gamma = nn.Parameter(torch.ones(dim))

    def extra_repr(self) -> str:
        return self.operations.path("normalize")

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = self.operations.normalize(x, dtype=autocast_dtype(x), **self.options())
        return normalized

    def options(self) -> dict[str, Any]:
        """Arguments of `normalize` besides tokens and dtype."""
        return {"weight": self.gamma}


class LayerNorm(nn.LayerNorm):
    """PyTorch's LayerNorm, as input of a linear layer."""

    def __init__(self, dim: int, use_triton: UseTriton = False) -> None:
        super().__init__(dim)
        self.operations = Operations.of(use_triton)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.operations.path('normalize')}"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.operations.normalize(input, dtype=autocast_dtype(input), **self.options())

    def options(self) -> dict[str, Any]:
        """The same as in `RMSNorm`."""
        return {"weight": self.weight, "bias": self.bias, "center": True, "eps": self.eps}
