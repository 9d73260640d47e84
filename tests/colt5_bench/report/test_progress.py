from functools import partial

import pytest
from rich.console import Console

from colt5_bench.records.results import Group
from colt5_bench.report import progress
from colt5_bench.report.progress import Watcher
from tests.colt5_bench import made

OK, ERROR = (
    made.record(times={"wall": 0.0123456}, **{f"field_{index}": index for index in range(20)}),
    made.record(status="error", reason="no luck"),
)
CASE = OK.case


@pytest.fixture
def watched(monkeypatch, capfd):
    """Output of a watcher for two measurements, on a terminal of this width or on none."""

    def watched(width=None, **options):
        if width:
            monkeypatch.setattr(progress, "Console", partial(Console, force_terminal=True, width=width, no_color=True))
        with Watcher("toy", 2, **options) as watcher:
            watcher.begin(Group("toy", CASE, "forward"))
            watcher.done(OK)
            watcher.done(ERROR)
        return capfd.readouterr().err

    return watched


def test_a_long_case_leaves_room_for_what_is_left(watched):
    shown = watched(width=80)
    last = shown.split("\r")[-2] if shown.endswith("\r") else shown
    assert "2/2" in last
    assert "0:00:00 left" in last
    assert CASE[:12] in last
    assert CASE not in last


def test_verbose_has_a_line_for_each_record_where_there_is_no_terminal(watched):
    assert watched(verbose=True).splitlines() == [
        f"ok           {CASE}-forward-ours  12.35 ms",
        f"error        {ERROR.case}-forward-ours  no luck",
    ]


@pytest.mark.parametrize("options", [{"width": 80, "quiet": True}, {}])
def test_quiet_or_without_a_terminal_nothing_is_shown(watched, options):
    assert watched(**options) == ""
