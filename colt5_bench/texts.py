"""Texts that come from elsewhere, as they can be shown: on a terminal, in a page and in a results file."""


def printable(text: str) -> str:
    r"""The text with `\x1b` for what moves a cursor, ends a line or is half a character, and all else as it is."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def said(error: BaseException) -> str:
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
