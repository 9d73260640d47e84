"""Kernels between tokens and their scores: one read of the tokens forward, and one pass over them backward.

A token's score for a route is its product with the routing token, times its inverse norm if scores are cosines. Tiles
are tokens x routes x columns, and a thread has all routes: a loaded entry of a token serves each of them, and a warp
reads adjacent columns of a token.
"""

from collections.abc import Iterator
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._common.launch import COUNTS, Launch, Launcher
from kernels._common.plans import Plan, planner
from kernels._common.tensors import multiprocessors
from kernels.routing_scores import constants

MOST_ROUTES = 8
"""Most routes for which a program has accumulators."""

SMALLEST_NORM: tl.constexpr = tl.constexpr(constants.SMALLEST_NORM)

IN_THREAD = 32
"""Accumulators per thread; twice as many if there are many routes."""

SCORING_WARPS, GRADIENT_WARPS = 1, 2
"""Warps per program. Scores are exchanged between threads before they are written, and the warps of a program would
have to wait for each other."""

SCORING_PROGRAMS, GRADIENT_PROGRAMS = 32, 8
"""Programs per multiprocessor: about as many as its registers allow. All then run at the same time and have equal
work."""


@triton.jit
def _token_starts(tokens, stride):
    """Offsets of the data of tokens `tokens 1 1`."""
    starts = tokens.to(tl.int64) * stride
    if tokens.shape[0] > 1:
        # The offsets are not adjacent. But a compiler looks for adjacent ones only along columns, which have more of
        # them. In the other two directions it is to spread tokens over warps, not routes, as Triton 3.7 would do.
        starts = tl.max_contiguous(starts, [2, 1, 1])
    return starts


@triton.jit
def _load_tokens(x_ptr, tokens, columns, stride, n, d):
    """Tokens as fp32, 0 for absent ones: tokens x 1 x columns."""
    x_ptrs = x_ptr + _token_starts(tokens, stride) + columns
    return tl.load(x_ptrs, mask=(tokens < n) & (columns < d), other=0.0).to(tl.float32)


@triton.jit
def _load_routing(routing_ptr, slots, routes, columns, no_stride, n_routes, d):
    """Routing tokens as fp32, the same for each token of a tile: tokens x routes x columns.

    `no_stride` is 0, but hidden from the compiler, which would otherwise spread routes over warps for a tile of one
    token.
    """
    routing_ptrs = routing_ptr + routes * d + _token_starts(slots, no_stride) + columns
    return tl.load(routing_ptrs, mask=(routes < n_routes) & (columns < d), other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=[*COUNTS, "n", "padded"])
