from math import inf, log10, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench.records.derived import time_intervals
from colt5_bench.report import axes, plots
from colt5_bench.report.figures import cards
from colt5_bench.report.layout import ERROR_DECADES, MEMORY, RUN, View
from tests.colt5_bench.made import BOTH, FORWARD, diverging, record, timed


def drawing(card, **when):
    (found,) = (each for each in card.drawings if each.when.items() >= when.items())
    return found


def card_of(title, records, view=View()):  # noqa: B008
    (found,) = (card for card in cards(records, view) if card.title == title)
    return found


def test_each_column_direction_and_combination_has_a_drawing():
    records = [
        record("ours", direction, times={"cold": 1e-3, "wall": 2e-3}, n=n, eps=eps)
        for n in (512, 4096)
        for direction in (FORWARD, BOTH)
        for eps in (0.1, 0.03)
    ]
    card = card_of("Time", records)
    assert len(card.drawings) == 8
    shown = drawing(card, time="wall", direction=BOTH, eps="eps=0.03")
    (trace,) = shown.data
    assert list(trace["x"]) == [512, 4096]
    assert list(trace["y"]) == [2, 2]
    assert shown.layout["xaxis"]["ticktext"] == ["512", "4k"]


def test_the_roofline_is_drawn_from_the_least_time():
    records = [timed("ours", 2, n=n) for n in (512, 4096)]
    time, bandwidth = (card_of(title, records).drawings[0].data[-1] for title in ("Time", "Bandwidth"))
    assert time["name"] == bandwidth["name"] == "limit of the device"
    assert list(time["y"]) == [0.5, 0.5]
    assert list(bandwidth["y"]) == pytest.approx([8, 8])


def test_there_is_no_card_of_what_no_record_has():
    assert cards([record(status="skipped")], View()) == []
    assert [card.title for card in cards([diverging("ours", 1e-3)], View())] == ["Divergence"]


def test_time_against_memory_where_a_field_trades_them():
    records = [timed("ours", 8 / segments, segments=segments) for segments in (1, 2)]
    for made in records:
        made.peak_bytes = 1_000_000 * made.fields["segments"]
    (trace,) = card_of("Time against memory", records, View("segments")).drawings[0].data
    assert list(zip(trace["x"], trace["y"], trace["text"], strict=True)) == [(1, 8, "1"), (2, 4, "2")]


def test_a_cell_of_divergence_is_the_worst_and_says_what_was_wrong():
    records = [diverging("ours", error, n=n, rows=rows) for n, rows, error in ((1, 1, 1e-5), (1, 2, 1e-2), (2, 1, 0.0))]
    records += [diverging("other", nan, n=1), diverging("other", 1e-3, n=2)]
    records[-1].status = "wrong"
    (trace,) = card_of("Divergence", records).drawings[0].data
    assert [list(line) for line in trace["text"]] == [["1.0e-02", "0.0e+00"], ["nan", "1.0e-03 ✕"]]
    assert [list(line) for line in trace["z"]] == [[-2, None], [None, -3]]


def test_each_dtype_has_a_heat_map():
    records = [diverging("ours", 1e-3, n=n, dtype=dtype) for n in (1, 2) for dtype in ("float32", "bfloat16")]
    card = card_of("Divergence", records)
    assert [each.when for each in card.drawings] == [{"dtype": "float32"}, {"dtype": "bfloat16"}]


def test_nothing_of_a_metric_has_a_place_on_a_logarithmic_axis():
    records = [record(n=n) for n in (1, 2, 3)]
    for made, value in zip(records, (0.0, 1e-3, 10.0), strict=True):
        made.metrics = {"routing_gradient": value}
    shown = card_of("Routing gradient", records).drawings[0]
    assert list(shown.data[0]["y"]) == [1e-4, 1e-3, 10.0]
    assert shown.layout["yaxis"]["ticktext"][:2] == ["0", "0.001"]


