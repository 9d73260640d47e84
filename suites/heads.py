"""Self-attention by the heads of its heavy branch, their dimension, and the sets of keys and values routed to them."""

from dataclasses import dataclass
from itertools import product

import torch

from colt5_bench.pytest_plugin.replay import replay
from colt5_bench.suite import Suite
from suites._dense import DenseAttention
from suites._descent import HEAVY_SHARE, both_directions, implementations
from suites._layers import GUEST, OURS, REFERENCE, Layer, LayerCase, cost, plain, problem, truth
from suites.peers import COLT5_LAYER_PLAIN, COLT5_LAYER_TRITON, DENSE, DENSE_FLASH


@dataclass(frozen=True)
class HeadsCase(LayerCase):
    """Self-attention of one sequence of n tokens, a sixteenth of which is routed."""

    heads: int
    dim_head: int
    routed_sets: int
    """Sets of keys and values, each with a routing token and its share of the heads."""

    n: int
    dim: int
    dtype: str = "float32"

    @property
    def layer(self) -> Layer:
        shape = (1, self.n, self.dim)
        return Layer(
            lambda package, use_triton: package.ConditionalRoutedAttention(
                self.dim,
                num_heavy_tokens_q=self.n // HEAVY_SHARE,
                num_heavy_tokens_kv=self.n // HEAVY_SHARE,
                num_routed_kv=self.routed_sets,
                heavy_dim_head=self.dim_head,
                heavy_heads=self.heads,
                use_triton=use_triton,
            ),
            inputs={"x": shape},
            output=shape,
            masks={"mask": shape[:2]},
            dtype=self.dtype,
            dense=lambda attend: DenseAttention(attend, self.dim, self.heads, self.dim_head),
            dense_pairs=self.n**2,
        )


def cases(preset: str, device: torch.device) -> list[HeadsCase]:
    on_gpu = device.type == "cuda"
    n, dim = (16384, 512) if on_gpu else (1024, 64)
    dtypes = ["float32", "autocast"] if on_gpu else ["float32"]
    heads, dim_heads, routed_sets = [4, 8, 16], [64], [1, 2, 4]
    if preset == "smoke":
        heads, routed_sets, n, dtypes = [4], [1, 2], 128, ["float32"]
    elif preset == "full":
        heads, dim_heads, routed_sets = [1, 2, 4, 8, 16, 32], [32, 64, 128], [1, 2, 4, 8]
    return [
        HeadsCase(*sizes, n=n, dim=dim, dtype=dtype)
        for dtype, sizes in product(dtypes, product(heads, dim_heads, routed_sets))
        if sizes[0] % sizes[2] == 0
    ]


SUITE = Suite(
    name="heads",
    description="self-attention by heads, their dimension and the routed sets of keys and values",
    cases=cases,
    directions=both_directions,
    implementations=implementations(REFERENCE, OURS, DENSE, DENSE_FLASH, COLT5_LAYER_PLAIN, COLT5_LAYER_TRITON),
    reference="reference",
    problem=problem,
    truth=truth,
    plain=plain,
    cost=cost,
    guest=GUEST,
    x_axis="heads",
)


def test_heads(record, benchmark):
    replay(record, benchmark)
