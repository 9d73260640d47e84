"""`colt5-bench completion`: a script for completion of commands, options, files and names of suites."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from colt5_bench.commands import DONE
from colt5_bench.selection import SelectionError

EXAMPLES = """\
  eval "$(colt5-bench completion bash)"
  colt5-bench completion zsh > ~/.zfunc/_colt5-bench
  colt5-bench completion fish > ~/.config/fish/completions/colt5-bench.fish

pip installs the command `colt5-bench`. It is the same as `python bench.py`, which shells cannot complete.
"""

SHELLS = ("bash", "zsh", "fish")

SUITES = "grep -rls '^SUITE =' suites --include='*.py' | xargs -r basename -a -s .py | sort"
"""Command that lists the suites in the current checkout."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def main(options: argparse.Namespace) -> int:
    try:
        # Imported here, because measuring does not need it.
        shtab = import_module("shtab")
    except ImportError as error:
        raise SelectionError("completion needs shtab, which is not installed: pip install shtab") from error
    options.parser.prog = "colt5-bench"
    _complete_values(options.parser, shtab)
    print(shtab.complete(options.parser, options.shell))
    return DONE


def _complete_values(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Set the kinds of option values, which shtab reads from its own attribute."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_values(command, shtab)
        elif action.dest == "suite":
            action.complete = shtab.cmd(SUITES)  # type: ignore[attr-defined]
        elif action.type is Path:
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
