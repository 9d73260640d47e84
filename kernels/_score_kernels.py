"""Kernels between tokens and their scores: one read of the tokens forward, and one pass over them backward.

A token's score for a route is its product with the routing token, times its inverse norm if scores are cosines. Tiles
are tokens x routes x columns, of which a thread has all routes: what is read of a token serves each of them, and a warp
reads a token's columns side by side.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._launch import multiprocessors

MOST_ROUTES = 16
"""Routes for which a program has accumulators."""

SMALLEST_NORM: tl.constexpr = tl.constexpr(1e-12)
"""A token whose norm is below this is divided by this, as by PyTorch's normalize."""

IN_THREAD = 32
"""Accumulators of a thread, or more where there are many routes."""

PROGRAMS = 8
"""Of the backward pass for each multiprocessor, each of which leaves a partial sum."""

WARPS = 4


@triton.jit
def _token_starts(tokens, stride):
    """Where what belongs to tokens `tokens 1 1` begins."""
    starts = tokens.to(tl.int64) * stride
    if tokens.shape[0] > 1:
        # They are not neighbours. But a compiler looks for these only along columns, which have more of them; of the
        # other two directions it is to spread tokens over warps, and not, as Triton 3.7 would, routes.
        starts = tl.max_contiguous(starts, [2, 1, 1])
    return starts


@triton.jit
def _load_tokens(x_ptr, tokens, columns, stride, n, d):
    """Tokens as fp32, 0 where there is none: tokens x 1 x columns."""
    x_ptrs = x_ptr + _token_starts(tokens, stride) + columns
    return tl.load(x_ptrs, mask=(tokens < n) & (columns < d), other=0.0).to(tl.float32)


@triton.jit
def _load_routing(routing_ptr, slots, routes, columns, no_stride, n_routes, d):
    """Routing tokens as fp32, the same for each token of a tile: tokens x routes x columns.

    `no_stride` is 0, but the compiler must not know: of a tile of one token, it would spread routes over warps.
    """
    routing_ptrs = routing_ptr + routes * d + _token_starts(slots, no_stride) + columns
    return tl.load(routing_ptrs, mask=(routes < n_routes) & (columns < d), other=0.0).to(tl.float32)


