"""The pytest plugin: a test that asks for `record` runs once for each case, direction and implementation of its suite.

All implementations of a case and direction are measured together when the first of their tests runs.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch

from colt5_bench import environment
from colt5_bench.files import trouble
from colt5_bench.isolation import TIME_LIMIT, Measurer, Point
from colt5_bench.measure import Conditions
from colt5_bench.parts import keep_finished
from colt5_bench.replay import virtual_clock
from colt5_bench.results import Group, Record, Writer
from colt5_bench.selection import WHOLE, SelectionError, Shard, case_filter, choose_device, parse_seconds
from colt5_bench.static_facts import TARGETS
from colt5_bench.suite import PRESETS, Suite

MAX_SECONDS = {"smoke": 0.1, "default": 1.0, "full": 2.0}
"""How long sampling a time column of a case may take, by preset. A smoke run shows that everything runs."""


@dataclass(frozen=True)
class Options:
    """What a run was asked for; the command line explains each."""

    device: torch.device
    preset: str = "default"
    implementations: tuple[str, ...] = ()
    cases: str = ""
    shard: Shard = WHOLE
    out: Path | None = None
    resume: bool = False
    isolate: bool = False
    time_limit: float | None = None
    targets: tuple[int, ...] = ()
    """What kernels are compiled for where there is no GPU."""

    def __post_init__(self) -> None:
        if self.resume and self.out is None:
            raise SelectionError("--resume needs --out, which says where the results are that are to be completed.")

    def of_results(self, suite: str) -> dict[str, object]:
        """Those that decide which records there are to be, as the results state them."""
        return {
            "suite": suite,
            "preset": self.preset,
            "implementations": list(self.implementations),
            "cases": self.cases,
            "shard": str(self.shard),
            "targets": list(self.targets),
        }


class Run:
    """What one pytest session measures, and where the records go."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._wanted = case_filter(options.cases)
        isolated = options.isolate or options.time_limit is not None
        self._measurer = Measurer(isolated=isolated, time_limit=options.time_limit or TIME_LIMIT)
        self._points: dict[Group, Point] = {}
        self._expected: dict[Group, list[str]] = {}
        self._records: dict[tuple[Group, str], Record] = {}
        self._environments: dict[str, dict[str, object]] = {}
        """By suite."""
        self._writers: dict[str, Writer] = {}
        self._begun: set[str] = set()
        """Suites of which the results say what they were measured under."""
        self._conditions: Conditions | None = None

    def points(self, suite: Suite, file: Path) -> Iterator[tuple[str, str, str]]:
        """Case id, direction and implementation of everything that was asked for."""
        options = self._options
        names = [
            name for name in suite.implementations if not options.implementations or name in options.implementations
        ]
        cases = [case for case in suite.cases(options.preset, options.device) if self._wanted(case.id)]
        for case in options.shard.of(cases):
            for direction in suite.directions(case):
                group = Group(suite.name, case.id, direction)
                self._points[group] = Point(suite, case, direction, file, options.preset)
                for name in names:
                    yield case.id, direction, name

    def begin(self, expected: list[tuple[Group, str]], suites: list[str]) -> None:
        """What will have to be recorded, and the suites that were asked for. An interrupted run is read.

        Raises:
            SelectionError: there are results already, which are not to be completed or cannot be.
            OSError: there is no place for results, or another run is writing there.
        """
        for group, implementation in expected:
            self._expected.setdefault(group, []).append(implementation)
        for suite in suites:
            described = environment.describe(self._options.device)
            described["options"] = self._options.of_results(suite)
            described["expected"] = sum(len(names) for group, names in self._expected.items() if group.suite == suite)
            digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
            self._environments[suite] = {"key": digest, **described}
            if self._options.out is not None:
                self._own(suite, self._options.out / f"{suite}.jsonl")

    def record(self, group: Group, implementation: str) -> Record:
        """The record, measured together with those of the other implementations if it is the first of them."""
        if (group, implementation) not in self._records:
            conditions = self._prepare(group.suite)
            with warnings.catch_warnings():
                # What a measured implementation warns of is no failure, whatever filter the tests run under.
                warnings.simplefilter("default")
                records = self._measurer.measure(self._points[group], self._expected[group], conditions)
            for record in records:
                self._records[group, record.implementation] = record
                if group.suite in self._writers:
                    self._writer(group.suite).record(record)
        return self._records[group, implementation]

    def missing(self) -> list[str]:
        """What was expected and never recorded."""
        return [
            " ".join((*group, name))
            for group, names in self._expected.items()
            for name in names
            if (group, name) not in self._records
        ]

    def close(self) -> None:
        for suite, writer in self._writers.items():
            nothing = not self._environments[suite]["expected"] and not writer.path.stat().st_size
            if nothing and self._options.shard != WHOLE:
                # A shard without a case is there, all the same.
                self._writer(suite)
            writer.close()

    def _own(self, suite: str, path: Path) -> None:
        self._writers[suite] = writer = Writer(path)
        if not path.stat().st_size:
            return
        if not self._options.resume:
            raise SelectionError(
                f"{path} is there already: complete it with --resume, or name a place without results with --out."
            )
        for record in keep_finished(writer, self._environments[suite], self._expected):
            self._records[record.group, record.implementation] = record

    def _prepare(self, suite: str) -> Conditions:
        if self._conditions is None:
            self._conditions = Conditions.on(
                self._options.device,
                "",
                max_seconds=MAX_SECONDS[self._options.preset],
                targets=self._options.targets,
            )
        return replace(self._conditions, environment=str(self._environments[suite]["key"]))

    def _writer(self, suite: str) -> Writer:
        if suite not in self._begun:
            ceilings = asdict(self._prepare(suite).ceilings)
            self._writers[suite].environment({**self._environments[suite], "ceilings": ceilings})
            self._begun.add(suite)
        return self._writers[suite]


_RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a run; the command line has the same, and explains them better."""
    group = parser.getgroup("colt5-bench", "measuring suites")
    group.addoption("--preset", choices=PRESETS, default="default", help="How much of each suite to measure.")
    group.addoption("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:<index>.")
    group.addoption(
        "--impl", action="append", default=[], metavar="NAME", help="Measure this implementation; may be repeated."
    )
    group.addoption(
        "--cases", default="", metavar="EXPR", help="Only cases whose id satisfies an expression such as 'n=512'."
    )
    group.addoption(
        "--out", type=Path, default=None, metavar="DIR", help="Write records to DIR/<suite>.jsonl as they are taken."
    )
    group.addoption("--resume", action="store_true", help="Measure what is missing in the results of --out.")
    group.addoption("--shard", default=str(WHOLE), metavar="I/N", help="Only this one of N shares of the cases.")
    group.addoption("--isolate", action="store_true", help="Measure each case in a process of its own.")
    group.addoption(
        "--compile-for", action="append", default=[], type=int, choices=TARGETS, help="Without a GPU: compile kernels."
    )
    group.addoption(
        "--time-limit", default=None, metavar="SECONDS", help="End the process of a case after this; isolates."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the run, unless its options make none."""
    if config.getoption("dist", "no") != "no":
        raise pytest.UsageError("suites are measured one case at a time: leave out -n")
    out = config.getoption("--out")
    try:
        limit = config.getoption("--time-limit")
        config.stash[_RUN] = Run(
            Options(
                device=choose_device(config.getoption("--device")),
                preset=config.getoption("--preset"),
                implementations=tuple(config.getoption("--impl")),
                cases=config.getoption("--cases"),
                shard=Shard.parse(config.getoption("--shard")),
                # What is measured may change the current directory.
                out=None if out is None else out.absolute(),
                resume=config.getoption("--resume"),
                isolate=config.getoption("--isolate"),
                time_limit=None if limit is None else parse_seconds(limit),
                targets=tuple(config.getoption("--compile-for")),
            )
        )
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each point of the suite that stands beside the test function."""
    if "record" not in metafunc.fixturenames:
        return
    config, suite = metafunc.config, metafunc.module.SUITE
    # A case takes as long as it takes.
    patient = [pytest.mark.timeout(0)] if config.pluginmanager.hasplugin("timeout") else []
    metafunc.parametrize(
        ("case", "direction", "implementation"),
        [
            pytest.param(
                case,
                direction,
                implementation,
                id=f"{case}-{direction}-{implementation}",
                marks=[pytest.mark.benchmark(group=f"{case} {direction}", timer=virtual_clock), *patient],
            )
            for case, direction, implementation in config.stash[_RUN].points(suite, Path(metafunc.module.__file__))
        ],
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was collected, and not deselected since, is what has to be recorded, unless collecting is all there is."""
    if session.config.getoption("collectonly"):
        return
    asking = [item for item in session.items if isinstance(item, pytest.Function) and "record" in item.fixturenames]
    suites = list(dict.fromkeys(item.module.SUITE.name for item in asking))
    try:
        session.config.stash[_RUN].begin([_point(item) for item in filter(_is_measured, asking)], suites)
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from error
    except OSError as error:
        raise pytest.UsageError(trouble(error)) from error


@pytest.fixture
def record(request: pytest.FixtureRequest, case: str, direction: str, implementation: str) -> Record:
    """What was measured for the case, direction and implementation of this test."""
    try:
        taken = request.config.stash[_RUN].record(*_point(request.node))
    except OSError as error:
        # What is measured from here on would be lost, too.
        pytest.exit(trouble(error), returncode=pytest.ExitCode.INTERNAL_ERROR)
    column = next(iter(taken.timings), "")
    request.node.user_properties += [
        ("status", taken.status),
        ("reason", taken.reason),
        ("seconds", taken.seconds(column)),
    ]
    return taken


def _is_measured(item: pytest.Function) -> bool:
    """Not so for what stands in for a suite of which no case was asked for: pytest skips it."""
    return isinstance(item.callspec.params["case"], str)


def _point(item: pytest.Item) -> tuple[Group, str]:
    assert isinstance(item, pytest.Function)
    case, direction, implementation = (
        str(item.callspec.params[name]) for name in ("case", "direction", "implementation")
    )
    return Group(item.module.SUITE.name, case, direction), implementation


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Close the results, and fail if a record is missing that was expected."""
    run = session.config.stash[_RUN]
    run.close()
    if run.missing() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name the records that are missing."""
    if missing := config.stash[_RUN].missing():
        terminalreporter.section("expected and not measured", red=True)
        for point in missing:
            terminalreporter.line(point)
