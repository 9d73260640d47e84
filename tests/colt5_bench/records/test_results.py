import errno
import gzip
import json
import math
import multiprocessing
import sys
from dataclasses import asdict, fields, replace
from io import FileIO
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench.records.results import Divergence, Record, Run, Timing, Writer, load, write
from colt5_bench.report.export import _OF_SEVERAL, to_frame


@pytest.fixture
def record():
    return Record(
        suite="toy",
        case="rows=2,n=8",
        fields={"rows": 2, "n": 8},
        implementation="ours",
        direction="forward",
        device="a GPU",
        status="ok",
        timings={"cold": Timing("cold", [3e-3, 1e-3, 2e-3], "confident", 0.01, sm_clock_mhz=1980.0)},
        peak_bytes=10,
        accuracy={"output": Divergence(1e-6, 1e-7, 0.0, kinks=3, budget=2e-6)},
        metrics={"saturated": 3.0},
        kernels=[{"name": "forward", "registers": 32}],
    )


@pytest.fixture
def path(tmp_path, record):
    path = tmp_path / "new" / "toy.jsonl"
    writer = Writer(path)
    writer.environment({"key": "abc", "torch": "2.13"})
    writer.record(record)
    writer.record(record)
    writer.close()
    return path


def test_what_was_written_is_read(path, record):
    run = load(path)
    assert run.environments == {"abc": {"key": "abc", "torch": "2.13"}}
    assert run.records == [record, record]
    assert not run.cut_off


def test_a_directory_is_all_that_is_in_it(path, record):
    (path.parent / "more").mkdir()
    (path.parent / "more" / "toy.jsonl").write_text(path.read_text().splitlines()[1])
    assert load(path.parent).records == [record] * 3


@pytest.mark.parametrize("name", ["", "missing.jsonl"])
def test_where_there_are_no_results_it_says_so(tmp_path, name):
    with pytest.raises(ValueError, match="is neither a results file"):
        load(tmp_path / name)


def test_a_record_is_on_disk_before_the_next_is_taken(tmp_path, record):
    writer = Writer(tmp_path / "toy.jsonl")
    writer.record(record)
    assert load(writer.path).records == [record]
    writer.close()


def test_a_last_line_that_was_cut_off_is_left_out(path):
    path.write_text(path.read_text()[:-40])
    run = load(path)
    assert len(run.records) == 1
    assert run.cut_off == [path]


def test_wherever_a_file_is_cut_off_what_is_before_is_read(path, record):
    whole = path.read_bytes()
    ends = [position for position, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        run = load(path)
        lines = sum(end <= size for end in ends)
        assert len(run.environments) + len(run.records) == lines
        assert run.records == [record] * max(lines - 1, 0)
        assert run.cut_off == ([] if size in ends or size - 1 in ends else [path])


def test_a_broken_line_elsewhere_is_an_error(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-40], lines[2]]))
    with pytest.raises(ValueError, match=r"toy\.jsonl:2: not valid JSON"):
        load(path)


def test_another_schema_is_an_error(path):
    lines = path.read_text().splitlines()
    content = {**json.loads(lines[1]), "schema": 99}
    path.write_text("\n".join([lines[0], json.dumps(content), lines[2]]))
    with pytest.raises(ValueError, match="schema must be 2 for this version, got 99"):
        load(path)


@pytest.mark.parametrize("line", ["{}", "[1, 2]", '{"kind": "environment"}', '{"kind": "record", "schema": 2}'])
def test_what_is_no_line_of_results_is_an_error(path, line):
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(ValueError, match=r"toy\.jsonl:1: not a line of a results file"):
        load(path)


def test_a_file_written_in_one_go_takes_the_place_of_what_was_there(path, record):
    write(path, [{"key": "def"}], [record])
    assert load(path.parent) == Run(path.parent, {"def": {"key": "def"}}, [record])
    assert [each.name for each in path.parent.iterdir()] == ["toy.jsonl"]


def test_a_file_that_is_there_is_gone_on_with(path, record):
    writer = Writer(path)
    writer.record(record)
    writer.close()
    assert load(path).records == [record] * 3


def test_divergence_that_is_not_a_number_survives(tmp_path, record):
    record.accuracy["output"].largest = math.nan
    writer = Writer(tmp_path / "toy.jsonl")
    writer.record(record)
    writer.close()
    assert math.isnan(load(writer.path).records[0].accuracy["output"].largest)


def test_the_time_of_a_column_is_its_median(record):
    assert record.seconds("cold") == 2e-3
    assert record.seconds("graph") is None
    record.timings["graph"] = Timing("graph", [], "not capturable: copies to the host", math.nan)
    assert record.seconds("graph") is None


def test_key_tells_records_apart(record):
    assert record.key == ("toy", "rows=2,n=8", "forward", "ours")


