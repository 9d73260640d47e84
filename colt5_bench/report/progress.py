"""Progress of a run on the terminal: a bar, and lines for records."""

import os
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from colt5_bench.records.results import Group, Record


class Watcher:
    """Shows a bar while a suite is measured.

    Quiet, it shows nothing. Verbose, it also prints a line for each record, in a log as well. It draws on a copy of
    stderr, because measured code may replace stderr.
    """

    def __init__(self, title: str, total: int, *, quiet: bool = False, verbose: bool = False) -> None:
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
            # This column is cut if a line is too long.
            TextColumn("{task.fields[point]}", markup=False, table_column=Column(ratio=1, no_wrap=True)),
            expand=True,
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total, point="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._stream.close()

    def begin(self, group: Group) -> None:
        """Show the point that is being measured."""
        self._progress.update(self._task, point=f"{group.case}-{group.direction}")

    def tell(self, text: str) -> None:
        """Show the progress."""
        self._progress.update(self._task, point=text)
        if self._verbose:
            self._console.print(text)

    def done(self, record: Record) -> None:
        """Show a finished record."""
        self._progress.advance(self._task)
        if self._verbose:
            seconds = record.seconds(next(iter(record.timings), ""))
            figure = record.reason or ("" if seconds is None else f"{1e3 * seconds:.4g} ms")
            point = f"{record.case}-{record.direction}-{record.implementation}"
            self._console.print(f"{record.status:12} {point}  {figure}".rstrip())
