"""What is seen of a pytest session that the command line drives: a bar, and failures of the harness itself."""

import os
from types import TracebackType
from typing import Any, Self

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column


class Watcher:
    """A pytest plugin that shows a bar in place of pytest's own output, and keeps what no record tells of.

    Quiet, it shows nothing; verbose, also a line for each record, which goes into a log as well. It draws on a copy of
    the error stream, since pytest captures the stream itself while something is measured.
    """

    def __init__(self, title: str, *, quiet: bool = False, verbose: bool = False) -> None:
        self.failures: list[str] = []
        """Tracebacks of whatever failed outside a measurement."""

        self._stream = os.fdopen(os.dup(2), "w")
        self._console = console = Console(file=self._stream, highlight=False, markup=False, soft_wrap=True)
        self._verbose = verbose
        self._progress = Progress(
            TextColumn(title),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            # Of a line that is too long, this is what is cut.
            TextColumn("{task.fields[point]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            expand=True,
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=None, point="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._stream.close()

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.unregister(name="terminalreporter")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._progress.update(self._task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._progress.update(self._task, point=_point(nodeid))

    def pytest_runtest_logfinish(self) -> None:
        self._progress.advance(self._task)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append(report.longreprtext)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        if isinstance(excinfo.value, pytest.exit.Exception):
            self.failures.append(excinfo.value.msg)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told: dict[str, Any] = dict(report.user_properties)
        if report.failed and told.get("status", "ok") == "ok":
            self.failures.append(report.longreprtext)
        elif self._verbose and report.when == "call" and "status" in told:
            figure = told["reason"] or ("" if told["seconds"] is None else f"{1e3 * told['seconds']:.4g} ms")
            self._console.print(f"{told['status']:12} {_point(report.nodeid)}  {figure}".rstrip())


def _point(nodeid: str) -> str:
    """Case, direction and implementation."""
    return nodeid.partition("[")[2].removesuffix("]")