def test_frame_has_fields_and_figures_as_columns(record):
    (row,) = to_frame([record]).to_dict("records")
    assert row["n"] == 8
    assert row["cold_ms"] == 2.0
    assert 0 <= row["cold_ms_low"] <= 2.0 <= row["cold_ms_high"]
    assert row["output_error"] == 1e-6
    assert row["saturated"] == 3.0
    assert row["status"] == "ok"


BASELINES = Path(__file__).parents[3] / "reports" / "baselines"

NUMBERS = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf])
TEXTS = st.text(st.characters() | st.sampled_from('\x1b\x85\u2028\ud800\u202e\\\n\r"é'))


@st.composite
def records(draw):
    return Record(
        suite="toy",
        case=draw(TEXTS),
        fields=draw(st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers() | NUMBERS)),
        implementation=draw(TEXTS),
        direction="forward",
        device="a GPU",
        status="error",
        reason=draw(TEXTS),
        timings=draw(st.dictionaries(TEXTS, st.builds(Timing, TEXTS, st.lists(NUMBERS), TEXTS, NUMBERS))),
        accuracy=draw(st.dictionaries(TEXTS, st.builds(Divergence, NUMBERS, NUMBERS, NUMBERS))),
        metrics=draw(st.dictionaries(TEXTS, NUMBERS)),
        limit_seconds=draw(st.none() | NUMBERS),
    )


def texts_of(value):
    if isinstance(value, dict):
        return [text for pair in value.items() for each in pair for text in texts_of(each)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in texts_of(each)]
    return [value] if isinstance(value, str) else []


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


@given(given=records(), escaping=st.booleans())
def test_whatever_a_record_holds_strict_parsers_read_it_and_it_comes_back(tmp_path_factory, given, escaping):
    """Written here, or by a program that escapes nothing: texts are printable, and figures are unchanged."""
    path = tmp_path_factory.mktemp("records") / "toy.jsonl"
    if escaping:
        write(path, [], [given])
        assert json.loads(path.read_bytes(), parse_constant=refuse)["suite"] == "toy"
    else:
        path.write_text(json.dumps({"kind": "record", **asdict(given)}) + "\n")
    (read,) = load(path).records
    assert all(map(str.isprintable, texts_of(asdict(read))))
    path.write_text("")
    write(path, [], [read])
    # A printable text stays the same; repr() treats NaN as equal to NaN.
    assert repr(load(path).records) == repr([read])
    plain = [text.isprintable() for text in texts_of(asdict(given))]
    assert repr(read) == repr(given) or not all(plain)
    assert list(read.metrics.values()) == pytest.approx(list(given.metrics.values()), rel=0, abs=0, nan_ok=True) or (
        len(read.metrics) < len(given.metrics)
    )


