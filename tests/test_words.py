"""Docstrings and comments begin with a short sentence, whose subject comes first."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = "kernels", "reference", "suites", "colt5_bench", "tests"
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

MOST_WORDS = 20
NO_SUBJECT = re.compile(r"(what|that of|of|which|how|whether)\b", re.IGNORECASE)
END_OF_SENTENCE = re.compile(r"\n\s*\n|(?<=[.!?])\s+(?=[^a-z\s])")
CODE = re.compile(r"(`+)[^`]*\1")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, of modules, functions, classes and fields."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment; consecutive lines with one indent are one comment."""
    line, column, text = 0, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        (row, start), words = token.start, token.string.lstrip("#: ")
        if text and (row, start) == (line + text.count("\n") + 1, column):
            text += "\n" + words
            continue
        if text:
            yield line, text
        line, column, text = row, start, words
    if text:
        yield line, text


def fault(text: str) -> str | None:
    """Reason why a first sentence is hard to read."""
    sentence = END_OF_SENTENCE.split(text.strip(), maxsplit=1)[0]
    if NO_SUBJECT.match(sentence):
        return "no subject at the beginning"
    words = [word for word in CODE.sub("code", sentence).split() if re.search("[a-zA-Z]", word)]
    return f"{len(words)} words" if len(words) > MOST_WORDS else None


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_first_sentences_are_short_and_begin_with_their_subject(path):
    source = path.read_text()
    faults = {line: fault(text) for line, text in [*docstrings(source), *comments(source)] if fault(text)}
    assert not faults


@pytest.mark.parametrize("start", ["What it is", "That of it", "Of it", "Which it is", "How it is", "Whether it is"])
def test_a_sentence_without_its_subject_is_found(start):
    assert fault(f"{start}.")
    assert not fault(f"The sentence: {start}.")
    assert dict(comments(f"x = 1\n# {start}\n# or not\ny = 2  # Yes\n")) == {2: f"{start}\nor not", 4: "Yes"}


@pytest.mark.parametrize("words", [19, 20, 21])
def test_a_long_sentence_is_found(words):
    sentence = " ".join(["word"] * words)
    assert bool(fault(f"{sentence}. Another one.")) == (words > MOST_WORDS)
    assert bool(fault(" ".join(["`x y`"] * words))) == (words > MOST_WORDS)
