"""Texts that come from elsewhere, as they can be shown: on a terminal, in a page and in a results file."""


def printable(text: str) -> str:
    r"""The text with `\x1b` for what moves a cursor, ends a line or is half a character, and all else as it is."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def said(error: BaseException) -> str:
    """The type and the text of an exception, in one line."""
    try:
        text = str(error)
    except BaseException as why:
        if isinstance(why, KeyboardInterrupt):
            raise
        text = "its text cannot be read"
    return printable(" ".join(f"{type(error).__name__}: {text}".split()))
