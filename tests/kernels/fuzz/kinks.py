"""Where the relaxed selection has no single derivative: rows with an entry that a rounding puts on either side."""

from typing import Any

import torch
from torch import Tensor

import reference
from reference._shared.arguments import epsilon_schedule

UNIT = torch.finfo(torch.float32).eps / 2


def rows_at_kink(name: str, scores: Tensor, options: dict[str, Any], spread: float) -> Tensor:
    """Which rows `...` of fp64 scores `... n` have an entry at a kink of an operation.

    Args:
        name: `coor_descent` or `soft_topk`.
        options: what it was called with.
        spread: how far scores may be off, beside by a rounding to fp32.
    """
    mask = options.get("mask")
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    s = scores.masked_fill(~valid, 0.0)
    distance = (_from_saturation if name == "soft_topk" else _from_kinks)(s, valid, options)
    return ((distance <= 4 * UNIT * s.abs() + 4 * spread + 1e-13) & valid).any(-1)


def _from_kinks(s: Tensor, valid: Tensor, options: dict[str, Any]) -> Tensor:
    """How far entries are from s = -a, in the nearest iteration of coordinate descent."""
    *temperatures, _ = epsilon_schedule(
        options["n_iters"], options["eps"], options.get("eps_init"), options.get("eps_decay", 1.0)
    )
    log_k = torch.as_tensor(options["k"], dtype=torch.float64, device=s.device).unsqueeze(-1).log()
    a = temperatures[0] * (log_k - valid.sum(-1, keepdim=True).double().log())
    nearest = torch.full_like(s, torch.inf)
    for temperature in temperatures[1:]:
        nearest = torch.minimum(nearest, (s + a).abs())
        exponent = (torch.minimum(s, -a) / temperature).masked_fill(~valid, -torch.inf)
        a = temperature * (log_k - exponent.logsumexp(dim=-1, keepdim=True))
    return torch.minimum(nearest, (s + a).abs())


def _from_saturation(s: Tensor, valid: Tensor, options: dict[str, Any]) -> Tensor:
    """How far entries are from where the exact solution reaches 1; all that round to 1 are there."""
    eps = options["eps"]
    y = reference.soft_topk(s, **{**options, "mask": valid})
    below = s.masked_fill(~valid | (y == 1), -torch.inf).amax(-1, keepdim=True)
    largest = y.masked_fill(y == 1, 0.0).amax(-1, keepdim=True)
    distance = (s - below + eps * largest.log()).abs() - 1e-6 * eps
    return distance.nan_to_num(torch.inf).masked_fill(~below.isfinite(), torch.inf)
