import gzip
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nvtx
import pytest
import torch
from triton import profiler as proton

from colt5_bench import cli, commands
from colt5_bench.case import DIRECTIONS, FORWARD, FORWARD_BACKWARD
from colt5_bench.commands import run as run_command
from colt5_bench.measuring import measure
from colt5_bench.measuring.conditions import Conditions
from colt5_bench.profiling import nsight, profiler
from colt5_bench.profiling.profiler import Point
from colt5_bench.request import Request
from colt5_bench.session import Session
from tests.colt5_bench import toy

ROOT = Path(__file__).parents[3]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
FORWARD_POINT = Point("toy", "rows=2,n=8", FORWARD, "good")
POINT = Point("toy", "rows=2,n=8", FORWARD_BACKWARD, "good")


def profile(mode, suite, directory, *, wanted=None):
    wanted = wanted or profiler.points([suite], "smoke", CPU, implementations=[], cases="")
    return profiler.profile(mode, wanted, {suite.name: suite}, "smoke", CPU, directory)


@pytest.fixture
def ranges(monkeypatch):
    """The stacks of NVTX ranges, each at its maximum height."""
    stacks, open_now = [], []

    @contextmanager
    def annotate(message, domain):
        assert domain == profiler.DOMAIN
        open_now.append(message)
        stacks.append(tuple(open_now))
        yield
        open_now.pop()

    monkeypatch.setattr(nvtx, "annotate", annotate)
    return stacks


class TestPoints:
    def test_are_those_that_a_run_would_measure(self):
        suite = toy.suite(toy.good, toy.wrong)
        session = Session(Request("cpu", implementations=("good",), cases="n=16"))
        points = profiler.points([suite], "default", CPU, implementations=["good"], cases="n=16")
        expected = [(*group, name) for group, name in session.points(suite, Path("toy.py"))]
        assert list(map(tuple, points)) == expected
        assert len(points) == len(DIRECTIONS)

    def test_no_label_is_part_of_another(self):
        names = ("ours", "ours_fast")
        points = [Point("toy", case, each, name) for case in ("n=8", "n=80") for each in DIRECTIONS for name in names]
        labels = [point.label(phase) for point in points for phase in point.phases]
        assert len(labels) == 2 * 2 * 3
        assert all(one == other or one not in other for one in labels for other in labels)

    def test_phases_are_those_of_the_direction(self):
        assert FORWARD_POINT.phases == ("forward",)
        assert POINT.phases == ("forward", "backward")

    def test_files_have_names_that_every_file_system_takes(self):
        point = Point("toy", "a=" + "x/ *" * 100, FORWARD_BACKWARD, "good")
        assert point.file_name(7).startswith("007-toy-good-forward+backward-a=x")
        assert len(point.file_name(7)) == profiler.LONGEST_NAME
        assert not set(point.file_name(7)) & set("/ *")


class TestMissing:
    @pytest.mark.parametrize("mode", ["ncu", "nsys", "memory", "proton"])
    def test_what_is_about_a_gpu_needs_one(self, mode):
        assert f"--profile {mode} needs a GPU" in profiler.missing(mode, CPU)

    @pytest.mark.parametrize(("mode", "tool"), profiler.TOOLS.items())
    def test_a_tool_that_is_not_installed_is_named(self, monkeypatch, mode, tool):
        monkeypatch.setenv("PATH", "")
        assert f"needs {tool}, but {mode} is not on the PATH" in profiler.missing(mode, GPU)

    def test_a_triton_without_its_profiler_is_told_of(self, monkeypatch):
        monkeypatch.setattr(profiler, "find_spec", lambda name: None)
        assert "triton.profiler" in profiler.missing("proton", GPU)

    @pytest.mark.parametrize("mode", ["nvtx", "torch"])
    def test_others_work_everywhere(self, mode):
        assert profiler.missing(mode, CPU) is None

    def test_every_mode_has_a_way(self):
        assert set(profiler.MODES) == {*profiler.RECORDERS, *profiler.TOOLS}