def test_a_metric_below_nothing_is_on_a_linear_axis():
    records = [record(n=n) for n in (1, 2)]
    for made, value in zip(records, (-1e-3, 10.0), strict=True):
        made.metrics = {"bias": value}
    assert card_of("Bias", records).drawings[0].layout["yaxis"]["type"] == "linear"


def test_what_keeps_nothing_for_the_backward_pass_is_drawn_too():
    records = [timed("ours", 1, n=n) for n in (1, 2)]
    records[0].saved_bytes = 0
    shown = card_of("Memory", records).drawings[0]
    assert list(shown.data[1]["y"]) == [0.1, 2]
    assert shown.layout["yaxis"]["ticktext"][0] == "0"
    assert "0 MB" in shown.data[1]["hovertext"][0]


def test_lines_have_one_colour_in_all_cards():
    records = [timed(name, 1, n=n) for n in (512, 1024) for name in ("reference", "ours")]
    records[0].peak_bytes = records[2].peak_bytes = None
    time, memory = (card_of(title, records).drawings[0].data for title in ("Time", "Memory"))
    colours = [{trace["name"]: trace["line"]["color"] for trace in data} for data in (time, memory)]
    assert colours[0]["ours"] == colours[1]["ours"] != colours[0]["reference"]


def test_names_stand_in_order_after_numbers():
    records = [record(times={"wall": 1e-3}, n=n) for n in ("b", 2, "a", None)]
    axis = card_of("Time", records).drawings[0].layout["xaxis"]
    assert list(axis["categoryarray"]) == [2, "None", "a", "b"]


@pytest.mark.parametrize(("x", "mode"), [((1, 2), "lines+markers"), (("block", "vit"), "markers")])
def test_names_are_not_joined_by_a_line(x, mode):
    records = [timed("ours", 1, n=n, score_std=n) for n in x]
    data = card_of("Time", records).drawings[0].data
    assert [trace["mode"] for trace in data] == [mode, mode.removesuffix("+markers")]


def test_runs_that_measured_other_cases_share_no_line():
    records = [record(times={"wall": 1e-3}, n=n, **{RUN: f"2026-11-2{n} abc{n}"}) for n in (1, 2)]
    card = card_of("Time", records, View(RUN))
    assert len(card.drawings) == 2
    assert card.drawings[0].layout["xaxis"]["ticktext"] == ["abc1"]


def test_noise_does_not_fill_an_axis():
    low, high = (
        card_of("Time", [timed("ours", ms, n=n) for n, ms in ((1, 2.0), (2, 2.02))])
        .drawings[0]
        .layout["yaxis"]["range"]
    )
    assert high - low >= 1


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=20))
def test_ticks_of_logarithmic_axes_are_powers_of_ten(values):
    for axis in (axes.logarithmic(values), axes.with_zero(values)[0], axes.across(MEMORY, values)):
        assert len(axis["tickvals"]) >= 2
        assert all(log10(tick).is_integer() for tick in axis["tickvals"])
    low, high = axes.logarithmic(values)["range"]
    assert low <= log10(min(values)) <= log10(max(values)) <= high


@pytest.mark.parametrize("errors", [(1e-5, 1e-3), (1e-12, 1.0), (1e30, 1e31), (nan, 1e-3)])
def test_all_charts_of_errors_have_one_scale(errors, tmp_path, monkeypatch):
    records = [
        diverging(name, error, n=n, dtype=dtype)
        for n, error in enumerate(errors, start=1)
        for name in ("reference", "ours")
        for dtype in ("float32", "bfloat16")
    ]
    traces = [each.data[0] for each in card_of("Divergence", records).drawings]
    assert {(trace["zmin"], trace["zmax"]) for trace in traces} == {ERROR_DECADES}
    drawn = [z for trace in traces for row in trace["z"] for z in row if z is not None]
    assert drawn
    assert ERROR_DECADES[0] <= min(drawn) <= max(drawn) <= ERROR_DECADES[1]
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, directory, name: [figures.append(figure)])
    plots.write_plots(records, tmp_path)
    low, high = (10.0**power for power in ERROR_DECADES)
    limits = {ax.get_ylim() for figure in figures for ax in figure.axes}
    assert len(figures) == 2
    assert len(limits) == 1
    assert limits.pop() == pytest.approx((low / 10**plots.MARGIN, high * 10**plots.MARGIN))


