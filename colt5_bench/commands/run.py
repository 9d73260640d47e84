"""`python bench.py run`, the default command: measure suites."""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

import torch
from rich.console import Console

from colt5_bench.commands import DONE, FAILURE, INTERRUPTED, UNMEASURED, USAGE, _check, _profile, attempt
from colt5_bench.commands._comparison import expression
from colt5_bench.files import describe_os_error
from colt5_bench.loading import choose_device, installed_guests, invite, load_suites, pick_suites
from colt5_bench.measuring import busy
from colt5_bench.records import provenance
from colt5_bench.records.environment import cores
from colt5_bench.records.parts import missing
from colt5_bench.records.results import FAILED, Run, load
from colt5_bench.report.progress import Watcher
from colt5_bench.report.table import endings, summary
from colt5_bench.request import MEASURING, NO_REPORT, REPORT, Request, declare
from colt5_bench.selection import WHOLE, SelectionError, case_filter, pick, split_paths, suite_files
from colt5_bench.session import Session
from colt5_bench.startup import check, find_checkout, reports_of
from colt5_bench.suite import Grid, TrainingSuite

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

Arguments after `--` are passed on to pytest.

exit status:
  0    everything is measured
  1    an implementation failed its accuracy gate, was refused or failed; with --check, something is worse than in the
       baseline
  2    wrong usage
  3    something could not be measured or compared
  4    with --check: nothing is certainly worse, but a time may be; noise hides the answer
  130  interrupted; everything measured so far is kept
  141  the program that reads the output has ended
"""


Measure = Callable[..., int]
"""Measures a suite, writes the results to the directory of the request, and returns an exit status."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="the same as the command `list`")
    declare(parser.add_argument, ("suite", *MEASURING))
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("-q", "--quiet", action="store_true", help="print only how the run ended")
    shown.add_argument("-v", "--verbose", action="store_true", help="print a line for each record when it is measured")
    _check.configure(parser)
    _profile.add_option(parser)


def main(options: argparse.Namespace) -> int:
    checkout = find_checkout(Path.cwd().resolve())
    check(checkout)
    request = Request.of(options)
    options.impl = list(request.implementations)
    options.suite, paths = split_paths(options.suite)
    suites = load_suites(checkout, paths)
    device = choose_device(request.device)
    _choose(options, request, suites)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        serve = _service(options, request, suites)
        if int(os.environ["RANK"]) > 0:
            serve()
            return DONE
    suites |= {name: invite(suites[name], (*installed_guests(suites[name]), *request.guests)) for name in options.suite}
    _validate(options, request, suites, paths, device)
    chosen = {name: suites[name] for name in options.suite}
    if options.profile:
        return _profile.main(options, request, list(chosen.values()), device, checkout)
    options.impl = _check.checked(options, chosen)
    request = replace(request, implementations=tuple(options.impl))
    check_against = _check.Check.of(options, suites, device)
    measure = partial(_run_suite, options, {**suite_files(checkout), **paths})
    return _run(options, request, chosen, checkout, check_against, measure, paths)


def _choose(options: argparse.Namespace, request: Request, suites: dict[str, Grid]) -> None:
    if not options.suite:
        raise SelectionError(f"name a suite with --suite: {', '.join(suites)}, or all.")
    options.suite = pick_suites(options.suite, suites)
    training = [name for name, suite in suites.items() if isinstance(suite, TrainingSuite)]
    if request.corpus is not None and not {*training} & {*options.suite}:
        named = ", ".join(options.suite)
        raise SelectionError(f"--corpus needs a suite that trains ({', '.join(training) or 'none'}), got {named}.")


