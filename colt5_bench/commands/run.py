"""`python bench.py run`, which is what `python bench.py --suite ...` means: measure suites.

Each suite is a file of tests, run through pytest with the plugin.
"""

import argparse
import os
import shlex
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from rich.console import Console

from colt5_bench import busy, plugin
from colt5_bench.commands import DONE, FAILURE, INTERRUPTED, UNMEASURED, USAGE, _check, _profile, attempt
from colt5_bench.commands import list as list_command
from colt5_bench.environment import cores
from colt5_bench.isolation import TIME_LIMIT
from colt5_bench.parts import missing
from colt5_bench.progress import Watcher
from colt5_bench.report.layout import View
from colt5_bench.report.page import PAGE, write_page
from colt5_bench.report.plots import write_plots
from colt5_bench.report.table import endings, summary
from colt5_bench.results import FAILED, Run, load
from colt5_bench.selection import (
    SelectionError,
    Shard,
    case_filter,
    choose_device,
    load_suites,
    parse_seconds,
    pick,
    suite_files,
)
from colt5_bench.startup import check, find_checkout
from colt5_bench.static_facts import TARGETS
from colt5_bench.suite import PRESETS, Suite

SUMMARY = "measure suites; what is meant where no command is named"
EXAMPLES = """\
  python bench.py --list
  python bench.py --suite coor_descent
  python bench.py --suite all --preset smoke
  python bench.py --suite coor_descent --suite topk --preset smoke --device cpu
  python bench.py --suite coor_descent --impl reference --impl ours -k 'n=4096 and not eps=0.03'
  python bench.py --suite gradients --preset full --out reports/gradients
  python bench.py --suite coor_descent --impl ours -k n=4096 --profile torch
  python bench.py --suite layers --preset full --isolate --time-limit 600 --out reports/layers
  python bench.py --suite layers --preset full --isolate --time-limit 600 --out reports/layers --resume
  python bench.py --suite layers --shard 2/4 --out reports/layers-2
  python bench.py --suite coor_descent --baseline reports/baselines/nvidia-h200.jsonl --check
  python bench.py --suite coor_descent -- --benchmark-json=benchmark.json

what follows `--` is passed on to pytest

exit status: 0 all is measured; 1 an implementation missed its accuracy bound or failed, or with --check, something is
worse than in the baseline; 2 wrong usage; 3 could not measure, or not all; 4 with --check, nothing is worse for
certain, but a time may be: it is too noisy to tell; 130 interrupted, with everything kept that was measured until then;
141 nobody reads the output any more
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="this, or all; may be repeated")
    parser.add_argument("--list", action="store_true", help="the same as the command `list`")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="how much of it (default: %(default)s)")
    parser.add_argument("--impl", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument(
        "-k", dest="cases", default="", metavar="EXPR", help="only cases with this in their id; and, or, not, ( )"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>; default auto"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where results go (default: reports/<utc-timestamp>-<suite>, or without the suite for several)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="complete the run in --out, begun with the same options; what ended with an error is measured again",
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="only this one of N shares of the cases; `merge` joins the results of all"
    )
    parser.add_argument(
        "--isolate",
        action="store_true",
        help="measure each case in a process of its own, so that the run survives whatever one does; where a CUDA "
        "context breaks, the run goes on like this by itself",
    )
    parser.add_argument(
        "--time-limit",
        metavar="SECONDS",
        help=f"end the process of a case after this, and record an error (default: {TIME_LIMIT:g}); implies --isolate",
    )
    parser.add_argument(
        "--compile-for",
        action="append",
        default=[],
        type=int,
        choices=TARGETS,
        metavar="SM",
        help=f"without a GPU, record what the compiler makes of kernels for it: {', '.join(map(str, TARGETS))}; may be "
        "repeated",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("-q", "--quiet", action="store_true", help="no progress and no table, just how it ended")
    shown.add_argument("-v", "--verbose", action="store_true", help="a line for each record as it is taken")
    _check.configure(parser)
    _profile.add_option(parser)


def main(options: argparse.Namespace) -> int:
    if options.list:
        return list_command.main(options)
    checkout = find_checkout(Path.cwd().resolve())
    check(checkout)
    suites = load_suites(checkout)
    device = choose_device(options.device)
    _validate(options, suites, device)
    if options.profile:
        return _profile.main(options, [suites[name] for name in options.suite], device, checkout)
    check_against = _check.Check.of(options, suites, device)
    return _run(options, {name: suites[name] for name in options.suite}, checkout, check_against)


def _validate(options: argparse.Namespace, suites: dict[str, Suite], device: torch.device) -> None:
    if not options.suite:
        raise SelectionError(f"say which suite with --suite; there is {', '.join(suites)}, and all.")
    if options.resume and options.out is None:
        raise SelectionError("--resume completes the run in --out DIR: say which.")
    if options.shard:
        Shard.parse(options.shard)
    if options.time_limit:
        parse_seconds(options.time_limit)
    options.suite = list(suites if "all" in options.suite else dict.fromkeys(options.suite))
    wanted = case_filter(options.cases)
    for name in options.suite:
        suite = suites[pick("suite", name, suites)]
        for implementation in options.impl:
            pick(f"implementation in suite {name}", implementation, suite.implementations)
        if not any(wanted(case.id) for case in suite.cases(options.preset, device)):
            raise SelectionError(f"no case of suite {name}, preset {options.preset}, satisfies {options.cases!r}.")


def _run(
    options: argparse.Namespace, suites: dict[str, Suite], checkout: Path, check_against: _check.Check | None
) -> int:
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name = started if len(suites) > 1 else f"{started}-{options.suite[0]}"
    # What is measured may change the current directory.
    out = options.out.absolute() if options.out else _new_directory(checkout / "reports", name)
    directories = {name: out / name if len(suites) > 1 else out for name in suites}
    status = DONE
    for name, suite in suites.items():
        status = max(status, _run_suite(options, suite, checkout, directories[name]))
        if status in (USAGE, INTERRUPTED):
            break
    if status == INTERRUPTED:
        print(f"interrupted; this completes it: {_again(options, options.out or out)}", file=sys.stderr)
    if check_against is None or status in (USAGE, INTERRUPTED):
        return status

    def more(suite: Suite, cases: str, directory: Path) -> int:
        own = {"cases": cases, "resume": False, "shard": None}
        return _run_suite(argparse.Namespace(**{**vars(options), **own}), suite, checkout, directory)

    return check_against.conclude(status, directories, suites, more)


def _new_directory(parent: Path, name: str) -> Path:
    """One that no other run has, be it begun in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        with suppress(FileExistsError):
            (directory := parent / (name if number == 1 else f"{name}-{number}")).mkdir()
            break
    return directory


