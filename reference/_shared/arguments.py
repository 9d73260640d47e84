"""Definitions that the plain and the fused operations share: argument checks and the epsilon schedule."""

from collections.abc import Iterator
from functools import reduce
from math import inf
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Solver = Literal["coor_descent", "exact"]
"""Solvers for the relaxed selection: coordinate descent, or the solution that it converges to."""


def require(holds: bool, name: str, value: object, allowed: str, *named: object) -> None:
    """Raise ValueError that names the argument, its value and what is allowed, unless `holds`.

    Args:
        value: a `torch.Size` is shown as a shape, a device as the place of the argument.
        allowed: a format string for the values in `named`. The message is made only if needed: it takes time, and it
            would specialise compiled code to the sizes in it.
    """
    if holds:
        return
    if isinstance(value, torch.Size):
        value = f"shape {tuple(value)}"
    elif isinstance(value, torch.device):
        value = f"on {value}"
    elif isinstance(value, Tensor):
        # Its values may be on a device that has not finished.
        value = "a tensor"
    shown = (tuple(each) if isinstance(each, torch.Size) else each for each in named)
    raise ValueError(f"{name} must be {allowed.format(*shown)}, got {value}")


def check_float(name: str, tensor: Tensor) -> None:
    """Check that a tensor has a float dtype and is not part of a trace. Every operation begins with this.

    Raises:
        NotImplementedError: in `torch.jit.trace`, which turns a number that depends on a size into a constant.
    """
    if torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            "torch.jit.trace makes constants of sizes and choices: use torch.export.export instead"
        )
    dtype = tensor.dtype
    require(dtype in FLOAT_DTYPES, name, dtype, "a tensor of a float dtype")


def check_integers(**integers: int) -> None:
    """Arguments with separate bounds are integers."""
    for name, integer in integers.items():
        require(_is_integer(integer), name, integer, "an integer")


def check_counts(**counts: int) -> None:
    """Numbers of tokens, heads and the like are integers of at least 1."""
    for name, count in counts.items():
        require(_is_integer(count), name, count, "an integer")
        require(count >= 1, name, count, ">= 1")


def check_positive(**numbers: float) -> None:
    """Temperatures, ratios and the like are real numbers above 0, and finite."""
    for name, number in numbers.items():
        require(_is_number(number), name, number, "a finite number")
        require(number > 0, name, number, "> 0")


def check_scale(cosine_sim_scale: float | None) -> None:
    """The factor of cosines is a finite number, or None."""
    fits = cosine_sim_scale is None or (_is_number(cosine_sim_scale) and cosine_sim_scale == cosine_sim_scale)
    require(fits, "cosine_sim_scale", cosine_sim_scale, "None or a finite number")


def _is_integer(value: object) -> bool:
    """True for an integer of Python or numpy, or a symbolic one of a compiler. A bool is not one."""
    return type(value) is int or (isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool))


def _is_number(value: Any) -> bool:
    """True for an integer, or a float that is not infinite. NaN passes, because every comparison with a bound refuses
    it."""
    if type(value) is float or type(value) is int or isinstance(value, Real):
        return not isinstance(value, bool) and abs(value) != inf
    return isinstance(value, (torch.SymInt, torch.SymFloat))


def check_scores(scores: Tensor, mask: Tensor | None) -> None:
    """Scores are a float tensor (..., n) with n >= 1; a mask is boolean and broadcasts to their shape."""
    check_float("scores", scores)
    shape = scores.shape
    require(len(shape) >= 1, "scores", "a tensor without dimensions", "of shape (..., n)")
    require(shape[-1] >= 1, "scores", shape, "of shape (..., n) with n >= 1")
    if mask is not None:
        require(mask.dtype == torch.bool, "mask", mask.dtype, "a tensor of dtype torch.bool")
        _check_broadcast("mask", mask, shape, "the shape of scores")
        require(mask.device == scores.device, "mask", mask.device, "on {}, the device of scores", scores.device)


