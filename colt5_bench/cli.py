"""The command line: `python bench.py COMMAND ...`."""

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from colt5_bench.commands import CLOSED, INTERRUPTED, UNMEASURED, USAGE
from colt5_bench.files import describe_os_error
from colt5_bench.process.garbage import no_garbage_collection
from colt5_bench.selection import SelectionError, pick
from colt5_bench.startup import StartupError, ending_at_once
from colt5_bench.texts import describe_error, printable

COMMANDS = {
    "run": "measure suites; the default command",
    "list": "list the suites and what they measure",
    "compare": "say what became better or worse between two saved runs, or between two revisions, measured in turns",
    "baseline": "make a run the baseline of later runs, and print the differences",
    "merge": "join the results of all shards of a run into one file",
    "report": "write a run as an HTML page, plots, CSV or Parquet, or several runs as a leaderboard",
    "export": "write a run in the format of pytest-benchmark, github-action-benchmark, bencher.dev or flashinfer-bench",
    "history": "plot chosen cases over saved runs and revisions, oldest first",
    "selftest": "check that times are right on this machine, and that verdicts can be trusted",
    "new-suite": "write a working suite to a file, as a start for your own",
    "env": "print the hardware and the versions of a run on this machine, for a bug report",
    "completion": "print a script for completion of `colt5-bench` in a shell",
}
"""Each is a module of `commands`, with `EXAMPLES`, `configure(parser)` and `main(options)`, imported if it is named."""

DEFAULT = "run"

EXAMPLES = """\
  python bench.py --list
  python bench.py --suite coor_descent
  python bench.py --suite all --preset smoke
  python bench.py --suite coor_descent --baseline reports/baselines/nvidia-h200.jsonl --check
  python bench.py compare main my-branch --suite coor_descent
  python bench.py run --help
"""

WRONG_PLACE = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EAGAIN),
)
"""Errors that depend on a path given by the user."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, which is right for every kind of error."""
    if not os.environ.get("COLUMNS", "1").strip("0 "):
        # Some pseudo-terminals set a width of 0, with which nothing would be shown.
        del os.environ["COLUMNS"]
    try:
        try:
            return _main(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            # Flushed here, because an error at the exit of Python would change the status.
            _flush()
    except (StartupError, SelectionError) as error:
        return _failed(str(error), USAGE)
    except ModuleNotFoundError as error:
        return _failed(
            f"the package {error.name!r} is not installed. In a checkout, run `make install`, then start "
            "`.venv/bin/python bench.py`. Elsewhere, run `pip install 'colt5-bench[bench]'`",
            USAGE,
        )
    except BrokenPipeError:
        return CLOSED
    except OSError as error:
        of_the_user = error.filename is not None and error.errno in WRONG_PLACE
        return _failed(describe_os_error(error), USAGE if of_the_user else UNMEASURED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        # This is how rich ends if its output is closed.
        if end.code == 1:
            return CLOSED
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return _failed(f"in {where.filename}:{where.lineno}: {describe_error(error)}", UNMEASURED)


def _main(arguments: list[str]) -> int:
    # Arguments after `--` are passed on unread.
    split = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, passed_on = arguments[:split], arguments[split + 1 :]
    arguments = _with_command(arguments)
    named = arguments[0]
    parser = _parser(COMMANDS if named == "completion" else [name for name in COMMANDS if name == named])
    options = parser.parse_args(arguments)
    options.pytest, options.parser = passed_on, parser
    main: Callable[[argparse.Namespace], int] = _command(options.command).main
    return main(options)


def _command(name: str) -> Any:
    # PyTorch reads it at import. Otherwise, warnings of its allocator would disturb the progress bar.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with ending_at_once(), no_garbage_collection():
        return import_module(f"colt5_bench.commands.{name.replace('-', '_')}")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            # Otherwise Python would try to write the remaining text again at its exit.
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
        named = [pick("command", arguments[0], COMMANDS), *arguments[1:]]
    else:
        named = [DEFAULT, *arguments]
    if named[0] == DEFAULT and "--list" in named:
        return ["list", *(word for word in named[1:] if word != "--list")]
    return named


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without all options. Options cannot be abbreviated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("a path must not be empty; . is the current directory")
    return Path(text)


def _version() -> str:
    try:
        return f"colt5-bench {version('colt5-bench')}"
    except PackageNotFoundError:
        return "colt5-bench, which is not installed"


def _parser(wanted: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of all commands. Only the wanted ones get their options."""
    parser = _Parser(
        description="Measure implementations of conditionally routed attention (CoLT5): time, memory and accuracy.",
        epilog=f"examples:\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        one = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in wanted:
            command = _command(name)
            one.epilog = f"examples:\n{command.EXAMPLES}"
            command.configure(one)
    return parser