@pytest.mark.parametrize("baseline", sorted(BASELINES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_so_do_they_read_what_is_committed(baseline):
    lines = baseline.read_text().splitlines()
    assert len([json.loads(line, parse_constant=refuse) for line in lines]) == len(lines) > 1
    assert load(baseline).records


WRONG = [None, True, 5, -0.5, "text", [], [1], {}, {"a": 1}, [None], {"": {}}, [[]]]
"""A value of each JSON type."""


def fits(value, hint):
    """True if the field can hold the value: a float can hold an integer."""
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    return any(
        (option is float and type(value) in (int, float))
        or (option in (int, str, NoneType) and type(value) is option)
        or (option is object)
        for option in options
    )


@pytest.mark.parametrize("owner", [Record, Timing, Divergence], ids=lambda owner: owner.__name__)
def test_a_value_of_another_type_than_its_field_is_named_and_never_read(path, record, owner):
    hints = get_type_hints(owner)
    for each in fields(owner):
        for value in WRONG:
            content = {"kind": "record", **asdict(record)}
            holder = {Record: content, Timing: content["timings"]["cold"], Divergence: content["accuracy"]["output"]}
            holder[owner][each.name] = value
            path.write_text(json.dumps(content) + "\n")
            try:
                (read,) = load(path).records
            except ValueError as error:
                told = str(error)
                assert told.startswith(f"{path}:1: "), told
                assert "\n" not in told
                assert not fits(value, hints[each.name]) or each.name in ("suite", "status", "schema"), told
            else:
                found = {Record: read, Timing: read.timings.get("cold"), Divergence: read.accuracy.get("output")}[owner]
                empty = each.name in (*_OF_SEVERAL, "samples") and not value
                lists = each.name in ("samples", "refused", "sm_clock_range_mhz", "worst_at") and value in ([], [1])
                dicts = each.name in ("fields", "metrics", "throttle_reasons") and value in ({}, {"a": 1})
                assert found is None or getattr(found, each.name) == value
                assert empty or lists or dicts or fits(value, hints[each.name]), (each.name, value)


@pytest.mark.parametrize("name", ["key", "utc", "command", "expected", "git", "gpu", "options"])
def test_so_it_is_with_what_is_read_of_an_environment(path, name):
    right = {"key": "a", "git": {"revision": "b", "dirty": False}, "gpu": None, "options": {"suite": "toy"}}
    for value in [5.5, [1], [[]], {"revision": 5}, {"suite": []}, *([None] if name not in ("git", "gpu") else [])]:
        if (name == "gpu" and isinstance(value, dict)) or (name in ("git", "options") and name not in str(value)):
            continue
        path.write_text(json.dumps({"kind": "environment", **right, name: value}) + "\n")
        with pytest.raises(ValueError, match=rf"toy\.jsonl:1: not a line of a results file: .*{name}"):
            load(path)


@pytest.mark.parametrize("name", ["", ".", "..", "../../x", "/x", "a/b", "..\\x", ".x", "x" * 101, "a/\n"])
def test_a_suite_has_a_name_that_leads_nowhere(path, record, name):
    path.write_text(json.dumps({"kind": "record", **asdict(replace(record, suite=name))}) + "\n")
    with pytest.raises(ValueError, match=r"toy\.jsonl:1: not a line of a results file: .*suite"):
        load(path)


def test_other_encodings_are_read_or_named(path, record):
    text = path.read_text()
    for written in (gzip.compress(text.encode()), text.encode("utf-8-sig"), text.replace("\n", "\r\n\n").encode()):
        path.write_bytes(written)
        assert load(path).records == [record, record]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"):
        path.write_text(text.replace("a GPU", "a GPÜ").replace("torch", "törch"), encoding=encoding)
        with pytest.raises(ValueError, match=r"toy\.jsonl( is UTF-16|:1: not valid JSON)"):
            load(path)
    path.write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(ValueError, match=r"toy\.jsonl cannot be decompressed"):
        load(path)


def test_characters_that_some_take_for_the_end_of_a_line_end_none(path, record):
    for each in "\x0b\x0c\x1c\x85\u2028\u2029":
        given = replace(record, reason=f"one{each}two")
        path.write_text(json.dumps({"kind": "record", **asdict(given)}, ensure_ascii=ord(each) < 32) + "\n")
        assert [read.reason for read in load(path).records] == [f"one{each.encode('unicode_escape').decode()}two"]


def append_elsewhere(path, answers):
    try:
        Writer(path).close()
    except BlockingIOError as error:
        answers.put(str(error))
    else:
        answers.put("")


def test_a_file_has_one_writer_until_it_is_closed(path, record):
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def elsewhere():
        process = context.Process(target=append_elsewhere, args=(path, answers))
        process.start()
        process.join()
        return answers.get()

    writer = Writer(path)
    assert "another run is writing to it" in elsewhere()
    # There is no second writer while the content is replaced either.
    writer.rewrite([], [record])
    assert "another run is writing to it" in elsewhere()
    writer.record(record)
    writer.close()
    assert elsewhere() == ""
    assert load(path).records == [record, record]


def test_a_writer_that_wrote_nothing_leaves_nothing(tmp_path):
    Writer(tmp_path / "toy.jsonl").close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_of_a_line_that_does_not_fit_nothing_is_written(path, record, monkeypatch, share):
    class Full(FileIO):
        def write(self, line):
            super().write(line[: int(share * len(line))])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("colt5_bench.files.FileIO", Full)
    before, writer = path.read_bytes(), Writer(path)
    for _ in range(2):
        with pytest.raises(OSError, match=r"No space left on device: .*toy\.jsonl"):
            writer.record(record)
        assert path.read_bytes() == before
    with pytest.raises(OSError, match=r"No space left on device: .*toy\.jsonl"):
        writer.rewrite([], [record])
    assert path.read_bytes() == before
    writer.close()
    assert [each.name for each in path.parent.iterdir()] == ["toy.jsonl"]


def calls(function, *arguments):
    """Number of function calls, of Python functions and from them."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


def test_twice_as_many_records_take_twice_as_many_calls(path, record):
    """For reading, which makes few Python calls per record, and for making a table."""
    odd = replace(record, limit_seconds=math.inf, reason="odd\n")
    small, large = path.with_name("small.jsonl"), path.with_name("large.jsonl")
    write(small, [], [record, odd] * 50)
    write(large, [], [record, odd] * 100)
    load(small), to_frame([record])
    assert calls(load, large) < 2.1 * calls(load, small)
    assert calls(to_frame, [record] * 100) < 2.1 * calls(to_frame, [record] * 50)
    write(small, [], [record] * 50)
    write(large, [], [record] * 100)
    assert calls(load, large) - calls(load, small) < 30 * 50
    assert calls(to_frame, [record] * 100) - calls(to_frame, [record] * 50) < 30 * 50