def takes_no_part(scores: Tensor, mask: Tensor | None) -> Tensor:
    """bool, of the shape of the scores. Entries are True for masked scores and for scores of -inf, which count as
    masked."""
    lowest = scores == -torch.inf
    return lowest if mask is None else lowest | ~mask


def without_infinities(scores: Tensor) -> Tensor:
    """Scores with NaN in place of +inf: a score that is infinitely above all others has no defined result."""
    return scores.masked_fill(scores == torch.inf, torch.nan)


def check_tokens(x: Tensor, dim: int, mask: Tensor | None = None, name: str = "x", mask_name: str = "mask") -> None:
    """Tokens are a float tensor (b, n, dim). A mask is boolean and (b, n), on the device of the tokens."""
    check_float(name, x)
    require(x.ndim == 3 and x.shape[-1] == dim, name, x.shape, "of shape (b, n, {})", dim)
    if mask is not None:
        require(mask.dtype == torch.bool, mask_name, mask.dtype, "a tensor of dtype torch.bool")
        fits, allowed = mask.shape == x.shape[:2], "of shape {}, one entry per token of {}"
        require(fits, mask_name, mask.shape, allowed, x.shape[:2], name)
        require(mask.device == x.device, mask_name, mask.device, "on {}, the device of {}", x.device, name)


