import errno
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from colt5_bench import cli, commands, startup
from colt5_bench.commands import env, run
from colt5_bench.loading import choose_device, load_suites
from colt5_bench.measuring import conditions
from colt5_bench.measuring.host import HostSeconds
from colt5_bench.measuring.isolation import Measurer
from colt5_bench.measuring.roofline import Ceilings
from colt5_bench.records.environment import device_name
from colt5_bench.records.results import FAILED, load
from colt5_bench.report.table import endings
from colt5_bench.request import CEILINGS, NO_REPORT, REPORT
from colt5_bench.selection import SelectionError, case_filter, pick
from colt5_bench.startup import StartupError, check, find_checkout
from tests.colt5_bench import made

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name("toy.py")
CPU = torch.device("cpu")


def make_checkout(directory):
    """A checkout that contains only the toy suite."""
    for package in ("reference", "kernels", "suites"):
        (directory / package).mkdir()
        (directory / package / "__init__.py").touch()
    (directory / "suites" / "toy.py").write_text(TOY.read_text())
    (directory / "suites" / "_shared.py").write_text("raise AssertionError('a private module is no suite')")
    return directory


def start(checkout, implementations, *options, longest=resource.RLIM_INFINITY, **environment):
    """Run bench.py in a checkout; return its exit status and its output."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))

    # The address of pytest's own worker turns pytest-benchmark off.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, ROOT / "bench.py", "--suite", "toy", "--device", "cpu", "--out", "out", *options],
        cwd=checkout,
        env={**inherited, "TOY": implementations, **environment},
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture
def checkout(tmp_path):
    return make_checkout(tmp_path)


@pytest.fixture
def bench(checkout):
    return partial(start, checkout)


@pytest.fixture
def bench_here(tmp_path, monkeypatch, capfd):
    """The same in this process, for the suite by its path; return the exit status and the output."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    file = tmp_path / "toy.py"

    def bench_here(implementations, *options, more=""):
        file.write_text(TOY.read_text() + more)
        monkeypatch.setenv("TOY", implementations)
        where = ("--suite", str(file), "--device", "cpu", "--out", str(tmp_path / "out"))
        status = cli.main([*where, *options])
        return subprocess.CompletedProcess(where, status, *capfd.readouterr())

    return bench_here


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole run with its results. It logs its imports, and the environment has options for other tests."""
    checkout = make_checkout(tmp_path_factory.mktemp("whole"))
    run = start(checkout, "good", "--quiet", PYTEST_ADDOPTS="--co -x --lf", PYTHONPROFILEIMPORTTIME="1")
    return run, checkout / "out" / "toy.jsonl"


def test_a_run_prints_a_table_and_says_where_results_are(bench, checkout):
    run = bench("good", "--", "--benchmark-json=benchmark.json")
    assert run.returncode == commands.DONE, run.stderr
    assert "reference" in run.stdout
    assert "toy.jsonl" in run.stdout
    assert "Traceback" not in run.stderr
    records = load(checkout / "out" / "toy.jsonl").records
    assert [record.status for record in records] == ["ok"] * 8
    assert list((checkout / "out").glob("*.png"))
    assert run.stdout.splitlines()[-1].startswith("report: ")
    assert run.stdout.endswith("report.html\n")
    assert (checkout / "out" / "report.html").exists()
    assert (checkout / "benchmark.json").exists()

    # Neither output is a terminal.
    assert "\x1b" not in run.stdout + run.stderr


def test_a_failed_accuracy_gate_is_the_exit_status(bench_here, tmp_path):
    run = bench_here("good,wrong,raising", "--preset", "smoke", "--verbose")
    assert run.returncode == commands.FAILURE
    # All lines except the revision.
    lines = [line for line in run.stderr.splitlines() if not line.startswith("warning: ")]
    told = [re.sub(r"\d\S* ms$", "? ms", line) for line in lines]
    assert "ok           rows=2,n=8-forward-good  ? ms" in told
    assert "error        rows=2,n=8-forward-raising  RuntimeError: no luck with this" in told
    assert len(told) == 8
    assert "output is off by" in run.stdout
    assert "no luck with this" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr
    records = load(tmp_path / "out" / "toy.jsonl").records
    assert {record.implementation: record.status for record in records} == {
        "reference": "ok",
        "good": "ok",
        "wrong": "wrong",
        "raising": "error",
    }


def test_an_interrupted_run_keeps_what_it_has(bench_here, tmp_path):
    run = bench_here("interrupting")
    assert run.returncode == commands.INTERRUPTED
    records = load(tmp_path / "out" / "toy.jsonl").records
    assert {record.case for record in records} == {"rows=2,n=8"}
    assert len(records) == 4
    assert "toy.jsonl" in run.stdout
    again = f"--suite {tmp_path}/toy.py --preset default --device cpu --out {tmp_path}/out --resume"
    assert f"interrupted; to complete the run: python bench.py {again}" in run.stderr


FAILING_ONCE = """

