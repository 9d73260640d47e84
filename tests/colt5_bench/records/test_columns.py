"""One name for one quantity in records, CSV, terminal, page, plots and comparisons."""

import re
from math import inf

import pytest

from colt5_bench.compare import compare, load_rules
from colt5_bench.records import columns as quantities
from colt5_bench.records.columns import TIMES, Quantity
from colt5_bench.records.results import Run, Timing
from colt5_bench.report.export import to_frame
from colt5_bench.report.figures import cards
from colt5_bench.report.layout import View
from colt5_bench.report.plots import write_plots
from colt5_bench.report.rows import columns
from colt5_bench.report.table import _divergence_columns, _time_columns
from tests.colt5_bench.compare.test_compare import ROOT
from tests.colt5_bench.made import diverging, timed
from tests.colt5_bench.report.test_report import texts

KNOWN = {each.title for each in (*TIMES.values(), *vars(quantities).values()) if isinstance(each, Quantity)}
KNOWN |= {quantities.error_of("output").title}


@pytest.fixture
def records():
    made = [timed(name, ms, "cold", n=n) for n in (1, 2) for name, ms in (("reference", 8), ("ours", 2))]
    for record in made:
        record.timings |= {name: Timing(name, [1e-3] * 10, "confident", inf) for name in TIMES}
    return made


def test_tables_of_the_terminal_and_of_the_page_have_the_same_columns(records):
    terminal = {column.title for column in _time_columns(records, "reference")}
    assert terminal == {column.title for column in columns(records) if column.number}
    assert terminal <= KNOWN
    shown = {column.title for column in _divergence_columns([diverging("ours", 1e-3)])} - {"status"}
    assert shown <= KNOWN


def test_charts_are_named_likewise(records, tmp_path):
    on_the_page = {
        drawing.layout["yaxis"]["title"]["text"]
        for card in cards(records, View())
        for drawing in card.drawings
        if drawing.data[0]["type"] == "scatter"
    }
    assert on_the_page == {f"{name} [ms]" for name in TIMES} | {"bandwidth [GB/s]", "memory [MB]"}
    written = " ".join(texts(path) for path in write_plots(records, tmp_path) if path.suffix == ".svg")
    for title in ("cold [ms]", "bandwidth [GB/s]", "memory [MB]", "peak", "saved", "gradient error"):
        assert title in written
    assert all(title in KNOWN for title in re.findall(r"[\w-]+ \[(?!MB)\S+\]", written))


def test_a_csv_has_the_name_and_then_the_unit(records):
    names = set(to_frame(records))
    assert {f"{name}_ms{end}" for name in TIMES for end in ("", "_low", "_high")} <= names
    assert {"output_error", "scores_error", "peak_bytes", "saved_bytes"} <= names


def test_a_comparison_has_the_same_names(records):
    run = Run(ROOT, {}, records)
    found = compare(run, run, load_rules(ROOT / "suites" / "thresholds.toml"), {}).findings
    metrics = {finding.metric for finding in found} - {"status"}
    assert metrics
    assert metrics <= {
        *TIMES,
        "peak",
        "saved",
        "output error",
        "scores error",
        *(f"speed-up, {name}" for name in TIMES),
    }
