"""Implementations that the user adds by `--impl NAME=...`, and suites by path."""

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench import cli, commands, loading
from colt5_bench.loading import describe_guest, invite
from colt5_bench.measuring.call import Call
from colt5_bench.records.results import load
from colt5_bench.request import NO_REPORT, REPORT
from colt5_bench.selection import Guest, SelectionError, split_guests, split_paths
from tests.colt5_bench import toy
from tests.colt5_bench.test_cli import ROOT, make_checkout

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True)
PLACES = st.one_of(
    NAMES, st.builds("{}.{}".format, NAMES, NAMES), st.text("ab/: =.", max_size=9).map(lambda part: f"/{part}x.py")
)

MINE = """
from beside import FACTOR


class Holder:
    @staticmethod
    def inside(scores):
        return FACTOR * scores


def good(scores):
    return FACTOR * scores


def wrong(scores):
    y = FACTOR * scores
    y.data[..., -1] += 1
    return y


def raising(scores):
    raise RuntimeError("not today")


def sly(scores):
    from colt5_bench.measuring import rounds

    rounds.perf_counter = lambda: 0.0
    return FACTOR * scores


NUMBER = 3
"""


@pytest.fixture
def place(tmp_path):
    """A folder outside of any checkout, with functions and modules that they import."""
    folder = tmp_path / "my kernels"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "beside.py").write_text("FACTOR = 2")
    yield folder
    sys.path[:] = [path for path in sys.path if path != str(folder)]
    sys.modules.pop("beside", None)


@given(NAMES, PLACES, NAMES)
def test_a_guest_is_read_as_it_is_written(name, place, attribute):
    guest = Guest.parse(f"{name}={place}:{attribute}")
    assert (guest.name, guest.attribute) == (name, attribute)
    assert Guest.parse(str(guest)) == guest


@pytest.mark.parametrize(
    "text", ["=a.py:f", "mine=", "mine=a.py", "mine=a.py:", "mi-ne=a.py:f", "1=a.py:f", "m=:f", "m=a:1"]
)
def test_a_guest_that_names_no_function_is_refused(text):
    with pytest.raises(SelectionError, match=r"--impl with = must be NAME=.* got "):
        Guest.parse(text)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([], []),
        (["ours"], ["ours"]),
        (["mine=a:f"], []),
        (["ours", "mine=a:f"], ["ours", "mine"]),
        (["mine=a:f", "ours", "mine=a:f", "other=a:g"], ["ours", "mine", "other"]),
    ],
)
def test_guests_join_all_or_the_ones_that_are_named(given, names):
    found, guests = split_guests(given)
    assert found == names
    assert [str(guest) for guest in guests] == list(dict.fromkeys(text for text in given if "=" in text))


def test_two_guests_of_one_name_are_refused():
    with pytest.raises(SelectionError, match="two implementations 'mine'"):
        split_guests(["mine=a:f", "mine=a:g"])


@pytest.mark.parametrize("attribute", ["good", "Holder.inside"])
def test_a_function_of_a_file_joins_a_suite(place, attribute, tmp_path):
    guest = Guest.parse(f"mine={place}/mine.py:{attribute}")
    case = toy.ToyCase(2, 8)
    suite = invite(toy.suite(), [guest])
    call = Call(suite.implementations["mine"].build(case), suite.problem(case, "cpu"), "forward")
    assert call.results()["output"].equal(2 * suite.problem(case, "cpu").inputs["scores"])
    assert describe_guest(guest)["function"] == f"mine.py:{attribute}"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mine={place}/none.py:f", "cannot read .*none.py: No such file"),
        ("mine={place}/mine.py:none", "mine.py has no none, only .*good, wrong, raising, sly"),
        ("mine={place}/mine.py:good.deeper", "has no good.deeper, only"),
        ("mine={place}/mine.py:NUMBER", "NUMBER must be a function or a class, got 3"),
        ("mine={place}/broken.py:f", "cannot be imported: .*invalid syntax"),
        ("mine={place}/leaving.py:f", "cannot be imported: SystemExit"),
        ("mine={place}/unmet.py:f", "cannot be imported: .*no_such_package"),
        ("mine=no_such_package:f", "cannot be imported: .*no_such_package"),
        ("reference=os:getcwd", "suite toy already has an implementation reference; choose another name"),
    ],
)
def test_a_guest_that_is_not_there_is_told_why(place, text, why):
    (place / "broken.py").write_text("def f(:")
    (place / "leaving.py").write_text("raise SystemExit(0)")
    (place / "unmet.py").write_text("import no_such_package")
    with pytest.raises(SelectionError, match=why):
        invite(toy.suite(), [Guest.parse(text.format(place=place))])


