"""`python bench.py report`: a run as a page, as images, and as a table for other programs; runs as a leaderboard."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from colt5_bench.commands import DONE
from colt5_bench.commands._comparison import Comparer, add_options
from colt5_bench.compare import Finding, read_baseline
from colt5_bench.loading import load_suites
from colt5_bench.process.garbage import no_garbage_collection
from colt5_bench.records.derived import group_by
from colt5_bench.records.parts import read
from colt5_bench.records.results import Record, Run
from colt5_bench.report.export import write_csv, write_parquet
from colt5_bench.report.layout import View
from colt5_bench.report.leaderboard import LEADERBOARD, write_leaderboard
from colt5_bench.report.page import PAGE, write_page
from colt5_bench.report.plots import write_plots
from colt5_bench.selection import SelectionError
from colt5_bench.startup import check, find_checkout

EXAMPLES = """\
  python bench.py report reports/baselines/nvidia-h200.jsonl --out reports/h200.html
  python bench.py report reports/gradients --out gradients.csv --out gradients.parquet
  python bench.py report reports/gradients --plots docs/figures
  python bench.py report reports/h200 reports/h100 reports/laptop --out reports/leaderboard.html
  python bench.py report reports/after --baseline reports/baselines/nvidia-h200.jsonl
"""

ENDINGS = (".html", ".csv", ".parquet")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a results file, or a directory with results; several, from any machines, make a leaderboard",
    )
    parser.add_argument(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"file to write, ending in {', '.join(ENDINGS)}; may be repeated (default without --plots: {PAGE} beside "
        f"the results, or {LEADERBOARD} in the current directory)",
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write each plot to this directory, as PNG and SVG")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="results file or directory that the run is compared with, on the page",
    )
    add_options(parser)


@no_garbage_collection()
def main(options: argparse.Namespace) -> int:
    for path in options.out:
        if path.suffix not in ENDINGS:
            raise SelectionError(f"--out must end in {', '.join(ENDINGS)}, got {path}.")
    runs = [read(path) for path in options.runs]
    for run in runs:
        if not run.records:
            raise SelectionError(f"{run.path} contains no records.")
    if len(runs) > 1:
        return _leaderboard(options, runs)
    (run,), views = runs, load_views()
    findings = _compare(options, run) if options.baseline else None
    directory = run.path if run.path.is_dir() else run.path.parent
    for path in options.out or ([] if options.plots else [directory / PAGE]):
        print(_write(path, run, views, findings))
    if options.plots:
        for path in write_all_plots(run, views, options.plots):
            print(path)
    return DONE


def _leaderboard(options: argparse.Namespace, runs: Sequence[Run]) -> int:
    if options.plots or options.baseline:
        raise SelectionError(f"--plots and --baseline need exactly one run, got {len(runs)}.")
    views, records = load_views(), [record for run in runs for record in run.records]
    for path in options.out or [Path(LEADERBOARD)]:
        print(write_leaderboard(path, runs, views) if path.suffix == ".html" else _write_table(path, records))
    return DONE


def _compare(options: argparse.Namespace, run: Run) -> Sequence[Finding]:
    suites = {record.suite for record in run.records}
    comparer = Comparer.of(options, load_suites(find_checkout(Path.cwd().resolve())))
    return comparer(read_baseline(options.baseline), run, lambda record: record.suite in suites).findings


def load_views() -> dict[str, View]:
    """Views of the suites of this checkout, by name."""
    checkout = find_checkout(Path.cwd().resolve())
    check(checkout)
    return {name: View.of(suite) for name, suite in load_suites(checkout).items()}


def write_all_plots(run: Run, views: dict[str, View], directory: Path) -> list[Path]:
    """The plots of each suite. If there are several, each has its own directory."""
    suites = group_by(run.records, lambda record: record.suite)
    paths = []
    for records in suites:
        name = records[0].suite
        view = views.get(name, View())
        place = directory / name if len(suites) > 1 else directory
        paths += write_plots(records, place, x=view.x, lines=view.lines)
    return paths


def _write(path: Path, run: Run, views: dict[str, View], findings: Sequence[Finding] | None) -> Path:
    if path.suffix == ".html":
        return write_page(path, run, views, findings=findings)
    return _write_table(path, run.records)


def _write_table(path: Path, records: Sequence[Record]) -> Path:
    try:
        return write_csv(path, records) if path.suffix == ".csv" else write_parquet(path, records)
    except ImportError as error:
        hint = "pip install -c constraints.txt -e '.[parquet]'"
        raise SelectionError(f"--out {path} needs pyarrow, which is not installed: {hint}") from error
