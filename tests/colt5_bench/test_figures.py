from math import nan

import pytest

from colt5_bench.report.figures import cards
from colt5_bench.report.layout import RUN, View
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
    shown = drawing(card, time="wall time", direction=BOTH, eps="eps=0.03")
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
