from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from colt5_bench.loading import load_suites
from colt5_bench.report import plots
from colt5_bench.report.colours import NAMED, PALETTE, colour
from colt5_bench.report.figures import cards
from colt5_bench.report.layout import View
from tests.colt5_bench.made import BOTH, FORWARD, timed

ROOT = Path(__file__).parents[3]


@given(st.text())
def test_a_name_has_a_colour_whatever_it_is(name):
    assert colour(name) in PALETTE
    assert name in NAMED or colour(name) not in (colour("reference"), colour("ours"))


def test_implementations_of_a_suite_have_different_colours():
    assert len(set(PALETTE)) == len(PALETTE) == len(NAMED)
    for suite in load_suites(ROOT).values():
        assert len({colour(name) for name in suite.implementations}) == len(suite.implementations)


@pytest.mark.parametrize(
    "names", [("ours",), ("other", "ours"), ("reference", "ours", "b"), ("b", "ours", "reference")]
)
def test_a_line_has_the_colour_of_its_implementation_whatever_else_is_drawn(names, tmp_path, monkeypatch):
    records = [timed(name, 1, n=n, direction=way) for n in (1, 2) for name in names for way in (FORWARD, BOTH)]
    for made in records:
        made.metrics = {"saturated": made.fields["n"]}
    for card in cards(records, View(lines=("eps",))):
        for drawing in card.drawings:
            for trace in drawing.data:
                if trace["type"] == "scatter" and trace["name"] != "limit of the device":
                    assert trace["line"]["color"] == trace["marker"]["color"] == colour(trace["name"].split()[0])
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, directory, name: [figures.append(figure)])
    plots.write_plots(records, tmp_path)
    assert len(figures) == 5
    for figure in figures:
        legend = {line.get_label(): to_hex(line.get_color()) for line in figure.legends[0].legend_handles}
        assert {name: legend[name] for name in names} == {name: colour(name).lower() for name in names}
        drawn = {to_hex(line.get_color()) for ax in figure.axes for line in ax.lines}
        assert drawn - {to_hex(plots.GREY)} == {colour(name).lower() for name in names}
