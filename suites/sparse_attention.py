"""Sparse attention layers compared with dense attention, from 1,024 to 1,048,576 tokens, causal and not.

All have the same width and number of heads. With `settings=published` each attends as in its paper or package. With
`settings=equal` a routed query attends to the same number of keys in each, which is the metric `keys`:

    ours                  CoLT5 (2303.09752): a sixteenth of the tokens are queries and an eighth keys of the heavy
                          branch, at most as many as for 65,536 tokens, the longest input of the paper; causal: windows
                          with 1,024 keys for each of two routes, as in the example of colt5-attention's README
    mosa                  each head attends among a thirty-second of the tokens (2505.00315)
    mixture_of_depths     an eighth of the tokens attend to each other (2404.02258)
    moba, fla_moba        blocks of 512 keys, 3 of them per query (2502.13189); causal only
    nsa, fla_nsa          means of blocks of 64 keys, 16 selected ones and the last 512 keys (2502.11089); causal only;
                          fla's with FlexAttention for the window, since its own needs flash-attn
    selected,             the last 512 keys and 512 given others for each query; causal only, and a key is also its
      attn_gym_gather     value
    entmax, adasplash     1.5-entmax (1905.05702, 2502.12082), in which scores decide the number of keys of a query

Names that begin with a package are the package's kernels; the others are plain PyTorch by the papers. Each is judged by
its own definition in fp64, and its speed-up is over dense attention: the page of a run shows the length from which it
is faster. If attention scores select keys, a rounding decides for some queries: the errors of moba and nsa are shown
but not gated.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, nn

from colt5_bench.case import FORWARD, Problem, Truth
from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Implementation, Operation, Suite
from colt5_bench.tolerance import Tolerance
from suites._dense import Attend, DenseAttention, attend_plainly, attend_with_sdpa
from suites._descent import both_directions, implementations, lenient
from suites._layers import (
    GUEST,
    OURS,
    Layer,
    LayerCase,
    as_function,
    cost,
    plain,
    problem,
    seeded_problem,
    truth,
    truth_of,
    without_memory,
)
from suites._pieces import by_window, in_pieces
from suites._sparse import (
    MixtureOfDepths,
    MixtureOfSparseAttention,
    NativeSparseAttention,
    SharedKeyAttention,
    apart,
    entmax,
    native_sparse,
    selection,
    to_blocks,
    to_selected,
)
from suites.layers import LONGEST_AT_ONCE
from suites.peers import (
    ADASPLASH,
    ATTN_GYM,
    DENSE,
    DENSE_FLASH,
    FLA,
    FLASH_ATTN,
    attend_with_adasplash,
    native_sparse_with_fla,
    to_blocks_with_fla,
    to_selected_with_attn_gym,
)

MOST_KEYS = 1024
"""Keys that a query attends to with equal settings; a quarter of the tokens if there are few."""

LONGEST_BACKWARD = 131_072
"""Longest causal sequence with a gradient: above it, the routed layer's own in fp64 takes too long."""

LONGEST_GATHERED = {"cuda": 131_072, "cpu": 4096}
LONGEST_SORTED = {"cuda": 16_384, "cpu": 4096}
"""Longest sequences of definitions that gather, or sort, keys for each query, by type of device."""

LONGEST_PUBLISHED = 65_536
"""Longest input in CoLT5's paper."""


