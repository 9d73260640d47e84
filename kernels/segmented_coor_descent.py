"""Coordinate descent as the CoLT5 system published it: vectors a and b, checkpointed at the borders of segments.

The forward pass keeps b at the start of each segment of iterations and a at its end, and the backward pass recomputes
what lies between: for each iteration of a segment, from the last to the first, all that come before it. More segments
take more memory and less time, which is what the suite `segments` shows beside `kernels.coor_descent`, which needs
none.

Gradient. With x = s + b, p = softmax(x / e) and A_t = dL/da_t, iteration t hands back

    b_{t+1} = -relu(s + a_t)                  db := dL/db_{t+1},  A_t = -sum db [s + a_t > 0],  ds -= db [s + a_t > 0]
    a_t = e (log k - logsumexp(x / e))        dx = -A_t p,  ds += dx,  dL/db_t = dx,  dk += A_t e / k

and s + a_{t-1} > 0 is where b_t < 0, so that the gradient of b_t is used up as soon as it is known, on

    ds += -A_t p where b_t = 0,    A_{t-1} = A_t sum p [b_t < 0]

but for b_0 = -s, where x = 0 whatever s is. The output y = exp((s + a + b) / e) starts it: ds = A = g y / e where
s + a <= 0, A summed over the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import as_rows, k_as_rows, mask_as_rows, runs_triton
from kernels._primitives import LOG2_E, exp2
from reference._arguments import check_k, check_schedule, check_scores, epsilon_schedule, first_temperature, require

LONGEST = 131072
"""Longest row that is supported: one program handles a row."""

RESIDENT = 8192
"""Longest row of which one program keeps s, b and, in the backward pass, ds in registers; a quarter of it in fp64."""

STREAMED = 8192
"""Entries of a longer row that a program reads at a time; a quarter of it in fp64."""


@triton.jit
def _borders(segment, n_iters, segments):
    """First iteration of a segment and of the one after; n_iters are split as evenly as possible."""
    return segment * n_iters // segments, (segment + 1) * n_iters // segments


@triton.jit
def _slot(segment, row, n_rows):
    """Where a segment and row is among the checkpoints `segments rows`."""
    return tl.cast(segment, tl.int64) * n_rows + row


@triton.jit
def _load_scores(scores_ptr, mask_ptr, columns, n, dtype: tl.constexpr, HAS_MASK: tl.constexpr):
    """Scores of a row, -inf where there is none to take part."""
    valid = columns < n
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + columns, mask=valid, other=0) != 0)
    return tl.load(scores_ptr + columns, mask=valid, other=-float("inf")).to(dtype)


@triton.jit
def _load_log_k(k_ptr, row, k, dtype: tl.constexpr, HAS_K: tl.constexpr):
    """Logarithm of the row's k, and k; NaN, and with it the row, where k is not positive."""
    k += tl.zeros((), tl.float64)
    if HAS_K:
        k = tl.load(k_ptr + row).to(tl.float64)
    k = tl.where(k > 0, k, float("nan")).to(dtype)
    return tl.log(k), k


@triton.jit
def _finite(highest):
    """The highest score, or 0 in a row without a valid one."""
    return tl.where(highest == -float("inf"), 0.0, highest)


@triton.jit
def _first_b(s):
    return tl.where(s == -float("inf"), 0.0, -s)


@triton.jit
def _next_b(s, a):
    return -tl.maximum(s + a, 0.0)


@triton.jit
def _largest(highest, a):
    """The largest s + b, without a reduction: s - relu(s + a) = min(s, -a)."""
    return tl.minimum(highest, -a)


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
def _exponentials(s, b, largest, temperature):
    """exp((s + b) / temperature), scaled so that the largest of the row is 1."""
    return _exp_over(s + b - largest, temperature)


@triton.jit
def _next_a(total, largest, log_k, temperature):
    """temperature (log k - logsumexp), from the sum of `_exponentials`; finite for a row without a valid entry."""
    total = tl.where(total == 0, 1.0, total)
    return temperature.to(total.dtype) * (log_k - tl.log(total)) - largest


@triton.jit
def _cool(temperature, eps_decay, eps):
    """The next of `reference._arguments.epsilon_schedule`."""
    return tl.maximum(temperature * eps_decay, eps)


@triton.jit
def _output(s, a, temperature):
    """exp((s + a + b) / temperature) for b = -relu(s + a); 0 for what takes no part, also if a is NaN."""
    y = _exp_over(s + a + _next_b(s, a), temperature)
    return tl.where(s == -float("inf"), 0.0, y)


