"""Rows without a unique derivative of the relaxed selection: a rounding decides the side of an entry."""

from collections.abc import Iterator
from math import log2
from typing import Any

import torch
from torch import Tensor

import reference
from reference._shared.arguments import epsilon_schedule
from suites._kinks import SATURATION

UNIT = torch.finfo(torch.float32).eps / 2

LOST = 4
"""Roundings of the sum in an iteration: an exponential of a GPU is exact to 2**-22."""


def rows_at_kink(name: str, scores: Tensor, options: dict[str, Any], spread: float) -> Tensor:
    """Rows `...` of fp64 scores `... n` with an entry at a kink of an operation.

    Args:
        name: `coor_descent` or `soft_topk`.
        options: its arguments.
        spread: possible error of scores, in addition to a rounding to fp32.
    """
    mask = options.get("mask")
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    s = scores.masked_fill(~valid, 0.0)
    near = (_near_saturation if name == "soft_topk" else _near_kinks)(s, valid, options, spread)
    return (near & valid).any(-1)


def _near_kinks(s: Tensor, valid: Tensor, options: dict[str, Any], spread: float) -> Tensor:
    """Entries close to s = -a in an iteration of coordinate descent."""
    near, off = torch.zeros_like(valid), 0.0
    for _, a, handed_on, own in _iterations(s, valid, options):
        off = handed_on * off + (1 - handed_on) * spread + UNIT * own
        near |= _is_near(s, (s + a).abs(), off + spread)
    return near


def error_handed_on(name: str, scores: Tensor, options: dict[str, Any]) -> Tensor:
    """The error of each row `... 1` of outputs whose iterations each lose a few roundings of the sum.

    Arguments are those of `rows_at_kink`.

    A rounding of the sum moves a by the temperature, and the output by this divided by the last temperature.
    """
    if name != "coor_descent" or not scores.numel():
        return scores.new_zeros((*scores.shape[:-1], 1))
    mask = options.get("mask")
    valid = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand(scores.shape)
    off = scores.new_zeros((*scores.shape[:-1], 1))
    for temperature, _, handed_on, _ in _iterations(scores.masked_fill(~valid, 0.0), valid, options):
        off = handed_on * off + temperature
    return LOST * UNIT * off / options["eps"]


def _iterations(
    s: Tensor, valid: Tensor, options: dict[str, Any]
) -> Iterator[tuple[float, Tensor, Tensor | float, Tensor]]:
    """Iterations of coordinate descent: temperature, a, and the accumulated roundings of a.

    Each iteration adds its own error, in units of a rounding. It passes on the earlier ones, times the share of the sum
    of the entries with s > -a, whose exponent is -a.
    """
    *temperatures, _ = epsilon_schedule(
        options["n_iters"], options["eps"], options.get("eps_init"), options.get("eps_decay", 1.0)
    )
    log_k = torch.as_tensor(options["k"], dtype=torch.float64, device=s.device).detach().unsqueeze(-1).log()
    sums = log2(max(s.shape[-1], 2))
    log_sum = valid.sum(-1, keepdim=True).double().log()
    a = temperatures[0] * (log_k - log_sum)
    # The first iteration does not depend on scores.
    yield temperatures[0], a, 1.0, temperatures[0] * (log_k.abs() + log_sum)
    for temperature in temperatures[1:]:
        at_most = torch.minimum(s, -a)
        exponent = (at_most / temperature).masked_fill(~valid, -torch.inf)
        log_sum = exponent.logsumexp(dim=-1, keepdim=True)
        p = (exponent - log_sum).exp().nan_to_num()
        handed_on = (p * (s > -a)).sum(-1, keepdim=True)
        own = (p * at_most.abs()).sum(-1, keepdim=True) + temperature * (log_k.abs() + log_sum.abs() + sums)
        a = temperature * (log_k - log_sum)
        yield temperature, a, handed_on, own


def _near_saturation(s: Tensor, valid: Tensor, options: dict[str, Any], spread: float) -> Tensor:
    """Entries close to the point where the exact solution reaches 1; they include all that round to 1."""
    eps = options["eps"]
    y = reference.soft_topk(s, **{**options, "mask": valid})
    distance = SATURATION.distances(s, y, eps) - 1e-6 * eps
    return _is_near(s, distance.nan_to_num(torch.inf), spread)


def _is_near(s: Tensor, distance: Tensor, off: Tensor | float) -> Tensor:
    return distance <= 4 * UNIT * s.abs() + 4 * off + 1e-13