@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0])
def test_times_and_bandwidths_are_drawn_with_their_intervals(count, spread, tmp_path, monkeypatch):
    generator = np.random.default_rng([count, int(10 * spread)])
    records = [timed(name, 1, n=n) for n in (1, 2) for name in ("reference", "ours")]
    for made in records:
        made.timings["wall"].samples = (1e-3 * generator.lognormal(0, spread, count)).tolist()
    bounds = {id(made): bound for made, bound in zip(records, time_intervals(records, "wall"), strict=True)}
    for title in ("Time", "Bandwidth"):
        for trace in card_of(title, records).drawings[0].data[:-1]:
            own = [made for made in records if made.implementation == trace["name"]]
            for at, made in enumerate(own):
                low, high = bounds[id(made)]
                value, below, above = (trace["y"][at], *(trace["error_y"][way][at] for way in ("arrayminus", "array")))
                expected = (low * 1e3, high * 1e3) if title == "Time" else (4e-3 / high, 4e-3 / low if low else inf)
                assert value - below == pytest.approx(min(expected[0], value), abs=1e-12)
                assert above > 1e3 * value if count < 3 else value + above == pytest.approx(max(expected[1], value))
                assert ("±?" in trace["hovertext"][at]) is (count < 3)
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, directory, name: [figures.append(figure)])
    plots.write_plots(records, tmp_path)
    for figure in figures[:2]:
        bars = [ax for ax in figure.axes for _ in ax.collections]
        endless = [line for ax in figure.axes for line in ax.lines if line.get_linestyle() == ":"]
        assert (len(bars), len(endless)) == ((4, 0) if count >= 3 else (0, 4))


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_noise_of_many_decades_leaves_room_for_the_values(spread, tmp_path, monkeypatch):
    generator = np.random.default_rng(int(spread))
    records = [timed(name, 1, n=n, null=null) for name in ("reference", "ours") for n in (1, 2) for null in (0, 1)]
    for made in records:
        made.timings["wall"].samples = [1e-3, *(1e-3 * generator.lognormal(0, spread, 8)).clip(1e-8, 1e2), 1e-3]
    values = [log10(1e3 * made.seconds("wall")) for made in records]
    for each in card_of("Time", records).drawings:
        low, high = each.layout["yaxis"]["range"]
        assert high - low <= max(values) - min(values) + 5
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, directory, name: [figures.append(figure)])
    plots.write_plots(records, tmp_path)
    for figure in figures:
        figure.draw_without_rendering()
        assert all(ax.get_position().width > 0.15 for ax in figure.axes if ax.get_visible())


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("ns", [(1, 2, 4), tuple(range(1, 12))])
def test_panels_of_static_plots_show_all_that_they_hold(factor, ns, tmp_path, monkeypatch):
    """Values of one direction may be far smaller, or far larger, than those of the other."""
    records = [
        timed(name, factor * (1 if direction == FORWARD else 1000), n=n, direction=direction)
        for n in ns
        for name in ("reference", "ours")
        for direction in (BOTH, FORWARD)
    ]
    for made in records:
        made.metrics = {"saturated": made.fields["n"] ** 3}
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, directory, name: [figures.append(figure)])
    plots.write_plots(records, tmp_path)
    assert len(figures) == 5
    for ax in (ax for figure in figures for ax in figure.axes if ax.get_visible()):
        low, high = ax.get_ylim()
        values = [value for line in ax.lines for value in line.get_ydata()]
        assert low <= min(values) <= max(values) <= high
        labels = [tick.get_text() for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_ticklabels()]
        assert not any("$" in each for each in labels)
