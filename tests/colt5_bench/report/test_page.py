import json
import random
import re
from math import nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colt5_bench.compare import Finding
from colt5_bench.records.derived import faster_from
from colt5_bench.records.results import STATUSES, Run
from colt5_bench.report.layout import View
from colt5_bench.report.page import _fastest, write_page
from colt5_bench.report.rows import columns
from tests.colt5_bench.made import FORWARD, diverging, record, timed

ENVIRONMENT = {
    "key": "a",
    "utc": "2026-11-23T22:05:36+00:00",
    "command": "bench.py --suite toy --preset smoke",
    "torch": "2.13",
    "git": {"revision": "a900dda5a226fe45", "dirty": True},
    "gpu": None,
}


RELATIONS = st.sampled_from([0.3, 0.8, 1.0, 1.2, 4.0])
"""Times divided by those of the reference."""


def noisy(name, milliseconds, **fields):
    """Samples with one percent of noise that the reference does not share in the same rounds."""
    made, chance = timed(name, milliseconds, **fields), random.Random(f"{name} {fields}")
    made.timings["wall"].samples = [milliseconds / 1e3 * (1 + 0.01 * chance.choice((-1, 1))) for _ in range(30)]
    return made


def run_of(*records, **more):
    environment = {**ENVIRONMENT, **more}
    for made in records:
        made.environment = environment["key"]
    return Run(Path("toy.jsonl"), {environment["key"]: environment}, list(records))


def page_of(tmp_path, run, **more):
    views = {"toy": View(description="twice the <scores>")}
    return write_page(tmp_path / "below" / "page.html", run, views, **more).read_text()


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def visible(page):
    return re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)