class TestProfile:
    def test_torch_writes_a_trace_and_a_table_that_name_the_phases(self, tmp_path):
        outcome = profile("torch", toy.suite(), tmp_path / "out", wanted=[POINT._replace(implementation="reference")])
        trace, table = outcome.files
        assert trace.name == "001-toy-reference-forward+backward-rows=2,n=8.trace.json.gz"
        with gzip.open(trace) as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        for phase in POINT.phases:
            label = POINT._replace(implementation="reference").label(phase)
            assert names.count(label) == profiler.CALLS
            assert label in table.read_text()
        assert "aten::mul" in table.read_text()

    def test_ranges_are_of_case_implementation_and_phase(self, tmp_path, ranges):
        profile("nvtx", toy.suite(toy.good), tmp_path, wanted=[POINT])
        outer = ("toy rows=2,n=8 | forward+backward", "good")
        phases = [(*outer, POINT.label("forward")), (*outer, POINT.label("backward"))]
        assert ranges == [outer[:1], outer, *(phases * profiler.CALLS)]

    def test_forward_alone_has_no_backward(self, tmp_path, ranges):
        profile("nvtx", toy.suite(toy.good), tmp_path, wanted=[FORWARD_POINT])
        assert len(ranges) == 2 + profiler.CALLS

    def test_the_backward_pass_runs_in_the_thread_of_its_range(self, tmp_path):
        threads = []

        def watching(scores):
            threads.append(torch.autograd.is_multithreading_enabled())
            return 2 * scores

        profile("nvtx", toy.suite(watching), tmp_path, wanted=[POINT._replace(implementation="watching")])
        assert threads == [False] * (profiler.WARM_UP_CALLS + profiler.CALLS)

    def test_what_raises_or_cannot_run_is_told_and_the_others_go_on(self, tmp_path):
        absent = toy.Implementation("absent", lambda case: toy.good, lambda case, device: "not here")
        suite = toy.suite(toy.raising, toy.good)
        suite = toy.suite(implementations={**suite.implementations, "absent": absent})
        outcome = profile("torch", suite, tmp_path)
        assert {point.implementation for point in outcome.failed} == {"raising"}
        assert set(outcome.failed.values()) == {"RuntimeError: no luck with this"}
        assert {point.implementation: why for point, why in outcome.skipped.items()} == {"absent": "not here"}
        assert len(outcome.files) == 2 * 2 * len(DIRECTIONS)

    def test_ranges_alone_write_nothing(self, tmp_path):
        profile("nvtx", toy.suite(), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_without_being_asked_for_there_are_no_ranges(ranges):
    conditions = Conditions.on(CPU, "abc", max_seconds=0.01)
    (record,) = measure.measure(toy.suite(), toy.ToyCase(2, 8), FORWARD_BACKWARD, ["reference"], conditions)
    assert record.status == "ok"
    assert ranges == []


class TestOnAGpu:
    """Parts that only a GPU can record, with their interfaces replaced."""

    def test_tools_are_told_where_it_begins_and_ends(self, monkeypatch, tmp_path):
        said = []

        @contextmanager
        def marks():
            said.append("start")
            yield
            said.append("stop")

        monkeypatch.setattr(torch.cuda.profiler, "profile", marks)
        with profiler._for_a_tool(POINT, GPU, tmp_path) as files:
            said.append("calls")
        assert (said, files) == (["start", "calls", "stop"], [])

    @pytest.fixture
    def history(self, monkeypatch):
        """Arguments with which PyTorch was told to record the GPU's memory."""
        told = []
        record = lambda enabled="all", **options: told.append(enabled)  # noqa: E731
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
        return told

    def test_a_snapshot_is_of_one_point(self, history, tmp_path):
        with profiler._memory(POINT, GPU, tmp_path / "001-n=8,eps=0.1") as files:
            assert history == ["all"]
        assert history == ["all", None]
        assert [file.name for file in files] == ["001-n=8,eps=0.1.pickle"]
        assert files[0].is_file()

    def test_history_ends_with_a_call_that_fails(self, history, tmp_path):
        with pytest.raises(ZeroDivisionError), profiler._memory(POINT, GPU, tmp_path / "001"):
            raise ZeroDivisionError
        assert history == ["all", None]

    def test_proton_gives_what_it_wrote(self, monkeypatch, tmp_path):
        def start(name, *, hook):
            assert hook == "triton"
            return name

        monkeypatch.setattr(proton, "start", start)
        monkeypatch.setattr(proton, "finalize", lambda session: Path(f"{session}.hatchet").write_text("{}"))
        with profiler._proton(POINT, GPU, tmp_path / "001-eps=0.1") as files:
            pass
        assert [file.name for file in files] == ["001-eps=0.1.hatchet"]

    def test_proton_that_writes_nothing_is_an_error(self, monkeypatch, tmp_path):
        monkeypatch.setattr(proton, "start", lambda name, *, hook: None)
        monkeypatch.setattr(proton, "finalize", lambda session: None)
        with pytest.raises(RuntimeError, match="wrote no profile"), profiler._proton(POINT, GPU, tmp_path / "001"):
            pass


class TestCommand:
    @pytest.fixture
    def bench(self, monkeypatch, capsys, tmp_path):
        """Profile the toy suite; return the exit status, the output, and the files in the directory."""
        monkeypatch.chdir(ROOT)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        suite = toy.suite(toy.good, toy.raising)
        monkeypatch.setattr(run_command, "load_suites", lambda checkout, others: {"toy": suite})

        def bench(*options):
            selection = ["--suite", "toy", "--preset", "smoke", "--device", "cpu", "--out", str(tmp_path / "out")]
            status = cli.main([*selection, *options])
            return status, capsys.readouterr(), sorted(path.name for path in tmp_path.rglob("*") if path.is_file())

        return bench

    def test_records_no_time(self, bench):
        status, said, files = bench("--profile", "torch", "--impl", "good")
        assert status == commands.DONE
        assert "torch: 2 of 2 profiled, 0 skipped, 0 failed" in said.out
        assert len(files) == 4
        assert not [name for name in files if name.endswith(".jsonl")]

    def test_that_fails_for_one_says_so(self, bench):
        status, said, files = bench("--profile", "torch")
        assert status == commands.FAILURE
        assert "failed: toy rows=2,n=8 forward raising: RuntimeError: no luck with this" in said.err
        assert len(files) == 8

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--profile", "memory"], "needs a GPU, but the device is cpu"),
            (["--profile", "torch", "--", "-x"], "--profile does not start pytest"),
        ],
    )
    def test_that_cannot_be_is_wrong_usage(self, bench, options, message):
        status, said, files = bench(*options)
        assert (status, files) == (commands.USAGE, [])
        assert message in said.err

    @pytest.mark.parametrize(("complete", "status"), [(True, commands.DONE), (False, commands.FAILURE)])
    def test_a_tool_is_given_the_selection(self, bench, monkeypatch, complete, status):
        given = {}

        def ncu(selection, wanted, directory):
            given.update(selection=selection, wanted=wanted)
            return nsight.Seen([directory / "ncu.csv"], complete)

        monkeypatch.setattr(profiler, "missing", lambda mode, device: None)
        monkeypatch.setattr(nsight, "ncu", ncu)
        got, said, _ = bench("--profile", "ncu", "--impl", "good", "-k", "n=8")
        assert got == status
        assert "ncu.csv" in said.out
        expected = ["--suite=toy", "--preset", "smoke", "--device", "cpu", "--impl=good", "--cases", "n=8"]
        assert given["selection"] == expected
        assert [point.implementation for point in given["wanted"]] == ["good"] * 2

    def test_a_tool_that_saw_nothing_fails(self, bench, monkeypatch):
        def nsys(selection, wanted, directory):
            raise nsight.NsightError("saw nothing")

        monkeypatch.setattr(profiler, "missing", lambda mode, device: None)
        monkeypatch.setattr(nsight, "nsys", nsys)
        status, said, _ = bench("--profile", "nsys")
        assert status == commands.FAILURE
        assert "--profile nsys: saw nothing" in said.err


# CUPTI, which profilers use, serves one process per GPU at a time, and only the first profiler of a process.
@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("mode", ["nvtx", "torch", "memory", "proton"])
def test_every_mode_works_on_a_gpu(mode, tmp_path):
    options = ["--suite", "combine", "--preset", "smoke", "--device", "cuda", "--profile", mode, "--out", "out"]
    command = [sys.executable, str(ROOT / "bench.py"), *options]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=250)
    assert run.returncode == commands.DONE, run.stdout + run.stderr
    assert any(each.is_file() for each in tmp_path.rglob("*")) is (mode != "nvtx")
