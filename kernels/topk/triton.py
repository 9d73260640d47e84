"""The kernel of `kernels.topk`: descent, selection and gates of a row in registers."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import Plan, most_registers, planner, tile_settings
from kernels._common.primitives import highest_in_thread, load_tile, max_or_nan, per_row, tile_columns
from kernels.coor_descent import cooling_iterations, descend, origin_of, soft_selection

LONGEST = 4096
"""Longest row that the kernel supports; longer ones use `coor_descent` and torch.topk."""


MOST = 32
"""Most entries that the kernel selects from a row, one by one."""


IN_THREAD = 16
"""Entries of a row per thread: selection keeps two more registers for each."""


@triton.jit
def _sortable(scores, columns):
    """int64 in the order of the scores; equal scores are in the reverse order of their columns."""
    bits = scores.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@triton.jit(do_not_specialize=COUNTS)
def _topk_kernel(
    x_ptr,  # rows n
    mask_ptr,  # rows n
    values_ptr,  # rows selected
    indices_ptr,  # rows selected, int64
    soft_ptr,  # rows selected
    gates_ptr,  # rows selected
    state_ptr,  # rows+1 2 n_iters+1, fp64
    x_stride,
    mask_stride,
    n_rows,
    n,
    n_iters,
    selected,
    k: "fp64",
    first: "fp64",
    eps_decay: "fp64",
    eps: "fp64",
    cooling,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SELECTED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAVE: tl.constexpr,
):
    """The largest entries of ROWS rows, one by one, with the relaxed selection at these."""
    columns = tile_columns(REPEATS, WIDTH)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x = load_tile(x_ptr, mask_ptr, rows, columns, x_stride, mask_stride, n_rows, n, HAS_MASK)
    _, _, a, factor, _ = descend(
        x, rows, columns, 0, 0, x_ptr, mask_ptr, x_ptr, state_ptr, x_ptr, x_stride, mask_stride, n_rows, n, n_iters, k,
        first, eps_decay, eps, cooling, REPEATS, ROWS, WIDTH, 1, 1, HAS_MASK, False, SAVE,
    )  # fmt: skip

    # Columns beyond the row come after its masked entries, which come after all others.
    left = tl.where(columns < n, _sortable(x, columns), -9223372036854775808)
    place = tl.arange(0, SELECTED)[None, :]
    chosen = tl.zeros([ROWS, SELECTED], tl.int64)
    for i in range(selected):
        best = tl.max(tl.max(left, axis=0), axis=1)
        chosen = tl.where(place == i, best[:, None], chosen)
        left = tl.where(left == per_row(best), -9223372036854775808, left)

    ordered = (chosen >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    moved = value - origin_of(max_or_nan(highest_in_thread(x, ROWS, WIDTH), 1), eps)[:, None]
    soft = tl.reshape(soft_selection(moved[None, :, :], a, factor, True), [ROWS, SELECTED])
    is_surplus = value == -float("inf")
    gate = tl.where(is_surplus, 0.0, soft + (1.0 - soft))
    value = tl.where(is_surplus, 0.0, value)

    out = rows[:, None] * selected + place
    writes = (rows[:, None] < n_rows) & (place < selected)
    tl.store(indices_ptr + out, 0x7FFFFFFF - (chosen & 0x7FFFFFFF), mask=writes)
    tl.store(values_ptr + out, (value * gate).to(values_ptr.dtype.element_ty), mask=writes)
    tl.store(soft_ptr + out, soft.to(soft_ptr.dtype.element_ty), mask=writes)
    tl.store(gates_ptr + out, gate.to(gates_ptr.dtype.element_ty), mask=writes)


@planner
def _plan(n_rows: int, n: int, selected: int) -> Plan:
    tile = tile_settings(n, IN_THREAD)
    # If entries are loaded one by one, the assembler may spill without a limit, to fit another program.
    limit = {"maxnreg": most_registers(tile["num_warps"])} if n % 16 else {}
    return Plan(triton.cdiv(n_rows, tile["ROWS"]), {**tile, **limit, "SELECTED": triton.next_power_of_2(selected)})


@Launcher
def launch_topk(
    x: Tensor,
    mask: Tensor | None,
    selected: int,
    k: float,
    n_iters: int,
    eps: float,
    first: float,
    eps_decay: float,
    *outputs: Tensor,
) -> Iterator[Launch]:
    n_rows, n = x.shape
    yield Launch(
        _topk_kernel,
        _plan(n_rows, n, selected),
        x,
        x if mask is None else mask,
        *outputs,
        x.stride(0),
        0 if mask is None else mask.stride(0),
        n_rows,
        n,
        n_iters,
        selected,
        k,
        first,
        eps_decay,
        eps,
        cooling_iterations(n_iters, eps, first, eps_decay),
        HAS_MASK=mask is not None,
        SAVE=outputs[4].numel() > 0,
    )