def test_a_suite_may_take_no_guests(place):
    with pytest.raises(SelectionError, match="suite toy takes no added implementations"):
        invite(toy.suite(guest=None), [Guest.parse(f"mine={place}/mine.py:good")])


def test_packages_bring_guests_by_entry_points(place, tmp_path, capsys, monkeypatch):
    package = tmp_path / "packages"
    described = package / "kernels_of_mine-1.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels_of_mine\nVersion: 1\n")
    points = [
        "toy.mine = of_mine:good",
        "toy.gone = of_mine:gone",
        "toy.none = of_nobody:f",
        "other.mine = of_mine:good",
    ]
    (described / "entry_points.txt").write_text("\n".join([f"[{loading.GROUP}]", *points]))
    (package / "of_mine.py").write_text("def good(scores):\n    return 2 * scores\n")
    monkeypatch.syspath_prepend(package)
    loading._installed_guests.cache_clear()
    assert [str(guest) for guest in loading.installed_guests(toy.suite())] == ["mine=of_mine:good"]
    said = capsys.readouterr().err
    assert "toy.gone is left out" in said
    assert "toy.none is left out" in said
    loading.installed_guests(toy.suite())
    assert not capsys.readouterr().err
    assert loading.installed_guests(toy.suite(name="none")) == ()
    # A guest does not end runs of a suite that takes none either.
    assert loading.installed_guests(toy.suite(guest=None)) == ()
    assert "toy.mine is left out: suite toy takes no added implementations" in capsys.readouterr().err
    loading._installed_guests.cache_clear()


