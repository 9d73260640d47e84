"""The page as readers see it: in Chromium, from disk, without network."""

import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from math import nan
from time import perf_counter

import pytest

from colt5_bench.compare import Finding
from colt5_bench.records.results import Run
from colt5_bench.report.colours import colour
from colt5_bench.report.layout import View
from colt5_bench.report.leaderboard import write_leaderboard
from colt5_bench.report.page import write_page
from tests.attempts import first_good
from tests.colt5_bench.made import BOTH, FORWARD, diverging, record, timed

sync_api = pytest.importorskip("playwright.sync_api")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

LOADS_WITHIN = 3.0
"""Limit in seconds for showing, sorting and filtering 2,000 records."""

WIDE, PHONE = {"width": 1360, "height": 900}, {"width": 390, "height": 844}

ENVIRONMENT = {
    "key": "a",
    "utc": "2026-11-23T22:05:36.123+00:00",
    "git": {"revision": "a900dda5a226fe45", "dirty": True},
    "cpu": "AMD EPYC",
    "command": "bench.py --suite toy",
}

BUTTONS = {"Download plot", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
"""All buttons of a plot: none sends data anywhere."""


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = f"there is none of {', '.join(BROWSERS)} here: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_api.sync_playwright() as playwright:
        # Root, as in a container, has no sandbox; the browser opens only our own page.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def written(directory, lengths, errors):
    """A page with times of a suite for some lengths, and with errors and metrics of another suite."""
    records = [
        timed(name, factor * n / 1e3, "cold", direction=direction, n=n, eps=eps)
        for n in range(1, lengths + 1)
        for eps in (0.1, 0.03)
        for direction in (FORWARD, BOTH)
        for name, factor in (("reference", 8), ("ours", 2), ("other", 3), ("fourth", 4))
    ]
    timed_ones = len(records)
    records[1].accuracy["scores"].largest = nan
    records += [
        diverging(name, 1e-6 * n, n=n, std=std) for n in range(1, errors + 1) for std in range(6) for name in "ab"
    ]
    for made in records[timed_ones:]:
        made.suite, made.metrics = "health", {"saturated": made.fields["std"] * 100.0}
    records[-1] = record("b", BOTH, status="out_of_memory", reason="tried to allocate 1 TB", std=7)
    records[-1].suite = "health"
    for made in records:
        made.environment = "a"
    path = directory / "report.html"
    views = {"health": View(lines=("std",))}
    return write_page(path, Run(path, {"a": ENVIRONMENT}, records), views).as_uri()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A page with 400 records, more than its table shows at first."""
    return written(tmp_path_factory.mktemp("page"), lengths=10, errors=20)


def findings():
    """Findings with names and figures of any length."""
    texts = (
        "n=512",
        "a_rather_long_name_of_an_implementation_or_kernel",
        " ".join(f"field_{n}=value_{n}" for n in range(9)),
    )
    return [
        Finding(
            "worse", "windowed_attention", case, BOTH, name, metric, 1.2345e-6, 123456789.0, "s", interval, note=note
        )
        for case in texts
        for name in texts[:2]
        for metric in (*texts[:2], "forward_kernel sm_90 spilled_bytes")
        for interval in (None, (1.05, 1.234))
        for note in ("", "compiled for other settings than in the baseline " * 4)
    ]


@contextmanager
def opening(browser, url):
    """Open the page as on a device; any message on the console at the end is an error."""
    contexts, complaints = [], []

    def opened(viewport=WIDE, scheme="light", url=url):
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


@pytest.fixture
def opened(browser, url):
    with opening(browser, url) as opened:
        yield opened


@pytest.fixture(scope="module")
def unchanged(browser, url):
    """A page for tests that do not change it, because a page takes time to load."""
    with opening(browser, url) as opened:
        yield opened()


def column(page, place):
    return page.locator(f"#table tbody tr td:nth-child({place})").all_inner_texts()


def heading(page, name):
    return page.locator("#table thead th", has_text=name)


@pytest.mark.alone
def test_2000_records_are_soon_there(opened, tmp_path):
    url = written(tmp_path, lengths=50, errors=100)

    def load():
        begun = perf_counter()
        page = opened(url=url)
        page.wait_for_selector("#table tbody tr")
        return perf_counter() - begun, page

    seconds, page = first_good(load, lambda loaded: loaded[0] < LOADS_WITHIN, attempts=8)
    assert seconds < LOADS_WITHIN
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
    # Lines between those of the grid are not brighter.
    assert page.locator(".minor-gridlayer path").count() > 0
    lines = "document.querySelectorAll('.gridlayer path, .minor-gridlayer path')"
    assert len(set(page.evaluate(f"[...{lines}].map(line => getComputedStyle(line).stroke)"))) == 1
    # Only elements that scroll by themselves are wider than the window.
    assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]


def test_a_choice_changes_the_plots(opened):
    page = opened()
    suite = page.locator("#suite-toy")
    plot = suite.locator(".card [role=img]").first
    plot.locator(".main-svg").first.wait_for()
    assert plot.get_attribute("aria-label") == "Time, cold, forward, eps=0.1"
    suite.get_by_role("combobox", name="direction", exact=True).select_option(BOTH)
    suite.get_by_role("combobox", name="eps", exact=True).select_option("eps=0.03")
    assert plot.get_attribute("aria-label") == "Time, cold, forward+backward, eps=0.03"


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
    page.get_by_label("contains").fill("n=10 eps=0.1 ours")
    assert page.locator("#count").inner_text() == "2 of 400 records"
    assert column(page, 2) == ["ours", "ours"]
    page.get_by_label("contains").fill("")
    page.locator("#filters").get_by_label("suite").select_option("health")
    page.locator("#filters").get_by_label("status").select_option("out of memory")
    assert page.locator("#count").inner_text() == "1 of 400 records"
    page.get_by_label("contains").fill("1 tb")
    assert column(page, 5) == ["out of memory"]
    page.get_by_label("contains").fill("nowhere")
    assert page.locator("#count").inner_text() == "0 of 400 records"


def test_a_heading_sorts_there_and_back(opened):
    page = opened()
    time = heading(page, "cold [ms]")
    time.get_by_role("button").click()
    assert time.get_attribute("aria-sort") == "ascending"
    assert column(page, 6)[0] == "0.002±0.37%"
    time.get_by_role("button").click()
    assert time.get_attribute("aria-sort") == "descending"
    assert column(page, 6)[0] == "0.08±0.37%"
    # NaN counts as the largest; absent values come last in both directions.
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


def draw_all(page):
    for card in page.locator(".card").all():
        card.scroll_into_view_if_needed()
        card.locator(".main-svg").first.wait_for()


def test_a_plot_has_no_button_that_uploads_it(unchanged):
    page = unchanged
    draw_all(page)
    for card in page.locator(".card").all():
        titles = card.locator(".modebar-btn").evaluate_all("all => all.map((each) => each.dataset.title)")
        assert titles
        assert set(titles) <= BUTTONS
    servers = "[...document.querySelectorAll('.js-plotly-plot')].map((each) => each._context.plotlyServerURL)"
    assert set(page.evaluate(servers)) == {""}


def test_an_implementation_has_one_colour_on_the_page(unchanged):
    page = unchanged
    draw_all(page)
    lines = page.evaluate(
        """[...document.querySelectorAll('.js-plotly-plot')].flatMap((plot) => plot.data.filter((trace) => trace.line)
            .map((trace) => [trace.name.split(" ")[0], trace.line.color, trace.marker.color]))"""
    )
    drawn = {name: {first, second} for name, first, second in lines if name != "limit"}
    assert set(drawn) == {"reference", "ours", "other", "fourth", "a", "b"}
    for name, first, second in lines:
        # Black is the ink of the theme.
        assert name in ("limit", "reference") or first == second == colour(name)
    assert len({frozenset(each) for each in drawn.values()}) >= 4


def test_buttons_that_are_hidden_are_not_seen(opened):
    page = opened()
    more, every = (page.get_by_role("button", name=name) for name in ("Show 100 more", "Show all"))
    assert more.is_visible()
    every.click()
    assert not more.is_visible()
    assert not every.is_visible()
    page.get_by_label("contains").fill("n=10 eps=0.1 ours")
    assert not page.locator(".more").is_visible()


@pytest.mark.parametrize("place", range(1, 15))
def test_a_click_anywhere_in_a_row_opens_it(unchanged, place):
    page = unchanged
    row = page.locator("#table tbody tr").nth(1)
    assert row.locator("td").count() == 14
    row.locator(f"td:nth-child({place})").click(position={"x": 3, "y": 3})
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading", level=2).inner_text() == "toy · ours · forward"
    for said in ("2026-11-23 22:05 a900dda+ · Toy GPU", "a900dda5a226fe45", "uncommitted changes", "AMD EPYC"):
        assert said in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_each_row_names_its_date_revision_and_machine(unchanged):
    assert set(column(unchanged, 13)) == {"2026-11-23 22:05 a900dda+ · Toy GPU"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_there_in_print(opened, scheme):
    """Plots are drawn before anyone scrolls there, and the theme is light."""
    page = opened(PHONE, scheme)
    page.emulate_media(media="print")
    for card in page.locator(".card").all():
        assert card.locator(".trace, .hm").count() > 0
        svg = card.locator(".main-svg").first
        assert 600 <= svg.bounding_box()["width"] <= 680
    page.wait_for_function("document.documentElement.dataset.theme === 'light'")
    page.emulate_media(media="screen", color_scheme=scheme)
    page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")


def test_a_pdf_has_every_plot(opened):
    page = opened()
    page.evaluate("addEventListener('beforeprint', () => { printed = document.querySelectorAll('.card .main-svg') })")
    page.pdf()
    assert (
        page.evaluate("new Set([...printed].map((each) => each.closest('.card'))).size")
        == page.locator(".card").count()
    )


def test_what_changed_is_seen_without_scrolling(opened, tmp_path):
    page_of = write_page(tmp_path / "report.html", Run(tmp_path, records=[timed("ours", 1)]), {}, findings=findings())
    page = opened({"width": 1400, "height": 900}, url=page_of.as_uri())
    table = page.locator("#findings .scroll")
    edge = table.bounding_box()["x"] + table.bounding_box()["width"]
    assert edge <= 1400
    for row in page.locator("#findings tr").all():
        for place in (7, 8, 9):
            box = row.locator(f":nth-child({place})").first.bounding_box()
            assert box["x"] + box["width"] <= edge
    titles = page.locator("#findings th").all_inner_texts()
    assert titles[6:9] == ["baseline", "now", "change"]


def test_a_figure_shows_its_interval_and_none_that_may_be_1_is_a_change(opened, tmp_path):
    records = [timed(name, 1, n=n) for n in (1, 2, 3) for name in ("reference", "ours")]
    for at, made in enumerate(records):
        made.timings["wall"].samples = [(1 + 0.5 * ((at + sample) % 2)) * 1e-3 for sample in range(10)]
    page = opened(url=write_page(tmp_path / "report.html", Run(tmp_path, records=records), {}).as_uri())
    page.wait_for_selector("#table tbody tr")
    assert all("±" in each for each in column(page, 6))
    ratios = column(page, 7)
    assert ratios[::2] == ["1x"] * 3
    assert all("-" in ratio and "±" not in ratio for ratio in ratios[1::2])
    standing = page.locator("#suite-toy tbody tr").nth(1).locator("td").all_inner_texts()
    assert "±" not in standing[1] + standing[2]
    assert page.locator(".tiles li").count() == 1 + page.locator(".tiles", has_text="gradient error").count()
    draw_all(page)
    assert page.locator(".card").first.locator(".errorbar").count() == 6


@pytest.fixture(scope="module")
def leaderboard(tmp_path_factory):
    """500 points of two suites on three machines with names of any length."""
    machines = ("Toy GPU", "A machine with a rather long name, such as processors have", "Other GPU")
    records = [
        replace(timed(name, factor * n, "cold", direction=direction, n=n), suite=suite, device=machine, environment="a")
        for suite in ("toy", "a_rather_long_name_of_a_suite")
        for n in range(1, 126)
        for direction in (FORWARD, BOTH)
        for machine in machines
        for name, factor in (("ours", 1), ("reference", 2), ("a_rather_long_name_of_an_implementation", 2))
    ]
    path = tmp_path_factory.mktemp("leaderboard") / "leaderboard.html"
    return write_leaderboard(path, [Run(path, {"a": ENVIRONMENT}, records)], {}).as_uri()


@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (PHONE, "dark")])
def test_a_leaderboard_is_searched(browser, leaderboard, viewport, scheme):
    with opening(browser, leaderboard) as opened:
        page = opened(viewport, scheme)
        count, rows = page.locator("#count"), page.locator(".board tbody tr:visible")
        assert count.inner_text() == "500 of 500 points"
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        page.get_by_role("button", name="Switch between").click()
        assert page.evaluate("document.documentElement.dataset.theme") != scheme
        # Only elements that scroll by themselves are wider than the window.
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]
        page.get_by_label("contains").fill("TOY n=7 backward")
        assert count.inner_text() == f"{rows.count()} of 500 points"
        assert rows.count() == len([n for n in range(1, 126) if str(n).startswith("7")])
        assert page.locator("#boards section:visible h2").all_inner_texts() == ["toy"]
        fastest = rows.first.locator("td:nth-child(3) li").first
        assert fastest.locator(".name").inner_text() == "ours"
        assert fastest.locator(".place").inner_text() == "first"
        page.get_by_label("contains").fill("nowhere")
        assert (count.inner_text(), rows.count()) == ("0 of 500 points", 0)
