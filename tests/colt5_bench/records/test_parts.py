import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colt5_bench import cli, commands
from colt5_bench.records.parts import _in_turn, differences, keep_finished, merge
from colt5_bench.records.results import Writer, load, write
from colt5_bench.selection import SelectionError, Shard
from tests.colt5_bench import made

OPTIONS = {"suite": "toy", "preset": "full", "implementations": [], "cases": "", "shard": "1/1"}
ENVIRONMENT = {
    "key": "1",
    "utc": "2026-01-01T00:00:00+00:00",
    "cpu": "a CPU",
    "torch": "2.13.0",
    "packages": {"numpy": "2.4"},
    "gpu": {"name": "Toy GPU", "at_start": {"sm_clock_mhz": 1980}},
    "git": {"revision": "abc", "dirty": False},
    "options": OPTIONS,
    "expected": 2,
}


def environment(**changed):
    """An environment with `options` and some fields of `gpu` changed."""
    inner = {name: {**ENVIRONMENT[name], **changed.pop(name)} for name in ("options", "gpu") if name in changed}
    return {**ENVIRONMENT, **changed, **inner}


@pytest.fixture
def part(tmp_path):
    """A shard of a run of 8 cases, in its own file."""

    def part(shard, *, only=8, **changed):
        shard = Shard(*shard)
        cases = shard.of([2**power for power in range(8)])
        records = [made.record(name, n=n) for n in cases for name in ("reference", "ours")]
        path = tmp_path / f"{shard.index}-of-{shard.count}-{len(list(tmp_path.iterdir()))}.jsonl"
        key = f"{shard}"
        for record in records:
            record.environment, record.suite = key, changed.get("options", {}).get("suite", "toy")
        described = environment(
            key=key, expected=len(records), options={"shard": str(shard), **changed.pop("options", {})}
        )
        write(path, [{**described, **changed}], records[: 2 * only])
        return path

    return part


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "merged.jsonl"


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_merged_shards_are_in_the_order_of_the_whole(part, out, order):
    merged = merge([part((index, 3)) for index in order], out)
    assert [record.fields["n"] for record in merged.records] == [2**power for power in range(8) for _ in range(2)]
    assert load(out).records == merged.records
    assert set(load(out).environments) == {"1/3", "2/3", "3/3"}


@given(cases=st.integers(0, 30), count=st.integers(1, 9))
def test_shards_in_turn_are_the_whole_whatever_their_number(cases, count):
    records = [made.record(name, n=n) for n in range(cases) for name in ("reference", "ours")]
    ids = list(dict.fromkeys(record.case for record in records))
    shards = [Shard(index + 1, count).of(ids) for index in range(count)]
    assert sorted(itertools.chain(*shards)) == sorted(ids)
    assert _in_turn([[record for record in records if record.case in shard] for shard in shards]) == records


def test_suites_are_merged_each_on_its_own(part, out):
    other = {"options": {"suite": "other"}}
    paths = [part((1, 2)), part((1, 1), **other), part((2, 2))]
    assert len(merge(paths, out).records) == 32


@pytest.mark.parametrize(
    ("second", "changed", "message"),
    [
        ((1, 2), {}, r"both contain shard 1/2: name only one of them"),
        ((3, 3), {}, r"suite toy was divided into 2 and into 3 shards: name only shards of one division"),
        ((2, 2), {"only": 3}, r"lacks 2 of its records: complete it with `run --resume`"),
        ((2, 2), {"torch": "2.11.0"}, r"do not belong to one run: they differ in torch '2.13.0' and '2.11.0'"),
        ((2, 2), {"git": {"revision": "def", "dirty": False}}, r"differ in git.revision 'abc' and 'def'"),
        ((2, 2), {"gpu": {"name": "Other GPU"}}, r"differ in gpu.name 'Toy GPU' and 'Other GPU'"),
        ((2, 2), {"gpu": None}, r"differ in .*gpu\.name 'Toy GPU' and None"),
        ((2, 2), {"options": {"preset": "smoke"}}, r"differ in options.preset 'full' and 'smoke'"),
        ((2, 2), {"options": {"cases": "n=8"}}, r"differ in options.cases '' and 'n=8'"),
    ],
)
def test_what_does_not_belong_together_is_not_merged(part, out, second, changed, message):
    with pytest.raises(SelectionError, match=message):
        merge([part((1, 2)), part(second, **changed)], out)
    assert not out.exists()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0), (3, 7)])
