"""The command line: `python bench.py COMMAND ...`."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from colt5_bench.commands import (
    CLOSED,
    INTERRUPTED,
    UNMEASURED,
    USAGE,
    baseline,
    compare,
    completion,
    env,
    history,
    merge,
    report,
    run,
    selftest,
)
from colt5_bench.commands import list as list_command
from colt5_bench.files import trouble
from colt5_bench.selection import SelectionError, pick
from colt5_bench.startup import StartupError
from colt5_bench.texts import printable, said

COMMANDS = {
    "run": run,
    "list": list_command,
    "compare": compare,
    "baseline": baseline,
    "merge": merge,
    "report": report,
    "history": history,
    "selftest": selftest,
    "env": env,
    "completion": completion,
}
"""Each module has `SUMMARY`, `EXAMPLES`, `configure(parser)` and `main(options)`."""

DEFAULT = "run"


WRONG_PLACE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EAGAIN),
)
"""Errors that another path would not have."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; whatever happens, it is none that says something else."""
    if not os.environ.get("COLUMNS", "1").strip("0 "):
        # As some terminals say that are none; nothing would be shown.
        del os.environ["COLUMNS"]
    try:
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            # Not as Python ends: it would end with a status of its own.
            _flush()
    except (StartupError, SelectionError) as error:
        return _failed(str(error), USAGE)
    except BrokenPipeError:
        return CLOSED
    except OSError as error:
        of_the_user = error.filename is not None and error.errno in WRONG_PLACE
        return _failed(trouble(error), USAGE if of_the_user else UNMEASURED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        # So rich ends where nobody reads what it shows.
        if end.code == 1:
            return CLOSED
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return _failed(f"in {where.filename}:{where.lineno}: {said(error)}", UNMEASURED)


def _main(arguments: list[str]) -> int:
    # What follows `--` is passed on, and nothing of it is ours.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, passed_on = arguments[:split], arguments[split + 1 :]
    parser = _parser()
    options = parser.parse_args(_with_command(arguments))
    options.pytest, options.parser = passed_on, parser
    return COMMANDS[options.command].main(options)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            # What is left in it cannot be written as Python ends either.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise


def _failed(message: str, status: int) -> int:
    with suppress(OSError):
        print(f"{Path(sys.argv[0]).name}: error: {printable(message)}", file=sys.stderr)
    return status


def _with_command(arguments: Sequence[str]) -> list[str]:
    """`--suite topk` is `run --suite topk`."""
    if arguments and arguments[0] in ("-h", "--help", "--version"):
        return list(arguments)
    if arguments and not arguments[0].startswith("-"):
        return [pick("command", arguments[0], COMMANDS), *arguments[1:]]
    return [DEFAULT, *arguments]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in a line, and not also every option there is. Takes no option by half its name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it names no file and no directory; the current one is .")
    return Path(text)


def _version() -> str:
    try:
        return f"colt5-bench {version('colt5-bench')}"
    except PackageNotFoundError:
        return "colt5-bench, which is not installed"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        description="Measure implementations of the operations of conditionally routed attention.",
        epilog=f"examples, and what `{DEFAULT}` is short for:\n{run.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
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
