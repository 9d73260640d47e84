import json
import shlex
from math import nan

import pytest

from colt5_bench.cli import _parser
from colt5_bench.records.results import Timing
from colt5_bench.report.rows import columns, command, details, rows
from colt5_bench.selection import case_filter
from tests.colt5_bench.made import diverging, record, timed


def test_cells():
    records = [timed("reference", 8), timed("ours", 2)]
    assert [column.title for column in columns(records)][5:7] == ["wall [ms]", "speed-up [x]"]
    cells = dict(zip((column.title for column in columns(records)), rows(records, {}, {})[1], strict=True))
    assert cells["wall [ms]"] == (2, "2±0.37%")
    assert cells["speed-up [x]"] == (4, "4x±0.37%")
    assert cells["bandwidth [GB/s]"] == (pytest.approx(2), "2±0.37%")
    assert cells["share of limit [%]"] == (25, "25±0.37%")
    assert cells["peak [MB]"] == 12.345678
    assert cells["largest error"] == 3e-5


def test_what_is_not_there_is_none_and_what_is_no_number_is_said():
    skipped, diverged = record(status="out_of_memory"), diverging("ours", nan)
    assert rows([skipped], {}, {})[0][4:-1] == ["out of memory", *[None] * 6]
    assert rows([diverged], {}, {})[0][-2] == "nan"


def test_a_row_opens_all_that_is_known():
    made = timed("ours", 2, "cold")
    made.timings["graph"] = Timing("graph", [], "not capturable: it synchronizes", nan)
    made.kernels = [{"name": "_step", "registers": 32, "spills": 0, "sass": {"exp": 7}, "widths": [128, 64]}]
    made.metrics = {"saturated": 640.0}
    text = json.dumps([section.__dict__ for section in details(made, {})], allow_nan=False)
    for part in (
        "eps",
        "not capturable",
        "relative interval",
        "_step",
        "registers",
        "exp: 7",
        "128, 64",
        "saturated",
        "1e-05",
    ):
        assert part in text


def test_the_command_measures_the_record_anew():
    made = timed("ours", 1)
    made.case = "rows=8,layer=a b,n=512"
    environments = {"a": {"command": "bench.py --suite toy --preset smoke", "gpu": None}}
    made.environment = "a"
    words = shlex.split(command(made, environments))
    assert words[:2] == ["python", "bench.py"]
    options = _parser(["run"]).parse_args(["run", *words[2:]])
    assert (options.suite, options.impl, options.preset, options.device) == (["toy"], ["ours"], "smoke", "cpu")
    assert case_filter(options.cases)(made.case)
    assert not case_filter(options.cases)("rows=8,layer=a b,n=4096")
    environments["a"]["gpu"] = {"name": "H200"}
    assert "--device" not in command(made, environments)