def check_windows(
    qkv: Tensor,
    heads: int,
    window_size: int,
    mask: Tensor | None,
    rotary_theta: float | None = None,
    position_bias: Tensor | None = None,
) -> None:
    """Queries, keys and values are a float tensor (b, n, 3 * heads * d); a mask is boolean and (b, n). If there is a
    theta of rotary position embedding, d is even. A position bias is a float tensor (heads, 2 * r + 1)."""
    check_float("qkv", qkv)
    check_counts(heads=heads, window_size=window_size)
    fits = qkv.ndim == 3 and qkv.shape[-1] >= 1 and qkv.shape[-1] % (3 * heads) == 0
    require(fits, "qkv", qkv.shape, "of shape (b, n, {} * d) for {} heads", 3 * heads, heads)
    check_tokens(qkv, qkv.shape[-1], mask, "qkv")
    if rotary_theta is not None:
        check_positive(rotary_theta=rotary_theta)
        require(qkv.shape[-1] // heads % 2 == 0, "qkv", qkv.shape, "of an even d for rotary position embedding")
    if position_bias is not None:
        check_float("position_bias", position_bias)
        fits = position_bias.ndim == 2 and position_bias.shape[0] == heads and position_bias.shape[1] % 2 == 1
        require(rotary_theta is None, "position_bias", position_bias, "None if rotary_theta is given")
        require(fits, "position_bias", position_bias.shape, "of shape ({0}, 2 * r + 1) for {0} heads", heads)
        same, allowed = position_bias.device == qkv.device, "on {}, the device of qkv"
        require(same, "position_bias", position_bias.device, allowed, qkv.device)


def check_gathered(
    query: Tensor, key_value: Tensor, indices: Tensor, weights: Tensor, null_kv: Tensor, mask: Tensor | None
) -> None:
    """Shapes, dtypes and devices of `gathered_attention`. The values of indices are not checked."""
    check_float("query", query)
    require(query.ndim == 5, "query", query.shape, "of shape (b, w, h, i, d)")
    batch, windows, heads, _, dim = query.shape
    require(dim >= 1 and heads >= 1, "query", query.shape, "of shape (b, w, h, i, d), h and d >= 1")
    require(key_value.ndim == 4, "key_value", key_value.shape, "of shape (b, r, n, 2 d h / r)")
    routes = key_value.shape[1]
    shares = routes >= 1 and heads % routes == 0
    require(shares, "key_value", key_value.shape, "of shape (b, r, n, 2 d h / r) with r a divisor of h = {}", heads)
    expected = (batch, routes, key_value.shape[2], 2 * dim * heads // routes)
    require(key_value.shape == expected, "key_value", key_value.shape, "of shape {}", expected)
    require(key_value.dtype == query.dtype, "key_value", key_value.dtype, "of dtype {}, that of query", query.dtype)

    fits = indices.ndim == 4 and indices.shape[:3] == (batch, windows, routes)
    require(fits, "indices", indices.shape, "of shape ({}, {}, {}, s)", batch, windows, routes)
    require(indices.dtype in (torch.int32, torch.int64), "indices", indices.dtype, "of dtype int32 or int64")
    check_float("weights", weights)
    check_float("null_kv", null_kv)
    require(null_kv.shape == (2, heads, dim), "null_kv", null_kv.shape, "of shape {}", (2, heads, dim))
    listed = {"weights": weights} if mask is None else {"weights": weights, "mask": mask}
    for name, tensor in listed.items():
        require(tensor.shape == indices.shape, name, tensor.shape, "of shape {}, the shape of indices", indices.shape)
    if mask is not None:
        require(mask.dtype == torch.bool, "mask", mask.dtype, "a tensor of dtype torch.bool")
    for name, tensor in {"key_value": key_value, "indices": indices, "null_kv": null_kv, **listed}.items():
        require(tensor.device == query.device, name, tensor.device, "on {}, the device of query", query.device)


def check_k(k: float | Tensor, scores: Tensor) -> None:
    """k is a positive number, or a tensor that broadcasts to scores.shape[:-1], one k per row.

    The values of a tensor are not checked, because the host would wait for the device: a row whose k is not positive is
    NaN.
    """
    if isinstance(k, Tensor):
        require(not k.is_complex() and k.dtype != torch.bool, "k", k.dtype, "a number or a tensor of real numbers")
        _check_broadcast("k", k, scores.shape[:-1], "scores.shape[:-1], one k per row")
        require(k.device == scores.device, "k", k.device, "on {}, the device of scores", scores.device)
    else:
        check_positive(k=k)


def check_schedule(n_iters: int, eps: float, eps_init: float | None, eps_decay: float) -> None:
    """At least one iteration, positive temperatures, and a decay in (0, 1]."""
    check_counts(n_iters=n_iters)
    check_positive(eps=eps)
    require(eps_init is None or (_is_number(eps_init) and eps_init > 0), "eps_init", eps_init, "None or > 0")
    require(_is_number(eps_decay) and 0 < eps_decay <= 1, "eps_decay", eps_decay, "in (0, 1]")


def _check_broadcast(name: str, tensor: Tensor, shape: torch.Size, allowed: str) -> None:
    fits = tensor.ndim <= len(shape) and all(
        size == 1 or size == full for size, full in zip(reversed(tensor.shape), reversed(shape), strict=False)
    )
    require(fits, name, tensor.shape, "of a shape that broadcasts to {}, {}", shape, allowed)


def first_temperature(eps: float, eps_init: float | None) -> float:
    """The temperature of the first iteration: never below the last, eps."""
    return eps if eps_init is None else max(eps_init, eps)


def epsilon_schedule(n_iters: int, eps: float, eps_init: float | None, eps_decay: float) -> Iterator[float]:
    """The temperatures of n_iters iterations, then the one of the output.

    Epsilon scaling: Schmitzer 2016, https://arxiv.org/abs/1610.06519, section 3.
    """
    temperature = first_temperature(eps, eps_init)
    for _ in range(n_iters + 1):
        yield temperature
        temperature = max(temperature * eps_decay, eps)


def result_dtype(dtype: torch.dtype | None, *tensors: Tensor | None) -> torch.dtype:
    """The dtype of a result: `dtype` if it is given, else the promoted dtype of all tensors."""
    given = [tensor.dtype for tensor in tensors if tensor is not None]
    return reduce(torch.promote_types, given) if dtype is None else dtype


def check_normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype | None) -> None:
    """x is `... d` with d >= 1, weight and bias are `d` on its device, and eps is positive."""
    check_float("x", x)
    require(x.ndim >= 1 and x.shape[-1] >= 1, "x", x.shape, "of shape (..., d) with d >= 1")
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None:
            check_float(name, each)
            fits = each.shape == x.shape[-1:]
            require(fits, name, each.shape, "of shape {}, one entry per feature of x", x.shape[-1:])
            require(each.device == x.device, name, each.device, "on {}, the device of x", x.device)
    check_positive(eps=eps)
    require(dtype is None or dtype in FLOAT_DTYPES, "dtype", dtype, "None or a float dtype")


def check_biased_gelu(x: Tensor, bias: Tensor) -> None:
    """x is `... d` with d >= 1, and the bias is `d` on its device."""
    check_float("x", x)
    check_float("bias", bias)
    require(x.ndim >= 1 and x.shape[-1] >= 1, "x", x.shape, "of shape (..., d) with d >= 1")
    require(bias.shape == x.shape[-1:], "bias", bias.shape, "of shape {}, one entry per feature of x", x.shape[-1:])
    require(bias.device == x.device, "bias", bias.device, "on {}, the device of x", x.device)


def check_combine(
    routed: Tensor,
    scores: Tensor,
    indices: Tensor,
    length: int,
    null: Tensor | None,
    light: Tensor | None,
    residual: Tensor | None,
    bias: Tensor | None,
    routed_bias: Tensor | None,
    start: int,
    dtype: torch.dtype | None,
) -> None:
    """Shapes match, indices are integers, and everything is on one device."""
    check_float("routed", routed)
    check_float("scores", scores)
    require(routed.ndim == 3, "routed", routed.shape, "of shape (b, k, d)")
    check_counts(length=length)
    check_integers(start=start)
    require(0 <= start <= length, "start", start, "from 0 to length = {}", length)
    batch, k, d = routed.shape
    shapes = {
        "scores": (scores, (batch, k)),
        "indices": (indices, (batch, k)),
        "null": (null, (d,)),
        "light": (light, (batch, length, d)),
        "residual": (residual, (batch, length, d)),
        "bias": (bias, (d,)),
        "routed_bias": (routed_bias, (d,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            require(tensor.shape == shape, name, tensor.shape, "of shape {}", shape)
            require(tensor.device == routed.device, name, tensor.device, "on {}, the device of routed", routed.device)
    require(indices.dtype in (torch.int32, torch.int64), "indices", indices.dtype, "a tensor of int32 or int64")
    require(dtype is None or dtype in FLOAT_DTYPES, "dtype", dtype, "None or a float dtype")


def check_routed(query: Tensor, key_value: Tensor, weights: Tensor, null_kv: Tensor, mask: Tensor | None) -> None:
    """Shapes match, heads are shared evenly between routes, and everything is on one device."""
    check_float("query", query)
    require(query.ndim == 3, "query", query.shape, "of shape (b, i, h * d)")
    fits = null_kv.ndim == 3 and null_kv.shape[0] == 2 and null_kv.shape[1] * null_kv.shape[2] == query.shape[2]
    require(fits, "null_kv", null_kv.shape, "of shape (2, h, d) with h * d = {}", query.shape[2])
    require(key_value.ndim == 4, "key_value", key_value.shape, "of shape (b, r, j, 2 * h / r * d)")
    (batch, routes, n_keys, width), (_, heads, dim) = key_value.shape, null_kv.shape
    fits = batch == query.shape[0] and routes >= 1 and heads % routes == 0 and width == 2 * heads // routes * dim
    allowed = "of shape ({0}, r, j, 2 * {1} / r * {2}) for {1} heads of {2} in r routes"
    require(fits, "key_value", key_value.shape, allowed, query.shape[0], heads, dim)
    require(key_value.dtype == query.dtype, "key_value", key_value.dtype, "of dtype {}, that of query", query.dtype)
    for name, tensor in (("weights", weights), ("mask", mask)):
        if tensor is not None:
            shape = (batch, routes, n_keys)
            require(tensor.shape == shape, name, tensor.shape, "of shape {}", shape)
    if mask is not None:
        require(mask.dtype == torch.bool, "mask", mask.dtype, "a tensor of dtype torch.bool")
    for name, tensor in (("key_value", key_value), ("weights", weights), ("null_kv", null_kv), ("mask", mask)):
        if tensor is not None:
            require(tensor.device == query.device, name, tensor.device, "on {}, the device of query", query.device)


def check_routing_tokens(x: Tensor, routing_tokens: Tensor) -> None:
    """Tokens are a float tensor (b, n, d), routing tokens one of (b, r, d) or (1, r, d)."""
    check_float("x", x)
    require(x.ndim == 3 and x.shape[-1] >= 1, "x", x.shape, "of shape (b, n, d) with d >= 1")
    check_float("routing_tokens", routing_tokens)
    (batch, _, d), shape = x.shape, routing_tokens.shape
    fits = len(shape) == 3 and (shape[0] == 1 or shape[0] == batch) and shape[1] >= 1 and shape[2] == d
    require(fits, "routing_tokens", shape, "of shape ({0}, r, {1}) or (1, r, {1}) with r >= 1", batch, d)
    same = routing_tokens.device == x.device
    require(same, "routing_tokens", routing_tokens.device, "on {}, the device of x", x.device)


def check_route(
    x: Tensor,
    routing_tokens: Tensor,
    num_selected: int,
    k: float,
    schedule: tuple[int, float, float | None, float],
    solver: Solver,
    block_size: int | None,
    mask: Tensor | None,
    length: int | None = None,
) -> None:
    """Check all arguments of `route`. The length is that of x, unless x is a part of a sequence."""
    check_routing_tokens(x, routing_tokens)
    check_tokens(x, x.shape[-1], mask)
    check_counts(num_selected=num_selected, **({} if block_size is None else {"block_size": block_size}))
    length = x.shape[1] if length is None else length
    n = length if block_size is None else block_size
    name = "n" if block_size is None else "block_size"
    require(num_selected <= n, "num_selected", num_selected, "from 1 to {} = {}", name, n)
    require(not isinstance(k, Tensor), "k", "a tensor", "a number")
    check_k(k, x)
    check_schedule(*schedule)
    require(solver in ("coor_descent", "exact"), "solver", solver, "coor_descent or exact")


def check_prefixes(scores: Tensor, window_size: int, num_selected: int, k: float) -> None:
    """Scores are `b r n`. At least one and at most n of them are selected, from windows of at least one token."""
    check_scores(scores, None)
    require(scores.ndim == 3, "scores", scores.shape, "of shape (b, r, n)")
    check_counts(window_size=window_size, num_selected=num_selected)
    n = scores.shape[-1]
    require(num_selected <= n, "num_selected", num_selected, "at most n = {}", n)
    require(not isinstance(k, Tensor), "k", "a tensor", "a number")
    check_k(k, scores)


def check_topk(x: Tensor, k: int, coor_descent_k_ratio: float) -> None:
    """k is from 1 to n and the ratio at least 1."""
    check_integers(k=k)
    require(1 <= k <= x.shape[-1], "k", k, "from 1 to n = {}", x.shape[-1])
    check_positive(coor_descent_k_ratio=coor_descent_k_ratio)
    require(coor_descent_k_ratio >= 1, "coor_descent_k_ratio", coor_descent_k_ratio, ">= 1")


def check_select(scores: Tensor, num_selected: int, mask: Tensor | None) -> None:
    """Scores and mask match, and there are at least as many entries as are selected."""
    check_scores(scores, mask)
    n = scores.shape[-1]
    check_integers(num_selected=num_selected)
    require(1 <= num_selected <= n, "num_selected", num_selected, "from 1 to n = {}", n)
