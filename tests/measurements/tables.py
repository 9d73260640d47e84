"""Tables of README and docs, and figures in the text next to them, from the baseline of the H200.

`python -m tests.measurements.tables` writes them into the pages again. The diff shows changed figures, and sentences
whose words no longer hold. The author of the new baseline has to correct these sentences.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from colt5_bench.case import DIRECTIONS, FORWARD_BACKWARD
from colt5_bench.records.results import Record, load
from suites import _descent
from suites._descent import DescentCase

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "reports" / "baselines" / "nvidia-h200.jsonl"
README, RESULTS, PERFORMANCE = "README.md", "docs/results.md", "docs/performance.md"
QUESTIONS = "docs/questions.md"

HEADLINES: dict[str, dict[str, object]] = {
    "8192 x 512, 20, decaying": {"rows": 8192, "n": 512},
    "1024 x 4096, 50, .1": {"rows": 1024, "n_iters": 50},
    "64 x 32768, 50, .1": {"rows": 64},
    "8 x 131072, 50, .1": {"rows": 8},
    "1 x 1048576, 20, decaying": {"rows": 1},
    "4 x 4194304, 20, decaying": {"rows": 4},
}
"""Rows of the table of coordinate descent, and the fields that identify their cases."""

LAYERS: dict[str, dict[str, object]] = {
    "router, 1 x 1048576, 2 routes, fp32": {"kind": "router", "dtype": "float32"},
    "cross attention to 1048576 tokens, fp32": {"kind": "cross_attention", "dtype": "float32"},
    "feed-forward, 2 x 32768": {"kind": "feed_forward"},
    "attention, 2 x 32768": {"kind": "attention"},
    "block, 2 x 32768": {"kind": "block"},
    "image, 1 x 256 x 256, 32 features": {"kind": "image"},
    "autoregressive, 2 x 8192": {"kind": "autoregressive"},
    "autoregressive, 2 x 32768": {"model": "document-32k"},
    "autoregressive, 1 x 131072": {"model": "document-128k"},
    "autoregressive, 1 x 1048576": {"model": "document-1m"},
}
"""Rows of the table of layers, with the same kind of fields."""

OF_LAYERS = {"model": "document", "dtype": "autocast"}
"""Default fields of a layer, if a row does not override them."""

LENGTHS = [4**power for power in range(5, 11)]

BY_LENGTH = {
    "router": "float32",
    "cross_attention": "float32",
    "self_attention": "autocast",
    "autoregressive": "autocast",
}
"""Columns of the table by length. All but the first are compared with the dense layer."""

BYTES_PER_SECOND, EXPONENTIALS_PER_SECOND = 4.30e12, 4.18e12
"""Rates of an H200, by which docs/performance.md gives limits. Records of the headlines have no measured ones."""

WINDOWED = {"radius 64": 64, "causal windows of 128": 128}

NUMBER = r"\d+(?:\.\d+)?"

Records = Mapping[tuple[str, str], Record]
"""Records of one case, by implementation and direction."""


class Baseline:
    """The records of a results file."""

    def __init__(self, path: Path = BASELINE) -> None:
        self.records = load(path).records

    def of(self, suite: str, **fields: object) -> Records:
        return {
            (record.implementation, record.direction): record
            for record in self.records
            if record.suite == suite and fields.items() <= record.fields.items()
        }


class Table(NamedTuple):
    """A table, identified by the first cells of its header."""

    page: str
    header: str
    rows: Callable[[Baseline], list[list[str]]]

    def written_to(self, text: str, baseline: Baseline) -> str:
        lines = text.split("\n")
        headers = [at for at, line in enumerate(lines) if line.startswith(f"| {self.header} |")]
        if len(headers) != 1:
            raise ValueError(f"{self.page} has {len(headers)} tables that begin with {self.header}")
        first = headers[0] + 2
        last = next(at for at in range(first, len(lines)) if not lines[at].startswith("|"))
        lines[first:last] = [f"| {' | '.join(row)} |" for row in self.rows(baseline)]
        return "\n".join(lines)


class Sentence(NamedTuple):
    """Words of a page, with names in braces in place of figures."""

    page: str
    words: str
    figures: Callable[[Baseline], Mapping[str, str]]

    def written_to(self, text: str, baseline: Baseline) -> str:
        """The text with figures of the baseline. Lines may break between words."""
        figures = self.figures(baseline)
        parts = re.split(r"\{(\w+)\}", " ".join(self.words.split()))
        words, names = [r"\s+".join(map(re.escape, part.split(" "))) for part in parts[::2]], parts[1::2]
        pattern = words[0] + "".join(rf"({NUMBER}(?: / {NUMBER})?){each}" for each in words[1:])
        if (found := re.search(pattern, text)) is None:
            raise ValueError(f"{self.page} does not say: {self.words}")
        for group, name in reversed([*enumerate(names, 1)]):
            text = text[: found.start(group)] + figures[name] + text[found.end(group) :]
        return text


def milliseconds(records: Records, *implementations: str, column: str = "cold") -> str:
    """Forward and forward+backward of the fastest one, if there are several."""
    return " / ".join(_fastest(records, implementations, direction, column) for direction in DIRECTIONS)


def _fastest(records: Records, implementations: Iterable[str], direction: str, column: str) -> str:
    found = (records.get((name, direction)) for name in implementations)
    seconds = [each.seconds(column) for each in found if each is not None and each.status == "ok"]
    return f"{1e3 * min(map(float, filter(None, seconds))):#.3g}".rstrip(".") if any(seconds) else "-"


def megabytes(records: Records, *implementations: str) -> list[str]:
    found = (records.get((name, FORWARD_BACKWARD)) for name in implementations)
    return ["-" if each is None else f"{float(each.peak_bytes or 0) / 1e6:.0f}" for each in found]


def _headlines(baseline: Baseline) -> list[list[str]]:
    def row(title: str, records: Records) -> list[str]:
        others = (("segmented",), ("colt5_triton", "colt5_triton_segmented"), ("compile",), ("reference",))
        times = [milliseconds(records, *names) for names in (("ours",), *others)]
        return [title, *times, *megabytes(records, "ours", "reference")]

    return [row(title, baseline.of("coor_descent", **fields)) for title, fields in HEADLINES.items()]


def _limits(records: Records) -> dict[str, tuple[float, str]]:
    """By direction, the least microseconds for a case of coordinate descent, and whether bytes or exponentials take
    them."""
    case = DescentCase(**records["ours", FORWARD_BACKWARD].fields)
    costs = {direction: _descent.cost(case, direction) for direction in DIRECTIONS}
    return {
        direction: max(
            (1e6 * cost.bytes / BYTES_PER_SECOND, "bytes"),
            (1e6 * cost.exponentials / EXPONENTIALS_PER_SECOND, "exponentials"),
        )
        for direction, cost in costs.items()
    }


def _table_of_limits(baseline: Baseline) -> list[list[str]]:
    def row(title: str, records: Records) -> list[str]:
        limits = _limits(records).values()
        return [title, *chain.from_iterable((f"{us:.1f} us" if us < 50 else f"{us:.0f} us", by) for us, by in limits)]

    return [row(title, baseline.of("coor_descent", **fields)) for title, fields in HEADLINES.items()]


def _shares(fields: Mapping[str, object], baseline: Baseline) -> dict[str, str]:
    """Microseconds of a headline, forward and with the backward pass, and the shares of the limit in percent."""
    records = baseline.of("coor_descent", **fields)
    limits = _limits(records)
    figures = {}
    for name, direction in zip(("forward", "both"), DIRECTIONS, strict=True):
        us = 1e6 * (records["ours", direction].seconds("cold") or math.nan)
        figures |= {name: f"{us:.0f}", f"share_{name}": f"{100 * limits[direction][0] / us:.0f}"}
    return figures


def _layers(baseline: Baseline) -> list[list[str]]:
    def row(title: str, records: Records) -> list[str]:
        times = [milliseconds(records, name) for name in ("ours", "reference")]
        return [title, *times, *megabytes(records, "ours", "reference")]

    return [row(title, baseline.of("layers", **OF_LAYERS | fields)) for title, fields in LAYERS.items()]


def _by_length(baseline: Baseline) -> list[list[str]]:
    def cells(n: int, kind: str, dtype: str) -> list[str]:
        records = baseline.of("sequence_length", kind=kind, dtype=dtype, n=n, route_block_size=None)
        dense = [] if kind == "router" else [milliseconds(records, "dense", "dense_flash")]
        return [milliseconds(records, "ours"), *dense]

    return [[f"{n}", *(cell for kind in BY_LENGTH.items() for cell in cells(n, *kind))] for n in LENGTHS]


def _heads(baseline: Baseline) -> list[list[str]]:
    def cells(heads: int, sets: int, dtype: str, *others: str) -> list[str]:
        records = baseline.of("heads", heads=heads, routed_sets=sets, dtype=dtype)
        return [milliseconds(records, *names) for names in (("ours",), ("reference",), others)]

    return [
        [
            *(f"{heads}", f"{sets}"),
            *cells(heads, sets, "autocast", "dense", "dense_flash"),
            *cells(heads, sets, "float32", "colt5_plain", "colt5_triton"),
        ]
        for heads in (4, 8, 16)
        for sets in (1, 2, 4)
    ]


def _windowed(baseline: Baseline) -> list[list[str]]:
    def row(title: str, size: int, name: str, dtype: str) -> list[str]:
        records = baseline.of("windowed_attention", window_size=size, dtype=dtype)
        return [f"{title}, {name}", *(milliseconds(records, each) for each in ("ours", "flex", "reference"))]

    dtypes = {"bf16": "bfloat16", "fp32": "float32"}
    return [row(*window, *dtype) for window in WINDOWED.items() for dtype in dtypes.items()]


def _dense_layer(baseline: Baseline) -> dict[str, str]:
    return {"dense": milliseconds(baseline.of("layers", **OF_LAYERS, kind="attention"), "dense_flash")}


def _error_of_layers(baseline: Baseline) -> dict[str, str]:
    errors = {
        (record.case, record.direction, record.implementation, tensor): divergence.largest
        for record in baseline.records
        if record.suite == "layers"
        for tensor, divergence in record.accuracy.items()
    }
    ratios = [
        error / errors[case, direction, "reference", tensor]
        for (case, direction, name, tensor), error in errors.items()
        if name == "ours" and (case, direction, "reference", tensor) in errors
    ]
    return {"ratio": f"{max(ratios):.2f}"}


def _host_times(baseline: Baseline) -> dict[str, str]:
    records = baseline.of("sequence_length", kind="self_attention", dtype="autocast", n=16384)
    return {name: milliseconds(records, name, column="wall") for name in ("ours", "dense")}


def _crossover(waited: Callable[[Record], float], baseline: Baseline) -> dict[str, str]:
    """The longest sequence of self-attention for which dense attention is faster, and the next one measured.

    Raises:
        ValueError: routing is faster for all, or for none, so the sentence has to change.
    """

    def is_faster(n: int) -> bool:
        records = baseline.of("sequence_length", kind="self_attention", dtype="autocast", n=n, route_block_size=None)
        dense = [
            each for (name, _), each in records.items() if name in ("dense", "dense_flash") and each.status == "ok"
        ]
        return all(waited(records["ours", each.direction]) < waited(each) for each in dense)

    faster = [is_faster(n) for n in LENGTHS]
    if True not in faster or (first := faster.index(True)) == 0:
        raise ValueError(f"between which lengths does routing begin to pay? It is faster: {faster}")
    return {"below": f"{LENGTHS[first - 1]}", "pays": f"{LENGTHS[first]}"}


def _on_the_gpu(record: Record) -> float:
    return record.seconds("cold") or 0.0


def _as_called(record: Record) -> float:
    """Records without the column have the longer time, of the host or of the GPU."""
    return record.seconds("eager") or max(record.seconds("wall") or 0.0, _on_the_gpu(record))


WRITTEN: Sequence[Table | Sentence] = (
    Table(README, "rows x n, iterations, temperature", _headlines),
    Table(RESULTS, "layer", _layers),
    Sentence(RESULTS, "flash attention takes {dense} ms", _dense_layer),
    Sentence(RESULTS, "{ratio} times as large as that of plain PyTorch", _error_of_layers),
    Table(RESULTS, "tokens", _by_length),
    Sentence(
        RESULTS,
        "Routing pays from a length between {below} and {pays} tokens on.",
        partial(_crossover, _on_the_gpu),
    ),
    Sentence(
        RESULTS,
        "Called eagerly, routing pays from a length between {below} and {pays} tokens on.",
        partial(_crossover, _as_called),
    ),
    Sentence(
        QUESTIONS,
        "it pays from a length between {below} and {pays} tokens on in GPU time",
        partial(_crossover, _on_the_gpu),
    ),
    Sentence(
        QUESTIONS,
        "and between {below} and {pays} tokens if layers are called eagerly",
        partial(_crossover, _as_called),
    ),
    Sentence(
        RESULTS,
        "a call takes the host {ours} ms with routing, and {dense} ms with the dense layer",
        _host_times,
    ),
    Table(PERFORMANCE, "rows x n, iterations, temperature | limit forward", _table_of_limits),
    *(
        Sentence(
            PERFORMANCE,
            f"| {title} | {{forward}} us | {{share_forward}} % | {{both}} us | {{share_both}} % |",
            partial(_shares, fields),
        )
        for title, fields in HEADLINES.items()
    ),
    Table(PERFORMANCE, "2 x 32768, 8 heads of 64", _windowed),
    Table(PERFORMANCE, "heads", _heads),
)


def pages(baseline: Baseline, texts: Mapping[str, str]) -> dict[str, str]:
    """The texts of pages, by path, with the figures of a baseline."""
    written = dict(texts)
    for each in WRITTEN:
        written[each.page] = each.written_to(written[each.page], baseline)
    return written


def main() -> None:
    paths = {each.page: ROOT / each.page for each in WRITTEN}
    texts = {page: path.read_text(encoding="utf-8") for page, path in paths.items()}
    for page, text in pages(Baseline(), texts).items():
        print(f"{page}: {'same' if text == texts[page] else 'changed'}")
        paths[page].write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
