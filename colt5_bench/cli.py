"""`python bench.py`: measures suites by running their files through pytest with the plugin."""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from rich.console import Console

from colt5_bench import plugin
from colt5_bench.progress import Watcher
from colt5_bench.report.plots import write_plots
from colt5_bench.report.table import summary
from colt5_bench.results import FAILED, load
from colt5_bench.selection import SelectionError, case_filter, choose_device, load_suites, pick, suite_files
from colt5_bench.startup import StartupError, check, find_checkout
from colt5_bench.suite import PRESETS, Suite

DONE, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

EXAMPLES = """\
examples:
  python bench.py --list
  python bench.py --suite coor_descent
  python bench.py --suite coor_descent --suite topk --preset smoke --device cpu
  python bench.py --suite coor_descent --impl reference --impl ours -k 'n=4096 and not eps=0.03'
  python bench.py --suite gradients --preset full --out reports/gradients
  python bench.py --suite coor_descent -- --benchmark-json=benchmark.json

exit status: 0 all is measured; 1 an implementation missed its accuracy bound or failed; 2 wrong usage; 130 interrupted,
with everything kept that was measured until then
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser()
    options = parser.parse_args(arguments[:split])
    try:
        checkout = find_checkout(Path.cwd().resolve())
        check(checkout)
        suites = load_suites(checkout)
        device = choose_device(options.device)
        if options.list:
            _list(suites, device)
            return DONE
        _validate(options, suites, device)
        return _run(options, [suites[name] for name in options.suite], checkout, arguments[split + 1 :])
    except (StartupError, SelectionError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure implementations of the operations of conditionally routed attention.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", action="append", default=[], metavar="NAME", help="measure this; may be repeated")
    parser.add_argument("--list", action="store_true", help="say which suites there are, and what they measure")
    parser.add_argument("--preset", choices=PRESETS, default="default", help="how much of it (default: %(default)s)")
    parser.add_argument("--impl", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument(
        "-k", dest="cases", default="", metavar="EXPR", help="only cases with this in their id; and, or, not, ( )"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>; default auto"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: reports/<utc-timestamp>-<suite>)"
    )
    parser.add_argument("pytest", nargs="*", metavar="-- OPTION ...", help="passed on to pytest")
    return parser


def _list(suites: dict[str, Suite], device: torch.device) -> None:
    for suite in suites.values():
        counts = ", ".join(f"{len(suite.cases(preset, device))} {preset}" for preset in PRESETS)
        print(f"{suite.name}: {suite.description}")
        print(f"    cases on {device.type}: {counts}")
        print(f"    implementations: {', '.join(suite.implementations)}")


def _validate(options: argparse.Namespace, suites: dict[str, Suite], device: torch.device) -> None:
    if not options.suite:
        raise SelectionError(f"say which suite with --suite; there is {', '.join(suites)}.")
    options.suite = list(dict.fromkeys(options.suite))
    wanted = case_filter(options.cases)
    for name in options.suite:
        suite = suites[pick("suite", name, suites)]
        for implementation in options.impl:
            pick(f"implementation in suite {name}", implementation, suite.implementations)
        if not any(wanted(case.id) for case in suite.cases(options.preset, device)):
            raise SelectionError(f"no case of suite {name}, preset {options.preset}, satisfies {options.cases!r}.")


def _run(options: argparse.Namespace, suites: list[Suite], checkout: Path, passed_on: list[str]) -> int:
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    status = DONE
    for suite in suites:
        directory = options.out or checkout / "reports" / f"{started}-{suite.name}"
        if options.out and len(suites) > 1:
            directory = directory / suite.name
        status = max(status, _run_suite(options, suite, checkout, directory, passed_on))
        if status in (USAGE, INTERRUPTED):
            break
    return status


def _run_suite(options: argparse.Namespace, suite: Suite, checkout: Path, directory: Path, passed_on: list[str]) -> int:
    results = directory / f"{suite.name}.jsonl"
    if results.exists():
        raise SelectionError(f"{results} is there already; --out has to name a place without results.")

    with Watcher(suite.name) as watcher:
        code = pytest.main(
            [
                str(suite_files(checkout)[suite.name]),
                # The project's settings of pytest are those of its tests.
                *("-c", os.devnull, "--rootdir", str(checkout), "-p", "no:cacheprovider"),
                *("--preset", options.preset, "--device", options.device, "--cases", options.cases),
                *("--out", str(directory)),
                *(f"--impl={name}" for name in options.impl),
                *passed_on,
            ],
            plugins=[plugin, watcher],
        )
    for failure in watcher.failures:
        print(failure, file=sys.stderr)

    failed = code == pytest.ExitCode.TESTS_FAILED or bool(watcher.failures)
    if results.exists():
        _, records = load(results)
        failed |= any(record.status in FAILED for record in records)
        console = Console()
        summary(records, suite.reference, console)
        plots = write_plots(records, directory, x=suite.x_axis, lines=suite.lines) if records else []
        console.print(f"results: {results}", soft_wrap=True, highlight=False)
        if plots:
            console.print(f"plots: {len(plots)} files in {directory}", soft_wrap=True, highlight=False)
    if code == pytest.ExitCode.INTERRUPTED and not watcher.failures:
        return INTERRUPTED
    if code == pytest.ExitCode.USAGE_ERROR:
        return USAGE
    return FAILURE if failed or code != pytest.ExitCode.OK else DONE
