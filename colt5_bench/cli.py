"""The command line: `python bench.py COMMAND ...`."""

import argparse
import sys
from collections.abc import Sequence

from colt5_bench.commands import INTERRUPTED, USAGE, baseline, compare, env, history, report, run, selftest
from colt5_bench.commands import list as list_command
from colt5_bench.selection import SelectionError
from colt5_bench.startup import StartupError

COMMANDS = {
    "run": run,
    "list": list_command,
    "compare": compare,
    "baseline": baseline,
    "report": report,
    "history": history,
    "selftest": selftest,
    "env": env,
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
    options = parser.parse_args(_with_command(arguments))
    options.pytest = passed_on
    try:
        return COMMANDS[options.command].main(options)
    except (StartupError, SelectionError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _with_command(arguments: Sequence[str]) -> list[str]:
    """`--suite topk` is `run --suite topk`."""
    named = arguments and (arguments[0] in COMMANDS or arguments[0] in ("-h", "--help") or arguments[0][0] != "-")
    return list(arguments) if named else [DEFAULT, *arguments]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
