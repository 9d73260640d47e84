"""Bits per byte of attention layers after training, on text and on tasks whose answer is far back.

Each run trains a small decoder of bytes; the blocks differ only in their attention. Attention has no positions, so a
causal convolution of 4 bytes comes before it; `light_rotary` and `rotary` have rotary position embedding instead of the
convolution. Tasks:

    text    the next byte of the corpus, at every position
    recall  the value of a key, at least `distance` bytes before, among random bytes (MQAR: Zoology, 2312.04927)
    needle  a number that a line of the text stated exactly `distance` bytes before

Metrics, on the test split unless stated otherwise:

    bits_per_byte      cross entropy of the bytes that count, in bits
    accuracy           share of these that are the most likely byte
    leak               largest change of a logit when only later bytes change: 0 for a causal model, or rounding
    validation_*       the same two on the validation split, at the last evaluation
    seconds            time of all training steps, host and device together, without evaluations
    router_gradient    norm of the gradient of all routing tokens, divided by that of all parameters
    changed            share of routed keys and values that were not routed at the evaluation before
    overlap            share of the tokens of a route that another route of the layer has selected, too
    position_entropy   entropy in bits of the positions of routed tokens, in 64 parts of the sequence: at most 6

The curves `position` and `bits_by_position` give bits per byte from each position to the next.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
from math import ceil, cos, log, pi, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import reference
from colt5_bench.case import Case
from colt5_bench.pytest_plugin.replay import check
from colt5_bench.suite import Course, Trainee, TrainingSuite
from reference.layers.light_attention import WindowedAttention
from suites._text import corpus

BYTES = 256
SEEDS = (1, 2, 3)
EVALUATIONS = 10
"""Most evaluations of a run, with at least 8 steps between two."""

VALIDATION_BATCHES, TEST_BATCHES = 2, 8
POSITION_PARTS = 64
IGNORED = -100
"""Target of a byte that does not count."""


@dataclass(frozen=True)
class QualityCase(Case):
    """A task, the size of model and training, and a seed."""

    task: str
    n: int
    """Bytes of a sequence."""

    distance: int
    """Bytes from the answer to the question; 0 for text."""

    layers: int
    dim: int
    heads: int
    window: int
    batch: int
    steps: int
    seed: int

    @property
    def dim_head(self) -> int:
        return self.dim // self.heads


class Batch(NamedTuple):
    """Bytes `b n` and the next ones, int64; bytes that do not count are `IGNORED`."""

    inputs: Tensor
    targets: Tensor


# Tasks: from a case, a split of the corpus and a generator to sequences `b n+1`, and True where bytes count.


def text(case: QualityCase, content: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes from random places, all of which count."""
    if len(content) <= case.n:
        raise ValueError(f"--corpus must have more than n = {case.n} bytes in each split, got {len(content)}")
    starts = torch.randint(len(content) - case.n, (case.batch,), generator=generator)
    sequences = torch.stack([content[start : start + case.n + 1] for start in starts.tolist()]).long()
    return sequences, torch.ones_like(sequences, dtype=torch.bool)


PAIRS, SYMBOLS = 32, 64
"""Pairs per sequence, and the number of different bytes for keys and for values."""


