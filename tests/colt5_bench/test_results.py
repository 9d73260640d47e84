import json
import math

import pytest

from colt5_bench.results import Divergence, Record, Run, Timing, Writer, load, to_frame, write


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
    with pytest.raises(ValueError, match="is no results file"):
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
    with pytest.raises(ValueError, match=r"toy\.jsonl:2 is not JSON"):
        load(path)


def test_another_schema_is_an_error(path):
    lines = path.read_text().splitlines()
    content = {**json.loads(lines[1]), "schema": 99}
    path.write_text("\n".join([lines[0], json.dumps(content), lines[2]]))
    with pytest.raises(ValueError, match="has schema 99"):
        load(path)


@pytest.mark.parametrize("line", ["{}", "[1, 2]", '{"kind": "environment"}', '{"kind": "record", "schema": 2}'])
def test_what_is_no_line_of_results_is_an_error(path, line):
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(ValueError, match=r"toy\.jsonl:1 is no line of a results file"):
        load(path)


def test_a_file_written_in_one_go_takes_the_place_of_what_was_there(path, record):
    path.with_name("toy.jsonl.unfinished").write_text("left behind")
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
    assert row["output_error"] == 1e-6
    assert row["saturated"] == 3.0
    assert row["status"] == "ok"