from colt5_bench.measuring.isolation import Measurer

measure = Measurer.measure


def failing_once(*arguments):
    Measurer.measure = measure
    raise AssertionError("no luck in the harness")


Measurer.measure = failing_once
"""


def test_a_failure_of_the_harness_is_shown_and_fails(bench_here):
    """It loses only the current point."""
    run = bench_here("good", "--preset", "smoke", "--quiet", more=FAILING_ONCE)
    assert run.returncode == commands.UNMEASURED
    assert "no luck in the harness" in run.stderr
    assert [line.partition(":")[0] for line in run.stdout.splitlines()] == ["2 ok", "results", "plots", "report"]


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_what_a_run_would_be_measured_under(here, capsys):
    assert cli.main(["env", "--device", "cpu"]) == commands.DONE
    assert f"torch                        {torch.__version__}" in capsys.readouterr().out
    assert cli.main(["env", "--device", "cpu", "--json"]) == commands.DONE
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--suite", "coor_decent"], ["no suite 'coor_decent'", "segments", "Did you mean coor_descent?"]),
        (["--suite", "gradients", "--impl", "our"], ["in suite gradients 'our'", "reference", "Did you mean ours?"]),
        (["--suite", "coor_descent", "-k", "n=513"], ["no case", "'n=513'", "--suite coor_descent", "guests.md"]),
        (["--suite", "coor_descent", "-k", "(n=512"], ["-k must join parts of case ids", "got '(n=512'"]),
        (
            ["--suite", "coor_descent", "--device", "tpu"],
            ["--device must be auto, cpu, cuda or cuda:<index>, got 'tpu'"],
        ),
        (["--suite", "coor_descent", "--resume"], ["--resume needs --out DIR"]),
        (["--suite", "coor_descent", "--shard", "5/4"], ["--shard must be I/N with I from 1 to N", "got '5/4'"]),
        (
            ["--suite", "coor_descent", "--time-limit", "soon"],
            ["--time-limit must be a number of seconds above 0", "got 'soon'"],
        ),
        (["--suite", "coor_descent", "--out", "/dev/null/results"], ["cannot use /dev/null/results: Not a directory"]),
        (["--suite", "topk", "--profile", "torch", "--shard", "1/2"], ["--profile writes no records", "--shard"]),
        (["histroy"], ["no command 'histroy'", "report, export, history", "Did you mean history?"]),
        ([], ["--suite", "coor_descent", "gradients"]),
    ],
)
def test_what_there_is_not_is_a_usage_error_that_says_what_there_is(here, capsys, arguments, messages):
    assert cli.main([*arguments, "--device", "cpu"] if "--device" not in arguments else arguments) == commands.USAGE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for message in messages:
        assert message in error


@pytest.mark.parametrize("preset", ["smoke", "default"])
def test_a_run_without_a_case_names_the_command_that_lists_them(bench_here, capfd, preset):
    run = bench_here("good", "--preset", preset, "-k", "n=255")
    assert run.returncode == commands.USAGE
    command = re.search("`python bench.py (.*?)`", run.stderr)[1].split()
    assert cli.main([*command, "--device", "cpu"]) == commands.DONE
    assert capfd.readouterr().out.count("rows=2,n=") == {"smoke": 1, "default": 2}[preset]


def test_a_wrong_option_is_told_of_in_a_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--suite", "topk", "--preset", "huge"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "invalid choice: 'huge' (choose from" in error
    assert error.endswith(" run --help\n")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--suite", "topk", "-q", "-v"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["list"], ["--list"], ["run", "--list"]])
def test_list_says_what_there_is(here, capsys, command):
    assert cli.main([*command, "--device", "cpu"]) == commands.DONE
    output = capsys.readouterr().out
    assert "gradients: divergence" in output
    assert "list --suite NAME" in output
    assert "peers" not in output


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--list"], ["list"], ["run", "--list"]])
def test_help_and_lists_do_not_wait_for_heavy_imports(arguments):
    script = f"""
import sys
from contextlib import suppress
from colt5_bench import cli
with suppress(SystemExit):
    cli.main({arguments!r})