def recall(case: QualityCase, content: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of key and value, and at the end all keys again in another order, with their values.

    No key is twice among the pairs. Keys are below SYMBOLS, values below 2 SYMBOLS, all other bytes above. A key is
    asked for at least `distance` bytes behind its first place.
    """

    def permutations(count: int) -> Tensor:
        return torch.rand(case.batch, count, generator=generator).argsort(-1)

    shape = (case.batch, case.n + 1)
    sequences = torch.randint(2 * SYMBOLS, BYTES, shape, generator=generator)
    keys = permutations(SYMBOLS)[:, :PAIRS]
    values = torch.randint(SYMBOLS, 2 * SYMBOLS, (case.batch, PAIRS), generator=generator)
    order = permutations(PAIRS)
    asked_from = case.n + 1 - 2 * PAIRS
    said_from = asked_from - case.distance - 2 * PAIRS + 2
    for start, each in ((said_from, (keys, values)), (asked_from, (keys.gather(1, order), values.gather(1, order)))):
        sequences[:, start : start + 2 * PAIRS] = rearrange(torch.stack(each, -1), "b p kv -> b (p kv)")
    counts = torch.zeros(shape, dtype=torch.bool)
    counts[:, asked_from + 1 :: 2] = True
    return sequences, counts


LINE, DIGITS = b"\n# the number is ", 8


def needle(case: QualityCase, content: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Text with a line that states a number, and the same line at the end."""
    sequences, counts = text(case, content, generator)
    number = torch.randint(ord("0"), ord("9") + 1, (case.batch, DIGITS), generator=generator)
    line = torch.cat((torch.tensor(list(LINE)).expand(case.batch, -1), number), dim=1)
    length = line.shape[1]
    asked_from = case.n + 1 - length
    for start in (asked_from - case.distance, asked_from):
        sequences[:, start : start + length] = line
    counts[:, : case.n + 1 - DIGITS] = False
    return sequences, counts


TASKS: Mapping[str, Callable[[QualityCase, Tensor, torch.Generator], tuple[Tensor, Tensor]]] = {
    "text": text,
    "recall": recall,
    "needle": needle,
}


def draw(case: QualityCase, content: Tensor, *what: object) -> Batch:
    """A batch of a split, by name."""
    digest = hashlib.sha256(repr((case.task, case.n, case.distance, case.batch, *what)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    sequences, counts = TASKS[case.task](case, content, generator)
    return Batch(sequences[:, :-1], sequences.masked_fill(~counts, IGNORED)[:, 1:])


# Models.


class CausalConvolution(nn.Module):
    """Each feature of a token is computed from that of the token itself and of the 3 before it."""

    def __init__(self, dim: int, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dim) / sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        width, n = len(self.weight), x.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        return sum((padded[:, i : i + n] * self.weight[i] for i in range(1, width)), padded[:, :n] * self.weight[0])


class DenseAttention(nn.Module):
    """Causal attention to all tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class RandomRoutes(nn.Module):
    """A routed layer that selects at random, differently in each call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, random_route=True)


class Block(nn.Module):
    """Convolution, attention and feed-forward layer, each added to its input."""

    def __init__(self, attention: nn.Module, dim: int, hidden: int, convolves: bool) -> None:
        super().__init__()
        self.convolution = CausalConvolution(dim) if convolves else None
        self.attention = attention
        self.feed_forward = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.convolution, self.attention, self.feed_forward):
            x = x if layer is None else x + layer(x)
        return x


class Decoder(nn.Module):
    """Bytes `b n` to logits `b n 256` of the next ones.

    Args:
        attentions: one for each block.
        dim: size of a token.
        hidden: size of a token within the feed-forward layers.
        convolves: whether a convolution comes before each attention.
        autocasts: whether to compute under autocast to bf16, on a GPU.
    """

    def __init__(
        self, attentions: Sequence[nn.Module], dim: int, hidden: int, convolves: bool = True, autocasts: bool = True
    ) -> None:
        super().__init__()
        self.autocasts = autocasts
        self.embedding = nn.Embedding(BYTES, dim)
        self.blocks = nn.Sequential(*(Block(attention, dim, hidden, convolves) for attention in attentions))
        self.to_logits = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, BYTES))

    def forward(self, x: Tensor) -> Tensor:
        return self.to_logits(self.blocks(self.embedding(x)))


Attention = Callable[[QualityCase], nn.Module]


def light(case: QualityCase, **options: Any) -> nn.Module:
    size = (case.dim, case.window, case.dim_head, case.heads)
    return WindowedAttention(*size, **{"causal": True, "use_triton": None, **options})


def dense(case: QualityCase) -> nn.Module:
    return DenseAttention(case.dim, case.heads)


MOST_KEYS = 1024
"""Most tokens that are routed as keys and values; an eighth of all if that is less."""


def routed(case: QualityCase, causal: bool = True, **options: Any) -> nn.Module:
    """The routed layer for autoregressive models; a quarter of each window is routed as queries."""
    return reference.ConditionalRoutedAutoregressiveAttention(
        case.dim,
        num_heavy_tokens_q=case.window // 4,
        num_heavy_tokens_kv=min(case.n // 8, MOST_KEYS),
        light_dim_head=case.dim_head,
        light_heads=case.heads,
        light_window_size=case.window,
        heavy_dim_head=case.dim_head,
        heavy_heads=case.heads,
        causal_query_routing=causal,
        **{"use_triton": None, **options},
    )


def frozen(case: QualityCase) -> nn.Module:
    """Routing tokens keep their initial values."""
    layer = routed(case, init="zero")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.endswith("routing_token"))
    return layer


