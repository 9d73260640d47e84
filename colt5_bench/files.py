"""Files that are whole or not there at all, and that one process at a time appends to."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from colt5_bench.texts import printable


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A place to write the content of `path`. Whatever happens, the file has its content from before or all of the new
    one.

    Directories on the way to it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and with another ending: nobody takes it for what it is to become.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def own(path: Path) -> FileIO:
    """Open a file to append to; until it is closed no other process can.

    Raises:
        BlockingIOError: another process has it open.
    """
    while True:
        file = FileIO(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BlockingIOError(errno.EAGAIN, "another run is writing to it", str(path)) from None
        except OSError:
            # A file system without locks has none to give.
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        # Whoever had it until now has put another file in its place.
        file.close()


def describe_os_error(error: OSError) -> str:
    """The path that cannot be used, and why, in one line."""
    what = "what is needed" if error.filename is None else error.filename
    return printable(f"cannot use {what}: {error.strerror or error}")


def append(file: FileIO, line: bytes) -> None:
    """Write a line, or nothing of it."""
    end = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        with suppress(OSError):
            file.truncate(end)
        error.filename = str(file.name)
        raise