print(*{{"matplotlib", "numpy", "pandas", "pytest", "torch", "triton"}} & set(sys.modules), file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout
    assert ended.stderr.split() == []


def test_what_is_measured_without_pytest_does_not_wait_for_what_comes_later():
    script = f"""
import gc
import sys
from pathlib import Path
from colt5_bench import cli
from colt5_bench.loading import load_suites
cli._command("run")
assert load_suites(Path({str(ROOT)!r}))
assert gc.isenabled()
print(*{{"_pytest", "matplotlib", "pandas", "plotly", "pytest_benchmark", "scipy", "sympy"}} & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


@pytest.mark.parametrize("by", ["the user", "the suite"])
def test_who_starts_a_run_may_say_what_the_device_can_do_and_what_is_measured_may_not(bench_here, monkeypatch, by):
    rates = Ceilings(1e30, 1e30, dict.fromkeys(("float32", "bfloat16", "float16"), 1e30), device_name(CPU), True)
    more = ""
    if by == "the user":
        monkeypatch.setenv(CEILINGS, json.dumps(asdict(rates)))
    else:
        monkeypatch.delenv(CEILINGS, raising=False)
        more = f"\nos.environ[{CEILINGS!r}] = {json.dumps(asdict(rates))!r}\n"
    try:
        run = bench_here("good", "--preset", "smoke", "--quiet", more=more)
    finally:
        os.environ.pop(CEILINGS, None)
    (described,) = load(Path(run.args[-1]) / "toy.jsonl").environments.values()
    assert (described["ceilings"] == asdict(rates)) == (by == "the user")
    assert described["host"]["linear"] > 0


def test_the_host_is_measured_before_any_point(bench_here, monkeypatch):
    """A point may break the context of a GPU."""
    order, measured = [], Measurer.measure
    monkeypatch.setattr(conditions, "measure_host", lambda device: order.append("host") or HostSeconds(1.0, None))
    monkeypatch.setattr(Measurer, "measure", lambda *each: order.append("point") or measured(*each))
    bench_here("good", "--preset", "smoke", "--quiet")
    assert order[0] == "host"
    assert order.count("host") == 1
    assert "point" in order


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "python bench.py --suite coor_descent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["mer"], ["merge"]),
        (["run", "--preset", ""], ["smoke", "default", "full"]),
        (["run", "--suite", "to"], ["toy"]),
        (["merge", "suites/to"], ["suites/toy.py"]),
    ],
)
def test_a_shell_completes(checkout, capsys, words, completed):
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == commands.DONE
    script = f"""{capsys.readouterr().out}
        COMP_WORDS=(colt5-bench {shlex.join(words)}) COMP_CWORD={len(words)}
        $(complete -p colt5-bench | sed 's/.* -F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    shell = subprocess.run(["bash", "-c", script], cwd=checkout, capture_output=True, text=True, check=True)
    assert shell.stdout.split() == completed


@pytest.mark.parametrize(
    ("shell", "lines"),
    [
        ("zsh", [r"#compdef colt5-bench", r'  "--resume\[complete the run in --out, .*']),
        ("fish", [r"complete -c colt5-bench -n '.* run' -l resume .*", r"complete -c colt5-bench .* -a merge .*"]),
    ],
)
def test_other_shells_have_a_script_of_their_own(capsys, shell, lines):
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == commands.DONE
    script = capsys.readouterr().out
    for line in lines:
        assert re.search(f"^{line}$", script, flags=re.MULTILINE)


def test_without_its_library_completion_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == commands.USAGE
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.parametrize("ending", FAILED)
def test_without_colour_a_terminal_gets_none(monkeypatch, ending):
    def shown():
        console = Console(file=StringIO(), force_terminal=True)
        endings([made.record(status=ending, reason="no luck")], console)
        text = console.file.getvalue()
        assert f"{ending.replace('_', ' ')}: no luck" in text
        return text

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert re.search(r"\x1b\[3[13]m", shown())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown()


def test_the_package_starts_as_bench_py_does():
    command = [sys.executable, "-m", "colt5_bench", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "--suite coor_descent" in shown


def test_elsewhere_it_knows_its_own_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--list"]) == commands.DONE
    assert "coor_descent: " in capsys.readouterr().out


def test_without_suites_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(startup, "__file__", str(tmp_path / "colt5_bench" / "startup.py"))
    assert cli.main(["--list"]) == commands.USAGE
    assert "is not a checkout of colt5-bench" in capsys.readouterr().err


def test_a_package_that_shadows_ours_is_told_of(checkout, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    # In this process `kernels` is that of the real checkout.
    with pytest.raises(StartupError, match=r"`import kernels` finds .* instead of .*pip uninstall kernels"):
        check(find_checkout(checkout), ["kernels"])


def test_times_of_the_interpreter_are_refused(here, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(["--suite", "coor_descent"]) == commands.USAGE
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("expression", "selected"),
    [
        ("", {"n=512,std=1", "n=4096,std=1", "n=4096,std=5"}),
        ("n=512", {"n=512,std=1"}),
        ("n=4096 and not std=1", {"n=4096,std=5"}),
        ("n=512 or std=5", {"n=512,std=1", "n=4096,std=5"}),
        ("not (n=512 or std=5)", {"n=4096,std=1"}),
        ("n=4096,std=1", {"n=4096,std=1"}),
        ("__import__", set()),
        ("std=1.0", set()),
    ],
)
def test_case_expressions(expression, selected):
    ids = {"n=512,std=1", "n=4096,std=1", "n=4096,std=5"}
    assert set(filter(case_filter(expression), ids)) == selected


@pytest.mark.parametrize("left", ["n=", "n=512 ", "(n=512)", "not n="])
@pytest.mark.parametrize(
    "right", ["(8 or 16)", "(8)", "()", "(a)(b)", "((8)", ")", "and", "or or", "(" * 300 + "a" + ")" * 300]
)
def test_what_is_no_case_expression_is_said(left, right):
    with pytest.raises(SelectionError, match="-k must join parts of case ids"):
        case_filter(left + right)


def test_a_name_is_picked_from_those_allowed():
    assert pick("suite", "topk", ["topk", "segments"]) == "topk"
    with pytest.raises(SelectionError, match=r"no suite 'xyz'; choose from topk, segments\.$"):
        pick("suite", "xyz", ["topk", "segments"])


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(SelectionError, match="--device cuda:2 does not exist: PyTorch sees 2 GPUs"):
        choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")


def raising(error):
    def main(options):
        raise error

    return main


STATUSES = [
    (SelectionError("no such"), commands.USAGE),
    *((OSError(number, os.strerror(number), "out/x"), commands.USAGE) for number in cli.WRONG_PLACE),
    *((OSError(number, os.strerror(number), "out/x"), commands.UNMEASURED) for number in (errno.ENOSPC, errno.EIO)),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), commands.UNMEASURED),
    (BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)), commands.CLOSED),
    (KeyboardInterrupt(), commands.INTERRUPTED),
    *((error("no\nluck \x1b[2J"), commands.UNMEASURED) for error in (TypeError, KeyError, MemoryError, RecursionError)),
    (AssertionError(), commands.UNMEASURED),
    (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), commands.UNMEASURED),
]


