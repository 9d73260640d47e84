"""The pytest plugin: a test that asks for `record` runs once for each case, direction and implementation of its suite.

All implementations of a case and direction are measured together when the first of their tests runs.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from colt5_bench.files import describe_os_error
from colt5_bench.loading import installed_guests, invite
from colt5_bench.pytest_plugin.replay import virtual_clock
from colt5_bench.records.results import Group, Record
from colt5_bench.request import MEASURING, Request, declare
from colt5_bench.selection import SelectionError
from colt5_bench.session import Session

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of the command line, except short ones, which are reserved for pytest."""
    group = parser.getgroup("colt5-bench", "measuring suites")

    def add(*flags: str, **settings: Any) -> None:
        group.addoption(*(flag for flag in flags if flag.startswith("--")), **settings)

    declare(add, MEASURING)


def pytest_configure(config: pytest.Config) -> None:
    """Prepare the session, and check its options."""
    if config.getoption("dist", "no") != "no":
        raise pytest.UsageError("cases of suites are measured one at a time: leave out -n")
    try:
        config.stash[_SESSION] = Session(Request.of(config.option))
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each point of the suite in the module of the test function."""
    if "record" not in metafunc.fixturenames:
        return
    config = metafunc.config
    try:
        suite = metafunc.module.SUITE
        suite = invite(suite, (*installed_guests(suite), *Request.of(config.option).guests))
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from error
    # Cases have no timeout.
    patient = [pytest.mark.timeout(0)] if config.pluginmanager.hasplugin("timeout") else []
    metafunc.parametrize(
        ("case", "direction", "implementation"),
        [
            pytest.param(
                group.case,
                group.direction,
                implementation,
                id=f"{group.case}-{group.direction}-{implementation}",
                marks=[pytest.mark.benchmark(group=f"{group.case} {group.direction}", timer=virtual_clock), *patient],
            )
            for group, implementation in config.stash[_SESSION].points(suite, Path(metafunc.module.__file__))
        ],
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take the collected tests that were not deselected as the expected records, unless pytest only collects."""
    if session.config.getoption("collectonly"):
        return
    asking = [item for item in session.items if isinstance(item, pytest.Function) and "record" in item.fixturenames]
    suites = list(dict.fromkeys(item.module.SUITE.name for item in asking))
    try:
        with _uncaptured(session.config):
            session.config.stash[_SESSION].begin(map(_point, filter(_is_measured, asking)), suites)
    except SelectionError as error:
        raise pytest.UsageError(str(error)) from error
    except OSError as error:
        raise pytest.UsageError(describe_os_error(error)) from error


@pytest.fixture
def record(request: pytest.FixtureRequest, case: str, direction: str, implementation: str) -> Record:
    """The record of the case, direction and implementation of this test."""
    group, _ = _point(request.node)
    try:
        records = request.config.stash[_SESSION].measure(group)
    except OSError as error:
        # All later results would be lost, too.
        pytest.exit(describe_os_error(error), returncode=pytest.ExitCode.INTERNAL_ERROR)
    return next(record for record in records if record.implementation == implementation)


def _uncaptured(config: pytest.Config) -> AbstractContextManager[None]:
    """A context whose output is shown to the user."""
    capturing = config.pluginmanager.getplugin("capturemanager")
    return capturing.global_and_fixture_disabled() if capturing else nullcontext()


def _is_measured(item: pytest.Function) -> bool:
    """False for the placeholder of a suite without selected cases, which pytest skips."""
    return isinstance(item.callspec.params["case"], str)


def _point(item: pytest.Item) -> tuple[Group, str]:
    assert isinstance(item, pytest.Function)
    case, direction, implementation = (
        str(item.callspec.params[name]) for name in ("case", "direction", "implementation")
    )
    return Group(item.module.SUITE.name, case, direction), implementation


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Close the results, and fail if an expected record is missing or the code changed during the run."""
    own = session.config.stash[_SESSION]
    try:
        own.close()
    except OSError as error:
        print(describe_os_error(error), file=sys.stderr)
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        return
    if (own.missing() or own.changed) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name missing records, and changes of the code."""
    own = config.stash[_SESSION]
    for title, lines in {"expected and not measured": own.missing(), "code that changed": own.changed}.items():
        if lines:
            terminalreporter.section(title, red=True)
            for line in lines:
                terminalreporter.line(line)
