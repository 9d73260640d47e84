"""Multiply-adds of an encoder layer, counted by PyTorch's FlopCounterMode, over those of the CoLT5 paper's table.

2303.09752, section 3, for n tokens of dimension d: T5 12 n d^2 + 2 n^2 d; LongT5 12 n d^2 + n^2 d / 8; CoLT5
7.25 n d^2 + n^2 d / 84. The last is for light branches of half the feed-forward width and a quarter of the heads, heavy
ones of four times the width and three quarters of the heads, and m = q = n / 16 and v = n / 8 routed tokens. The table
gives the sum; its terms, as read here, are

    light feed-forward    4 n d^2        light projections    n d^2
    heavy feed-forward    2 n d^2        heavy projections    9/32 n d^2      heavy attention    3/256 n^2 d

whose sum is 7.28 n d^2 + n^2 d / 85.3, the table's figures except for rounding. No formula has the terms that are
linear in n and in d or the window: the light attention, the router, and the local attention of LongT5, which counts as
`attention` here because one softmax is over both.

Nothing is computed: tensors are fake, of any size. The accuracy gate checks that the counted multiply-adds are exactly
those that follow from the shapes of the layer. Metrics are each term divided by the one above, `total` divided by the
formula of the table, `unlisted`, the share of the count that is in no formula, and `giga` multiply-adds.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import reference
from colt5_bench.case import FORWARD, Case, Cost, Problem, Truth
from colt5_bench.pytest_plugin.replay import check
from colt5_bench.suite import Implementation, Operation, Suite
from kernels._common.tensors import triton_for_cpu_tensors
from kernels.windowed_attention import pairs_in_reach, windowed_attention
from reference.layers.operations import Operations
from suites._dense import DenseAttention, DenseBlock, DenseFeedForward, attend_with_sdpa
from suites._descent import implementations

DIM_HEAD = 64
RADIUS = 127
GLOBAL_BLOCK = 16
"""Tokens that a global token of LongT5 sums (2112.07916, section 3.1.2)."""


@dataclass(frozen=True)
class FlopsCase(Case):
    """An encoder layer of dimension dim for one sequence of n tokens."""

    n: int
    dim: int

    @property
    def heads(self) -> int:
        return self.dim // DIM_HEAD


class LongAttention(nn.Module):
    """Attention of LongT5: to the tokens of its own and the neighbouring windows, and to sums of all blocks."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.global_to_kv = nn.Linear(dim, 2 * dim, bias=False)
        self.global_to_kv.weight = self.to_kv.weight

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `b n d`, n a multiple of the window and of the blocks."""
        size = RADIUS + 1
        query = rearrange(self.to_q(x), "b (w i) (h d) -> b w h i d", h=self.heads, i=size)
        local = F.pad(rearrange(self.to_kv(x), "b (w j) c -> b w j c", j=size), (0, 0, 0, 0, 1, 1))
        local = torch.cat((local[:, :-2], local[:, 1:-1], local[:, 2:]), dim=2)
        sums = self.global_to_kv(reduce(x, "b (m j) d -> b m d", "sum", j=GLOBAL_BLOCK))
        both = torch.cat((local, repeat(sums, "b m c -> b w m c", w=query.shape[1])), dim=2)
        key, value = rearrange(both, "b w j (kv h d) -> kv b w h j d", kv=2, h=self.heads)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(rearrange(out, "b w h i d -> b (w i) (h d)"))


def colt5(case: FlopsCase, use_triton: bool) -> nn.Module:
    light = case.heads // 4
    return reference.ConditionalRoutedTransformerBlock(
        case.dim,
        num_heavy_attn_tokens_q=case.n // 16,
        num_heavy_attn_tokens_kv=case.n // 8,
        num_heavy_ff_tokens=case.n // 16,
        light_heads=light,
        heavy_heads=case.heads - light,
        light_window_size=2 * RADIUS,
        light_ff_mult=2,
        heavy_ff_mult=16,
        use_triton=replace(Operations.of(True), windowed_attention=_on_a_gpu) if use_triton else False,
        use_flash_attn=True,
    )


def t5(case: FlopsCase) -> nn.Module:
    attention = DenseAttention(attend_with_sdpa, case.dim, case.heads, DIM_HEAD)
    return DenseBlock(attention, DenseFeedForward(case.dim, 4 * case.dim))


def longt5(case: FlopsCase) -> nn.Module:
    return DenseBlock(LongAttention(case.dim, case.heads), DenseFeedForward(case.dim, 4 * case.dim))


def _on_a_gpu(qkv: Tensor, **options: Any) -> Tensor:
    """The kernel, which counts pairs within reach; for a CPU tensor the definition would be used."""
    with triton_for_cpu_tensors():
        return windowed_attention(qkv, **options)


class _AttentionFlops(TorchFunctionMode):
    """Counts the operations of attention within each module."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = ModuleTracker()
        self.by_module: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (F.scaled_dot_product_attention, torch.ops.colt5.windowed_attention):
            return func(*args, **(kwargs or {}))
        with FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        self.by_module.update(dict.fromkeys(self.tracker.parents, counter.get_total_flops()))
        return result


