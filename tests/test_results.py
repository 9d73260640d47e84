"""Tables of README and docs, and figures in the text beside them, are what the baseline of the H200 says."""

from functools import cache
from pathlib import Path

import pytest

from colt5_bench.case import DIRECTIONS, FORWARD_BACKWARD
from colt5_bench.records.results import load

HEADLINES = [
    ("8192 x 512, 20, decaying", {"rows": 8192, "n": 512}),
    ("1024 x 4096, 50, .1", {"rows": 1024, "n_iters": 50}),
    ("64 x 32768, 50, .1", {"rows": 64}),
    ("8 x 131072, 50, .1", {"rows": 8}),
    ("1 x 1048576, 20, decaying", {"rows": 1}),
    ("4 x 4194304, 20, decaying", {"rows": 4}),
]
"""The rows of the README's table of coordinate descent, and the fields that their cases are known by."""

LAYERS = [
    ("router, 1 x 1048576, 2 routes, fp32", {"kind": "router", "model": "document", "dtype": "float32"}),
    ("cross attention to 1048576 tokens, fp32", {"kind": "cross_attention", "model": "document", "dtype": "float32"}),
    ("feed-forward, 2 x 32768", {"kind": "feed_forward"}),
    ("attention, 2 x 32768", {"kind": "attention"}),
    ("block, 2 x 32768", {"kind": "block"}),
    ("image, 1 x 256 x 256, 32 features", {"kind": "image"}),
    ("autoregressive, 2 x 8192", {"kind": "autoregressive", "model": "document"}),
    ("autoregressive, 2 x 32768", {"model": "document-32k"}),
    ("autoregressive, 1 x 131072", {"model": "document-128k"}),
    ("autoregressive, 1 x 1048576", {"model": "document-1m"}),
]
"""The rows of the table of layers, and the fields that their cases are known by."""

LENGTHS = [4**power for power in range(5, 11)]

BY_LENGTH = [
    ("router", "float32"),
    ("cross_attention", "float32"),
    ("self_attention", "autocast"),
    ("autoregressive", "autocast"),
]
"""The columns of the table by length, all but the first with those of the dense layer."""

WINDOWED = [("radius 64", 64), ("causal windows of 128", 128)]


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text()
BASELINE = ROOT / "reports" / "baselines" / "nvidia-h200.jsonl"


@cache
def baseline():
    return load(BASELINE).records


def records_of(suite, fields):
    return {
        (record.implementation, record.direction): record
        for record in baseline()
        if record.suite == suite and fields.items() <= record.fields.items()
    }


def milliseconds(records, *implementations, column="cold"):
    """Forward and forward+backward, of the faster one where there are several."""
    return " / ".join(
        min(
            (
                f"{1e3 * records[name, direction].seconds(column):#.3g}"
                for name in implementations
                if (name, direction) in records and records[name, direction].status == "ok"
            ),
            key=float,
            default="-",
        ).rstrip(".")
        for direction in DIRECTIONS
    )


def megabytes(records, implementation):
    record = records.get((implementation, FORWARD_BACKWARD))
    return f"{record.peak_bytes / 1e6:.0f}" if record else "-"


@pytest.mark.parametrize(("title", "fields"), HEADLINES, ids=[title for title, _ in HEADLINES])
def test_the_table_of_results_is_what_the_baseline_says(title, fields):
    """If a baseline has been recorded anew, the line that is missing here is what has to stand there."""
    records = records_of("coor_descent", fields)
    columns = [
        title,
        milliseconds(records, "ours"),
        milliseconds(records, "reference"),
        milliseconds(records, "compile"),
        milliseconds(records, "colt5_triton", "colt5_triton_segmented"),
        f"{megabytes(records, 'ours')}, {megabytes(records, 'reference')}",
    ]
    assert f"| {' | '.join(columns)} |" in README


@pytest.mark.parametrize(("title", "fields"), LAYERS, ids=[title for title, _ in LAYERS])
def test_the_table_of_layers_is_what_the_baseline_says(title, fields):
    records = records_of("layers", {"model": "document", "dtype": "autocast", **fields})
    columns = [
        title,
        milliseconds(records, "ours"),
        milliseconds(records, "reference"),
        f"{megabytes(records, 'ours')}, {megabytes(records, 'reference')}",
    ]
    assert f"| {' | '.join(columns)} |" in RESULTS


def test_the_dense_layer_is_what_the_baseline_says():
    records = records_of("layers", {"kind": "attention", "model": "document", "dtype": "autocast"})
    assert f"takes {milliseconds(records, 'dense_flash')} ms" in RESULTS


def test_the_error_of_layers_is_what_the_baseline_says():
    records = {
        (record.case, record.direction, record.implementation): record
        for record in baseline()
        if record.suite == "layers"
    }
    ratios = [
        divergence.largest / records[case, direction, "reference"].accuracy[tensor].largest
        for (case, direction, implementation), record in records.items()
        if implementation == "ours" and (case, direction, "reference") in records
        for tensor, divergence in record.accuracy.items()
    ]
    assert f"{max(ratios):.2f} times as large as that of plain PyTorch" in " ".join(RESULTS.split())


@pytest.mark.parametrize("n", LENGTHS)
def test_the_table_by_length_is_what_the_baseline_says(n):
    columns = [f"{n}"]
    for kind, dtype in BY_LENGTH:
        records = records_of("sequence_length", {"kind": kind, "dtype": dtype, "n": n, "route_block_size": None})
        columns.append(milliseconds(records, "ours"))
        if kind != "router":
            columns.append(milliseconds(records, "dense", "dense_flash"))
    assert f"| {' | '.join(columns)} |" in RESULTS


def test_host_times_are_what_the_baseline_says():
    records = records_of("sequence_length", {"kind": "self_attention", "dtype": "autocast", "n": 16384})
    ours, dense = (milliseconds(records, name, column="wall") for name in ("ours", "dense"))
    said = f"takes the host {ours} ms for 16384 tokens of self-attention, where the dense one takes {dense}"
    assert said in " ".join(RESULTS.split())


@pytest.mark.parametrize("heads", [4, 8, 16])
@pytest.mark.parametrize("sets", [1, 2, 4])
def test_the_table_of_heads_is_what_the_baseline_says(heads, sets):
    columns = [f"{heads}", f"{sets}"]
    for dtype, others in (("autocast", ("dense", "dense_flash")), ("float32", ("colt5_plain", "colt5_triton"))):
        records = records_of("heads", {"heads": heads, "routed_sets": sets, "dtype": dtype})
        columns += [milliseconds(records, "ours"), milliseconds(records, "reference"), milliseconds(records, *others)]
    assert f"| {' | '.join(columns)} |" in PERFORMANCE


@pytest.mark.parametrize(("title", "window_size"), WINDOWED)
@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp32", "float32")])
def test_the_table_of_windowed_attention_is_what_the_baseline_says(title, window_size, name, dtype):
    records = records_of("windowed_attention", {"window_size": window_size, "dtype": dtype})
    columns = [f"{title}, {name}", *(milliseconds(records, each) for each in ("ours", "flex", "reference"))]
    assert f"| {' | '.join(columns)} |" in PERFORMANCE
