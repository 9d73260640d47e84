"""Lines of strict JSON, in plain or compressed files.

JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" or "-Infinity".
"""

import gzip
import json
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from math import inf, isfinite, isnan, nan
from pathlib import Path
from typing import Any

from colt5_bench.texts import printable

_NUMBERS = {"NaN": nan, "Infinity": inf, "-Infinity": -inf}
_WORDS = tuple(f'"{word}"'.encode() for word in _NUMBERS)
_GZIP = b"\x1f\x8b"


def encode(content: Any) -> bytes:
    """The line of a dictionary, which may contain dataclasses. Values of other types are written as text, and
    characters that cannot be printed as escapes."""
    return json.dumps(_writable(content), allow_nan=False, default=str, ensure_ascii=False).encode() + b"\n"


def decode(line: bytes) -> Any:
    """The content of a line. Another program, with fewer escapes, may have written it.

    Raises:
        ValueError: the line is not JSON.
    """
    try:
        content = json.loads(line.decode())
        return content if _all_is_printable(line) else _shown(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error


def entries(content: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, without the slow copies of `dataclasses.asdict`."""
    return {each.name: getattr(content, each.name) for each in fields(content)}


def figures(value: Any, texts: Collection[str] = ()) -> Any:
    """The value with NaN and infinities instead of their strings, except in fields with a name of `texts`."""
    if isinstance(value, str):
        return _NUMBERS.get(value, value)
    if isinstance(value, dict):
        return {
            name: each if name in texts and isinstance(each, str) else figures(each, texts)
            for name, each in value.items()
        }
    return [figures(each, texts) for each in value] if isinstance(value, list) else value


def is_simple(line: bytes) -> bool:
    """True if any parser reads the same as `decode` and `figures`."""
    return _all_is_printable(line) and not any(word in line for word in _WORDS)


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, plain or in gzip, each with its end. Empty ones are left out.

    Raises:
        ValueError: the file has another encoding than UTF-8, or cannot be decompressed.
    """
    with path.open("rb") as file:
        start = file.read(len(BOM_UTF8))
        file.seek(0)
        if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise ValueError(f"{path} is UTF-16: convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`")
        try:
            for line in gzip.GzipFile(fileobj=file) if start.startswith(_GZIP) else file:
                if text := line.removeprefix(BOM_UTF8).strip(b" \t\r\n"):
                    yield text + line[-1:] if line.endswith(b"\n") else text
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} cannot be decompressed: {error}") from error


def _all_is_printable(line: bytes) -> bool:
    return line.isascii() and b"\\" not in line


def _writable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(str(name)): _writable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        return "NaN" if isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return _writable(entries(value)) if is_dataclass(value) else value


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(name): _shown(each) for name, each in value.items()}
    return [_shown(each) for each in value] if isinstance(value, list) else value
