"""The pytest plugin: a test that asks for `record` runs once for each case, direction and implementation of its suite.

All implementations of a case and direction are measured together when the first of their tests runs.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from colt5_bench import environment
from colt5_bench.case import Case
from colt5_bench.measure import Conditions, measure
from colt5_bench.replay import virtual_clock
from colt5_bench.results import Record, Writer
from colt5_bench.selection import SelectionError, case_filter, choose_device
from colt5_bench.static_facts import TARGETS
from colt5_bench.suite import PRESETS, Suite

MAX_SECONDS = {"smoke": 0.1, "default": 1.0, "full": 2.0}
"""How long sampling a time column of a case may take, by preset. A smoke run shows that everything runs."""


class _Key(NamedTuple):
    """What is measured together."""

    suite: str
    case: str
    direction: str


class Run:
    """What one pytest session measures, and where the records go."""

    def __init__(
        self,
        *,
        device: torch.device,
        preset: str,
        implementations: list[str],
        cases: str,
        out: Path | None,
        targets: list[int],
    ) -> None:
        self._device = device
        self._preset = preset
        self._implementations = implementations
        self._wanted = case_filter(cases)
        self._out = out
        self._targets = targets
        self._cases: dict[tuple[str, str], tuple[Suite, Case]] = {}
        self._expected: dict[_Key, list[str]] = {}
        self._records: dict[tuple[_Key, str], Record] = {}
        self._writers: dict[str, Writer] = {}
        self._conditions: Conditions | None = None
        self._environment: dict[str, object] = {}

    def points(self, suite: Suite) -> Iterator[tuple[str, str, str]]:
        """Case id, direction and implementation of everything that was asked for."""
        names = [name for name in suite.implementations if not self._implementations or name in self._implementations]
        for case in suite.cases(self._preset, self._device):
            if self._wanted(case.id):
                self._cases[suite.name, case.id] = suite, case
                for direction in suite.directions(case):
                    for name in names:
                        yield case.id, direction, name

    def expect(self, key: _Key, implementation: str) -> None:
        """A record of this will have to be there at the end."""
        self._expected.setdefault(key, []).append(implementation)

    def record(self, key: _Key, implementation: str) -> Record:
        """The record, measured together with those of the other implementations if it is the first of them."""
        if (key, implementation) not in self._records:
            suite, case = self._cases[key.suite, key.case]
            with warnings.catch_warnings():
                # What a measured implementation warns of is no failure, whatever filter the tests run under.
                warnings.simplefilter("default")
                records = measure(suite, case, key.direction, self._expected[key], self._prepare())
            for record in records:
                self._records[key, record.implementation] = record
                if self._out is not None:
                    self._writer(key.suite, self._out).record(record)
        return self._records[key, implementation]

    def missing(self) -> list[str]:
        """What was expected and never recorded."""
        return [
            " ".join((*key, name))
            for key, names in self._expected.items()
            for name in names
            if (key, name) not in self._records
        ]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _prepare(self) -> Conditions:
        if self._conditions is None:
            described = environment.describe(self._device)
            digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]
            self._conditions = Conditions.on(
                self._device, digest, max_seconds=MAX_SECONDS[self._preset], targets=self._targets
            )
            self._environment = {"key": digest, **described, "ceilings": asdict(self._conditions.ceilings)}
        return self._conditions

    def _writer(self, suite: str, out: Path) -> Writer:
        if suite not in self._writers:
            self._writers[suite] = Writer(out / f"{suite}.jsonl")
            self._writers[suite].environment(self._environment)
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
    group.addoption(
        "--compile-for", action="append", default=[], type=int, choices=TARGETS, help="Without a GPU: compile kernels."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the run, unless its options make none."""
    if config.getoption("dist", "no") != "no":
        raise pytest.UsageError("suites are measured one case at a time: leave out -n")
    try:
        config.stash[_RUN] = Run(
            device=choose_device(config.getoption("--device")),
            preset=config.getoption("--preset"),
            implementations=config.getoption("--impl"),
            cases=config.getoption("--cases"),
            out=config.getoption("--out"),
            targets=config.getoption("--compile-for"),
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
            for case, direction, implementation in config.stash[_RUN].points(suite)
        ],
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was collected, and not deselected since, is what has to be recorded, unless collecting is all there is."""
    if session.config.getoption("collectonly"):
        return
    for item in filter(_is_measured, session.items):
        session.config.stash[_RUN].expect(*_point(item))


@pytest.fixture
def record(request: pytest.FixtureRequest, case: str, direction: str, implementation: str) -> Record:
    """What was measured for the case, direction and implementation of this test."""
    taken = request.config.stash[_RUN].record(*_point(request.node))
    request.node.user_properties.append(("status", taken.status))
    return taken


def _is_measured(item: pytest.Item) -> bool:
    """Not so for what stands in for a suite of which no case was asked for: pytest skips it."""
    if not isinstance(item, pytest.Function) or "record" not in item.fixturenames:
        return False
    return isinstance(item.callspec.params["case"], str)


def _point(item: pytest.Item) -> tuple[_Key, str]:
    assert isinstance(item, pytest.Function)
    case, direction, implementation = (
        str(item.callspec.params[name]) for name in ("case", "direction", "implementation")
    )
    return _Key(item.module.SUITE.name, case, direction), implementation


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
