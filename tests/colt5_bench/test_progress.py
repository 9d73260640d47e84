from functools import partial
from types import SimpleNamespace

import pytest
from rich.console import Console

from colt5_bench import progress
from colt5_bench.progress import Watcher

POINT = ",".join(f"field_{index}={index}" for index in range(20)) + "-forward-ours"
NODE = f"toy.py::test_toy[{POINT}]"


def report(status, *, when="call", failed=False, reason="", seconds=None, text="Traceback ..."):
    properties = [("status", status), ("reason", reason), ("seconds", seconds)] if status else []
    return SimpleNamespace(nodeid=NODE, when=when, failed=failed, user_properties=properties, longreprtext=text)


@pytest.fixture
def watched(monkeypatch, capfd):
    """What a watcher shows of two measurements, on a terminal of this width or on none."""

    def watched(width=None, **options):
        if width:
            monkeypatch.setattr(progress, "Console", partial(Console, force_terminal=True, width=width, no_color=True))
        with Watcher("toy", **options) as watcher:
            watcher.pytest_collection_finish(SimpleNamespace(items=[None, None]))
            watcher.pytest_runtest_logstart(NODE)
            watcher.pytest_runtest_logreport(report("ok", seconds=0.0123456))
            watcher.pytest_runtest_logfinish()
            watcher.pytest_runtest_logreport(report("error", failed=True, reason="no luck"))
            watcher.pytest_runtest_logreport(report("skipped", when="setup"))
            watcher.pytest_runtest_logfinish()
        return capfd.readouterr().err

    return watched


def test_a_long_case_leaves_room_for_what_is_left(watched):
    shown = watched(width=80)
    last = shown.split("\r")[-2] if shown.endswith("\r") else shown
    assert "2/2" in last
    assert "0:00:00 left" in last
    assert "field_0=0," in last
    assert POINT not in last


def test_verbose_has_a_line_for_each_record_where_there_is_no_terminal(watched):
    assert watched(verbose=True).splitlines() == [
        f"ok           {POINT}  12.35 ms",
        f"error        {POINT}  no luck",
    ]


@pytest.mark.parametrize("options", [{"width": 80, "quiet": True}, {}])
def test_quiet_or_without_a_terminal_nothing_is_shown(watched, options):
    assert watched(**options) == ""


def test_what_no_record_tells_of_is_kept():
    with Watcher("toy", quiet=True) as watcher:
        watcher.pytest_runtest_logreport(report("error", failed=True))
        watcher.pytest_runtest_logreport(report("ok", failed=True, text="of the harness"))
        watcher.pytest_runtest_logreport(report(None, when="setup", failed=True, text="of a fixture"))
    assert watcher.failures == ["of the harness", "of a fixture"]
