import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from colt5_bench import cli, commands
from colt5_bench.commands.history import _placed
from colt5_bench.records.results import Writer, load
from colt5_bench.report.layout import RUN
from tests.colt5_bench.made import diverging, record, timed

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def write(path, revision, milliseconds, day):
    """A run of one revision; `n=1024` is a case of the toy suite, and `reference` takes twice as long."""
    writer = Writer(path)
    utc = f"2026-11-{day}T10:00:00+00:00"
    writer.environment({"key": revision, "utc": utc, "git": {"revision": revision * 8, "dirty": day == 22}})
    for n in (512, 1024):
        for name, factor in (("ours", 1), ("reference", 2)):
            made = timed(name, factor * milliseconds, n=n)
            made.environment = revision
            writer.record(made)
    writer.close()
    return path


@pytest.fixture
def results(tmp_path):
    return write(tmp_path / "run" / "toy.jsonl", "abc12", 2, 21)


def test_the_page_is_beside_the_results(results, capsys):
    assert cli.main(["report", str(results)]) == commands.DONE
    page = results.with_name("report.html")
    assert capsys.readouterr().out.strip() == str(page)
    assert "ours over reference" in page.read_text()
    assert cli.main(["report", str(results.parent)]) == commands.DONE


def test_what_is_written_goes_by_the_ending(results, tmp_path, capsys):
    names = ["a.html", "b.csv", "c.parquet"]
    arguments = [argument for name in names for argument in ("--out", str(tmp_path / name))]
    assert cli.main(["report", str(results), *arguments, "--plots", str(tmp_path / "plots")]) == commands.DONE
    assert {path.name for path in tmp_path.iterdir()} == {*names, "plots", "run"}
    assert (tmp_path / "plots" / "time.svg").exists()
    assert str(tmp_path / "plots" / "time.png") in capsys.readouterr().out


def test_plots_of_several_suites_have_a_directory_each(results, tmp_path):
    writer = Writer(results.with_name("other.jsonl"))
    made = record(times={"wall": 1e-3})
    made.suite = "other"
    writer.record(made)
    writer.close()
    assert cli.main(["report", str(results.parent), "--plots", str(tmp_path / "plots")]) == commands.DONE
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"toy", "other"}


def test_an_ending_that_is_none_says_which_there_are(results, capsys):
    assert cli.main(["report", str(results), "--out", "page.pdf"]) == commands.USAGE
    assert "--out must end in .html, .csv, .parquet, got page.pdf" in capsys.readouterr().err


def test_a_run_that_is_none_is_a_usage_error(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == commands.USAGE
    assert "nowhere is neither a results file" in capsys.readouterr().err


def test_parquet_without_pyarrow_says_what_to_install(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli.main(["report", str(results), "--out", str(tmp_path / "a.parquet")]) == commands.USAGE
    assert ".[parquet]" in capsys.readouterr().err


def test_a_history_is_in_the_order_of_time(tmp_path, capsys):
    runs = [
        write(tmp_path / f"{revision}.jsonl", revision, *more) for revision, *more in (("new", 1, 22), ("old", 2, 21))
    ]
    out = tmp_path / "out"
    assert cli.main(["history", *map(str, runs), "-k", "n=512", "--impl", "ours", "--out", str(out)]) == commands.DONE
    assert f"history of 2 runs: {out / 'history.html'}" in capsys.readouterr().out
    page = (out / "history.html").read_text()
    assert page.index('"2026-11-21 10:00 oldoldo"') < page.index('"2026-11-22 10:00 newnewn+"')
    assert "n=1024" not in page
    written = (out / "time.svg").read_text()
    assert "2026-11-21 10:00 oldoldo" in written
    assert (out / "time.png").exists()


def test_a_history_of_nothing_says_what_was_asked_for(tmp_path, results, capsys):
    assert cli.main(["history", str(results), "-k", "n=513", "--out", str(tmp_path / "out")]) == commands.USAGE
    assert "'n=513'" in capsys.readouterr().err
    assert cli.main(["history", str(results), "--impl", "our"]) == commands.USAGE
    assert "Did you mean ours?" in capsys.readouterr().err


def test_an_empty_run_has_no_page(tmp_path, capsys):
    (tmp_path / "toy.jsonl").write_text('{"kind": "environment", "key": "abc"}\n')
    assert cli.main(["report", str(tmp_path)]) == commands.USAGE
    assert "contains no records" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("times", [("05:36.000", "05:36.001"), ("05:36", "05:37"), ("05:59", "06:00")])
def test_runs_of_one_revision_are_told_apart_by_as_much_of_their_time_as_it_takes(tmp_path, times):
    for key, time in zip("ab", times, strict=True):
        writer = Writer(tmp_path / f"{key}.jsonl")
        utc = f"2026-11-23T22:{time}+00:00"
        writer.environment({"key": key, "utc": utc, "git": {"revision": "c" * 40, "dirty": False}})
        made = timed("ours", 1)
        made.environment = key
        writer.record(made)
        writer.close()
    read = [load(tmp_path / f"{key}.jsonl") for key in "ab"]
    names = [str(record.fields[RUN]) for record in _placed(read, lambda record: True)]
    assert len(set(names)) == 2
    assert sorted(names) == names


@pytest.mark.parametrize("command", [["history", "{run}", "--out", "{out}"], ["report", "{run}", "--plots", "{out}"]])
@pytest.mark.parametrize("field", ["suite", "dtype"])
@pytest.mark.parametrize("value", ["../../x", "{tmp}/x"])
def test_what_a_file_names_is_written_nowhere_else(tmp_path, capsys, command, field, value):
    """With two suites, or two dtypes, each of them is part of a path."""
    (run := tmp_path / "runs").mkdir()
    value, lines = value.format(tmp=tmp_path), []
    for each in (value, "toy"):
        made = diverging("ours", 1e-3, dtype=each if field == "dtype" else "float32")
        made.suite = each if field == "suite" else "toy"
        lines.append(json.dumps({"kind": "record", **asdict(made)}) + "\n")
    (run / "toy.jsonl").write_text("".join(lines))
    out = tmp_path / "a" / "b" / "c"
    status = cli.main([word.format(run=run, out=out) for word in command])
    assert status == (commands.USAGE if field == "suite" else commands.DONE)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != run]
    assert all(out in path.parents for path in written)