@pytest.mark.parametrize(("error", "status"), STATUSES, ids=lambda each: type(each).__name__)
def test_whatever_is_raised_it_is_a_line_and_a_status_that_says_no_regression(monkeypatch, capsys, error, status):
    monkeypatch.setattr(env, "main", raising(error))
    assert cli.main(["env"]) == status
    told = capsys.readouterr().err
    assert told.count("\n") == (0 if status in (commands.CLOSED, commands.INTERRUPTED) else 1)
    assert "Traceback" not in told
    assert told.strip().isprintable()


@pytest.mark.parametrize(
    ("redirection", "status"),
    [(">/dev/full", commands.UNMEASURED), ("| true", commands.CLOSED), (">/dev/full 2>/dev/full", commands.UNMEASURED)],
)
def test_what_cannot_be_said_is_no_success_and_no_regression(redirection, status):
    """Detected when the output is flushed, or during the write: there is more output than a pipe holds."""
    script = """
import sys
from colt5_bench import cli, commands, startup
from colt5_bench.commands import list as listed
listed.main = lambda options: print("x" * int(sys.argv.pop())) or 0
sys.exit(cli.main(["list"]))
"""
    command = f"for size in 10 300000; do {shlex.join([sys.executable, '-c', script])} $size {redirection}; "
    command += "echo ${PIPESTATUS[0]} >&3; done 3>&1"
    command = f"exec 3>&1; {command}" if "|" not in redirection else command
    shell = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shell.stdout.split() == [str(status)] * 2
    assert "Traceback" not in shell.stderr
    assert "Exception ignored" not in shell.stderr