def bench(checkout, place, *options):
    """Run the command in the folder of the functions."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, ROOT / "bench.py", "--suite", "toy", "--preset", "smoke", "--device", "cpu", *options],
        cwd=checkout,
        env={**environment, "TOY": "good", REPORT: NO_REPORT},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.mark.parametrize("road", [["--isolate"], ["--", "-q"]], ids=["isolated", "pytest"])
def test_guests_are_measured_like_others(tmp_path, place, road):
    checkout = make_checkout(tmp_path)
    path = os.path.relpath(place, checkout)
    asked = [f"--impl={name}={path}/mine.py:{name}" for name in ("wrong", "raising", "sly")]
    run = bench(checkout, place, "--out=out", f"--impl=mine={path}/mine.py:good", *asked, *road)
    assert run.returncode == commands.FAILURE, run.stderr
    results = load(tmp_path / "out" / "toy.jsonl")
    (environment,) = results.environments.values()
    assert environment["guests"]["mine"]["function"] == "mine.py:good"
    statuses = {(record.implementation, record.status) for record in results.records}
    assert statuses == {
        *(
            ("reference", "ok"),
            ("good", "ok"),
            ("mine", "ok"),
            ("wrong", "wrong"),
            ("raising", "error"),
            ("sly", "refused"),
        )
    }
    assert {record.reason for record in results.records if record.status == "refused"} == {
        "it replaces colt5_bench.measuring.rounds.perf_counter by sly.<locals>.<lambda> of mine.py:28"
    }
    assert all(word in run.stdout for word in ("sly", "refused", "perf_counter"))
    wrong = {record.reason for record in results.records if record.status == "wrong"}
    (reason,) = {why for why in wrong if why.startswith("output")}
    assert re.search(r": 2 of 16 elements are wrong, most at \[\d, 7\], by ", reason)


def test_a_run_is_not_completed_with_other_code_of_a_guest(tmp_path, place, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(REPORT, NO_REPORT)
    arguments = ["--suite", toy.__file__, "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path / "out")]
    arguments.append(f"--impl=mine={place}/mine.py:good")
    assert cli.main(arguments) == commands.DONE
    capsys.readouterr()
    (place / "mine.py").write_text(MINE + "\n")
    assert cli.main([*arguments, "--resume"]) == commands.USAGE
    assert "guests.mine.sha256" in capsys.readouterr().err


OURS = toy.SUITE.implementations["reference"]
WRONG = {
    **{field: [None, 3, "f", ()] for field in ("cases", "directions", "problem", "truth", "plain", "cost")},
    "name": ["other", None, 3],
    "reference": ["refrence", None, 0],
    "implementations": [
        None,
        [toy.good],
        {},
        {"reference": toy.good},
        {"good": toy.SUITE.implementations["reference"]},
    ],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_a_suite_that_is_put_together_wrongly_is_told_by_field(field, value):
    with pytest.raises((TypeError, ValueError), match=rf"^SUITE\.{field}\b.* must be .*"):
        loading.checked(replace(toy.SUITE, **{field: value}), "toy")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "SUITE must be a Suite or a TrainingSuite, got a NoneType"),
        ("SUITE = 3", "SUITE must be a Suite or a TrainingSuite, got a int"),
        ("1 / 0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_suite_is_told_why(tmp_path, text, why):
    file = tmp_path / "rows.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SelectionError, match=f"--suite {file}: .*{why}"):
        loading.load_suites(tmp_path, {"rows": file})


def test_a_suite_of_ones_own_has_a_name_of_its_own(tmp_path):
    with pytest.raises(SelectionError, match="the checkout already has a suite 'toy'"):
        loading.load_suites(make_checkout(tmp_path), {"toy": tmp_path / "toy.py"})
    with pytest.raises(SelectionError, match="two suites 'rows'"):
        split_paths(["a/rows.py", "b/rows.py"])
    assert split_paths(["toy", "a/rows.py"]) == (["toy", "rows"], {"rows": Path("a/rows.py").absolute()})


def test_a_new_suite_runs_where_it_is_written(tmp_path, place, monkeypatch):
    monkeypatch.setenv(REPORT, NO_REPORT)

    def start(*words):
        command = [sys.executable, ROOT / "bench.py", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240)

    assert start("new-suite", "no-name.py").returncode == commands.USAGE
    assert start("new-suite", "rows.py").returncode == commands.DONE
    assert start("new-suite", "rows.py").returncode == commands.USAGE
    (place / "mine.py").write_text("def softmax(x, dim):\n    return x.softmax(dim)\n")
    guest = f"--impl=mine={place}/mine.py:softmax"
    run = start("--suite=rows.py", "--preset=smoke", "--device=cpu", "--out=out", "--isolate", guest)
    assert run.returncode == commands.DONE, run.stderr
    results = load(tmp_path / "out" / "rows.jsonl")
    (environment,) = results.environments.values()
    assert environment["suite_file"] == hashlib.sha256((tmp_path / "rows.py").read_bytes()).hexdigest()
    assert {record.implementation for record in results.records} == {"reference", "torch", "mine"}


def test_a_suite_with_other_sizes_is_written_as_the_page_says(tmp_path):
    """A guest that is wrong for odd sizes is found by those of the page."""
    page = (ROOT / "docs" / "guests.md").read_text()
    (source,) = re.findall(r"^```python\n(# sizes.py\n.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "sizes.py").write_text(source)
    (tmp_path / "mine.py").write_text(
        "import reference\n\n\n"
        "def coor_descent(scores, **options):\n"
        "    y = reference.coor_descent(scores, **options)\n"
        "    return 1.1 * y if scores.shape[-1] % 2 else y\n"
    )
    (command,) = re.findall(r"^python bench.py (--suite sizes.py .*)$", page, flags=re.MULTILINE)
    options = ["--preset=smoke", "--device=cpu", "--out=out", "--quiet"]
    words = [sys.executable, ROOT / "bench.py", *command.split(), *options]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTER"))}
    environment = {**inherited, REPORT: NO_REPORT}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == commands.FAILURE, done.stdout + done.stderr
    statuses = {(each.implementation, each.fields["n"]): each.status for each in load(tmp_path / "out").records}
    assert {name: [statuses[name, n] for n in (1000, 3001)] for name in ("reference", "ours", "mine")} == {
        "reference": ["ok", "ok"],
        "ours": ["ok", "ok"],
        "mine": ["ok", "wrong"],
    }