def _service(options: argparse.Namespace, request: Request, suites: dict[str, Grid]) -> Callable[[], None]:
    """The work of all processes of `torchrun` except the first one, which measures.

    Raises:
        SelectionError: a suite runs in one process only, or several suites are selected.
    """
    found = {suites[name].serve for name in options.suite}
    if len(found) > 1 or None in found:
        alone = [name for name in options.suite if suites[name].serve is None]
        raise SelectionError(f"torchrun needs a suite that runs in several processes, got {', '.join(alone)}.")
    if request.isolate or request.time_limit is not None or request.targets:
        raise SelectionError("--isolate, --time-limit and --compile-for do not work under torchrun: leave them out.")
    (serve,) = found
    assert serve is not None
    return serve


def _validate(
    options: argparse.Namespace,
    request: Request,
    suites: Mapping[str, Grid],
    paths: Mapping[str, Path],
    device: torch.device,
) -> None:
    wanted = case_filter(request.cases)
    for name in options.suite:
        suite = suites[name]
        for implementation in request.implementations:
            pick(f"implementation in suite {name}", implementation, suite.implementations)
        if not any(wanted(case.id) for case in suite.cases(request.preset, device)):
            raise SelectionError(
                f"no case of suite {name}, preset {request.preset}, matches -k {request.cases!r}. -k only chooses "
                f"among the cases of a suite, which `python bench.py list --suite {paths.get(name, name)} --preset "
                f"{request.preset}` shows. For other sizes, write a suite of your own: docs/guests.md."
            )


def _run(
    options: argparse.Namespace,
    request: Request,
    suites: Mapping[str, Grid],
    checkout: Path,
    check_against: _check.Check | None,
    measure: Measure,
    paths: Mapping[str, Path],
) -> int:
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name = started if len(suites) > 1 else f"{started}-{next(iter(suites))}"
    out = request.out or _new_directory(reports_of(checkout), name)
    directories = {name: out / name if len(suites) > 1 else out for name in suites}
    status = DONE
    for name, suite in suites.items():
        status = max(status, measure(replace(request, out=directories[name]), suite))
        if status in (USAGE, INTERRUPTED):
            break
    if status == INTERRUPTED:
        again = _again(request, [str(paths.get(name, name)) for name in suites], options.out or out, options.pytest)
        print(f"interrupted; to complete the run: {again}", file=sys.stderr)
    if check_against is None or status in (USAGE, INTERRUPTED):
        return status

    def more(suite: Grid, points: Sequence[tuple[str, str]], directory: Path) -> int:
        cases = expression([*dict.fromkeys(case for case, _ in points)])
        selected = replace(request, cases=cases, points=tuple(points), out=directory, resume=False, shard=WHOLE)
        # A repetition needs no plots: the page of the run shows the findings of the comparison.
        return measure(selected, suite, drawn=False)

    return check_against.conclude(status, directories, suites, more)