@pytest.mark.parametrize("columns", ["0", "00", "", " "])
def test_a_terminal_without_columns_is_shown_what_others_are(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(env, "main", lambda options: Console().print("shown") or 0)
    assert cli.main(["env"]) == commands.DONE
    assert capsys.readouterr().out == "shown\n"


def test_what_is_meant_otherwise_is_refused(here, capsys):
    for arguments in (
        ["--suit", "topk"],
        ["--suite", "topk", "--out", ""],
        ["compare", "a", "b", "--out="],
        ["--vers"],
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(arguments)
        assert capsys.readouterr().err.count("\n") == 1


def test_it_says_which_version_it_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("colt5-bench")


@pytest.mark.parametrize("module", ["colt5_bench.commands", "numpy", "torch"])
def test_while_all_is_imported_an_interrupt_ends_it_there_and_then(module):
    """At the moment of a search for a module."""
    script = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
sys.argv = ["bench.py", "env"]
runpy.run_path("bench.py", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr == ""


@pytest.fixture
def broken(checkout, monkeypatch):
    """A checkout whose suites besides the toy suite are broken in different ways, imported in this process."""
    sources = {
        "raising": "raise RuntimeError('no luck')",
        "leaving": "import sys; sys.exit(0)",
        "unreadable": "def (",
        "other": "SUITE = 5",
        "named": "from tests.colt5_bench import toy; SUITE = toy.SUITE",
    }
    for name, source in sources.items():
        (checkout / "suites" / f"{name}.py").write_text(source)
    for name in [name for name in sys.modules if name.partition(".")[0] == "suites"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("sys.path", [str(checkout), *sys.path])
    yield sources
    for name in [name for name in sys.modules if name.partition(".")[0] == "suites"]:
        del sys.modules[name]


def test_a_suite_that_is_broken_costs_no_other(broken, checkout, capsys):
    assert list(load_suites(checkout)) == ["toy"]
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in told] == sorted(f"suites/{name}.py" for name in broken)
    assert "suites/raising.py is left out: RuntimeError: no luck" in told
    assert (
        "suites/named.py is left out: ValueError: SUITE.name must be 'named', the name of its file, got 'toy'" in told
    )


def test_the_cases_of_a_suite_are_listed(here, capsys):
    assert cli.main(["list", "--suite", "topk", "--preset", "smoke", "--device", "cpu"]) == commands.DONE
    suite = load_suites(ROOT)["topk"]
    cases = [case.id for case in suite.cases("smoke", torch.device("cpu"))]
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        f"topk: {suite.description}",
        f"implementations: {', '.join(suite.implementations)}",
        f"{len(cases)} cases of preset smoke on cpu:",
        *cases,
    ]
    assert cli.main(["--list", "--suite", "topq", "--device", "cpu"]) == commands.USAGE


def test_runs_that_begin_in_one_second_have_a_directory_each(tmp_path):
    directories = [run._new_directory(tmp_path / "reports", "now") for _ in range(3)]
    assert [each.name for each in directories] == ["now", "now-2", "now-3"]
    assert all(each.is_dir() for each in directories)


def test_less_than_all_records_is_no_success(bench, checkout, whole):
    """For options for pytest on this command line, or in the environment for other tests."""
    partial = bench("wrong,good", "--", "-x", **{REPORT: NO_REPORT})
    assert partial.returncode == commands.UNMEASURED, partial.stdout
    assert "of the expected records are missing" in partial.stderr
    assert len(load(checkout / "out" / "toy.jsonl").records) < 12
    none = bench("good", "--out", "none", "--", "--collect-only", **{REPORT: NO_REPORT})
    assert none.returncode == commands.UNMEASURED
    run, results = whole
    assert run.returncode == commands.DONE, run.stderr
    assert len(load(results).records) == 8


@pytest.mark.parametrize("module", ["pandas", "scipy.stats", "torch._dynamo", "torch._inductor"])
def test_a_run_does_not_wait_for_imports_that_it_can_do_without(whole, module):
    run, _ = whole
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert {"torch", "matplotlib"} <= imported
    assert module not in imported


def test_on_a_full_disk_a_run_says_so_in_a_line(bench, checkout, whole):
    """The file may reach the length of half of the run, and a page is longer."""
    _, results = whole
    full = bench("good", "--quiet", longest=results.stat().st_size // 2)
    assert full.returncode == commands.UNMEASURED
    assert "Traceback" not in full.stderr
    assert [line for line in full.stderr.splitlines() if "out/toy.jsonl: File too large" in line]
    assert len(load(checkout / "out" / "toy.jsonl").records) < 8
    assert not load(checkout / "out" / "toy.jsonl").cut_off
    assert not list((checkout / "out").glob(".*"))
    assert not (checkout / "out" / "report.html").exists()
