"""The command line: `python bench.py COMMAND ...`."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from colt5_bench.commands import INTERRUPTED, USAGE, completion, env, history, merge, report, run, selftest
from colt5_bench.commands import list as list_command
from colt5_bench.selection import SelectionError, pick
from colt5_bench.startup import StartupError

COMMANDS = {
    "run": run,
    "list": list_command,
    "merge": merge,
    "report": report,
    "history": history,
    "selftest": selftest,
    "env": env,
    "completion": completion,
}
"""Each module has `SUMMARY`, `EXAMPLES`, `configure(parser)` and `main(options)`."""

DEFAULT = "run"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # What follows `--` is passed on, and nothing of it is ours.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, passed_on = arguments[:split], arguments[split + 1 :]
    parser = _parser()
    try:
        options = parser.parse_args(_with_command(arguments))
        options.pytest, options.parser = passed_on, parser
        return COMMANDS[options.command].main(options)
    except (StartupError, SelectionError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return USAGE
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{parser.prog}: error: cannot use {error.filename}: {error.strerror}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _with_command(arguments: Sequence[str]) -> list[str]:
    """`--suite topk` is `run --suite topk`."""
    if arguments and arguments[0] in ("-h", "--help"):
        return list(arguments)
    if arguments and not arguments[0].startswith("-"):
        return [pick("command", arguments[0], COMMANDS), *arguments[1:]]
    return [DEFAULT, *arguments]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, and not also every option there is."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description="Measure implementations of the operations of conditionally routed attention.",
        epilog=f"examples, and what `{DEFAULT}` is short for:\n{run.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY[0].upper()}{command.SUMMARY[1:]}.",
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(one)
    return parser