def _score_kernel(
    x_ptr,  # b n d
    routing_ptr,  # b r d, or 1 r d with a stride of 0
    scores_ptr,  # b r padded, fp32
    inverse_norms_ptr,  # b padded, fp32
    slots_ptr,  # b r padded, int32
    x_stride,
    token_stride,
    routing_stride,
    no_stride,
    n,
    padded,
    d,
    routes,
    blocks,
    parts,
    ROUTES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
):
    """Scores of every `parts`-th block of tokens for all routes, and 0 for padding. Slots of tokens become -1.

    With a WHOLE token in a tile, the routing tokens stay in registers.
    """
    batch = (tl.program_id(0) // parts).to(tl.int64)
    route = tl.arange(0, ROUTES)[None, :, None]
    place = tl.arange(0, TOKENS)[:, None, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    x_ptr += batch * x_stride
    routing_ptr += batch * routing_stride
    routing = tl.zeros([TOKENS, ROUTES, COLUMNS], tl.float32)
    if WHOLE:
        routing = _load_routing(routing_ptr, place, route, column, no_stride, routes, d)
    for block in range(tl.program_id(0) % parts, blocks, parts):
        token = block * TOKENS + place
        products = tl.zeros([TOKENS, ROUTES, COLUMNS], tl.float32)
        squares = tl.zeros([TOKENS, 1, COLUMNS], tl.float32)
        for first in range(0, COLUMNS if WHOLE else d, COLUMNS):
            x = _load_tokens(x_ptr, token, first + column, token_stride, n, d)
            if not WHOLE:
                routing = _load_routing(routing_ptr, place, route, first + column, no_stride, routes, d)
            products += x * routing
            if COSINE:
                squares += x * x
        scores = tl.sum(products, axis=2, keep_dims=True)
        if COSINE:
            norm = tl.sqrt(tl.sum(squares, axis=2, keep_dims=True))
            inverse_norm = 1.0 / tl.maximum(norm, SMALLEST_NORM)
            scores *= inverse_norm
            tl.store(inverse_norms_ptr + batch * padded + token, inverse_norm, mask=token < padded)
        places = (batch * routes + route) * padded + token
        tl.store(scores_ptr + places, scores, mask=(route < routes) & (token < padded))
        if HAS_SLOTS:
            tl.store(slots_ptr + places, -1, mask=(route < routes) & (token < padded))


@triton.jit
def _through_scores(
    x,  # tokens 1 columns
    grad_scores_ptrs,  # tokens routes 1
    scores_ptrs,  # tokens routes 1
    inverse_norm_ptrs,  # tokens 1 1
    routing,  # tokens routes columns
    is_route,
    is_token,
    COSINE: tl.constexpr,
):
    """The gradient of tokens through their scores, and the factors of tokens in that of routing tokens."""
    grad = tl.load(grad_scores_ptrs, mask=is_route & is_token, other=0.0)
    if COSINE:
        inverse_norm = tl.load(inverse_norm_ptrs, mask=is_token, other=0.0)
        scores = tl.load(scores_ptrs, mask=is_route & is_token, other=0.0)
        along = tl.sum(grad * scores, axis=1, keep_dims=True) * inverse_norm * inverse_norm
        grad *= inverse_norm
        # A smaller norm was replaced by a constant.
        dx = tl.sum(grad * routing, axis=1, keep_dims=True)
        dx -= tl.where(inverse_norm < 1.0 / SMALLEST_NORM, along, 0.0) * x
    else:
        dx = tl.sum(grad * routing, axis=1, keep_dims=True)
    return dx, grad


@triton.jit(do_not_specialize=[*COUNTS, "n", "padded"])
def _gradient_kernel(
    x_ptr,  # b n d
    routing_ptr,  # b r d, or 1 r d with a stride of 0
    scores_ptr,  # b r padded, fp32
    inverse_norms_ptr,  # b padded, fp32
    grad_scores_ptr,  # b r padded, fp32
    dx_ptr,  # b n d
    partials_ptr,  # b parts r d, fp32
    x_stride,
    token_stride,
    routing_stride,
    no_stride,
    n,
    padded,
    d,
    routes,
    blocks,
    parts,
    ROUTES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    NEEDS_X: tl.constexpr,
):
    """Gradient of some columns of every `parts`-th block of tokens through their scores. These tokens' share of the
    gradient of the routing tokens is written too."""
    column_blocks = tl.cdiv(d, COLUMNS)
    part = tl.program_id(0) // column_blocks % parts
    batch = (tl.program_id(0) // column_blocks // parts).to(tl.int64)
    route = tl.arange(0, ROUTES)[None, :, None]
    place = tl.arange(0, TOKENS)[:, None, None]
    columns = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    is_route, is_column = route < routes, columns < d
    routing = _load_routing(routing_ptr + batch * routing_stride, place, route, columns, no_stride, routes, d)
    of_route = (batch * routes + route) * padded
    x_ptr += batch * x_stride
    dx_ptr += batch * n * d
    inverse_norms_ptr += batch * padded

    total = tl.zeros([TOKENS, ROUTES, COLUMNS], tl.float32)
    for block in range(part, blocks, parts):
        token = block * TOKENS + place
        x = _load_tokens(x_ptr, token, columns, token_stride, n, d)
        dx, grad = _through_scores(
            x, grad_scores_ptr + of_route + token, scores_ptr + of_route + token, inverse_norms_ptr + token, routing,
            is_route, token < n, COSINE,
        )  # fmt: skip
        total += grad * x
        if NEEDS_X:
            dx_ptrs = dx_ptr + _token_starts(token, d) + columns
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=(token < n) & is_column)
    partial = tl.sum(total, axis=0, keep_dims=True)
    partial_ptrs = partials_ptr + ((batch * parts + part) * routes + route) * d + columns
    tl.store(partial_ptrs, partial, mask=is_route & is_column)


@triton.jit(do_not_specialize=[*COUNTS, "n", "padded", "selected"])
def _gathered_kernel(
    x_ptr,  # b n d
    routing_ptr,  # b r d, or 1 r d with a stride of 0
    scores_ptr,  # b r padded, fp32
    inverse_norms_ptr,  # b padded, fp32
    grad_scores_ptr,  # b r padded, fp32
    indices_ptr,  # b r selected, int64
    slots_ptr,  # b r padded, int32: index of a token among the selected ones, or -1
    grad_tokens_ptr,  # b r selected d
    dx_ptr,  # b n d
    x_stride,
    token_stride,
    routing_stride,
    no_stride,
    n,
    padded,
    d,
    routes,
    selected,
    blocks,
    ROUTES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Replace the gradient of some selected tokens through their scores by the whole gradient. Of the routes that have
    selected a token, the first one computes it, and adds up the gradients from all of them in their order."""
    batch = (tl.program_id(0) // blocks // routes).to(tl.int64)
    own_route = tl.program_id(0) // blocks % routes
    route = tl.arange(0, ROUTES)[None, :, None]
    place = tl.arange(0, TOKENS)[:, None, None]
    slot = tl.program_id(0) % blocks * TOKENS + place
    row = batch * routes + own_route
    token = tl.load(indices_ptr + row * selected + slot, mask=slot < selected, other=n).to(tl.int32)
    is_route, is_token = route < routes, token < n
    of_route = (batch * routes + route) * padded
    slots = tl.load(slots_ptr + of_route + token, mask=is_route & is_token, other=-1)
    first = tl.min(tl.where(slots >= 0, route, ROUTES), axis=1, keep_dims=True)
    is_token = is_token & (first == own_route)
    of_gradients = (batch * routes + route) * selected * d
    for start in range(0, d, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, None, :]
        is_column = columns < d
        routing = _load_routing(routing_ptr + batch * routing_stride, place, route, columns, no_stride, routes, d)
        x = tl.zeros([TOKENS, 1, COLUMNS], tl.float32)
        if COSINE:
            x = _load_tokens(x_ptr + batch * x_stride, token, columns, token_stride, n, d)
        dx, _ = _through_scores(
            x, grad_scores_ptr + of_route + token, scores_ptr + of_route + token,
            inverse_norms_ptr + batch * padded + token, routing, is_route, is_token, COSINE,
        )  # fmt: skip
        grad_ptrs = grad_tokens_ptr + of_gradients + _token_starts(slots, d) + columns
        grads = tl.load(grad_ptrs, mask=is_token & (slots >= 0) & is_column, other=0.0).to(tl.float32)
        dx += tl.sum(grads, axis=1, keep_dims=True)
        dx_ptrs = dx_ptr + batch * n * d + _token_starts(token, d) + columns
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=is_token & is_column)


@cache
def _tile(d: int, routes: int, itemsize: int, num_warps: int) -> dict[str, int]:
    """Launch settings. A tile has as many columns of a token as a thread has accumulators for, but no fewer than a warp
    reads at a time, so that no warp has more than one token. It has at least one token for each warp."""
    padded_routes = triton.next_power_of_2(routes)
    read_at_a_time = 32 * 16 // itemsize
    columns = max(min(triton.next_power_of_2(d), 32 * IN_THREAD // padded_routes), read_at_a_time)
    tokens = max(IN_THREAD * 32 * num_warps // (padded_routes * columns), num_warps)
    return {"ROUTES": padded_routes, "TOKENS": tokens, "COLUMNS": columns, "num_warps": num_warps}


@planner
def _plan_scores(batch: int, n: int, d: int, routes: int, itemsize: int, available: int) -> Plan:
    """Pieces are parts of a sequence, each of which has a program."""
    tile = _tile(d, routes, itemsize, SCORING_WARPS)
    parts = min(triton.cdiv(n, tile["TOKENS"]), triton.cdiv(SCORING_PROGRAMS * available, batch))
    return Plan(parts * batch, {**tile, "WHOLE": d <= tile["COLUMNS"]}, parts)


@planner
def _plan_gradients(batch: int, n: int, d: int, routes: int, itemsize: int, available: int) -> Plan:
    """Pieces are parts of a sequence, each of which has a program for each block of columns."""
    tile = _tile(d, routes, itemsize, GRADIENT_WARPS)
    columns = triton.cdiv(d, tile["COLUMNS"])
    parts = min(triton.cdiv(n, tile["TOKENS"]), triton.cdiv(GRADIENT_PROGRAMS * available, columns * batch))
    return Plan(columns * parts * batch, tile, parts)


@planner
def _plan_gathered(batch: int, selected: int, d: int, routes: int) -> Plan:
    """Pieces are blocks of the tokens that a route selected."""
    # The tile of fp32, which is the smallest, because the gathered gradients take registers, too.
    tile = _tile(d, routes, 4, GRADIENT_WARPS)
    if d % 16:
        # Addresses of entries that are loaded one by one take registers as well.
        tile = {**tile, "TOKENS": max(tile["TOKENS"] // 2, 1)}
    blocks = triton.cdiv(selected, tile["TOKENS"])
    return Plan(blocks * batch * routes, tile, blocks)


def _strides(x: Tensor, routing_tokens: Tensor) -> tuple[int, int, int, int]:
    return x.stride(0), x.stride(1), routing_tokens.stride(0) if routing_tokens.shape[0] > 1 else 0, 0


@Launcher
def launch_scores(
    x: Tensor, routing_tokens: Tensor, scores: Tensor, inverse_norms: Tensor | None, slots: Tensor | None
) -> Iterator[Launch]:
    """Write scores `b r padded` of tokens `b n d`, whose last stride is 1, with contiguous routing tokens `b|1 r d`. If
    inverse norms `b padded` have entries, write them, and as scores cosines times the norm of the routing token. If
    slots, int32 `b r padded`, have entries, fill them with -1."""
    batch, n, d = x.shape
    routes, padded = scores.shape[1:]
    plan = _plan_scores(batch, padded, d, routes, x.itemsize, multiprocessors(x.device))
    yield Launch(
        _score_kernel,
        plan,
        x,
        routing_tokens,
        scores,
        scores if inverse_norms is None else inverse_norms,
        scores if slots is None else slots,
        *_strides(x, routing_tokens),
        n,
        padded,
        d,
        routes,
        triton.cdiv(padded, plan.settings["TOKENS"]),
        plan.pieces,
        COSINE=inverse_norms is not None,
        HAS_SLOTS=slots is not None,
    )


def launch_gradients(
    x: Tensor,
    routing_tokens: Tensor,
    scores: Tensor,
    inverse_norms: Tensor | None,
    grad_scores: Tensor,
    gathered: tuple[Tensor, Tensor, Tensor] | None,
    dx: Tensor | None,
) -> Tensor:
    """Write the gradient of the tokens to `dx` (contiguous), and return that of the routing tokens. It is fp32 and of
    their shape; arguments are as for `launch_scores`.

    Args:
        grad_scores: `b r padded`, contiguous.
        gathered: indices below n `b r selected`, each once in a route; slots `b r padded`, the index of a token among
            these, or -1; and the gradient of these tokens `b r selected d`, contiguous.
        dx: None if the tokens need no gradient.
    """
    batch, n, d = x.shape
    routes = scores.shape[1]
    parts = _plan_gradients(batch, n, d, routes, x.itemsize, multiprocessors(x.device)).pieces
    partials = torch.empty((batch, parts, routes, d), dtype=torch.float32, device=x.device)
    indices, slots, grad_tokens = (None, None, None) if dx is None or gathered is None else gathered
    if indices is not None:
        indices = indices.contiguous()
    _launch_gradients(x, routing_tokens, scores, inverse_norms, grad_scores, indices, slots, grad_tokens, dx, partials)
    return partials.sum(dim=(0, 1)).unsqueeze(0) if routing_tokens.shape[0] == 1 else partials.sum(dim=1)


@Launcher
def _launch_gradients(
    x: Tensor,
    routing_tokens: Tensor,
    scores: Tensor,
    inverse_norms: Tensor | None,
    grad_scores: Tensor,
    indices: Tensor | None,
    slots: Tensor | None,
    grad_tokens: Tensor | None,
    dx: Tensor | None,
    partials: Tensor,
) -> Iterator[Launch]:
    """Gradients through scores, then the whole gradient of selected tokens, if there are any."""
    batch, n, d = x.shape
    routes, padded = scores.shape[1:]
    plan = _plan_gradients(batch, n, d, routes, x.itemsize, multiprocessors(x.device))
    inputs = (x, routing_tokens, scores, scores if inverse_norms is None else inverse_norms, grad_scores)
    sizes = (*_strides(x, routing_tokens), n, padded, d, routes)
    cosine = inverse_norms is not None
    yield Launch(
        _gradient_kernel,
        plan,
        *inputs,
        x if dx is None else dx,
        partials,
        *sizes,
        triton.cdiv(n, plan.settings["TOKENS"]),
        plan.pieces,
        COSINE=cosine,
        NEEDS_X=dx is not None,
    )
    if indices is not None:
        selected = indices.shape[2]
        plan = _plan_gathered(batch, selected, d, routes)
        given = (*inputs, indices, slots, grad_tokens, dx)
        yield Launch(_gathered_kernel, plan, *given, *sizes, selected, plan.pieces, COSINE=cosine)
