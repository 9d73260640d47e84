"""README and docs are true: their Python and their commands run, long ones in a short form."""

import ast
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml

import reference
from colt5_bench import cli
from colt5_bench.commands import DONE
from colt5_bench.loading import load_suites
from colt5_bench.records.results import load
from colt5_bench.request import NO_REPORT, REPORT

SHORT = ["--preset", "smoke", "--impl", "ours"]
"""Appended to commands that measure; of an option that is given twice the last one counts."""

FEW = ["--shard", "1/8"]
"""Appended to commands that record: the first case of a suite, and every eighth one after it."""

REDUCED = {
    "ConditionalRoutedTransformerBlock": {"32768": "256", "1024": "32", "512": "64", "128": "16"},
    "ConditionalRoutedCrossAttention": {"1_048_576": "800", "131072": "150", "1024": "48", "512": "32"},
    "ConditionalRoutedAutoregressiveAttention": {"8192": "256", "1024": "48", "512": "64", "128": "16", "32": "4"},
    "ConditionalRoutedImageAttention": {"65536": "256", "1024": "48", "256": "16", "32": "8"},
    "ConditionalRoutedViT": {"1024": "64", "1000": "10"},
}
"""Sizes of layers if there is no GPU. For the class of a block, they map each number in it to its replacement. All of
them must occur, and no larger number may remain."""

LARGEST = 800
"""Largest number that a block of layers may have if there is no GPU."""

ROOT = Path(__file__).parent.parent
PAGES = {
    file.relative_to(ROOT).as_posix(): file.read_text() for file in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
MEASURING = [file for file in WORKFLOWS if file.stem.startswith("regressions")]


def blocks(language, pages=PAGES):
    """The code of that language, in all pages or some; a block on several pages counts once."""
    found = (re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.DOTALL | re.MULTILINE) for page in pages)
    return list(dict.fromkeys(chain.from_iterable(found)))


def lines(language):
    return list(dict.fromkeys(chain.from_iterable(block.splitlines() for block in blocks(language))))