@triton.jit
def _output_gradient(s, grad, a, temperature):
    """Gradient of s through the output alone, at constant a: grad y / temperature where y is not clipped."""
    direct = grad.to(s.dtype) * _output(s, a, temperature) / temperature.to(s.dtype)
    return tl.where((s + a > 0) | (s == -float("inf")), 0.0, direct)


@triton.jit
def _score_gradient(s, b, exponentials, share):
    """What s gets from one iteration, to be subtracted; `share` is A_t over the sum of the exponentials."""
    return tl.where((b < 0) | (s == -float("inf")), 0.0, share * exponentials)


@triton.jit
def _resident_forward_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    a_ptr,  # segments rows
    b_ptr,  # segments rows n
    temperature_ptr,  # n_iters + 1, fp64
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    segments,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):
    """All iterations of a row that fits into registers."""
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    s = _load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, dtype, HAS_MASK)
    log_k, _ = _load_log_k(k_ptr, row, k, dtype, HAS_K)
    temperature = first + tl.zeros((), tl.float64)
    eps_decay += tl.zeros((), tl.float64)
    eps += tl.zeros((), tl.float64)

    highest = _finite(tl.max(s, axis=0))
    b = _first_b(s)
    a = tl.zeros((), dtype)
    largest = tl.zeros((), dtype)
    for segment in range(segments):
        if SAVE:
            tl.store(b_ptr + _slot(segment, row, n_rows) * n + columns, b, mask=columns < n)
        start, stop = _borders(segment, n_iters, segments)
        for t in range(start, stop):
            if SAVE:
                tl.store(temperature_ptr + t, temperature, mask=row == 0)
            total = tl.sum(_exponentials(s, b, largest, temperature), axis=0)
            a = _next_a(total, largest, log_k, temperature)
            b = _next_b(s, a)
            largest = _largest(highest, a)
            temperature = _cool(temperature, eps_decay, eps)
        if SAVE:
            tl.store(a_ptr + _slot(segment, row, n_rows), a)

    if SAVE:
        tl.store(temperature_ptr + n_iters, temperature, mask=row == 0)
    tl.store(y_ptr + row * n + columns, _output(s, a, temperature).to(y_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def _streaming_forward_kernel(
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    y_ptr,  # rows n
    a_ptr,  # segments rows
    b_ptr,  # segments rows n
    temperature_ptr,  # n_iters + 1, fp64
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    segments,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
    SAVE: tl.constexpr,
):
    """All iterations of a longer row, tile by tile: one pass an iteration updates b and sums up what a needs."""
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * scores_stride
    mask_ptr += row * mask_stride
    log_k, _ = _load_log_k(k_ptr, row, k, dtype, HAS_K)
    temperature = first + tl.zeros((), tl.float64)
    eps_decay += tl.zeros((), tl.float64)
    eps += tl.zeros((), tl.float64)

    in_lane = tl.full([BLOCK_N], -float("inf"), dtype)
    for tile in range(0, n, BLOCK_N):
        s = _load_scores(scores_ptr, mask_ptr, tile + tl.arange(0, BLOCK_N), n, dtype, HAS_MASK)
        in_lane = tl.maximum(in_lane, s)
    highest = _finite(tl.max(in_lane, axis=0))

    a = tl.zeros((), dtype)
    largest = tl.zeros((), dtype)
    for segment in range(segments):
        start, stop = _borders(segment, n_iters, segments)
        for t in range(start, stop):
            if SAVE:
                tl.store(temperature_ptr + t, temperature, mask=row == 0)
            in_lane = tl.zeros([BLOCK_N], dtype)
            for tile in range(0, n, BLOCK_N):
                columns = tile + tl.arange(0, BLOCK_N)
                s = _load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
                b = tl.where(t == 0, _first_b(s), _next_b(s, a))
                if SAVE and t == start:
                    tl.store(b_ptr + _slot(segment, row, n_rows) * n + columns, b, mask=columns < n)
                in_lane += _exponentials(s, b, largest, temperature)
            a = _next_a(tl.sum(in_lane, axis=0), largest, log_k, temperature)
            largest = _largest(highest, a)
            temperature = _cool(temperature, eps_decay, eps)
        if SAVE:
            tl.store(a_ptr + _slot(segment, row, n_rows), a)

    if SAVE:
        tl.store(temperature_ptr + n_iters, temperature, mask=row == 0)
    for tile in range(0, n, BLOCK_N):
        columns = tile + tl.arange(0, BLOCK_N)
        s = _load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
        tl.store(y_ptr + row * n + columns, _output(s, a, temperature).to(y_ptr.dtype.element_ty), mask=columns < n)


@triton.jit
def _resume(a_ptr, row, segment, n_rows, highest):
    """a that a segment starts from, and the largest s + b there; both 0 for the first, which starts from b = -s."""
    a = tl.load(a_ptr + _slot(segment - 1, row, n_rows), mask=segment > 0, other=0.0)
    return a, tl.where(segment > 0, _largest(highest, a), 0.0)


@triton.jit
def _resident_backward_kernel(
    grad_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    a_ptr,  # segments rows
    b_ptr,  # segments rows n
    temperature_ptr,  # n_iters + 1, fp64
    ds_ptr,  # rows n
    dk_ptr,  # rows
    grad_stride,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    segments,
    k: "fp64",
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """The gradient of a row that fits into registers, from the last segment to the first."""
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    s = _load_scores(scores_ptr + row * scores_stride, mask_ptr + row * mask_stride, columns, n, dtype, HAS_MASK)
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=columns < n, other=0.0)
    log_k, k = _load_log_k(k_ptr, row, k, dtype, HAS_K)
    highest = _finite(tl.max(s, axis=0))

    a = tl.load(a_ptr + _slot(segments - 1, row, n_rows))
    ds = _output_gradient(s, grad, a, tl.load(temperature_ptr + n_iters))
    grad_a = tl.sum(ds, axis=0)
    dk = tl.zeros((), dtype)
    for reverse in range(segments):
        segment = segments - 1 - reverse
        start, stop = _borders(segment, n_iters, segments)
        # The first iteration of all hands nothing back to the scores.
        for steps_back in range(stop - tl.maximum(start, 1)):
            t = stop - 1 - steps_back
            b = tl.load(b_ptr + _slot(segment, row, n_rows) * n + columns, mask=columns < n, other=0.0)
            _, largest = _resume(a_ptr, row, segment, n_rows, highest)
            for recomputed in range(start, t):
                temperature = tl.load(temperature_ptr + recomputed)
                total = tl.sum(_exponentials(s, b, largest, temperature), axis=0)
                a = _next_a(total, largest, log_k, temperature)
                b = _next_b(s, a)
                largest = _largest(highest, a)

            temperature = tl.load(temperature_ptr + t)
            exponentials = _exponentials(s, b, largest, temperature)
            total = tl.sum(exponentials, axis=0)
            total = tl.where(total == 0, 1.0, total)
            clipped = tl.sum(tl.where(b < 0, exponentials, 0.0), axis=0)
            ds -= _score_gradient(s, b, exponentials, grad_a / total)
            dk += grad_a * temperature.to(dtype)
            grad_a *= clipped / total

    dk += grad_a * tl.load(temperature_ptr).to(dtype)
    tl.store(ds_ptr + row * n + columns, ds.to(ds_ptr.dtype.element_ty), mask=columns < n)
    tl.store(dk_ptr + row, dk / k)


@triton.jit
def _load_b(b_ptr, s, a, columns, n, saved):
    """b of a tile: from its checkpoint where an iteration starts from there, else from the a before."""
    if saved:
        b = tl.load(b_ptr + columns, mask=columns < n, other=0.0)
    else:
        b = _next_b(s, a)
    return b


@triton.jit
def _streaming_backward_kernel(
    grad_ptr,  # rows n
    scores_ptr,  # rows n
    mask_ptr,  # rows n
    k_ptr,  # rows
    a_ptr,  # segments rows
    b_ptr,  # segments rows n
    temperature_ptr,  # n_iters + 1, fp64
    ds_ptr,  # rows n, of the dtype of b: sums up the gradient of the scores
    dk_ptr,  # rows
    grad_stride,
    scores_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    segments,
    k: "fp64",
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_K: tl.constexpr,
):
    """The gradient of a longer row, tile by tile, from the last segment to the first."""
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * grad_stride
    scores_ptr += row * scores_stride
    mask_ptr += row * mask_stride
    ds_ptr += row * n
    log_k, k = _load_log_k(k_ptr, row, k, dtype, HAS_K)

    a = tl.load(a_ptr + _slot(segments - 1, row, n_rows))
    temperature = tl.load(temperature_ptr + n_iters)
    in_lane = tl.zeros([BLOCK_N], dtype)
    highest_in_lane = tl.full([BLOCK_N], -float("inf"), dtype)
    for tile in range(0, n, BLOCK_N):
        columns = tile + tl.arange(0, BLOCK_N)
        s = _load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
        ds = _output_gradient(s, tl.load(grad_ptr + columns, mask=columns < n, other=0.0), a, temperature)
        tl.store(ds_ptr + columns, ds, mask=columns < n)
        in_lane += ds
        highest_in_lane = tl.maximum(highest_in_lane, s)
    grad_a = tl.sum(in_lane, axis=0)
    highest = _finite(tl.max(highest_in_lane, axis=0))

    dk = tl.zeros((), dtype)
    for reverse in range(segments):
        segment = segments - 1 - reverse
        start, stop = _borders(segment, n_iters, segments)
        start_ptr = b_ptr + _slot(segment, row, n_rows) * n
        # The first iteration of all hands nothing back to the scores.
        for steps_back in range(stop - tl.maximum(start, 1)):
            t = stop - 1 - steps_back
            a, largest = _resume(a_ptr, row, segment, n_rows, highest)
            for recomputed in range(start, t):
                temperature = tl.load(temperature_ptr + recomputed)
                in_lane = tl.zeros([BLOCK_N], dtype)
                for tile in range(0, n, BLOCK_N):
                    columns = tile + tl.arange(0, BLOCK_N)
                    s = _load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
                    b = _load_b(start_ptr, s, a, columns, n, recomputed == start)
                    in_lane += _exponentials(s, b, largest, temperature)
                a = _next_a(tl.sum(in_lane, axis=0), largest, log_k, temperature)
                largest = _largest(highest, a)

            temperature = tl.load(temperature_ptr + t)
            in_lane = tl.zeros([BLOCK_N], dtype)
            clipped_in_lane = tl.zeros([BLOCK_N], dtype)
            for tile in range(0, n, BLOCK_N):
                columns = tile + tl.arange(0, BLOCK_N)
                s = _load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
                b = _load_b(start_ptr, s, a, columns, n, t == start)
                exponentials = _exponentials(s, b, largest, temperature)
                in_lane += exponentials
                clipped_in_lane += tl.where(b < 0, exponentials, 0.0)
            total = tl.sum(in_lane, axis=0)
            total = tl.where(total == 0, 1.0, total)
            clipped = tl.sum(clipped_in_lane, axis=0)
            # A thread may read below what another one wrote an iteration ago.
            tl.debug_barrier()
            for tile in range(0, n, BLOCK_N):
                columns = tile + tl.arange(0, BLOCK_N)
                s = _load_scores(scores_ptr, mask_ptr, columns, n, dtype, HAS_MASK)
                b = _load_b(start_ptr, s, a, columns, n, t == start)
                ds = tl.load(ds_ptr + columns, mask=columns < n, other=0.0)
                ds -= _score_gradient(s, b, _exponentials(s, b, largest, temperature), grad_a / total)
                tl.store(ds_ptr + columns, ds, mask=columns < n)
            dk += grad_a * temperature.to(dtype)
            grad_a *= clipped / total

    dk += grad_a * tl.load(temperature_ptr).to(dtype)
    tl.store(dk_ptr + row, dk / k)


def _tile(n: int, dtype: torch.dtype) -> tuple[bool, dict[str, int]]:
    """Whether a row of n entries stays in registers, and the launch settings: 16 entries in a thread, 4 in fp64."""
    size = 4 if dtype == torch.float64 else 1
    resident = n * size <= RESIDENT
    block_n = max(triton.next_power_of_2(n), 32) if resident else STREAMED // size
    num_warps = max(block_n * size // 512, 1)
    # All that a multiprocessor has: without a limit, the compiler spills to fit more programs on it.
    return resident, {"BLOCK_N": block_n, "num_warps": num_warps, "maxnreg": min(65536 // (32 * num_warps), 255)}


def _launch_forward(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    schedule: tuple[int, float, float, float],
    segments: int,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    temperatures: Tensor,
) -> None:
    n_rows, n = scores.shape
    n_iters, first, eps_decay, eps = schedule
    resident, settings = _tile(n, b.dtype)
    kernel = _resident_forward_kernel if resident else _streaming_forward_kernel
    kernel[(n_rows,)](
        scores,
        scores if mask is None else mask,
        scores if k_rows is None else k_rows.contiguous(),
        y,
        a,
        b,
        temperatures,
        scores.stride(0),
        0 if mask is None else mask.stride(0),
        n_rows,
        n,
        n_iters,
        segments,
        k,
        first,
        eps_decay,
        eps,
        HAS_MASK=mask is not None,
        HAS_K=k_rows is not None,
        SAVE=b.numel() > 0,
        **settings,
    )


def _launch_backward(
    grad: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    a: Tensor,
    b: Tensor,
    temperatures: Tensor,
    ds: Tensor,
    dk: Tensor,
) -> None:
    segments, n_rows, n = b.shape
    resident, settings = _tile(n, b.dtype)
    kernel = _resident_backward_kernel if resident else _streaming_backward_kernel
    total = ds if resident or ds.dtype == b.dtype else torch.empty_like(ds, dtype=b.dtype)
    kernel[(n_rows,)](
        grad,
        scores,
        scores if mask is None else mask,
        scores if k_rows is None else k_rows.contiguous(),
        a,
        b,
        temperatures,
        total,
        dk,
        grad.stride(0),
        scores.stride(0),
        0 if mask is None else mask.stride(0),
        n_rows,
        n,
        temperatures.numel() - 1,
        segments,
        k,
        HAS_MASK=mask is not None,
        HAS_K=k_rows is not None,
        **settings,
    )
    if total is not ds:
        ds.copy_(total)


def _prepare_in_pytorch(
    scores: Tensor, mask: Tensor | None, k_rows: Tensor | None, k: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels make of their inputs, in `dtype`: s `rows n`, -inf where none takes part; the highest s, k and
    log k, each `rows 1`."""
    s = scores.to(dtype)
    s = s if mask is None else s.masked_fill(~mask, -torch.inf)
    highest = s.amax(dim=-1, keepdim=True)
    k_column = scores.new_full((scores.shape[0], 1), k, dtype=dtype) if k_rows is None else k_rows.to(dtype)[:, None]
    k_column = torch.where(k_column > 0, k_column, torch.nan)
    return s, highest.masked_fill(highest == -torch.inf, 0.0), k_column, k_column.log()


def _exponentials_in_pytorch(s: Tensor, b: Tensor, largest: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """exp((s + b) / temperature) `rows n`, scaled so that the largest of a row is 1, and their sums `rows 1`."""
    exponentials = (s + b).sub_(largest).div_(temperature).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    return exponentials, total.masked_fill_(total == 0, 1.0)


def _iterate_in_pytorch(
    s: Tensor, highest: Tensor, log_k: Tensor, b: Tensor, largest: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration: the next a `rows 1`, b `rows n` and the largest s + b `rows 1`."""
    _, total = _exponentials_in_pytorch(s, b, largest, temperature)
    a = temperature * (log_k - total.log()) - largest
    return a, (s + a).relu_().neg_(), torch.minimum(highest, -a)


def _forward_in_pytorch(
    scores: Tensor,  # rows n
    mask: Tensor | None,  # rows n
    k_rows: Tensor | None,  # rows
    k: float,
    steps: list[float],
    segments: int,
    checkpoint_a: Tensor,  # segments rows
    checkpoint_b: Tensor,  # segments rows n; both without entries where no gradient is wanted
) -> Tensor:
    """The relaxed selection `rows n`, as the forward kernels compute it."""
    s, highest, _, log_k = _prepare_in_pytorch(scores, mask, k_rows, k, checkpoint_b.dtype)
    save = checkpoint_b.numel() > 0
    *temperatures, last_temperature = steps
    b = torch.where(s == -torch.inf, 0.0, -s)
    largest = torch.zeros_like(highest)
    for segment in range(segments):
        if save:
            checkpoint_b[segment] = b
        start, stop = _borders.fn(segment, len(temperatures), segments)
        for temperature in temperatures[start:stop]:
            a, b, largest = _iterate_in_pytorch(s, highest, log_k, b, largest, temperature)
        if save:
            checkpoint_a[segment] = a[:, 0]
    y = (s + a).add_(b).div_(last_temperature).exp_()
    return y if mask is None else y.masked_fill_(~mask, 0.0)


def _backward_in_pytorch(
    grad: Tensor,  # rows n
    scores: Tensor,  # rows n
    mask: Tensor | None,  # rows n
    k_rows: Tensor | None,  # rows
    k: float,
    steps: list[float],
    checkpoint_a: Tensor,  # segments rows
    checkpoint_b: Tensor,  # segments rows n
) -> tuple[Tensor, Tensor]:
    """Gradients of the scores `rows n` and of k `rows`, as the backward kernels compute them."""
    s, highest, k_column, log_k = _prepare_in_pytorch(scores, mask, k_rows, k, checkpoint_b.dtype)
    segments = len(checkpoint_b)
    *temperatures, last_temperature = steps
    hidden = s == -torch.inf

    slack = s + checkpoint_a[-1][:, None]
    y = slack.clamp(max=0.0).div_(last_temperature).exp_()
    ds = (y * grad / last_temperature).masked_fill_((slack > 0) | hidden, 0.0)
    grad_a = ds.sum(dim=-1, keepdim=True)
    dk = torch.zeros_like(grad_a)
    for segment in reversed(range(segments)):
        start, stop = _borders.fn(segment, len(temperatures), segments)
        # The first iteration of all hands nothing back to the scores.
        for t in reversed(range(max(start, 1), stop)):
            b = checkpoint_b[segment]
            # Of s + b; in the first segment b = -s.
            largest = torch.minimum(highest, -checkpoint_a[segment - 1][:, None]) if segment else 0.0 * highest
            for temperature in temperatures[start:t]:
                _, b, largest = _iterate_in_pytorch(s, highest, log_k, b, largest, temperature)
            exponentials, total = _exponentials_in_pytorch(s, b, largest, temperatures[t])
            clipped = b < 0
            dk += grad_a * temperatures[t]
            ds -= (exponentials * (grad_a / total)).masked_fill_(clipped | hidden, 0.0)
            grad_a = grad_a * (exponentials * clipped).sum(dim=-1, keepdim=True) / total
    dk += grad_a * temperatures[0]
    return ds, (dk / k_column)[:, 0]


_library = torch.library.Library("colt5", "FRAGMENT")
_library.define(
    "segmented_coor_descent(Tensor scores, Tensor? mask, Tensor? k_rows, float k, int n_iters, float first, "
    "float eps_decay, float eps, int segments, bool save) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "segmented_coor_descent_backward(Tensor grad, Tensor scores, Tensor? mask, Tensor? k_rows, float k, Tensor a, "
    "Tensor b, Tensor temperatures) -> (Tensor, Tensor)"
)


@torch.library.register_fake("colt5::segmented_coor_descent", lib=_library)
def _allocate(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    first: float,
    eps_decay: float,
    eps: float,
    segments: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and the checkpoints: a at the end of each segment and b at its start, and the temperatures."""
    kept = segments if save else 0
    # The dtype of b is the one that is computed in, also where nothing is kept.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return (
        torch.empty(scores.shape, dtype=scores.dtype, device=scores.device),
        torch.empty((kept, scores.shape[0]), dtype=dtype, device=scores.device),
        torch.empty((kept, *scores.shape), dtype=dtype, device=scores.device),
        torch.empty(n_iters + 1 if save else 0, dtype=torch.float64, device=scores.device),
    )


def _forward(
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    n_iters: int,
    first: float,
    eps_decay: float,
    eps: float,
    segments: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _allocate(scores, mask, k_rows, k, n_iters, first, eps_decay, eps, segments, save)
    y, a, b, temperatures = outputs
    if scores.numel() == 0:
        return outputs
    if runs_triton(scores):
        schedule = (n_iters, first, eps_decay, eps)
        _launch_forward(scores, mask, k_rows, k, schedule, segments, y, a, b, temperatures)
    else:
        steps = list(epsilon_schedule(n_iters, eps, first, eps_decay))
        y.copy_(_forward_in_pytorch(scores, mask, k_rows, k, steps, segments, a, b))
        if save:
            temperatures.copy_(torch.tensor(steps, dtype=torch.float64))
    return outputs


@torch.library.register_fake("colt5::segmented_coor_descent_backward", lib=_library)
def _allocate_gradients(
    grad: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    a: Tensor,
    b: Tensor,
    temperatures: Tensor,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(scores.shape, dtype=scores.dtype, device=scores.device),
        torch.empty(scores.shape[0], dtype=b.dtype, device=scores.device),
    )


def _backward(
    grad: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    k_rows: Tensor | None,
    k: float,
    a: Tensor,
    b: Tensor,
    temperatures: Tensor,
) -> tuple[Tensor, Tensor]:
    ds, dk = _allocate_gradients(grad, scores, mask, k_rows, k, a, b, temperatures)
    if scores.numel() == 0:
        return ds, dk
    grad = as_rows(grad)
    if runs_triton(scores):
        _launch_backward(grad, scores, mask, k_rows, k, a, b, temperatures, ds, dk)
    else:
        gradients = _backward_in_pytorch(grad, scores, mask, k_rows, k, temperatures.tolist(), a, b)
        ds.copy_(gradients[0]), dk.copy_(gradients[1])
    return ds, dk


for _device in ("CPU", "CUDA"):
    _library.impl("segmented_coor_descent", _forward, _device)
    _library.impl("segmented_coor_descent_backward", _backward, _device)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    scores, mask, k_rows, k, *_ = inputs
    _, a, b, temperatures = output
    ctx.save_for_backward(scores, mask, k_rows, a, b, temperatures)
    ctx.k = k
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    scores, mask, k_rows, a, b, temperatures = ctx.saved_tensors
    ds, dk = torch.ops.colt5.segmented_coor_descent_backward(grad, scores, mask, k_rows, ctx.k, a, b, temperatures)
    return ds, None, None if k_rows is None else dk.to(k_rows.dtype), *(None,) * 7


def _refuse(ctx, *_: Tensor) -> None:
    raise NotImplementedError("kernels.segmented_coor_descent has no second derivative: use reference.coor_descent")


torch.library.register_autograd(
    "colt5::segmented_coor_descent", _differentiate, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("colt5::segmented_coor_descent_backward", _refuse, lib=_library)


def segmented_coor_descent(
    scores: Tensor,
    *,
    n_iters: int,
    k: float | Tensor,
    eps: float = 0.1,
    eps_init: float | None = None,
    eps_decay: float = 1.0,
    mask: Tensor | None = None,
    checkpoint_segments: int = 1,
) -> Tensor:
    """`reference.coor_descent` by the algorithm that the CoLT5 system published, to be measured against.

    CoLT5: https://arxiv.org/abs/2303.09752, section 3.1; checkpointing by segments: Chen et al. 2016,
    https://arxiv.org/abs/1604.06174, section 4.1. The forward pass keeps `segments ... n` numbers for the backward
    pass, which takes a time linear in the number of iterations and in the length of a segment. Results are bitwise
    equal from run to run. A CPU tensor gets the same algorithm in PyTorch.

    Args:
        scores: `... n` with n up to 131072: fp32, bf16 or fp16, computed in fp32, or fp64. Any strides.
        n_iters: number of iterations, at least 1.
        k: how many entries a row should sum to. A number, or a tensor that broadcasts to `...`, one k a row; it has a
            gradient.
        eps: last temperature, in units of the scores.
        eps_init: first temperature; None or anything below eps stands for eps.
        eps_decay: factor in (0, 1] on the temperature after each iteration, until it reaches eps.
        mask: bool, broadcasts to `... n`; entries that are False take part in nothing and come out as 0.
        checkpoint_segments: from 1 to n_iters: into how many segments the iterations are split, as evenly as possible.

    Returns:
        `... n`, in the dtype of the scores. A row with a NaN among its valid scores is NaN, and so is a row whose k
        (from a tensor) is not positive.

    Raises:
        ValueError: an argument is out of its range, or shapes do not match.
        NotImplementedError: a second derivative is asked for.
    """
    check_scores(scores, mask)
    check_k(k, scores)
    check_schedule(n_iters, eps, eps_init, eps_decay)
    require(scores.shape[-1] <= LONGEST, "n (the length of a row)", scores.shape[-1], f"<= {LONGEST}")
    allowed = f"from 1 to n_iters = {n_iters}"
    require(1 <= checkpoint_segments <= n_iters, "checkpoint_segments", checkpoint_segments, allowed)
    k_rows, k_number = k_as_rows(k, scores.shape)
    needs_grad = scores.requires_grad or (k_rows is not None and k_rows.requires_grad)
    y, *_ = torch.ops.colt5.segmented_coor_descent(
        as_rows(scores),
        mask_as_rows(mask, scores.shape),
        k_rows,
        k_number,
        n_iters,
        first_temperature(eps, eps_init),
        eps_decay,
        eps,
        checkpoint_segments,
        needs_grad and torch.is_grad_enabled(),
    )
    return y.view(scores.shape)
