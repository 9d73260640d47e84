"""The page as its readers have it: in Chromium, from disk, with no network."""

import os
import shutil
from math import nan
from time import perf_counter

import pytest
from playwright.sync_api import sync_playwright

from colt5_bench.report.layout import View
from colt5_bench.report.page import write_page
from colt5_bench.results import Run
from tests.colt5_bench.made import BOTH, FORWARD, diverging, record, timed

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

LOADS_WITHIN = 3.0
"""Seconds in which 2,000 records have to be there, to be read, sorted and filtered."""

WIDE, PHONE = {"width": 1360, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = f"there is none of {', '.join(BROWSERS)} here: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox; nothing but our own page is opened.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """2,000 records of a suite with times and of one with divergence and metrics."""
    records = [
        timed(name, factor * n / 1e3, column, direction=direction, n=n, eps=eps)
        for n in range(1, 51)
        for eps in (0.1, 0.03)
        for direction in (FORWARD, BOTH)
        for name, factor in (("reference", 8), ("ours", 2), ("other", 3), ("fourth", 4))
        for column in ("cold",)
    ]
    records[1].accuracy["scores"].largest = nan
    records += [diverging(name, 1e-6 * n, n=n, std=std) for n in range(1, 101) for std in range(6) for name in "ab"]
    for made in records[800:]:
        made.suite, made.metrics = "health", {"saturated": made.fields["std"] * 100.0}
    records[-1] = record("b", BOTH, status="out_of_memory", reason="tried to allocate 1 TB", std=7)
    records[-1].suite = "health"
    assert len(records) == 2000
    path = tmp_path_factory.mktemp("page") / "report.html"
    views = {"health": View(lines=("std",))}
    return write_page(path, Run(path, records=records), views).as_uri()


@pytest.fixture
def opened(browser, url):
    """Open the page as on a device; whatever the console says by the end is an error."""
    contexts, complaints = [], []

    def opened(viewport=WIDE, scheme="light"):
        contexts.append(browser.new_context(viewport=viewport, color_scheme=scheme, offline=True))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def column(page, place):
    return page.locator(f"#table tbody tr td:nth-child({place})").all_inner_texts()


def heading(page, name):
    return page.locator("#table thead th", has_text=name)


@pytest.mark.alone
def test_2000_records_are_soon_there(opened):
    taken = []
    # The least of a few: what else runs on the machine is not the page's.
    while len(taken) < 8 and min(taken, default=LOADS_WITHIN) >= LOADS_WITHIN:
        started = perf_counter()
        page = opened()
        page.wait_for_selector("#table tbody tr")
        taken.append(perf_counter() - started)
    assert min(taken) < LOADS_WITHIN
    assert page.locator("#count").inner_text() == "2,000 records, the first 100 shown"
    page.get_by_role("button", name="Show all").click()
    assert len(column(page, 1)) == 2000


@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_every_plot_is_drawn(opened, viewport, scheme):
    page = opened(viewport, scheme)
    cards = page.locator(".card").all()
    titles = [card.locator("h3").inner_text() for card in cards]
    assert titles == ["Time", "Bandwidth", "Memory", "Divergence", "Divergence", "Saturated"]
    for card in cards:
        card.scroll_into_view_if_needed()
        card.locator(".main-svg").first.wait_for()
        assert card.locator(".trace, .hm").count() > 0
    # Nothing but what scrolls by itself is wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]


def test_a_choice_changes_the_plots(opened):
    page = opened()
    suite = page.locator("#suite-toy")
    plot = suite.locator(".card [role=img]").first
    plot.locator(".main-svg").first.wait_for()
    assert plot.get_attribute("aria-label") == "Time, GPU time, cold L2, forward, eps=0.1"
    suite.get_by_role("combobox", name="direction", exact=True).select_option(BOTH)
    suite.get_by_role("combobox", name="eps", exact=True).select_option("eps=0.03")
    assert plot.get_attribute("aria-label") == "Time, GPU time, cold L2, forward+backward, eps=0.03"


def test_the_theme_is_that_of_the_system_until_it_is_changed(opened):
    page = opened(scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('.card .xtick text')).fill"
    page.wait_for_selector(".card .xtick text")
    dark = page.evaluate(background), page.evaluate(ink)
    page.get_by_role("button", name="Switch between light and dark").click()
    light = page.evaluate(background), page.evaluate(ink)
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    page.reload()
    assert page.evaluate(background) == light[0]


def test_filters_leave_what_was_asked_for(opened):
    page = opened()
    page.get_by_label("contains").fill("n=50 eps=0.1 ours")
    assert page.locator("#count").inner_text() == "2 of 2,000 records"
    assert column(page, 2) == ["ours", "ours"]
    page.get_by_label("contains").fill("")
    page.locator("#filters").get_by_label("suite").select_option("health")
    page.locator("#filters").get_by_label("status").select_option("out of memory")
    assert page.locator("#count").inner_text() == "1 of 2,000 records"
    page.get_by_label("contains").fill("1 tb")
    assert column(page, 5) == ["out of memory"]
    page.get_by_label("contains").fill("nowhere")
    assert page.locator("#count").inner_text() == "0 of 2,000 records"


def test_a_heading_sorts_there_and_back(opened):
    page = opened()
    time = heading(page, "GPU time")
    time.get_by_role("button").click()
    assert time.get_attribute("aria-sort") == "ascending"
    assert column(page, 6)[0] == "0.002"
    time.get_by_role("button").click()
    assert time.get_attribute("aria-sort") == "descending"
    assert column(page, 6)[0] == "0.4"
    # What is no number is the largest; what is not there comes last, whatever the direction.
    error = heading(page, "largest error")
    error.get_by_role("button").click()
    assert column(page, 12)[0] == "1.0e-6"
    error.get_by_role("button").click()
    assert column(page, 12)[0] == "nan"
    page.get_by_role("button", name="Show all").click()
    assert column(page, 12)[-1] == "-"
    assert time.get_attribute("aria-sort") == "none"


def test_a_row_opens_and_closes_from_the_keyboard(opened):
    page = opened()
    page.get_by_label("contains").fill("out of memory")
    page.locator("#table .open").first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading", level=2).inner_text() == "health · b · forward+backward"
    assert "tried to allocate 1 TB" in dialog.inner_text()
    assert "python bench.py --suite health --impl b" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_the_command_of_a_row_is_copied(opened):
    page = opened()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    row = page.locator("#table tbody tr").nth(1)
    row.get_by_role("button", name="Copy").click()
    row.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == row.locator("code").inner_text()
