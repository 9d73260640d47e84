"""Texts from other sources, made printable on a terminal, in a page and in a results file."""

from shutil import get_terminal_size
from textwrap import fill

NARROWEST = 40
"""Narrowest width of tables and lines, even in a narrower terminal."""

Plain = str | int | float | bool | None
"""Types of scalar JSON values."""


def printable(text: str) -> str:
    r"""The text with escapes such as `\x1b` for control characters, ends of lines and half characters. All else is as
    it is."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def folded(line: str) -> str:
    """Wrap lines between words to the width of the terminal."""
    width = max(get_terminal_size().columns, NARROWEST)
    return fill(line, width, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)


def describe_error(error: BaseException) -> str:
    """The type and the text of an exception, in one line."""
    return printable(" ".join(f"{type(error).__name__}: {_text(error)}".split()))


def first_line(error: BaseException) -> str:
    """The type and the first line of the text of an exception."""
    return printable(f"{type(error).__name__}: {_text(error)}".splitlines()[0])


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "its text cannot be read"