def counted(case: FlopsCase, make: Callable[[FlopsCase], nn.Module]) -> tuple[Counter[str], Counter[str]]:
    """Multiply-adds by name of the module, of all its products and of attention; a flop counter counts each twice."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        module = make(case)
        x = torch.empty(1, case.n, case.dim)
        with FlopCounterMode(display=False) as counter, _AttentionFlops() as attention, attention.tracker:
            module(x)

    def by_name(flops_by_module: Mapping[str, int]) -> Counter[str]:
        root = type(module).__name__
        return Counter({name.removeprefix(root).lstrip("."): flops // 2 for name, flops in flops_by_module.items()})

    products = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    return by_name(products), by_name(attention.by_module)


@dataclass(frozen=True)
class Accounting:
    """Split of the multiply-adds of a layer into terms."""

    make: Callable[[FlopsCase], nn.Module]

    terms: Sequence[str]
    split: Callable[[Counter[str], Counter[str]], Mapping[str, int]]
    """From the counts of all products and of attention to those of the terms."""

    expected: Callable[[FlopsCase], Mapping[str, int]]
    """Terms that follow from the shapes."""

    paper: Callable[[FlopsCase], Mapping[str, float]]
    """The formulas of the paper, for the terms that have one."""

    table: tuple[float, float]
    """Factors of n d^2 and n^2 d in the table."""

    def count(self, case: FlopsCase) -> dict[str, int]:
        of_all, of_attention = counted(case, self.make)
        terms = dict(self.split(of_all, of_attention))
        assert sum(terms.values()) == of_all[""], "a product is in no term, or in two"
        return terms

    def metrics(self, case: FlopsCase, problem: Problem) -> dict[str, float]:
        terms, paper = self.count(case), self.paper(case)
        total, listed = sum(terms.values()), sum(terms[name] for name in paper)
        ratios = {name: terms[name] / paper[name] for name in paper}
        of_projections, of_pairs = self.table
        formula = of_projections * case.n * case.dim**2 + of_pairs * case.n**2 * case.dim
        return {**ratios, "total": total / formula, "unlisted": 1 - listed / total, "giga": total / 1e9}

    def function(self, case: FlopsCase) -> Callable[..., Tensor]:
        return lambda: self._tensor(self.count(case))

    def truth(self, case: FlopsCase, problem: Problem, direction: str) -> Truth:
        return Truth(self._tensor(self.expected(case)))

    def _tensor(self, terms: Mapping[str, int]) -> Tensor:
        return torch.tensor([terms[name] for name in self.terms], dtype=torch.float64)


def _colt5_terms(of_all: Counter[str], of_attention: Counter[str]) -> dict[str, int]:
    light, heavy = "conditional_attn.light_attn", "conditional_attn.heavy_attn"
    attention_routers = of_all["conditional_attn.q_router"] + of_all["conditional_attn.kv_router"]
    heavy_branch = of_all["conditional_attn"] - of_all[light] - attention_routers
    return {
        "light_feed_forward": of_all["conditional_ff.light_ff"],
        "heavy_feed_forward": of_all["conditional_ff.heavy_ff"],
        "light_projections": of_all[light] - of_attention[light],
        "heavy_projections": heavy_branch - of_attention[heavy],
        "heavy_attention": of_attention[heavy],
        "light_attention": of_attention[light],
        "routing": of_all["conditional_ff.router"] + attention_routers,
    }


def _colt5_expected(case: FlopsCase, use_triton: bool = False) -> dict[str, int]:
    """Plain PyTorch computes whole windows and their neighbours; the kernel counts only pairs in reach."""
    n, d, light, heavy = case.n, case.dim, case.heads // 4 * DIM_HEAD, (case.heads - case.heads // 4) * DIM_HEAD
    q, kv = n // 16, n // 8
    light_pairs = pairs_in_reach(n, RADIUS, False) if use_triton else ceil(n / RADIUS) * RADIUS * 3 * RADIUS
    return {
        "light_feed_forward": 2 * n * d * 2 * d,
        "heavy_feed_forward": 2 * q * d * 16 * d,
        "light_projections": 4 * n * d * light,
        "heavy_projections": 2 * q * d * heavy + 2 * kv * d * heavy,
        # A learned key is added to the routed ones.
        "heavy_attention": 2 * q * (kv + 1) * heavy,
        "light_attention": 2 * light_pairs * light,
        "routing": 3 * n * d,
    }


def _colt5_paper(case: FlopsCase) -> dict[str, float]:
    n, d = case.n, case.dim
    return {
        "light_feed_forward": 4 * n * d**2,
        "heavy_feed_forward": 2 * n * d**2,
        "light_projections": n * d**2,
        "heavy_projections": 9 / 32 * n * d**2,
        "heavy_attention": 3 / 256 * n**2 * d,
    }


def _dense_terms(of_all: Counter[str], of_attention: Counter[str]) -> dict[str, int]:
    beside = of_all["attention.global_to_kv"]
    return {
        "feed_forward": of_all["feed_forward"],
        "projections": of_all["attention"] - of_attention["attention"] - beside,
        "attention": of_attention["attention"],
        "global_projections": beside,
    }


def _dense_expected(keys: Callable[[FlopsCase], int], sums: Callable[[FlopsCase], int]) -> Any:
    """Terms of a layer in which each query has `keys` keys, some of which are projected from sums."""
    return lambda case: {
        "feed_forward": 8 * case.n * case.dim**2,
        "projections": 4 * case.n * case.dim**2,
        "attention": 2 * case.n * keys(case) * case.dim,
        "global_projections": 2 * sums(case) * case.dim**2,
    }


def _dense_paper(per_pair: float) -> Callable[[FlopsCase], dict[str, float]]:
    """The formula of 12 n d^2 and a multiple of n^2 d."""
    return lambda case: {
        "feed_forward": 8 * case.n * case.dim**2,
        "projections": 4 * case.n * case.dim**2,
        "attention": per_pair * case.n**2 * case.dim,
    }


COLT5_TERMS = tuple(_colt5_expected(FlopsCase(1024, 256)))
DENSE_TERMS = ("feed_forward", "projections", "attention", "global_projections")

REFERENCE, OURS = (
    Accounting(
        partial(colt5, use_triton=use_triton),
        COLT5_TERMS,
        _colt5_terms,
        partial(_colt5_expected, use_triton=use_triton),
        _colt5_paper,
        (7.25, 1 / 84),
    )
    for use_triton in (False, True)
)
T5 = Accounting(
    t5,
    DENSE_TERMS,
    _dense_terms,
    _dense_expected(lambda case: case.n, lambda case: 0),
    _dense_paper(2),
    (12, 2),
)
LONGT5 = Accounting(
    longt5,
    DENSE_TERMS,
    _dense_terms,
    _dense_expected(lambda case: 3 * (RADIUS + 1) + case.n // GLOBAL_BLOCK, lambda case: case.n // GLOBAL_BLOCK),
    _dense_paper(1 / 8),
    (12, 1 / 8),
)


def problem(case: FlopsCase, device: torch.device) -> Problem:
    """Empty, because the counted tensors are fake."""
    return Problem({}, torch.empty(0), ())


def implementation(name: str, accounting: Accounting, *, of_suite: bool = False) -> Implementation[FlopsCase]:
    operation = None if of_suite else Operation(problem, accounting.truth, accounting.function)
    return Implementation(name, accounting.function, operation=operation, metrics=accounting.metrics)


def cost(case: FlopsCase, direction: str) -> Cost:
    """Cost of the layer, if it were computed in fp32: parameters and tokens; backward their gradients too."""
    expected = sum(_colt5_expected(case).values())
    size = 4 * (44 * case.dim**2 + 2 * case.n * case.dim)
    return Cost(bytes=size, flops=2 * expected) if direction == FORWARD else Cost(bytes=3 * size, flops=6 * expected)


def cases(preset: str, device: torch.device) -> list[FlopsCase]:
    lengths, dims = [4096, 16384], [768, 1024, 2048]
    if preset == "smoke":
        lengths, dims = [1024, 4096], [256]
    elif preset == "full":
        lengths = [2**power for power in range(10, 21, 2)]
    return [FlopsCase(n, dim) for dim, n in product(dims, lengths)]


SUITE = Suite(
    name="flops",
    description="multiply-adds of T5, LongT5 and CoLT5 layers compared with the formulas of the paper, term by term",
    cases=cases,
    directions=lambda case: (FORWARD,),
    implementations=implementations(
        implementation("reference", REFERENCE, of_suite=True),
        implementation("ours", OURS),
        implementation("t5", T5),
        implementation("longt5", LONGT5),
    ),
    reference="reference",
    problem=problem,
    truth=REFERENCE.truth,
    plain=REFERENCE.function,
    cost=cost,
    timed=False,
)


def test_flops(record):
    check(record)
