"""Parts of `kernels.segmented_coor_descent`: one iteration on one row, forward and backward."""

import triton
import triton.language as tl

from kernels._common.primitives import LOG2_E, exp2


@triton.jit
def borders_of(segment, n_iters, segments):
    """First iteration of a segment and of the next one; n_iters are split as evenly as possible."""
    return segment * n_iters // segments, (segment + 1) * n_iters // segments


@triton.jit
def slot_of(segment, row, n_rows):
    """Index of a segment and row in the checkpoints `segments rows`."""
    return tl.cast(segment, tl.int64) * n_rows + row


@triton.jit
def load_scores(scores_ptr, mask_ptr, columns, n, dtype: tl.constexpr, HAS_MASK: tl.constexpr):
    """Scores of a row, -inf for entries that take no part."""
    valid = columns < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + columns, mask=valid, other=0) != 0)
    return tl.load(scores_ptr + columns, mask=valid, other=-float("inf")).to(dtype)


@triton.jit
def load_log_k(k_ptr, row, k, dtype: tl.constexpr, HAS_K: tl.constexpr):
    """Logarithm of the row's k, and k. Both are NaN, and make the row NaN, if k is not positive."""
    k += tl.zeros((), tl.float64)
    if HAS_K:
        k = tl.load(k_ptr + row).to(tl.float64)
    k = tl.where(k > 0, k, float("nan")).to(dtype)
    return tl.log(k), k


@triton.jit
def finite(max_score):
    """The highest score, or 0 in a row without a valid one."""
    return tl.where(max_score == -float("inf"), 0.0, max_score)


@triton.jit
def first_b(s):
    return tl.where(s == -float("inf"), 0.0, -s)


@triton.jit
def next_b(s, a):
    return -tl.maximum(s + a, 0.0)


@triton.jit
def largest_of(max_score, a):
    """The largest s + b, without a reduction: s - relu(s + a) = min(s, -a)."""
    return tl.minimum(max_score, -a)


@triton.jit
def _exp_over(x, temperature):
    """exp(x / temperature) in the dtype of x."""
    x *= LOG2_E / temperature.to(x.dtype)
    if x.dtype == tl.float64:
        y = tl.exp2(x)
    else:
        y = exp2(x)
    return y


@triton.jit
def exponentials_of(s, b, largest, temperature):
    """exp((s + b) / temperature), scaled so that the largest of the row is 1."""
    return _exp_over(s + b - largest, temperature)


@triton.jit
def next_a(total, largest, log_k, temperature):
    """temperature (log k - logsumexp), from the sum of `exponentials_of`; finite for a row without a valid entry."""
    total = tl.where(total == 0, 1.0, total)
    return temperature.to(total.dtype) * (log_k - tl.log(total)) - largest


@triton.jit
def cool(temperature, eps_decay, eps):
    """The next temperature of `reference._shared.arguments.epsilon_schedule`."""
    return tl.maximum(temperature * eps_decay, eps)


@triton.jit
def output_of(s, a, temperature):
    """exp((s + a + b) / temperature) for b = -relu(s + a). Entries that take no part are 0, even if a is NaN."""
    y = _exp_over(s + a + next_b(s, a), temperature)
    return tl.where(s == -float("inf"), 0.0, y)


@triton.jit
def gradient_through_output(s, grad_output, a, temperature):
    """Gradient of s through the output alone, at constant a: grad_output y / temperature where y is not clipped."""
    direct = grad_output.to(s.dtype) * output_of(s, a, temperature) / temperature.to(s.dtype)
    return tl.where((s + a > 0) | (s == -float("inf")), 0.0, direct)


@triton.jit
def gradient_through_scores(s, b, exponentials, share):
    """Gradient of s from one iteration, to be subtracted; `share` is A_t divided by the sum of the exponentials."""
    return tl.where((b < 0) | (s == -float("inf")), 0.0, share * exponentials)