def decoder(
    case: QualityCase, *attentions: Attention, parameters_of: Attention | None = None, **options: bool
) -> Decoder:
    """A decoder whose layers alternate between these attentions.

    Args:
        parameters_of: an attention; feed-forward layers get the width that gives the same number of parameters as with
            it.
        options: options of the decoder.
    """
    layers = [attentions[index % len(attentions)](case) for index in range(case.layers)]
    hidden = 4 * case.dim
    if parameters_of is not None:
        more = _size(parameters_of(case)) - _size(layers[0])
        hidden += round(more / (2 * case.dim + 1))
    return Decoder(layers, case.dim, hidden, **options)


def _size(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def trainee(name: str, *attentions: Attention, **options: Any) -> Trainee[QualityCase]:
    return Trainee(name, lambda case: decoder(case, *attentions, **options))


LONG_RUN = 1000
"""Number of steps after which small errors of gradients would have a visible effect."""


def in_full_precision(name: str, attention: Attention) -> Trainee[QualityCase]:
    """A decoder that computes only in fp32, to see whether kernels and bf16 change the training of a model."""

    def unavailable(case: QualityCase, device: torch.device) -> str | None:
        if case.task == "text" and case.steps >= LONG_RUN:
            return None
        return f"is measured only on text, and in runs of at least {LONG_RUN} steps"

    return Trainee(name, lambda case: decoder(case, attention, autocasts=False), unavailable=unavailable)


ZERO = partial(routed, init="zero")
COSINE = {"cosine_sim_routing": True}
EXACT = {"solver": "exact", "normalize_to": "selected"}
TRAINEES = (
    trainee("light", light),
    trainee("light_wide", light, parameters_of=ZERO),
    trainee("dense", dense),
    trainee("hybrid", dense, light),
    trainee("published", routed),
    trainee("zero", ZERO),
    trainee("cosine", partial(ZERO, router_kwargs=COSINE)),
    trainee("exact", partial(ZERO, router_kwargs=EXACT)),
    trainee("cosine_exact", partial(ZERO, router_kwargs=COSINE | EXACT | {"eps": 1.0})),
    trainee("sets_2", partial(ZERO, num_routed_kv=2)),
    trainee("sets_4", partial(ZERO, num_routed_kv=4)),
    trainee("frozen", frozen),
    trainee("random", lambda case: RandomRoutes(ZERO(case))),
    trainee("noncausal", partial(ZERO, causal=False)),
    trainee("light_rotary", partial(light, rotary_emb=True), convolves=False),
    trainee("rotary", partial(ZERO, light_rotary_emb=True, rotary_emb=True), convolves=False),
    in_full_precision("zero_fp32", ZERO),
    in_full_precision("zero_plain", partial(ZERO, use_triton=False)),
)
"""`light_wide` has as many parameters as `zero`. All from `cosine` on are `zero` with another option, except
`light_rotary`. `noncausal` routes queries as published, by their whole window, and so uses later bytes. `zero_fp32`
runs kernels in fp32, and `zero_plain` runs plain PyTorch, in long runs. If gradients are right, both train as `zero`
does, within the noise of seeds."""


# Training and its figures.


LEARNING_RATE, WARM_UP = 3e-3, 0.1
"""Highest learning rate of a model of width 64, and share of the steps until it is reached. Then it decays to 0 as a
cosine."""


@dataclass
class Run:
    """A model in training on a case, and its figures."""

    case: QualityCase
    model: Decoder
    device: torch.device
    splits: Mapping[str, Tensor]
    memory: dict[str, Tensor]

    def precision(self) -> torch.autocast:
        enabled = self.model.autocasts and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def logits(self, inputs: Tensor) -> Tensor:
        with self.precision():
            return self.model(inputs.to(self.device)).float()

    def losses(self, batch: Batch) -> Tensor:
        """Cross entropy `b n` in nats, 0 for bytes that do not count."""
        logits = self.logits(batch.inputs)
        return F.cross_entropy(logits.mT, batch.targets.to(self.device), ignore_index=IGNORED, reduction="none")

    def loss(self, step: int) -> Tensor:
        batch = draw(self.case, self.splits["train"], "train", self.case.seed, step)
        return self.losses(batch).sum() / (batch.targets != IGNORED).sum()

    def batches(self, split: str, count: int) -> Iterator[Batch]:
        """The same for all implementations and seeds."""
        return (draw(self.case, self.splits[split], split, index) for index in range(count))

    @torch.no_grad()
    def figures(self, batches: Iterator[Batch]) -> tuple[dict[str, float], Tensor]:
        """Bits per byte and accuracy, and bits `n` by position."""
        nats, right, counted = (torch.zeros(self.case.n, dtype=torch.float64) for _ in range(3))
        for batch in batches:
            logits, targets = self.logits(batch.inputs), batch.targets.to(self.device)
            losses = F.cross_entropy(logits.mT, targets, ignore_index=IGNORED, reduction="none")
            nats += losses.double().sum(0).cpu()
            right += (logits.argmax(-1) == targets).sum(0).cpu()
            counted += (batch.targets != IGNORED).sum(0)
        bits = nats.sum() / counted.sum() / log(2)
        figures = {"bits_per_byte": bits.item(), "accuracy": (right.sum() / counted.sum()).item()}
        return figures, nats / counted / log(2)

    def evaluate(self) -> dict[str, float]:
        figures, _ = self.figures(self.batches("validation", VALIDATION_BATCHES))
        return {f"validation_{name}": value for name, value in figures.items()} | self.health()

    def finish(self) -> dict[str, float | Sequence[float]]:
        figures, by_position = self.figures(self.batches("test", TEST_BATCHES))
        curves: dict[str, Sequence[float]] = {}
        if self.case.task == "text":
            edges = [0, *(2**power for power in range(6, 32) if 2**power < self.case.n)]
            parts = [by_position[low:high] for low, high in zip(edges, [*edges[1:], self.case.n], strict=True)]
            curves = {"position": edges, "bits_by_position": [part.mean().item() for part in parts]}
        return {**figures, "leak": self.leak(), **curves}

    @torch.no_grad()
    def leak(self) -> float:
        """Largest change of a logit before the middle of the last window, if all bytes from there on change."""
        inputs = next(self.batches("test", 1)).inputs
        start = self.case.n - self.case.window // 2
        other = inputs.clone()
        other[:, start:] = (other[:, start:] + 1) % BYTES
        outputs = []
        for each in (inputs, other):
            torch.manual_seed(0)
            outputs.append(self.logits(each)[:, :start])
        return (outputs[0] - outputs[1]).abs().max().item()

    def health(self) -> dict[str, float]:
        """Figures of the routers, on a batch for validation; none without routers."""
        layers = [each for each in self.model.modules() if hasattr(each, "kv_router")]
        if not layers:
            return {}
        with _inputs_of(layers) as inputs:
            self.losses(next(self.batches("validation", 1))).mean().backward()
        gradients = {name: each.grad for name, each in self.model.named_parameters() if each.grad is not None}
        of_routers = [each for name, each in gradients.items() if name.endswith("routing_token")]
        share = _norm(of_routers) / _norm(gradients.values())
        self.model.zero_grad()
        random = any(isinstance(each, RandomRoutes) for each in self.model.modules())
        routed = torch.stack([self.routed(layer, x, random) for layer, x in zip(layers, inputs, strict=True)])
        before, self.memory["routed"] = self.memory.get("routed"), routed
        figures = {"router_gradient": share, "position_entropy": _position_entropy(routed)}
        # One value per evaluation, like the curves.
        figures["changed"] = 1.0 if before is None else 1 - ((routed & before).sum() / routed.sum()).item()
        if routed.shape[2] > 1:
            figures["overlap"] = _overlap(routed)
        return figures

    @torch.no_grad()
    def routed(self, layer: Any, x: Tensor, random: bool) -> Tensor:
        """True for the tokens `b r n` that are routed as keys and values of the last window."""
        before = x[:, : (self.case.n - 1) // self.case.window * self.case.window]
        with self.precision():
            count = layer.num_heavy_tokens_kv
            indices = layer.kv_router(before, num_tokens=count, random_route=random, keep_one_route_dim=True).indices
        mask = torch.zeros(*indices.shape[:2], before.shape[1], dtype=torch.bool, device=x.device)
        return mask.scatter(-1, indices, True)


@contextmanager
def _inputs_of(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The input tokens of each layer, in the order of the calls."""
    inputs: list[Tensor] = []
    hooks = [each.register_forward_pre_hook(lambda layer, args: inputs.append(args[0].detach())) for each in layers]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _norm(tensors: Any) -> float:
    return sum((each.double().square().sum().item() for each in tensors), 0.0) ** 0.5


def _overlap(routed: Tensor) -> float:
    """Mean over pairs of routes of `l b r n`."""
    shared = torch.einsum("lbrn,lbsn->rs", routed.float(), routed.float())
    routes = len(shared)
    return ((shared.sum() - shared.trace()) / (routes - 1) / shared.trace()).item()


def _position_entropy(routed: Tensor) -> float:
    """Mean over layers and routes of `l b r n`."""
    parts = F.adaptive_avg_pool1d(routed.float().mean(1), min(POSITION_PARTS, routed.shape[-1]))
    return (torch.special.entr(parts / parts.sum(-1, keepdim=True)).sum(-1) / log(2)).mean().item()


def learning_rate(case: QualityCase, step: int) -> float:
    highest = LEARNING_RATE * sqrt(64 / case.dim)
    begun = min(1.0, (step + 1) / (WARM_UP * case.steps))
    return highest * begun * (1 + cos(pi * step / case.steps)) / 2


def course(case: QualityCase, trainee: Trainee[QualityCase], device: torch.device, path: Path | None) -> Course:
    torch.manual_seed(case.seed)
    model = trainee.build(case).to(device)
    assert isinstance(model, Decoder)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda")

    def prepare(step: int) -> None:
        torch.manual_seed((case.seed << 32) + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(case, step)

    run = Run(case, model, device, corpus(path).splits, {})
    return Course(
        model=model,
        optimizer=optimizer,
        prepare=prepare,
        loss=run.loss,
        evaluate=run.evaluate,
        finish=run.finish,
        steps=case.steps,
        evaluations=min(EVALUATIONS, case.steps // 8),
        tokens_per_step=case.batch * case.n,
        memory=run.memory,
    )


def far(task: str, distance: int) -> tuple[str, int, int]:
    """A task, the length of its sequences, which must be a multiple of 64, and the distance."""
    needed = distance + (4 * PAIRS if task == "recall" else 2 * (len(LINE) + DIGITS))
    return task, 64 * ceil(needed / 64), distance


def cases(preset: str, device: torch.device) -> list[QualityCase]:
    """The number of tokens per batch is the same at each length."""
    sizes: dict[str, Any]
    if preset == "smoke":
        tasks = [("text", 128, 0), far("recall", 64), far("needle", 64)]
        sizes, tokens = {"layers": 1, "dim": 32, "heads": 4, "window": 16, "steps": 16}, 2**9
    elif preset == "default":
        tasks = [("text", 8192, 0)]
        sizes, tokens = {"layers": 4, "dim": 256, "heads": 4, "window": 128, "steps": 200}, 2**15
    else:
        distances = [2**10, 2**12, 2**14, 2**16]
        tasks = [("text", 8192, 0), ("text", 32768, 0), *starmap(far, product(("recall", "needle"), distances))]
        sizes, tokens = {"layers": 6, "dim": 512, "heads": 8, "window": 128, "steps": 1000}, 2**16
    return [
        QualityCase(*task, **sizes, batch=max(tokens // task[1], 1), seed=seed)
        for task in tasks
        # On a CPU one task is enough to show intervals.
        for seed in SEEDS[: len(SEEDS) if preset != "smoke" else 2 if task[0] == "text" else 1]
    ]


SUITE = TrainingSuite[QualityCase](
    name="quality",
    description="whether routing helps: bits per byte and recall of small decoders after training",
    cases=cases,
    implementations={each.name: each for each in TRAINEES},
    reference="light",
    data=lambda path: corpus(path).digest,
    course=course,
    x_axis="n",
    lines=("task", "distance"),
)


def test_quality(record):
    check(record)
