import re
from io import StringIO
from math import inf, nan
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from colt5_bench.records.columns import TIMES
from colt5_bench.records.derived import label, speed_up_intervals, varying_fields, worst, worst_gradient
from colt5_bench.records.results import FAILED, Divergence, Timing
from colt5_bench.report import plots
from colt5_bench.report.layout import largest_error
from colt5_bench.report.plots import write_plots
from colt5_bench.report.table import MOST_CASES, summary
from tests.colt5_bench.made import BOTH, FORWARD, diverging, record, timed


def printed(records, reference="reference", width=200):
    console = Console(file=StringIO(), width=width)
    summary(records, reference, console)
    return console.file.getvalue()


def line_of(implementation, text):
    body = text.split("───", 1)[1]
    (line,) = (line for line in body.splitlines() if re.search(rf" {implementation} ", line))
    return line.split(implementation, 1)[1].split()


class TestTable:
    def test_figures_of_a_timed_record(self):
        text = printed([timed("reference", 8), timed("ours", 2)])
        #                                ms, over, GB/s, of limit, peak, saved, error
        assert line_of("ours", text) == ["2±0.37%", "4x±0.37%", "2", "25", "12.3", "2", "3.0e-05"]
        assert line_of("reference", text) == ["8±0.37%", "1x", "0.5", "6.25", "12.3", "2", "3.0e-05"]
        assert "wall is host time until a call returns" in text
        assert "GPU" not in text.split("toy on Toy GPU")[1]

    def test_gpu_time_comes_first_and_the_other_columns_have_their_names(self):
        ours = timed("ours", 2, "cold")
        ours.timings["warm"] = Timing("warm", [1.5e-3], "max_samples", inf)
        ours.timings["graph"] = Timing("graph", [1e-3], "max_samples", inf)
        ours.timings["wall"] = Timing("wall", [5e-5], "max_samples", inf)
        ours.timings["eager"] = Timing("eager", [2.5e-3], "max_samples", inf)
        text = printed([ours])
        assert line_of("ours", text)[:7] == ["2±0.37%", "-", "2", "25", "1.5±?", "1±?", "0.05±?"]
        assert line_of("ours", text)[7] == "2.5±?"
        assert [name for name in TIMES if name in text] == list(TIMES)

    def test_a_call_that_was_not_captured_has_no_graph_time(self):
        ours = timed("ours", 2, "cold")
        ours.timings["graph"] = Timing("graph", [], "not capturable: it synchronizes", inf)
        assert line_of("ours", printed([ours]))[4] == "-"

    @pytest.mark.parametrize(("ranges", "said"), [([[1980, 1980]], False), ([[1980, 1980], [1755, 1900]], True)])
    def test_clocks_that_moved_are_told_of(self, ranges, said):
        records = [timed(f"impl{number}", 2, "cold") for number in range(len(ranges))]
        for made, range_mhz in zip(records, ranges, strict=True):
            made.timings["cold"].sm_clock_range_mhz = range_mhz
        assert ("the SM clock was between 1755 and 1980 MHz" in printed(records)) is said

    def test_speed_up_is_over_the_same_case_and_direction(self):
        records = [timed("reference", 8), timed("ours", 2, n=1024), timed("reference", 6, n=1024)]
        records[1].implementation = "ours"
        assert line_of("ours", printed(records))[1] == "3x±0.37%"
        assert line_of("ours", printed([timed("reference", 8, direction=BOTH), timed("ours", 2)]))[1] == "-"

    @pytest.mark.parametrize("count", [1, 2, 3, 10, 100])
    @pytest.mark.parametrize("spread", [0.0, 0.01, 0.3, 3.0])
    @pytest.mark.parametrize("factor", [1.0, 1.1, 9.0, 22.0])
    def test_a_speed_up_that_may_be_none_is_shown_as_such(self, count, spread, factor):
        """For any noise: a ratio shown as a number has an interval that does not contain 1."""
        generator = np.random.default_rng([count, int(100 * spread), int(factor)])
        records = [timed("reference", 8), timed("ours", 2)]
        for made, milliseconds in zip(records, (factor, 1), strict=True):
            made.timings["wall"].samples = (1e-3 * milliseconds * generator.lognormal(0, spread, count)).tolist()
        milliseconds, ratio = line_of("ours", printed(records))[:2]
        (_, (low, high)) = speed_up_intervals(records, "reference", "wall")
        assert re.fullmatch(r"\S+±(\?|\S+%)", milliseconds)
        assert re.fullmatch(r"\S+-\S+x" if low <= 1 <= high else r"\S+x±\S+%", ratio)
        if count < 3 or factor == 1.0:
            assert "±" not in ratio

    def test_what_is_not_ok_shows_its_status_and_every_reason_once(self):
        records = [timed("ours", 1)]
        records += [record("other", n=n, status="skipped", reason="takes rows to 256") for n in (512, 1024)]
        records += [record("third", status="out_of_memory", reason="tried to allocate 1 TB")]
        text = printed(records)
        assert "1 ok, 2 skipped, 1 out of memory" in text
        assert text.count("takes rows to 256") == 1
        assert "  other: skipped: takes rows to 256" in text
        assert "  third: out of memory: tried to allocate 1 TB" in text
        assert line_of("third", text)[:3] == ["out", "of", "memory"]

    @pytest.mark.parametrize("failing", [[0], [3], [1, 3], [0, 1, 2, 3]])
    @pytest.mark.parametrize("status", FAILED)
    def test_a_failure_names_its_first_case_as_the_table_does(self, failing, status):
        points = [(n, direction) for n in (255, 512) for direction in (FORWARD, BOTH)]
        records = [record("mine", direction, n=n) for n, direction in points]
        for place in failing:
            records[place].status = status
            records[place].reason = f"off by {place}.5e-0{place} of 1,02{place} at [{place}]"
        text = printed(records)
        first = failing[0]
        where = f"n={points[first][0]} {points[first][1]}"
        assert re.search(rf"^ *{re.escape(where)} *$", text.split("───", 1)[1], flags=re.MULTILINE)
        many = "first " if len(failing) > 1 else ""
        named = f"  mine: {status.replace('_', ' ')} in {len(failing)} of 4, {many}{where}: {records[first].reason}\n"
        assert named in text
        assert text.count("off by") == 1

    def test_reasons_that_differ_in_more_than_numbers_are_all_printed(self):
        whys = ["takes float32 of 8", "takes float16 of 8", "takes float16 of 9", ""]
        text = printed([record("mine", n=n, status="skipped", reason=why) for n, why in enumerate(whys)])
        lines = [line for line in text.splitlines() if line.startswith("  mine: ")]
        assert lines == [
            "  mine: skipped in 1 of 4, n=0 forward: takes float32 of 8",
            "  mine: skipped in 2 of 4, first n=1 forward: takes float16 of 8",
            "  mine: skipped in 1 of 4, n=3 forward: no reason given",
        ]

    def test_a_reason_is_no_markup(self):
        text = printed([timed("ours", 1), record("other", status="error", reason="KeyError: [red]['a']")])
        assert "KeyError: [red]['a']" in text

    def test_fields_that_differ_are_with_the_case_and_the_others_below(self):
        text = printed([timed("ours", 1, n=512), timed("other", 1, n=1024)])
        assert "n=1024" in text
        assert text.count("eps=0.1") == 1
        assert text.count("rows=8") == 1

    def test_divergence_has_columns_of_its_own(self):
        text = printed([diverging("ours", 3e-5)])
        assert line_of("ours", text) == ["ok", "3.0e-05", "2.0e-04", "12.5", "7", "7.5e-01", "5.0e-07"]

    def test_divergence_without_gradients_has_no_columns_for_them(self):
        made = diverging("ours", 3e-5)
        del made.accuracy["scores"]
        text = printed([made])
        assert line_of("ours", text) == ["ok", "5.0e-07"]
        assert "gradient" not in text

    @pytest.mark.parametrize("make", [timed, diverging])
    def test_metrics_are_columns_after_the_others(self, make):
        ours, other = make("ours", 3e-5), make("other", 3e-5)
        ours.metrics = {"routing_gradient": 0.0, "saturated": 640.0}
        text = printed([ours, other])
        assert line_of("ours", text)[-2:] == ["0", "640"]
        assert line_of("other", text)[-2:] == ["-", "-"]
        assert text.index("routing") < text.index("saturated")

    def test_of_many_cases_of_divergence_the_worst_are_shown(self):
        records = [diverging("ours", 1e-6 * n, n=n) for n in range(1, 2 * MOST_CASES)]
        text = printed([*records, diverging("ours", nan, n=1000)])
        assert "n=1000" in text
        assert f"n={2 * MOST_CASES - 1}" in text
        assert "n=1 " not in text
        assert f"the {MOST_CASES} of {2 * MOST_CASES} cases" in text
        assert f"{2 * MOST_CASES} ok" in text

    def test_no_records_are_said_to_be_none(self):
        assert "nothing was measured" in printed([])


