"""A bias and the activation after it, as between the two products of a feed-forward layer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference._shared.arguments import check_biased_gelu


def biased_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (Hendrycks and Gimpel, 1606.08415) of x + bias: `(x + bias) * Phi(x + bias)`, with the distribution function
    Phi of the normal distribution. It is computed in fp32 at least and rounded once.

    Args:
        x: `... d`, any float dtype: a product without its bias.
        bias: `d`, any float dtype.

    Returns:
        `... d`, in the dtype of x.

    Raises:
        ValueError: x is not of a float dtype, or shapes do not match.
    """
    check_biased_gelu(x, bias)
    wide = torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32)
    return F.gelu(x.to(wide) + bias.to(wide)).to(x.dtype)
