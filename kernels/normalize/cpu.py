"""`kernels.normalize` in PyTorch, for CPU tensors."""

import torch
from torch import Tensor

from reference._shared.arguments import result_dtype


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, center: bool, eps: float) -> Tensor:
    wide = torch.promote_types(result_dtype(None, x, weight, bias), torch.float32)
    x, weight, bias = x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    if center:
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    scale = x.shape[-1] ** 0.5 / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(eps)
    return x * scale * weight if bias is None else torch.addcmul(bias, x * scale, weight)