def _run_suite(options: argparse.Namespace, suite: Suite, checkout: Path, directory: Path) -> int:
    # Before anything is measured that could not be kept.
    directory.mkdir(parents=True, exist_ok=True)
    # Options for the user's own tests could leave out what is to be measured.
    os.environ.pop("PYTEST_ADDOPTS", None)
    on_cpu = suite.timed and choose_device(options.device).type == "cpu"
    crowded = busy.warning(torch.get_num_threads(), cores(), busy.busy_cores()) if on_cpu else ""
    with Watcher(suite.name, quiet=options.quiet, verbose=options.verbose) as watcher:
        code = pytest.main(
            [
                str(suite_files(checkout)[suite.name]),
                # The project's settings of pytest are those of its tests.
                *("-c", os.devnull, "--rootdir", str(checkout), "-p", "no:cacheprovider"),
                *("--preset", options.preset, "--device", options.device, "--cases", options.cases),
                *("--out", str(directory)),
                *(f"--impl={name}" for name in options.impl),
                *_how(options),
                *(["--resume"] if options.resume else []),
                *options.pytest,
            ],
            plugins=[plugin, watcher],
        )
    for failure in watcher.failures:
        print(failure, file=sys.stderr)
    if code == pytest.ExitCode.USAGE_ERROR:
        return USAGE

    failed = code == pytest.ExitCode.TESTS_FAILED
    results, complete = directory / f"{suite.name}.jsonl", False
    if results.exists():
        run = load(results)
        failed |= any(record.status in FAILED for record in run.records)
        complete = not missing(run)
        _show(run, suite, crowded, quiet=options.quiet)
    if code == pytest.ExitCode.INTERRUPTED and not watcher.failures:
        return INTERRUPTED
    if not complete:
        print(f"{suite.name}: not all records that were expected are there", file=sys.stderr)
    if not complete or watcher.failures or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return UNMEASURED
    return FAILURE if failed else DONE


def _show(run: Run, suite: Suite, crowded: str, *, quiet: bool) -> None:
    directory, console = run.path.parent, Console()
    if quiet:
        endings(run.records, console)
    else:
        summary(run.records, suite.reference, console)
        if crowded:
            console.print(f"warning: {crowded}", soft_wrap=True, highlight=False)
    draw = partial(write_plots, run.records, directory, x=suite.x_axis, lines=suite.lines)
    plots = attempt("plots", draw) if run.records else []
    console.print(f"results: {run.path}", soft_wrap=True, highlight=False)
    if plots:
        console.print(f"plots: {len(plots)} files in {directory}", soft_wrap=True, highlight=False)
    if page := attempt("report", partial(write_page, directory / PAGE, run, {suite.name: View.of(suite)})):
        console.print(f"report: {page}", soft_wrap=True, highlight=False)


def _how(options: argparse.Namespace) -> list[str]:
    """The options of a run that say how it is measured, as they were given."""
    return [
        *(["--shard", options.shard] if options.shard else []),
        *(["--isolate"] if options.isolate else []),
        *(["--time-limit", options.time_limit] if options.time_limit else []),
        *(f"--compile-for={target}" for target in options.compile_for),
    ]


def _again(options: argparse.Namespace, out: Path) -> str:
    """The command that completes a run."""
    words = ["python", "bench.py"]
    words += [word for name in options.suite for word in ("--suite", name)]
    words += ["--preset", options.preset, "--device", options.device]
    words += [word for name in options.impl for word in ("--impl", name)]
    words += ["-k", options.cases] if options.cases else []
    words += [*_how(options), "--out", str(out), "--resume"]
    words += ["--", *options.pytest] if options.pytest else []
    return shlex.join(words)
