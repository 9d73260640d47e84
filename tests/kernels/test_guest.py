"""The kernel in docs/guests.md is wrong as the page says, and right after the fix on the page."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import triton
from rich.console import Console

from colt5_bench.loading import invite, load_suites
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.measuring.measure import measure
from colt5_bench.measuring.roofline import measure_ceilings
from colt5_bench.report.table import endings
from colt5_bench.selection import Guest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "guests.md").read_text()
(SOURCE,) = re.findall(r"^```python\n(# mine.py\n.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
(PRINTED,) = re.findall(r"^```text\n(mine: wrong .*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def without_numbers(text):
    return re.sub(r"\d[\d,.]*(e-?\d+)?", "N", " ".join(text.split()))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the kernel needs a GPU, or Triton's interpreter")
@pytest.mark.parametrize("mended", [False, True])
def test_the_gate_finds_the_bug_of_the_page(tmp_path, mended):
    file, cpu = tmp_path / "mine.py", torch.device("cpu")
    bug, mend = "tl.sum(x * x) / BLOCK", "tl.sum(x * x) / d"
    assert bug in SOURCE
    assert mend in PAGE
    file.write_text(SOURCE.replace(bug, mend) if mended else SOURCE)
    suite = load_suites(ROOT)["normalize"]
    suite = replace(invite(suite, [Guest.parse(f"mine={file}:normalize")]), timed=False)
    conditions = Conditions(cpu, "cpu", "abc", measure_ceilings(cpu))
    records = [
        record
        for case in suite.cases("smoke", cpu)
        if not case.center
        for direction in suite.directions(case)
        for record in measure(suite, case, direction, ["mine"], conditions)
    ]
    assert {record.status for record in records} == {"ok" if mended else "wrong"}
    if not mended:
        console = Console(file=StringIO(), width=400)
        endings(records, console)
        _, printed = console.file.getvalue().splitlines()
        assert without_numbers(printed) == without_numbers(PRINTED)