def _new_directory(parent: Path, name: str) -> Path:
    """A new directory, even if another run began in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        with suppress(FileExistsError):
            (directory := parent / (name if number == 1 else f"{name}-{number}")).mkdir()
            break
    return directory


def _run_suite(
    options: argparse.Namespace, files: Mapping[str, Path], request: Request, suite: Grid, *, drawn: bool = True
) -> int:
    """Measure a suite, show it, and return the exit status."""
    assert request.out is not None
    # Before the measurement, so that no results are lost.
    request.out.mkdir(parents=True, exist_ok=True)
    on_cpu = suite.timed and choose_device(request.device).type == "cpu"
    crowded = busy.warning(torch.get_num_threads(), cores(), busy.busy_cores()) if on_cpu else ""
    if options.pytest:
        status = _through_pytest(request, files[suite.name], options.pytest)
    else:
        status = _measure(options, request, suite, files[suite.name])
    results = request.out / f"{suite.name}.jsonl"
    if status == USAGE:
        return status
    if not results.exists():
        return max(status, UNMEASURED)
    run = load(results)
    _show(run, suite, crowded, quiet=options.quiet)
    if drawn and os.environ.get(REPORT) != NO_REPORT:
        _draw(run, suite)
    if changes := "; ".join(filter(None, map(provenance.change, run.environments.values()))):
        print(f"{suite.name}: {changes}: measure again, and change no code until the run has ended", file=sys.stderr)
    if status == INTERRUPTED:
        return status
    if number := missing(run):
        print(f"{suite.name}: {number} of the expected records are missing", file=sys.stderr)
    if missing(run) or changes:
        return UNMEASURED
    return max(status, FAILURE if any(record.status in FAILED for record in run.records) else DONE)


def _measure(options: argparse.Namespace, request: Request, suite: Grid, file: Path) -> int:
    """Measure group after group. An error of the harness affects only its group."""
    session, failed = Session(request), False
    points = session.points(suite, file)
    try:
        session.begin(points, [suite.name])
        with (
            Watcher(suite.name, len(points), quiet=options.quiet, verbose=options.verbose) as watcher,
            # stdout is for the table.
            redirect_stdout(sys.stderr),
        ):
            for group in session.groups():
                watcher.begin(group)
                try:
                    for record in session.measure(group, watcher.tell):
                        watcher.done(record)
                except OSError as error:
                    # All later results would be lost, too.
                    print(describe_os_error(error), file=sys.stderr)
                    return UNMEASURED
                except Exception:
                    failed = True
                    print(f"{' '.join(group)}:\n{traceback.format_exc()}", file=sys.stderr)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        session.close()
    return UNMEASURED if failed else DONE


def _through_pytest(request: Request, file: Path, arguments: list[str]) -> int:
    """Measure as `pytest FILE` does, with more arguments for pytest."""
    import pytest  # Imported here, because it takes long and other runs do not need it.

    from colt5_bench.pytest_plugin import plugin

    # Options for the tests of the user could deselect cases.
    os.environ.pop("PYTEST_ADDOPTS", None)
    code = pytest.main(
        [
            str(file),
            # The settings of pytest in the project are for its tests.
            *("-c", os.devnull, "--rootdir", str(file.parents[1]), "-p", "no:cacheprovider"),
            *request.arguments(),
            *("--out", str(request.out), *(["--resume"] if request.resume else [])),
            *arguments,
        ],
        plugins=[plugin],
    )
    statuses = {
        pytest.ExitCode.OK: DONE,
        pytest.ExitCode.TESTS_FAILED: FAILURE,
        pytest.ExitCode.INTERRUPTED: INTERRUPTED,
        pytest.ExitCode.USAGE_ERROR: USAGE,
    }
    return statuses.get(pytest.ExitCode(code), UNMEASURED)


def _show(run: Run, suite: Grid, crowded: str, *, quiet: bool) -> None:
    console = Console()
    if quiet:
        endings(run.records, console)
    else:
        summary(run.records, suite.reference, console)
        if crowded:
            console.print(f"warning: {crowded}", soft_wrap=True, highlight=False)
    console.print(f"results: {run.path}", soft_wrap=True, highlight=False)


def _draw(run: Run, suite: Grid) -> None:
    # Imported here, because they take long and are needed only after the measurement.
    from colt5_bench.report.layout import View
    from colt5_bench.report.page import PAGE, write_page
    from colt5_bench.report.plots import write_plots

    console, directory = Console(), run.path.parent
    draw = partial(write_plots, run.records, directory, x=suite.x_axis, lines=suite.lines)
    plots = attempt("plots", draw) if run.records else []
    if plots:
        console.print(f"plots: {len(plots)} files in {directory}", soft_wrap=True, highlight=False)
    if page := attempt("report", partial(write_page, directory / PAGE, run, {suite.name: View.of(suite)})):
        console.print(f"report: {page}", soft_wrap=True, highlight=False)


def _again(request: Request, suites: list[str], out: Path, for_pytest: list[str]) -> str:
    """The command that completes a run."""
    words = ["python", "bench.py", *(word for name in suites for word in ("--suite", name))]
    words += [*request.arguments(), "--out", str(out), "--resume"]
    words += ["--", *for_pytest] if for_pytest else []
    return shlex.join(words)