class TestPage:
    def test_it_needs_nothing_from_elsewhere(self, tmp_path):
        page = page_of(tmp_path, run_of(timed("ours", 1)))
        assert page.count("plotly.js v") == 1
        outside = visible(page)
        assert not re.search(r"\bsrc=|@import|url\(", outside)
        assert {target[:5] for target in re.findall(r'href="([^"#]+)', outside)} == {"data:"}

    @pytest.mark.parametrize("status", [status for status in STATUSES if status != "ok"])
    def test_every_record_has_a_row_and_what_it_opens(self, tmp_path, status):
        records = [timed("ours", 1), timed("reference", 4), record("other", status=status, reason="no GPU")]
        page = page_of(tmp_path, run_of(*records))
        data = data_of(page)
        assert [row[1] for row in data["rows"]] == ["ours", "reference", "other"]
        assert all(len(row) == len(columns(records)) for row in data["rows"])
        assert data["details"][2]["reason"] == "no GPU"
        said = status.replace("_", " ")
        assert data["rows"][2][4] == said
        assert f"2 ok, 1 {said}" in page
        assert f"other: {said}: no GPU" in page
        assert f".status-{said.split()[0]}" in page

    def test_what_records_say_is_no_markup(self, tmp_path):
        nasty = "<!--<script></script><img src=x onerror=alert(1)>"
        page = page_of(tmp_path, run_of(timed("ours", 1), record("other", status="error", reason=nasty)))
        assert nasty not in page
        assert data_of(page)["details"][1]["reason"] == nasty
        assert "twice the &lt;scores&gt;" in page

    def test_figures_are_those_of_the_records(self, tmp_path):
        records = [timed("reference", ms, n=n) for n, ms in ((1, 8), (2, 18))]
        records += [timed("ours", 2, n=n) for n in (1, 2)]
        text = " ".join(visible(page_of(tmp_path, run_of(*records))).split())
        assert "6x" in text  # the geometric mean of 4 and 9
        assert "ours over reference, wall: geometric mean of 2 pairs, 4x±0.37% to 9x±0.37%" in text
        assert "25±0.37%" in text
        assert "3.0e-05" in text

    @given(st.dictionaries(st.sampled_from([2**power for power in range(10, 21)]), RELATIONS, min_size=1))
    @settings(max_examples=30, deadline=None)
    def test_it_says_from_where_on_an_implementation_is_faster(self, relations):
        """A tie is not faster, and neither is an implementation that is faster only at shorter lengths."""
        records = []
        for n, relation in relations.items():
            records += [noisy("reference", 8.0, n=n), noisy("ours", 8.0 * relation, n=n)]
        faster = [n for n in relations if all(relations[longer] < 0.9 for longer in relations if longer >= n)]
        expected = str(min(faster)) if faster else f"not to {max(relations)}"
        assert faster_from(records, "reference", "wall", "n") == {
            ("ours", FORWARD): expected,
            ("reference", FORWARD): "",
        }

    def test_a_suite_that_asks_for_it_has_a_table_of_that(self, tmp_path):
        records = [
            noisy(name, ms, n=n) for n in (1, 2) for name, ms in (("reference", 8.0), ("ours", 3.0 if n > 1 else 9.0))
        ]
        records.append(record("other", status="skipped", reason="no GPU", n=1))
        views = {"toy": View(crossover=True)}
        page = visible(write_page(tmp_path / "page.html", run_of(*records), views).read_text())
        table = re.search(r'<table class="crossover">(.*?)</table>', page, re.DOTALL)[1]
        assert re.findall(r"<th scope=.row.>(\w+)</th><td class=.number.>(.*?)</td>", table) == [
            ("ours", "2"),
            ("other", chr(8211)),
        ]
        assert "crossover" not in visible(page_of(tmp_path, run_of(*records)))

    def test_a_lower_bound_is_no_headline(self, tmp_path):
        records = [timed("reference", 8), timed("ours", 2), timed("bound", 1)]
        records[2].limit_seconds = None
        assert "ours over reference, wall: geometric mean of 1 pair" in page_of(tmp_path, run_of(*records))

    def test_a_headline_is_about_ours_on_what_all_share(self, tmp_path):
        """Another one is faster, but has fewer cases."""
        records = [timed(name, ms, n=n) for n in (1, 2, 3) for name, ms in (("reference", 8), ("ours", 2 * n))]
        records += [timed("other", 1, n=n) for n in (1, 2)]
        assert "ours over reference, wall: geometric mean of 2 pairs, 2x±0.37% to 4x±0.37%" in page_of(
            tmp_path, run_of(*records)
        )
        records = [each for each in records if each.implementation != "ours"]
        assert "geometric mean" not in visible(page_of(tmp_path, run_of(*records)))

    @pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
    @pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
    def test_a_ratio_that_may_be_1_is_no_headline(self, tmp_path, count, spread):
        """For example, for an implementation that is equal to the reference, under any noise."""
        headlines = 0
        for seed in range(20):
            generator = np.random.default_rng([seed, count, int(100 * spread)])
            records = [timed("reference", 1), timed("ours", 1)]
            for made in records:
                made.timings["wall"].samples = (1e-3 * generator.lognormal(0, spread, count)).tolist()
            headlines += _fastest(records, "reference") is not None
        # 95 % intervals: 6 of 20 at a rate of 1 in 20 have a probability of less than one in a thousand.
        assert headlines < 6

    def test_without_times_the_smallest_error_is_the_headline(self, tmp_path):
        records = [diverging("reference", 0.5), diverging("ours", 1e-5), diverging("other", nan)]
        text = visible(page_of(tmp_path, run_of(*records)))
        assert "largest gradient error, ours; reference: 5.0e-01" in text

    def test_errors_of_several_dtypes_are_not_mixed(self, tmp_path):
        records = [
            diverging(name, error, dtype=dtype)
            for dtype, error in (("float32", 1e-5), ("bfloat16", 0.5))
            for name in ("reference", "ours")
        ]
        text = " ".join(visible(page_of(tmp_path, run_of(*records))).split())
        assert "largest gradient error in float32, ours; reference: 1.0e-05" in text
        assert "largest gradient error, float32" in text
        assert "5.0e-01" not in text

    def test_conditions_are_shown_once(self, tmp_path):
        run = run_of(timed("ours", 1))
        of_the_run = {"command": "bench.py --suite other", "options": {"suite": "other"}, "expected": 4}
        run.environments["b"] = {**ENVIRONMENT, "key": "b", **of_the_run}
        page = page_of(tmp_path, run)
        assert page.count('<details class="environment">') == 1
        assert "bench.py --suite other" in page
        assert "a900dda5a2" in page
        assert "with uncommitted changes" in " ".join(page.split())

    def test_many_conditions_are_folded_away(self, tmp_path):
        run = run_of(timed("ours", 1))
        run.environments |= {key: {**ENVIRONMENT, "key": key, "torch": key} for key in "bcd"}
        assert "Conditions of the measurements (4 sets)" in page_of(tmp_path, run)

    def test_a_comparison_stands_at_the_top_and_what_is_worst_in_it(self, tmp_path):
        findings = [
            Finding(verdict, "toy", "n=512", FORWARD, "ours", "cold", 1e-3, 2e-3, "s", note=f"it is {verdict}")
            for verdict in ("same", "better", "worse", "same")
        ]
        page = visible(page_of(tmp_path, run_of(timed("ours", 1)), findings=findings))
        assert "1 worse, 1 better, 2 same" in page
        assert page.index("it is worse") < page.index("it is better") < page.index('class="tiles"')
        assert "it is same" not in page

    def test_without_a_baseline_there_is_no_comparison(self, tmp_path):
        assert "nothing to compare" in page_of(tmp_path, run_of(timed("ours", 1)), findings=[])
        assert "baseline" not in visible(page_of(tmp_path, run_of(timed("ours", 1))))

    def test_a_file_that_was_cut_off_is_named(self, tmp_path):
        run = run_of(timed("ours", 1))
        run.cut_off = [tmp_path / "toy.jsonl"]
        assert "cut off in toy.jsonl" in page_of(tmp_path, run)

    def test_no_records_make_a_page_too(self, tmp_path):
        assert "nothing was measured" in page_of(tmp_path, Run(tmp_path))
