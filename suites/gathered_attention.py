"""Attention of windows to tokens routed from those before them, by the length of the sequence.

Lists are the tokens with the largest of normally distributed scores, as autoregressive attention selects them; the
projections and the routing of that layer are not part of it. `sdpa` is PyTorch's scaled_dot_product_attention on a copy
of the keys and values of each window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import kernels
import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Suite
from reference.gathered_attention import gather_and_attend
from suites._descent import CHUNK_BYTES, both_directions, implementations
from suites._layers import TRAINING_PRODUCTS
from suites._ours import by_kernels, guest


@dataclass(frozen=True)
class GatheredCase(Case):
    """Windows of `batch` sequences of n tokens, except the first, with queries routed in each."""

    batch: int
    n: int
    window: int
    """Tokens per window."""

    queries: int
    """Queries per window."""

    selected: int
    """Tokens before a window that each route selects for it."""

    routes: int
    heads: int
    dim_head: int
    dtype: str

    @property
    def windows(self) -> int:
        return self.n // self.window - 1

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key, over all heads, including the learned key."""
        listed = sum(min(self.selected, self.window * window) + 1 for window in range(1, self.windows + 1))
        return self.batch * self.heads * self.queries * listed


def cases(preset: str, device: torch.device) -> list[GatheredCase]:
    """The example of autoregressive attention in colt5-attention's README, and longer ones."""
    if preset == "smoke":
        return [GatheredCase(2, 97, 16, 4, 23, 2, 4, 16, "float32")]
    shapes = [(2, 8192), (2, 32768)] if device.type == "cuda" else [(1, 2048)]
    if preset == "full":
        shapes += [(1, 131_072)]
    dtypes = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    return [GatheredCase(b, n, 128, 32, 1024, 2, 8, 64, dtype) for b, n in shapes for dtype in dtypes]


def problem(case: GatheredCase, device: torch.device) -> Problem:
    dtype, shape = getattr(torch, case.dtype), (case.batch, case.windows, case.heads, case.queries, case.dim_head)
    query, upstream, key_value, scores, weights, null_kv = case.normal(
        device,
        shape,
        shape,
        (case.batch, case.routes, case.n, 2 * case.dim_head * case.heads // case.routes),
        (case.batch, case.routes, case.n),
        (case.batch, case.windows, case.routes, case.selected),
        (2, case.heads, case.dim_head),
    )
    indices, mask = _prefixes(case, scores)
    inputs = {
        "query": query.to(dtype),
        "key_value": key_value.to(dtype),
        "indices": indices,
        "weights": torch.special.ndtr(weights),
        "null_kv": null_kv,
        "mask": mask,
    }
    return Problem(inputs, upstream.to(dtype), DIFFERENTIABLE)


DIFFERENTIABLE = ("query", "key_value", "weights", "null_kv")


def _prefixes(case: GatheredCase, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest scores before each window, `b w r s`, and a mask of valid ones."""
    indices, mask = [], []
    for window in range(1, case.windows + 1):
        before = torch.arange(case.n, device=scores.device) < window * case.window
        largest = scores.masked_fill(~before, -torch.inf).topk(case.selected, dim=-1)
        indices.append(largest.indices)
        mask.append(largest.values > -torch.inf)
    return torch.stack(indices, dim=1), torch.stack(mask, dim=1)


def attending(function: Callable[..., Tensor]) -> Callable[[GatheredCase], Callable[..., Tensor]]:
    return lambda case: function


plain = attending(reference.gathered_attention)


def truth(case: GatheredCase, problem: Problem, direction: str) -> Truth:
    """The definition in fp64, a few windows at a time."""
    # Keys and values of a window, about eight times with autograd.
    kept = 8 * 16 * case.batch * case.heads * case.selected * case.dim_head
    size = max(1, 8 * CHUNK_BYTES // kept)
    inputs = {name: problem.inputs[name].detach() for name in problem.inputs}
    wide = {name: inputs[name].double().requires_grad_(direction != FORWARD) for name in DIFFERENTIABLE}
    outputs = []
    for start in range(0, case.windows, size):
        windows = slice(start, start + size)
        out = reference.gathered_attention(
            wide["query"][:, windows],
            wide["key_value"],
            inputs["indices"][:, windows],
            wide["weights"][:, windows],
            wide["null_kv"],
            mask=inputs["mask"][:, windows],
        )
        outputs.append(out.detach())
        if direction != FORWARD:
            out.backward(problem.upstream[:, windows].double())
    gradients = {name: gradient for name, tensor in wide.items() if (gradient := tensor.grad) is not None}
    return Truth(torch.cat(outputs, dim=1), gradients)


def cost(case: GatheredCase, direction: str) -> Cost:
    """All inputs read and the output written; then these and grad_output again, and a gradient for each.

    A pair of query and key costs two products of the head dimension, four more in the backward pass, and an
    exponential, which is computed again because all of them would not fit into memory.
    """
    size, windows = getattr(torch, case.dtype).itemsize, case.batch * case.windows
    queries = size * windows * case.heads * case.queries * case.dim_head
    key_value = 2 * size * case.batch * case.n * case.heads * case.dim_head
    listed = windows * case.routes * case.selected
    forward = 2 * queries + key_value + (8 + 4 + 1) * listed
    flops = 4 * case.pairs * case.dim_head
    if direction == FORWARD:
        return Cost(forward, exponentials=case.pairs, flops=flops, flops_dtype=case.dtype)
    return Cost(
        2 * forward + 2 * queries + key_value + 4 * listed,
        exponentials=2 * case.pairs,
        flops=TRAINING_PRODUCTS * flops,
        flops_dtype=case.dtype,
    )


SUITE = Suite(
    name="gathered_attention",
    description="attention to keys and values that are routed for each window of a sequence",
    cases=cases,
    directions=both_directions,
    implementations=implementations(
        Implementation[GatheredCase]("reference", plain),
        by_kernels(attending(kernels.gathered_attention)),
        Implementation[GatheredCase]("sdpa", lambda case: partial(gather_and_attend, use_flash=True)),
    ),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=guest(attending),
)


def test_gathered_attention(record, benchmark):
    replay(record, benchmark)
