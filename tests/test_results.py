"""Tables of README and docs, and figures in the text next to them, match the baseline of the H200."""

import pytest

from tests.measurements.tables import ROOT, WRITTEN, Baseline, Sentence, Table, pages

PAGES = sorted({each.page for each in WRITTEN})


def name(written):
    return f"{written.page} {written.header if isinstance(written, Table) else written.words}"


@pytest.fixture(scope="module")
def baseline():
    return Baseline()


@pytest.fixture(scope="module")
def texts():
    return {page: (ROOT / page).read_text() for page in PAGES}


def test_pages_say_what_the_baseline_says(baseline, texts):
    """After a new baseline, `python -m tests.measurements.tables` writes the figures into the pages."""
    assert pages(baseline, texts) == texts


@pytest.mark.parametrize("written", WRITTEN, ids=name)
def test_other_figures_are_found_and_mended(baseline, texts, written):
    text = texts[written.page]
    if isinstance(written, Table):
        others = written._replace(rows=lambda baseline: [[*row[:-1], f"{row[-1]}0"] for row in written.rows(baseline)])
    else:
        others = written._replace(figures=lambda baseline: dict.fromkeys(written.figures(baseline), "0.123"))
    wrong = others.written_to(text, baseline)
    assert wrong != text
    assert written.written_to(wrong, baseline) == text


@pytest.mark.parametrize("written", WRITTEN, ids=name)
def test_a_page_that_no_longer_has_the_words_is_told(baseline, written):
    with pytest.raises(ValueError, match=written.page):
        written.written_to("Other words.\n\n| other | header |\n|---|---|\n", baseline)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("It takes\n1.5 / 2 ms, or\n10.", "It takes\n3 / 4.25 ms, or\n7."),
        ("It takes 12 ms, or 0.25.", "It takes 3 / 4.25 ms, or 7."),
    ],
)
def test_figures_stand_in_any_line(text, written):
    sentence = Sentence("page", "takes {one} ms, or {two}.", lambda baseline: {"one": "3 / 4.25", "two": "7"})
    assert sentence.written_to(text, None) == written
