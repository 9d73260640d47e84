"""Parts of the commands that compare with a baseline."""

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from colt5_bench.commands import DONE, FAILURE, UNDECIDED, UNMEASURED
from colt5_bench.compare import Comparison, IncomparableError, Rules, compare, load_rules
from colt5_bench.records.results import Record, Run
from colt5_bench.selection import SelectionError, case_filter
from colt5_bench.startup import find_checkout
from colt5_bench.suite import Grid

STATUSES = """\
exit status:
  0  no regression
  1  a regression: something failed, is missing or became worse
  2  wrong usage
  3  nothing could be compared, or measuring failed
  4  undecided: nothing is certainly worse, but a time may be; the machine is too noisy, or there are too few runs
"""


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--thresholds",
        type=Path,
        metavar="FILE",
        help="file with the thresholds of regressions (default: suites/thresholds.toml of the checkout)",
    )


def thresholds_file(options: argparse.Namespace) -> Path:
    """The file of `--thresholds`, or the default file of the checkout."""
    return options.thresholds or find_checkout(Path.cwd().resolve()) / "suites" / "thresholds.toml"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_thresholds(parser)
    parser.add_argument(
        "--any-machine",
        action="store_true",
        help="compare speed-ups over the reference instead of times, for runs from different machines",
    )


@dataclass(frozen=True)
class Comparer:
    """Compares runs by the options of a command."""

    rules: Rules
    references: Mapping[str, str]
    any_machine: bool

    @classmethod
    def of(cls, options: argparse.Namespace, suites: Mapping[str, Grid]) -> "Comparer":
        """Read the options. Errors in them are found before anything is measured."""
        references = {name: suite.reference for name, suite in suites.items()}
        return cls(load_rules(thresholds_file(options)), references, options.any_machine)

    def __call__(self, baseline: Run, run: Run, scope: Callable[[Record], bool]) -> Comparison:
        try:
            return compare(baseline, run, self.rules, self.references, scope=scope, any_machine=self.any_machine)
        except IncomparableError as error:
            raise SelectionError(str(error)) from error


def in_scope(options: argparse.Namespace) -> Callable[[Record], bool]:
    """True if `--suite`, `--impl` and `-k` select a record. An option that is not given selects everything."""
    wanted = case_filter(options.cases)
    return lambda record: (
        (not options.suite or record.suite in options.suite)
        and (not options.impl or record.implementation in options.impl)
        and wanted(record.case)
    )


def expression(cases: Collection[str], others: Iterable[str] = ()) -> str:
    """Expression for `-k` that selects these cases, but not others whose ids contain the id of a case."""
    excluded = {case: [other for other in others if case in other and other not in cases] for case in cases}
    terms = (f"{case} and not ({' or '.join(longer)})" if longer else case for case, longer in excluded.items())
    return " or ".join(f"({term})" for term in terms)


def status_of(comparison: Comparison) -> int:
    """The exit status for a comparison."""
    if not comparison.compared:
        return UNMEASURED
    if comparison.regressions:
        return FAILURE
    return UNDECIDED if comparison.undecided else DONE