def test_a_record_that_is_there_twice_takes_no_place_of_another(part, out, count, source, target):
    path = part((1, count))
    environment, *lines = path.read_text().splitlines()
    lines[target % len(lines)] = lines[source % len(lines)]
    path.write_text("\n".join([environment, *lines]) + "\n")
    with pytest.raises(SelectionError, match="lacks 1 of its records"):
        merge([path, *([part((2, 2))] if count == 2 else [])], out)
    path.write_text("\n".join([environment, *lines, lines[source % len(lines)]]) + "\n")
    with pytest.raises(SelectionError, match="lacks 1 of its records"):
        merge([path, *([part((2, 2))] if count == 2 else [])], out)
    assert not out.exists()


@pytest.mark.parametrize("index", [0, 5, 7])
def test_nor_is_one_of_two_shards_or_of_one_twice(part, out, index):
    one, other = part((1, 2)), part((2, 2))
    with other.open("a") as file:
        file.write(one.read_text().splitlines()[1 + index] + "\n")
    with pytest.raises(SelectionError, match=r"contain toy .* twice"):
        merge([one, other], out)
    assert not out.exists()


def test_a_missing_shard_is_named(part, out):
    with pytest.raises(SelectionError, match=r"suite toy lacks shard 2/4 and 4/4"):
        merge([part((1, 4)), part((3, 4))], out)


def test_what_cannot_be_read_is_not_merged(part, out, tmp_path):
    path = part((1, 1))
    with pytest.raises(SelectionError, match="is neither a results file"):
        merge([path, tmp_path / "nothing"], out)
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "schema": 99})
    path.write_text("\n".join(lines))
    with pytest.raises(SelectionError, match="schema must be 2 for this version, got 99"):
        merge([path], out)
    path.write_text(json.dumps({"kind": "environment", "key": "old"}) + "\n")
    with pytest.raises(SelectionError, match="does not name the options"):
        merge([path], out)


def test_a_file_is_not_written_over(part):
    path = part((1, 1))
    before = path.read_text()
    with pytest.raises(SelectionError, match="--out must be a new file"):
        merge([path], path)
    assert path.read_text() == before


def test_the_command_says_what_it_wrote(part, out, capsys):
    assert cli.main(["merge", str(part((1, 1))), "--out", str(out)]) == commands.DONE
    assert capsys.readouterr().out == f"merged: 16 records of toy: {out}\n"
    assert cli.main(["merge", str(part((1, 2))), "--out", f"{out}2"]) == commands.USAGE
    error = capsys.readouterr().err
    assert "error: suite toy lacks shard 2/2" in error
    assert error.count("\n") == 1


def test_conditions_are_the_same_at_another_time_of_day():
    later = environment(key="2", utc="2026-01-02", gpu={"at_start": {"sm_clock_mhz": 345}}, cpu="another CPU")
    assert differences(ENVIRONMENT, later) == ""
    assert differences({**ENVIRONMENT, "gpu": None}, {**later, "gpu": None}) == "cpu 'a CPU' and 'another CPU'"
    assert differences(ENVIRONMENT, environment(options={"shard": "1/2"}), but=["options.shard"]) == ""


class TestWhatIsKept:
    GROUP = made.record().group

    def complete(self, path, expected):
        writer = Writer(path)
        try:
            return keep_finished(writer, ENVIRONMENT, expected)
        finally:
            writer.close()

    def keep(self, path, *records, expected=("ours", "reference")):
        write(path, [ENVIRONMENT], records)
        kept = self.complete(path, {self.GROUP: expected})
        assert load(path).records == kept
        assert list(load(path).environments) == ["1"]
        return [record.implementation for record in kept]

    @pytest.mark.parametrize("status", ["ok", "wrong", "out_of_memory", "skipped"])
    def test_is_what_was_measured_together_and_did_not_end_with_an_error(self, tmp_path, status):
        records = [made.record("ours", status=status), made.record("reference")]
        assert self.keep(tmp_path / "toy.jsonl", *records) == ["ours", "reference"]

    def test_is_nothing_of_what_is_incomplete_or_was_an_error(self, tmp_path):
        path = tmp_path / "toy.jsonl"
        assert self.keep(path, made.record("ours")) == []
        assert self.keep(path, made.record("ours"), made.record("reference", status="error")) == []

    def test_may_be_of_what_is_not_asked_for(self, tmp_path):
        assert self.keep(tmp_path / "toy.jsonl", made.record("ours"), expected=()) == ["ours"]

    def test_is_nothing_where_the_first_line_was_cut_off(self, tmp_path):
        path = tmp_path / "toy.jsonl"
        path.write_text('{"kind": "envir')
        assert self.complete(path, {self.GROUP: ["ours"]}) == []
        assert not path.exists()

    def test_is_left_as_it_is_where_it_cannot_be_read(self, tmp_path):
        path = tmp_path / "toy.jsonl"
        path.write_text("{}\n{}\n")
        with pytest.raises(SelectionError, match="kind"):
            self.complete(path, {})
        assert path.read_text() == "{}\n{}\n"