class TestShared:
    def test_fields_vary_by_their_value(self):
        records = [record(n=512, eps=0.1, mask=None), record(n=1024, eps=0.1, mask=True)]
        assert varying_fields(records) == ["n", "mask"]
        assert label(records[0].fields, ["n", "mask", "absent"]) == "n=512"

    def test_nan_is_the_worst(self):
        made = diverging("ours", nan)
        made.accuracy["k"] = Divergence(inf, 1, 1)
        made.accuracy["v"] = Divergence(1.0, 1, 1)
        assert worst(made) is worst_gradient(made) is made.accuracy["scores"]
        made.accuracy = {"output": Divergence(1.0, 1, 1)}
        assert worst_gradient(made) is None
        assert worst(made) is made.accuracy["output"]


def names(paths):
    return [path.name for path in paths]


def texts(path):
    """Texts of an SVG: matplotlib writes each text as a comment."""
    return " ".join(re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"), re.DOTALL))


class TestPlots:
    @pytest.fixture
    def records(self):
        return [
            timed(implementation, n / 100, direction=direction, n=n, eps=eps)
            for n in (512, 4096, 2**20)
            for implementation in ("reference", "ours")
            for direction in (FORWARD, BOTH)
            for eps in (0.1, 0.03)
        ]

    def test_files_are_images_and_the_same_each_time(self, tmp_path):
        records = [timed("ours", 1, n=512), timed("reference", 2, n=512)]
        first, second = (write_plots(records, tmp_path / name) for name in "ab")
        stems = ("time", "bandwidth", "memory", "divergence")
        assert names(first) == [f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")]
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes()
            if one.suffix == ".svg":
                assert ElementTree.parse(one).getroot().tag.endswith("svg")
            else:
                assert one.read_bytes().startswith(b"\x89PNG")

    def test_a_figure_says_what_it_shows(self, records, tmp_path):
        _, time, _, bandwidth, _, memory, *_ = write_plots(records, tmp_path)
        written = texts(time)
        assert "toy on Toy GPU" in written
        assert "wall [ms]" in written
        assert all(tick in written for tick in ("512", "4k", "1M"))
        assert written.count("eps=0.1") == written.count("eps=0.03") == 2
        assert re.search(r"\breference\b", written)
        assert re.search(r"\bours\b", written)
        assert "limit" in written
        assert "bandwidth [GB/s]" in texts(bandwidth)
        assert "[MB]" in texts(memory)
        assert "saved is kept for the backward pass" in texts(memory)

    def test_gpu_time_is_what_is_drawn_where_there_is_any(self, tmp_path):
        records = [record(times={"cold": 1e-3, "wall": 1e-4}, n=n) for n in (512, 1024)]
        assert "cold [ms]" in texts(write_plots(records, tmp_path)[1])

    def test_what_is_not_ok_is_named_below(self, tmp_path):
        records = [record(times={"wall": 1e-3})]
        records += [record("other", n=n, status="out_of_memory") for n in (512, 4096)]
        written = texts(write_plots(records, tmp_path)[1])
        assert "other (out of memory, 2)" in written
        assert written.count("other") == 1

    def test_wrong_gradients_are_drawn_hollow(self, tmp_path):
        records = [diverging(name, 1e-3, n=n) for name in ("ours", "other") for n in (512, 1024)]
        assert "found wrong" not in texts(write_plots(records, tmp_path)[1])
        records[-1].status = "wrong"
        written = texts(write_plots(records, tmp_path)[1])
        assert "found wrong" in written
        assert "other (wrong, 1)" in written

    def test_divergence_is_laid_out_by_spread_and_schedule_over_iterations(self, tmp_path):
        records = [
            diverging("ours", 1e-6 * std * n_iters, std=std, n_iters=n_iters, eps=eps, eps_decay=decay, n=n)
            for std in (1.0, 5.0)
            for eps, decay in ((0.1, 1.0), (0.03, 1.0), (0.03, 0.7))
            for n_iters in (5, 20, 200)
            for n in (2048, 32768)
        ]
        paths = write_plots(records, tmp_path, x="n_iters")
        assert names(paths) == ["divergence.png", "divergence.svg"]
        written = texts(paths[1])
        assert written.count("std=1 ") == written.count("std=5 ") == 3
        assert written.count("eps=0.03 eps_decay=0.7") == 2
        assert "the largest errors over all n." in written

    def test_divergence_is_along_another_field_where_some_have_no_iterations(self, tmp_path):
        records = [diverging("ours", 1e-6, n=n, n_iters=n_iters) for n in (512, 4096) for n_iters in (20, None)]
        written = texts(write_plots(records, tmp_path)[1])
        assert "4k" in written
        assert "the largest errors over all n_iters." in written

    def test_each_dtype_has_a_divergence_of_its_own(self, tmp_path):
        records = [diverging("ours", 1e-3, n=n, dtype=dtype) for n in (512, 1024) for dtype in ("float32", "bfloat16")]
        assert names(write_plots(records, tmp_path))[::2] == ["divergence-float32.png", "divergence-bfloat16.png"]

    @pytest.mark.parametrize("largest", [0.0, nan, inf])
    def test_an_error_that_cannot_be_drawn_is_left_out(self, largest, tmp_path):
        records = [diverging("ours", 1e-3, n=512), diverging("ours", largest, n=1024)]
        assert largest_error(records[1]) is None
        assert len(write_plots(records, tmp_path)) == 2

    @pytest.mark.parametrize("lengths", [1, 8, 9, 12])
    @pytest.mark.parametrize("error", [0.0, nan, inf])
    def test_there_is_none_of_errors_that_no_logarithm_has(self, tmp_path, lengths, error):
        records = [diverging("ours", error, n=2**power) for power in range(lengths)]
        assert write_plots(records, tmp_path) == []
        assert len(write_plots([*records, diverging("ours", 1e-3, n=2**20)], tmp_path)) == 2

    @pytest.mark.parametrize("name", ["a$b$c", "$$x_{1}\\%s<&amp;", "../../x", "/x", ".."])
    def test_names_are_neither_formulas_nor_paths(self, tmp_path, name):
        records = [diverging(name, 1e-3, dtype=dtype) for dtype in (name, "float32")]
        paths = write_plots(records, tmp_path / "a" / "b")
        assert len(paths) == 4
        assert {path.resolve().parent for path in paths} == {tmp_path / "a" / "b"}
        assert {path for path in tmp_path.rglob("*") if path.is_file()} == set(paths)

    def test_combinations_without_room_are_named(self, tmp_path):
        records = [record(times={"wall": 1e-3}, n=n, heads=heads) for n in (512, 1024) for heads in range(1, 12)]
        written = texts(write_plots(records, tmp_path)[1])
        assert "Measured, but not shown" in written
        assert all(f"heads={heads}" in written for heads in range(1, 12))

    @pytest.mark.parametrize(("eps", "panels"), [((0.1, 0.2, 0.3), 1), ((0.1, 0.2, 0.1), 2)])
    def test_a_field_that_goes_with_x_makes_no_panel(self, eps, panels, tmp_path):
        records = [record(times={"wall": 1e-3}, n=n, eps=each) for n, each in zip((1, 2, 4), eps, strict=True)]
        written = texts(write_plots(records, tmp_path)[1])
        assert len(re.findall(r"\bforward\b", written)) == panels
        assert ("eps" in written) is (panels > 1)

    @pytest.mark.parametrize(
        ("values", "scale"),
        [
            ((1.0, 2.0, 99.0), "linear"),
            ((0.0, 0.0, 0.0), "linear"),
            ((0.0, 1e-3, 10.0), "symlog"),
            ((nan, 1.0), "linear"),
        ],
    )
    def test_a_metric_is_drawn_down_to_nothing(self, values, scale):
        ax = Figure().subplots()
        plots._scale_metric(ax, values)
        assert ax.get_yscale() == scale

    def test_metrics_have_a_row_each_and_lines_by_field(self, tmp_path):
        records = [
            record(n=n, eps=eps, solver=solver, direction=direction)
            for n in (512, 1024)
            for eps in (0.1, 0.03)
            for solver in ("exact", "descent")
            for direction in (FORWARD, BOTH)
        ]
        for made in records:
            made.metrics = {"saturated_entries": 3.0, "agreement": 0.5}
        paths = write_plots(records, tmp_path, lines=["solver"])
        assert names(paths) == ["metrics.png", "metrics.svg"]
        written = texts(paths[1])
        assert written.count("eps=0.1") == written.count("eps=0.03") == 2
        assert written.count("saturated entries") == written.count("agreement") == 1
        assert written.count("ours solver=exact") == written.count("ours solver=descent") == 1

    def test_names_along_the_axis_are_drawn_each_in_its_place(self, tmp_path):
        records = [record(times={"wall": 1e-3}, n=name, eps=eps) for name in ("block", "vit") for eps in (0.1, 0.03)]
        written = texts(write_plots(records, tmp_path)[1])
        assert written.count("block") == written.count("vit") == 2

    def test_a_field_that_trades_time_for_memory_has_a_figure_of_that(self, tmp_path):
        records = [timed("ours", 8 / segments, segments=segments) for segments in (1, 2, 4)]
        for segments, made in enumerate(records, start=1):
            made.peak_bytes = segments * 1_000_000
        stems = {path.stem for path in write_plots(records, tmp_path, x="segments")}
        assert "trade-off" in stems
        assert "peak [MB]" in texts(tmp_path / "trade-off.svg")
        assert "trade-off" not in {path.stem for path in write_plots(records[:1], tmp_path / "one", x="segments")}

    def test_one_record_is_enough(self, tmp_path):
        assert len(write_plots([timed("ours", 1)], tmp_path)) == 8

    def test_no_data_makes_no_figure(self, tmp_path):
        assert write_plots([record(status="skipped", reason="no GPU")], tmp_path) == []
        assert write_plots([], tmp_path) == []