@triton.jit
def _score_kernel(
    x_ptr,  # b n d
    routing_ptr,  # b r d, or 1 r d with a stride of 0
    scores_ptr,  # b r padded, fp32
    inverse_norms_ptr,  # b padded, fp32
    x_stride,
    token_stride,
    routing_stride,
    no_stride,
    n,
    padded,
    d,
    routes,
    ROUTES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Scores of a block of tokens for all routes; of what pads the tokens, 0."""
    batch = tl.program_id(1).to(tl.int64)
    route = tl.arange(0, ROUTES)[None, :, None]
    place = tl.arange(0, TOKENS)[:, None, None]
    token = tl.program_id(0) * TOKENS + place
    column = tl.arange(0, COLUMNS)[None, None, :]
    x_ptr += batch * x_stride
    routing_ptr += batch * routing_stride
    products = tl.zeros([TOKENS, ROUTES, COLUMNS], tl.float32)
    squares = tl.zeros([TOKENS, 1, COLUMNS], tl.float32)
    for first in range(0, d, COLUMNS):
        columns = first + column
        x = _load_tokens(x_ptr, token, columns, token_stride, n, d)
        products += x * _load_routing(routing_ptr, place, route, columns, no_stride, routes, d)
        if COSINE:
            squares += x * x
    scores = tl.sum(products, axis=2, keep_dims=True)
    if COSINE:
        norm = tl.sqrt(tl.sum(squares, axis=2, keep_dims=True))
        inverse_norm = 1.0 / tl.maximum(norm, SMALLEST_NORM)
        scores *= inverse_norm
        tl.store(inverse_norms_ptr + batch * padded + token, inverse_norm, mask=token < padded)
    score_ptrs = scores_ptr + (batch * routes + route) * padded + token
    tl.store(score_ptrs, scores, mask=(route < routes) & (token < padded))


@triton.jit
def _gradient_kernel(
    x_ptr,  # b n d
    routing_ptr,  # b r d, or 1 r d with a stride of 0
    scores_ptr,  # b r padded, fp32
    inverse_norms_ptr,  # b padded, fp32
    grad_scores_ptr,  # b r padded, fp32
    slots_ptr,  # b r padded, int32: which of the selected tokens a token is, or -1
    grad_tokens_ptr,  # b r selected d
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
    selected,
    blocks,
    ROUTES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COSINE: tl.constexpr,
    GATHERED: tl.constexpr,
    NEEDS_X: tl.constexpr,
):
    """Gradient of some columns of a range of tokens, through their scores and where they were gathered, and this
    range's part in the gradient of the routing tokens."""
    batch = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    route = tl.arange(0, ROUTES)[None, :, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    is_route, is_column = route < routes, columns < d
    place = tl.arange(0, TOKENS)[:, None, None]
    routing = _load_routing(routing_ptr + batch * routing_stride, place, route, columns, no_stride, routes, d)
    of_route = (batch * routes + route) * padded
    x_ptr += batch * x_stride
    dx_ptr += batch * n * d
    grad_tokens_ptr += (batch * routes + route) * selected * d

    total = tl.zeros([TOKENS, ROUTES, COLUMNS], tl.float32)
    for block in range(part * blocks, (part + 1) * blocks):
        token = block * TOKENS + place
        is_token = token < n
        x = _load_tokens(x_ptr, token, columns, token_stride, n, d)
        grad = tl.load(grad_scores_ptr + of_route + token, mask=is_route & is_token, other=0.0)
        if COSINE:
            inverse_norm = tl.load(inverse_norms_ptr + batch * padded + token, mask=is_token, other=0.0)
            score = tl.load(scores_ptr + of_route + token, mask=is_route & is_token, other=0.0)
            along = tl.sum(grad * score, axis=1, keep_dims=True) * inverse_norm * inverse_norm
            along = tl.where(inverse_norm < 1.0 / SMALLEST_NORM, along, 0.0)
            grad *= inverse_norm
        total += grad * x
        if NEEDS_X:
            dx = tl.sum(grad * routing, axis=1, keep_dims=True)
            if COSINE:
                dx -= along * x
            if GATHERED:
                slot = tl.load(slots_ptr + of_route + token, mask=is_route & is_token, other=-1)
                grad_token_ptrs = grad_tokens_ptr + _token_starts(slot, d) + columns
                grad_token = tl.load(grad_token_ptrs, mask=(slot >= 0) & is_column, other=0.0)
                dx += tl.sum(grad_token.to(tl.float32), axis=1, keep_dims=True)
            dx_ptrs = dx_ptr + _token_starts(token, d) + columns
            tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=is_token & is_column)
    partial = tl.sum(total, axis=0, keep_dims=True)
    partial_ptrs = partials_ptr + ((batch * tl.num_programs(1) + part) * routes + route) * d + columns
    tl.store(partial_ptrs, partial, mask=is_route & is_column)


@cache
def _tile(d: int, routes: int, itemsize: int) -> dict[str, int]:
    """Launch settings: of a token, as many columns as a thread has accumulators for, but no fewer than a warp reads at
    a time, so that no warp has more than one token; and at least one token for each warp."""
    padded_routes = triton.next_power_of_2(routes)
    read_at_a_time = min(32 * 16 // itemsize, 64 * IN_THREAD // padded_routes)
    columns = max(min(triton.next_power_of_2(d), 32 * IN_THREAD // padded_routes), read_at_a_time)
    tokens = max(IN_THREAD * 32 * WARPS // (padded_routes * columns), WARPS)
    return {"ROUTES": padded_routes, "TOKENS": tokens, "COLUMNS": columns, "num_warps": WARPS}


def _strides(x: Tensor, routing_tokens: Tensor) -> tuple[int, int, int, int]:
    return x.stride(0), x.stride(1), routing_tokens.stride(0) if routing_tokens.shape[0] > 1 else 0, 0


def launch_scores(x: Tensor, routing_tokens: Tensor, scores: Tensor, inverse_norms: Tensor | None) -> None:
    """Write scores `b r padded` of tokens `b n d`, whose last stride is 1, with contiguous routing tokens `b|1 r d`;
    cosines times the norm of the routing token, and inverse norms `b padded`, where there is room for these."""
    batch, n, d = x.shape
    routes, padded = scores.shape[1:]
    tile = _tile(d, routes, x.element_size())
    _score_kernel[(triton.cdiv(padded, tile["TOKENS"]), batch)](
        x,
        routing_tokens,
        scores,
        scores if inverse_norms is None else inverse_norms,
        *_strides(x, routing_tokens),
        n,
        padded,
        d,
        routes,
        COSINE=inverse_norms is not None,
        **tile,
    )


def launch_gradients(
    x: Tensor,
    routing_tokens: Tensor,
    scores: Tensor,
    inverse_norms: Tensor | None,
    grad_scores: Tensor,
    gathered: tuple[Tensor, Tensor] | None,
    dx: Tensor | None,
) -> Tensor:
    """Write the gradient of the tokens to `dx` (contiguous), and return that of the routing tokens for each batch
    element, `b r d` in fp32; arguments as for `launch_scores`.

    Args:
        grad_scores: `b r padded`, contiguous.
        gathered: indices below n `b r selected`, each once in a route, and the gradient of these tokens
            `b r selected d`, contiguous.
        dx: None if the tokens need no gradient.
    """
    batch, n, d = x.shape
    routes, padded = scores.shape[1:]
    tile = _tile(d, routes, x.element_size())
    column_blocks, token_blocks = triton.cdiv(d, tile["COLUMNS"]), triton.cdiv(n, tile["TOKENS"])
    available = triton.cdiv(PROGRAMS * multiprocessors(x.device), column_blocks * batch)
    blocks = triton.cdiv(token_blocks, available)
    parts = triton.cdiv(token_blocks, blocks)
    partials = torch.empty((batch, parts, routes, d), dtype=torch.float32, device=x.device)
    slots, grad_tokens = scores, x
    if gathered is not None:
        indices, grad_tokens = gathered
        slot = torch.arange(indices.shape[2], dtype=torch.int32, device=x.device).expand(indices.shape)
        slots = torch.full_like(scores, -1, dtype=torch.int32).scatter_(2, indices, slot)
    _gradient_kernel[(column_blocks, parts, batch)](
        x,
        routing_tokens,
        scores,
        scores if inverse_norms is None else inverse_norms,
        grad_scores,
        slots,
        grad_tokens,
        x if dx is None else dx,
        partials,
        *_strides(x, routing_tokens),
        n,
        padded,
        d,
        routes,
        grad_tokens.shape[2],
        blocks,
        COSINE=inverse_norms is not None,
        GATHERED=gathered is not None,
        NEEDS_X=dx is not None,
        **tile,
    )
    return partials.sum(dim=1)