@dataclass(frozen=True)
class SparseCase(LayerCase):
    """Attention of one sequence of n tokens."""

    n: int
    causal: bool
    settings: str
    """`published` or `equal`."""

    dim: int
    heads: int
    dtype: str = "float32"

    @property
    def keys(self) -> int:
        """Keys that a query attends to with equal settings."""
        return min(MOST_KEYS, self.n // 4)

    def of(self, published: int) -> int:
        """A setting of a paper, or with equal settings the number of keys."""
        return published if self.settings == "published" else self.keys

    @property
    def layer(self) -> Layer:
        return replace((_autoregressive if self.causal else _routed)(self), dtype=self.dtype)


def _routed(case: SparseCase) -> Layer:
    """CoLT5's attention, with half as many light heads as heavy ones, as in CoLT5 Base."""
    shape, paper = (1, case.n, case.dim), min(case.n, LONGEST_PUBLISHED)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedAttention(
            case.dim,
            num_heavy_tokens_q=case.of(paper // 16),
            num_heavy_tokens_kv=case.of(paper // 8),
            light_heads=case.heads // 2,
            heavy_heads=case.heads,
            use_triton=use_triton,
        ),
        inputs={"x": shape},
        output=shape,
        dense=lambda attend: DenseAttention(attend, case.dim, case.heads),
        dense_pairs=case.n**2,
    )


def _autoregressive(case: SparseCase) -> Layer:
    shape = (1, case.n, case.dim)
    return Layer(
        lambda package, use_triton: package.ConditionalRoutedAutoregressiveAttention(
            case.dim,
            num_heavy_tokens_q=32,
            num_heavy_tokens_kv=case.keys,
            num_routed_kv=2 if case.settings == "published" else 1,
            light_heads=case.heads // 2,
            heavy_heads=case.heads,
            use_triton=use_triton,
            use_flash_attn=True,
        ),
        inputs={"x": shape},
        output=shape,
        sparing=by_window if case.n > LONGEST_AT_ONCE else in_pieces,
        dense=lambda attend: DenseAttention(attend, case.dim, case.heads, causal=True),
        dense_pairs=case.n**2,
    )


Build = Callable[[SparseCase], nn.Module]


def _in_its_place(
    name: str,
    build: Build,
    define: Build,
    keys: Callable[[SparseCase], float] | None,
    *,
    num_tokens: Callable[[SparseCase], int] | None = None,
    **options: Any,
) -> Implementation[SparseCase]:
    """A layer with its own parameters in place of ours.

    Args:
        build: the layer that is timed.
        define: the same layer by its definition.
        keys: most keys that a routed query attends to; None if unknown.
        num_tokens: number of tokens that a router selects, if there is one.
    """

    def function(build: Build, case: SparseCase, *, autocast: bool) -> Callable[..., Tensor]:
        return as_function(without_memory(lambda: build(case)), autocast=autocast)

    def own_problem(case: SparseCase, device: torch.device) -> Problem:
        seeded = seeded_problem(case, case.layer, lambda: define(case), device)
        return seeded if num_tokens is None else apart(seeded, num_tokens(case))

    def own_truth(case: SparseCase, problem: Problem, direction: str) -> Truth:
        return truth_of(function(define, case, autocast=False), problem, direction)

    return Implementation(
        name,
        lambda case: function(build, case, autocast=case.layer.autocast),
        operation=Operation(own_problem, own_truth, lambda case: function(define, case, autocast=case.layer.autocast)),
        metrics=lambda case, problem: {"keys": keys(case)} if keys else {},
        **{"bound": lenient, **options},
    )


def _by_router(name: str, layer: Callable[..., nn.Module], published: int) -> Implementation[SparseCase]:
    """A layer whose router selects the share of tokens of its paper, one in n."""

    def num_tokens(case: SparseCase) -> int:
        return case.of(case.n // published)

    def build(case: SparseCase, attend: Attend) -> nn.Module:
        return layer(attend, case.dim, case.heads, num_tokens(case), causal=case.causal)

    return _in_its_place(
        name,
        lambda case: build(case, attend_with_sdpa),
        lambda case: build(case, attend_plainly),
        num_tokens,
        num_tokens=num_tokens,
    )


def _dense_with(attend: Callable[[SparseCase], Attend]) -> Build:
    return lambda case: DenseAttention(attend(case), case.dim, case.heads, causal=case.causal)


def _blocks(case: SparseCase) -> dict[str, int]:
    """Blocks of MoBA, with as many keys as in its paper, or with the number for equal settings."""
    if case.settings == "published":
        return {"size": min(512, case.n // 4), "blocks": 3}
    return {"size": case.keys // 4, "blocks": 4}


def _moba(attend: Callable[..., Tensor]) -> Build:
    return _dense_with(lambda case: partial(attend, **_blocks(case)))


def _keys_of_moba(case: SparseCase) -> int:
    return prod(_blocks(case).values())


def _parts(case: SparseCase) -> dict[str, int]:
    """Parts of NSA; with equal settings, half of the keys are in blocks and half in the window."""
    if case.settings == "published":
        return {"size": 64, "blocks": 16, "window": min(512, case.n // 4)}
    size = min(64, case.keys // 8)
    return {"size": size, "blocks": case.keys // 2 // size, "window": case.keys // 2}


def _nsa(attend: Callable[..., Callable[..., Tensor]]) -> Build:
    return lambda case: NativeSparseAttention(attend(**_parts(case)), case.dim, case.heads)


def _keys_of_nsa(case: SparseCase) -> int:
    parts = _parts(case)
    return parts["size"] * parts["blocks"] + parts["window"]


def _given(case: SparseCase) -> dict[str, int]:
    """Keys in the window of a query, and other keys that are given."""
    half = case.of(min(1024, case.n // 2)) // 2
    return {"window": half, "selected": half}


@lru_cache(maxsize=1)
def _places(n: int, window: int, selected: int, device: torch.device) -> Tensor:
    """Places of the selected keys, which are an input and take no time."""
    return selection(torch.arange(n, device=device)[:, None], window, selected).to(torch.int32)


def _with_attn_gym(case: SparseCase) -> nn.Module:
    given = _given(case)

    def attend(query: Tensor, key: Tensor) -> Tensor:
        places = _places(case.n, **given, device=query.device)
        return to_selected_with_attn_gym(query, key, places, window=given["window"])

    return SharedKeyAttention(attend, case.dim, case.heads)


def _selected(case: SparseCase) -> nn.Module:
    given = _given(case)
    return SharedKeyAttention(lambda query, key: to_selected(query, key, **given), case.dim, case.heads)


def _keys_of_selected(case: SparseCase) -> int:
    return sum(_given(case).values())


Unavailable = Callable[[SparseCase, torch.device], str | None]


def _any_of(*reasons: Unavailable) -> Unavailable:
    """The first reason, if there is one."""
    return lambda case, device: next((why for each in reasons if (why := each(case, device))), None)


def _not_causal(case: SparseCase, device: torch.device) -> str | None:
    return None if case.causal else "is only causal"


def _few_heads(case: SparseCase, device: torch.device) -> str | None:
    return None if case.heads >= 16 else f"its kernels need at least 16 heads per key, got {case.heads}"


def _too_long(case: SparseCase, device: torch.device) -> str | None:
    longest = LONGEST_GATHERED[device.type]
    return f"takes at most {longest} tokens, because it gathers keys for each query" if case.n > longest else None


def _by_its_scores(case: SparseCase, device: torch.device) -> str | None:
    if case.settings == "equal":
        return "the number of keys of a query depends on its scores"
    longest = LONGEST_SORTED[device.type]
    return f"takes at most {longest} tokens, because it sorts keys for each query" if case.n > longest else None


def not_gated(case: SparseCase, tensor: str, expected: Tensor, tolerance: Tolerance) -> Tolerance:
    """Any finite error is allowed."""
    return tolerance.at_least(inf)


def _pair(
    name: str,
    theirs: str,
    build: Build,
    define: Build,
    keys: Callable[[SparseCase], float] | None,
    *,
    missing: Unavailable,
    unavailable: Unavailable,
    **options: Any,
) -> tuple[Implementation[SparseCase], Implementation[SparseCase]]:
    """A definition, and a package's kernels that are judged by it."""
    return (
        _in_its_place(name, define, define, keys, unavailable=unavailable, **options),
        _in_its_place(theirs, build, define, keys, unavailable=_any_of(unavailable, missing), **options),
    )


SPARSE = (
    _by_router("mosa", MixtureOfSparseAttention, published=32),
    _by_router("mixture_of_depths", MixtureOfDepths, published=8),
    *_pair(
        "moba",
        "fla_moba",
        _moba(to_blocks_with_fla),
        _moba(to_blocks),
        _keys_of_moba,
        missing=_any_of(FLA, FLASH_ATTN),
        unavailable=_any_of(_not_causal, _too_long),
        bound=not_gated,
    ),
    *_pair(
        "nsa",
        "fla_nsa",
        _nsa(native_sparse_with_fla),
        _nsa(partial(partial, native_sparse)),
        _keys_of_nsa,
        missing=_any_of(FLA, _few_heads),
        unavailable=_any_of(_not_causal, _too_long),
        bound=not_gated,
    ),
    *_pair(
        "selected",
        "attn_gym_gather",
        _with_attn_gym,
        _selected,
        _keys_of_selected,
        missing=ATTN_GYM,
        unavailable=_any_of(_not_causal, _too_long),
    ),
    *_pair(
        "entmax",
        "adasplash",
        _dense_with(lambda case: attend_with_adasplash),
        _dense_with(lambda case: entmax),
        None,
        missing=ADASPLASH,
        unavailable=_by_its_scores,
    ),
)
"""Layers in place of ours, by their papers and by packages."""


def _keys_of_ours(case: LayerCase, problem: Problem) -> dict[str, float]:
    assert isinstance(case, SparseCase)
    return {"keys": case.keys if case.causal else case.of(min(case.n, LONGEST_PUBLISHED) // 8)}


def _keys_of_dense(case: LayerCase, problem: Problem) -> dict[str, float]:
    assert isinstance(case, SparseCase)
    return {"keys": case.n}


def cases(preset: str, device: torch.device) -> list[SparseCase]:
    """If there is no GPU, sequences are short and tokens small; with one, layers run under autocast."""
    kinds = list(product((False, True), ("published", "equal")))
    if preset == "smoke":
        return [SparseCase(256, causal, settings, 32, 2) for causal, settings in kinds]
    if device.type != "cuda":
        return [SparseCase(n, causal, settings, 64, 4) for causal, settings in kinds for n in (1024, 2048, 4096)]
    step = 1 if preset == "full" else 2
    lengths = [2**power for power in range(10, 21, step)]
    return [SparseCase(n, causal, settings, 512, 16, "autocast") for causal, settings in kinds for n in lengths]


def directions(case: LayerCase) -> tuple[str, ...]:
    assert isinstance(case, SparseCase)
    return (FORWARD,) if case.causal and case.n > LONGEST_BACKWARD else both_directions(case)


SUITE = Suite(
    name="sparse_attention",
    description="sparse attention layers beside dense attention to 1,048,576 tokens, each by its paper's settings and "
    "with equally many keys",
    cases=cases,
    directions=directions,
    implementations=implementations(
        replace(DENSE, metrics=_keys_of_dense),
        replace(DENSE_FLASH, metrics=_keys_of_dense),
        replace(OURS, metrics=_keys_of_ours),
        *SPARSE,
    ),
    reference="dense",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=GUEST,
    crossover=True,
)


def test_sparse_attention(record, benchmark):
    replay(record, benchmark)
