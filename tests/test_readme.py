"""What the README shows works: its Python runs, and so do its commands, the long ones in short."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from colt5_bench.selection import load_suites

SHORT = ["--preset", "smoke", "--impl", "ours"]
"""Appended to what measures; of an option that is given twice the last counts."""

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]


def run(arguments, **environment):
    # Neither the interpreter nor what pytest tells its own workers is meant for a command of its own.
    inherited = {name: v for name, v in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    environment = {**inherited, **environment}
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("source", blocks("python"))
def test_python(source):
    exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    words = shlex.split(command)
    environment = {}
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    check = {"make": make, "python": python, "pytest": pytest_, "pip": pip}[words[0]]
    check(words[1:], environment)


def test_every_suite_is_listed():
    listed = re.findall(r"^\| `(\w+)` \| .*\?", README, flags=re.MULTILINE)
    assert sorted(listed) == sorted(load_suites(ROOT))


def make(arguments, environment):
    run(["make", "--dry-run", *arguments], **environment)


def python(arguments, environment):
    if "--suite" not in arguments:
        assert run([sys.executable, *arguments], **environment).strip()
        return
    if "--preset" in arguments:
        position = arguments.index("--preset")
        arguments = arguments[:position] + arguments[position + 2 :]
    measure(tuple(arguments))


@cache
def measure(arguments):
    """Commands that differ in the preset alone are one and the same here."""
    with TemporaryDirectory() as directory:
        run([sys.executable, *arguments, *SHORT, "--out", directory])
        assert list(Path(directory).rglob("*.jsonl"))


def pytest_(arguments, environment):
    """Suites run; the tests, of which this is one, are collected."""
    suites = arguments[0].startswith("suites")
    arguments = [*arguments, *SHORT] if suites else ["--collect-only", "-q", *arguments]
    output = run([sys.executable, "-m", "pytest", *arguments], **environment)
    assert re.search(r"\d+ passed" if suites else r"\d+ tests? collected|\d+/\d+ tests collected", output)


def pip(arguments, environment):
    """Installing is what `make install` does; here it is enough that everything named exists."""
    assert arguments[:2] == ["install", "-c"]
    assert (ROOT / arguments[2]).is_file()
    extras = re.fullmatch(r"\.\[(.+)\]", arguments[-1])[1].split(",")
    assert set(extras) <= set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