def run(arguments, **environment):
    # Neither the interpreter nor pytest's variables for its workers are meant for a separate command.
    inherited = {name: v for name, v in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment = {**inherited, REPORT: NO_REPORT, **environment}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


RECIPE = blocks("python", ["docs/training.md"])


# Other tests run the blocks that import installed packages, or are files: test_wheel.py, kernels/test_guest.py,
# colt5_bench/test_guests.py and reference/parallel/test_page.py.
@pytest.mark.parametrize(
    "source",
    [
        each
        for each in blocks("python")
        if each not in RECIPE
        and not any(mark in each for mark in ("from colt5.", "# mine.py", "# sizes.py", "# train.py"))
    ],
)
def test_python(source):
    execute(source if torch.cuda.is_available() else reduce(source))


def test_the_recipe_of_training_learns():
    """In few steps, from the 8 bits of an unknown byte."""
    (source,) = RECIPE
    namespace = execute(reduce(source))
    assert namespace["step"] < 100
    assert namespace["loss"].item() / math.log(2) < 6


def execute(source):
    """Names that a block defines, after a check that tensors have the shapes and sums of rows in its comments."""
    namespace = {"__name__": "docs"}
    exec(compile(source, "a block of the docs", "exec"), namespace)
    shapes = re.findall(r"^(\w+)\b.*  # \((\d+(?:, \d+)+)\)", source, flags=re.MULTILINE)
    assert shapes or "ConditionalRouted" not in source
    for name, shape in shapes:
        assert tuple(namespace[name].shape) == ast.literal_eval(shape), name
    for name, about, total in re.findall(r"^(\w+)\b.*  # sums to (about )?(\d+)", source, flags=re.MULTILINE):
        expected = torch.full(namespace[name].shape[:-1], float(total), device=namespace[name].device)
        torch.testing.assert_close(namespace[name].sum(-1), expected, rtol=0.05 if about else 1e-4, atol=0)
    return namespace


def reduce(source):
    """A block with the sizes of REDUCED, if it is about layers and has numbers above LARGEST."""
    imported = {alias.name for node in ast.walk(ast.parse(source)) for alias in getattr(node, "names", [])}
    layers = {name for name in imported if name.startswith("ConditionalRouted")}
    if not layers or largest(source) <= LARGEST:
        return source
    (subject,) = layers & set(REDUCED)
    sizes = REDUCED[subject]
    for printed in sizes:
        assert re.search(rf"\b{printed}\b", source), f"{printed} is not in the block of {subject}"
    reduced = re.sub(r"\b\d[\d_]*\b", lambda number: sizes.get(number[0], number[0]), source)
    assert largest(reduced) <= LARGEST
    return reduced


def largest(source):
    """The largest whole number in a block."""
    numbers = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return max((number for number in numbers if isinstance(number, int)), default=0)


def test_each_layer_of_the_system_is_shown():
    sources = blocks("python", ["docs/layers.md"])
    shown = [next((name for name in REDUCED if name in source), None) for source in sources]
    assert sorted(name for name in shown if name) == sorted(REDUCED)
    layers = {name for name in reference.__all__ if name.startswith("ConditionalRouted")}
    assert {name for name in layers if any(f"{name}(" in source for source in sources)} == layers


@pytest.mark.parametrize(
    "changed", [("32768", "32769"), ("num_heavy_tokens=1024", "num_heavy_tokens=2048"), ("TransformerBlock", "Block")]
)
def test_a_changed_block_does_not_run_unreduced(changed):
    block = next(source for source in blocks("python") if "32768" in source)
    with pytest.raises((AssertionError, ValueError)):
        reduce(block.replace(*changed))


def parsed(command):
    """The variables that a command begins with, and its words."""
    words, environment = shlex.split(command), {}
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    return environment, words


@pytest.mark.parametrize(
    "command",
    # The self-test measures times, and checks them.
    [pytest.param(each, marks=pytest.mark.alone if "selftest" in each else ()) for each in lines("bash")],
)
def test_command(command):
    environment, words = parsed(command)
    check = {"make": make, "python": python, "pytest": pytest_, "pip": pip, ".": enter}[words[0]]
    check(words[1:], environment)


@pytest.mark.parametrize("command", lines("shell"))
def test_a_command_of_several_is_one_that_there_is(command):
    """A command that takes long, or needs the output of another one, is parsed but not run."""
    _, words = parsed(command)
    assert words[:2] == ["python", "bench.py"]
    cli._parser(cli.COMMANDS).parse_args(cli._with_command(words[2:]))


@pytest.mark.parametrize("file", MEASURING, ids=[file.stem for file in MEASURING])
def test_a_workflow(file):
    """Its commands and targets exist, and so do the baselines that it names."""
    workflow = yaml.safe_load(file.read_text())
    assert workflow[True] == "pull_request"  # `on`, as YAML 1.1 reads it
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [shlex.split(step["run"].partition(" > ")[0]) for step in steps if "run" in step]
    assert commands[0] == ["make", "install"]
    for program, *arguments in commands:
        if program == "make":
            make(arguments, {})
        else:
            assert (program, arguments[0]) == (".venv/bin/python", "bench.py")
            cli._parser(cli.COMMANDS).parse_args(cli._with_command(arguments[1:]))
            baselines = [name for name in arguments if name.startswith("reports/baselines/")]
            assert baselines
            assert all((ROOT / name).is_file() for name in baselines)


def test_what_the_hosted_workflow_compares_with_is_there():
    """For a GPU that need not exist: the baseline has no times of one, but the facts of kernels."""
    (command,) = (line for line in run(["make", "--dry-run", "check"]).splitlines() if "--check" in line)
    words = shlex.split(command)
    records = load(ROOT / words[words.index("--baseline") + 1]).records
    assert {record.suite for record in records} == {word for at, word in enumerate(words) if words[at - 1] == "--suite"}
    assert {column for record in records for column in record.timings} == {"wall"}
    ours = [record for record in records if record.implementation == "ours"]
    assert {record.status for record in ours} == {"ok"}
    assert all(kernel["target"] == "sm_90" for record in ours for kernel in record.kernels)
    assert all(record.kernels and record.peak_bytes and record.accuracy for record in ours)


def test_every_suite_is_listed():
    listed = re.findall(r"^\| `(\w+)` \| .*\?", PAGES["docs/usage.md"], flags=re.MULTILINE)
    assert sorted(listed) == sorted(load_suites(ROOT))


def make(arguments, environment):
    run(["make", "--dry-run", *arguments], **environment)


def python(arguments, environment):
    assert (arguments[0], environment) == ("bench.py", {})
    if "--suite" not in arguments:
        assert bench(arguments).strip()
        return
    if "--preset" in arguments:
        position = arguments.index("--preset")
        arguments = arguments[:position] + arguments[position + 2 :]
    measure(tuple(arguments))


@cache
def measure(arguments):
    """Commands that differ only in the preset count as the same here."""
    few, written = ([], "*.trace.json.gz") if "--profile" in arguments else (FEW, "*.jsonl")
    with TemporaryDirectory() as directory:
        bench([*arguments, *SHORT, *few, "--out", directory])
        assert list(Path(directory).rglob(written))


def bench(arguments):
    """Output of `python bench.py`, run in this process, which has already imported what a command needs."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(ROOT)
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv(REPORT, NO_REPORT)
        try:
            status = cli.main(arguments[1:])
        except SystemExit as end:
            status = end.code
    assert status == DONE, f"{shlex.join(arguments)}\n{printed.getvalue()}"
    return printed.getvalue()


def pytest_(arguments, environment):
    """Suites run; tests, which include this one, only have to exist."""
    if arguments[0].startswith("suites"):
        output = run([sys.executable, "-m", "pytest", *arguments, *SHORT, *FEW], **environment)
        assert re.search(r"\d+ passed", output)
    else:
        assert all(next((ROOT / folder).rglob("test_*.py")) for folder in arguments)


def enter(arguments, environment):
    """The environment that make creates."""
    made = re.search(r"^VENV \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert arguments == [f"{made}/bin/activate"]


def pip(arguments, environment):
    """`make install` does the installation; here it is enough that all named files and extras exist."""
    assert arguments[:2] == ["install", "-c"]
    assert (ROOT / arguments[2]).is_file()
    extras = re.fullmatch(r"\.\[(.+)\]", arguments[-1])[1].split(",")
    assert set(extras) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 300


def test_badges():
    """They name an existing workflow, and the Python and licence of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    badges = [line for line in PAGES["README.md"].splitlines() if line.startswith("[![")]
    (workflow,) = {name for line in badges for name in re.findall(r"actions/workflows/([^/)]+)", line)}
    assert ROOT / ".github" / "workflows" / workflow in WORKFLOWS
    assert any(f"badge/python-{project['requires-python'].removeprefix('>=')}%2B-" in line for line in badges)
    assert any(f"badge/licence-{project['license']}-" in line for line in badges)
