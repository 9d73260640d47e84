"""Coordinate descent and the soft top-k of one row with enough digits, from fp64 to a list."""

import math

from mpmath import mp, mpf

from reference._shared.arguments import epsilon_schedule

DIGITS = 700
"""Enough for scores of 1e308, and for their differences in units of a temperature."""


def coor_descent(scores, k, n_iters, eps, eps_init=None, eps_decay=1.0):
    """The definition (docs/design.md, section 1), with s + b as min(s, -a); scores of -inf take no part."""
    *temperatures, last = map(mpf, epsilon_schedule(n_iters, eps, eps_init, eps_decay))
    with mp.workdps(DIGITS):
        valid = [mpf(s) for s in scores if s != -math.inf]
        exponents = [mpf(0)] * len(valid)
        for temperature in temperatures:
            a = temperature * (mp.log(k) - _log_sum_exp([each / temperature for each in exponents]))
            exponents = [min(s, -a) for s in valid]
        y = iter([float(mp.exp((each + a) / last)) for each in exponents])
        return [0.0 if s == -math.inf else next(y) for s in scores]


def soft_topk(scores, k, eps):
    """With the m largest at 1, for the least m at which no other entry is above it."""
    with mp.workdps(DIGITS):
        valid = sorted((mpf(s) for s in scores if s != -math.inf), reverse=True)
        if k >= len(valid):
            return [float(s != -math.inf) for s in scores]
        for m in range(len(valid)):
            a = mpf(eps) * (mp.log(k - m) - _log_sum_exp([s / mpf(eps) for s in valid[m:]]))
            # Or exactly 1, except for the last digits.
            if valid[m] + a <= mpf(10) ** -300:
                break
        return [0.0 if s == -math.inf else float(mp.exp(min((mpf(s) + a) / mpf(eps), 0))) for s in scores]


def _log_sum_exp(exponents):
    largest = max(exponents)
    # Terms that are negligible relative to 1 in a double are omitted, because they take as long as the others.
    return largest + mp.log(mp.fsum(mp.exp(x - largest) for x in exponents if x - largest > -200))
