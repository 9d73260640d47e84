"""Files that are written completely or not at all, and files that one process at a time appends to."""

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
    """A path for the new content of `path`. After any error the file has either its old content or all of the new
    content.

    Missing directories are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Hidden, and with another ending, so that it is not taken for the finished file.
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


def open_exclusively(path: Path) -> FileIO:
    """Open a file to append to. Until it is closed, no other process can open it.

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
            # The file system has no locks.
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        # The process that had it until now has replaced the file.
        file.close()


def describe_os_error(error: OSError) -> str:
    """One line with the path that cannot be used, and the reason."""
    what = "what is needed" if error.filename is None else error.filename
    return printable(f"cannot use {what}: {error.strerror or error}")


def append(file: FileIO, line: bytes) -> None:
    """Write a whole line, or nothing."""
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
