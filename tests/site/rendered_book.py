"""The rendered book in a real browser: `make test-book` after `make book`, and so no part of `make test`.

One Chromium visits every page once, wide, narrow and in the dark, and each test reads its part of what was found.
Names of hosts are not resolved, so a page that asks for something outside the book is told on and gets nothing.
"""

import base64
import functools
import io
import re
import threading
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build" / "html"
PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html") if "_static" not in path.parts)
PAGES = [page for page in PAGES if page != "index.html"]  # leads to the first page: a test of its own
if not PAGES:
    raise FileNotFoundError(f"{HTML} has no pages: run `make book` first")
CHAPTERS = {"notebooks/03_intervention.html": "original", "notebooks/04_detail_guidance.html": "CFG"}


WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}

READ = """() => ({
  ids: [...document.querySelectorAll("[id]")].map((e) => e.id),
  links: [...document.querySelectorAll("a[href]")].map((e) => e.href),
  images: [...document.images].map((e) => [e.src.slice(0, 80), e.alt, e.naturalWidth]),
})"""
FILTERED = """() => {
  document.documentElement.dataset.theme = "dark";
  return [...document.images].filter((e) => getComputedStyle(e).filter !== "none").map((e) => e.src.slice(0, 80));
}"""
# the innermost elements that their content sticks out of
OVERFLOW = """() => {
  const shown = (e) => getComputedStyle(e).overflowX === "visible";
  const tight = (e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1 && shown(e);
  const found = [...document.querySelectorAll("main *")].filter((e) => tight(e) && ![...e.children].some(tight));
  const width = document.documentElement.scrollWidth;
  return width > innerWidth ? [`${width} px`, ...found.slice(0, 5).map((e) => e.outerHTML.slice(0, 120))] : [];
}"""


@dataclass
class Visit:
    """What one page did and holds."""

    problems: list[str]  # errors in the console, exceptions, answers other than 200, requests to elsewhere
    ids: set[str]
    links: list[str]
    images: list[tuple[str, str, int]]  # source, alternative text, width in pixels (0: not there)
    filtered: list[str]  # images whose colours the dark mode changes
    overflow: list[str]


def visit(browser: Browser, site: str, name: str, body: str | None = None) -> Visit:
    """Open a page of the book, or `body` in its place."""
    page = browser.new_page(viewport=WIDE)
    problems: list[str] = []
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((site, "data:")) else problems.append(f"asks for {r.url}"))
    page.on("response", lambda r: None if r.ok or r.status == 304 else problems.append(f"{r.status} {r.url}"))
    if body is not None:
        page.route(f"{site}{name}", lambda route: route.fulfill(body=body, content_type="text/html"))
    page.goto(f"{site}{name}")
    page.evaluate("() => window.MathJax?.startup?.promise?.then(() => null)")  # formulas fetch their fonts late
    read = page.evaluate(READ)
    page.set_viewport_size(NARROW)
    overflow = page.evaluate(OVERFLOW)
    filtered = page.evaluate(FILTERED)
    page.close()
    return Visit(problems, set(read["ids"]), read["links"], read["images"], filtered, overflow)


def broken_links(found: Visit, site: str, visits: dict[str, Visit]) -> list[str]:
    """Links into the book that lead to no file, or to no place of its page."""
    broken = []
    for link in dict.fromkeys(link for link in found.links if link.startswith(site)):
        url, fragment = urldefrag(link.removeprefix(site))
        name, fragment = unquote(url.split("?")[0]), unquote(fragment)
        there = (HTML / name).is_file() or name == ""
        if not there or (fragment and name in visits and fragment not in visits[name].ids):
            broken.append(link)
    return broken


@pytest.fixture(scope="module")
def site():
    """Address of the book, served as any static host does."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def visits(browser, site):
    return {name: visit(browser, site, name) for name in PAGES}


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport=WIDE)
    yield page
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_the_page_loads_without_errors_and_asks_for_nothing_outside(visits, name):
    assert visits[name].problems == []


@pytest.mark.parametrize("name", PAGES)
def test_every_image_is_there_described_and_true_in_the_dark(visits, name):
    assert [source for source, alt, _ in visits[name].images if not alt.strip()] == []
    assert [source for source, _, width in visits[name].images if not width] == []
    assert visits[name].filtered == []


@pytest.mark.parametrize("name", PAGES)
def test_links_within_the_book_lead_somewhere(visits, site, name):
    assert broken_links(visits[name], site, visits) == []


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_no_wider_than_a_phone(visits, name):
    assert visits[name].overflow == []


def test_faults_are_found(browser, site, visits):
    body = """<!doctype html><html><head><link rel="icon" href="/_static/favicon.svg"></head><body><main>
        <img src="/none.png" alt=""><img src="/_static/favicon.svg" style="filter: invert(1)">
        <a href="/none.html">a</a> <a href="/search.html#none">b</a> <a href="#none">c</a>
        <a href="/search.html">d</a> <a href="http://elsewhere.invalid/">e</a>
        <div style="overflow: auto"><p style="width: 700px">scrolls</p></div>
        <p><b style="float: left; width: 600px">is wide</b></p>
        <script>console.error("an error"); fetch("http://elsewhere.invalid/x").catch(() => null);
        throw Error("an exception")</script></main></body></html>"""
    found = visit(browser, site, "fault.html", body)
    for problem in ("an error", "an exception", "404 .*none.png", r"asks for http://elsewhere\.invalid/x"):
        assert any(re.search(problem, line) for line in found.problems), problem
    (absent, no_text, nothing), (icon, _, width) = found.images
    assert (absent, no_text, nothing) == (f"{site}none.png", "", 0)
    assert icon == f"{site}_static/favicon.svg" and width > 0
    assert [source.rpartition("/")[2] for source in found.filtered] == ["favicon.svg"]
    assert found.overflow == ["608 px", '<p><b style="float: left; width: 600px">is wide</b></p>']
    links = broken_links(found, site, visits | {"fault.html": found})
    assert links == [f"{site}none.html", f"{site}search.html#none", f"{site}fault.html#none"]


def test_no_page_tells_where_it_was_built():
    assert [name for name in PAGES if str(ROOT) in (HTML / name).read_text()] == []


def test_the_address_of_the_book_is_its_first_page(page, site):
    page.goto(site)
    page.wait_for_url("**/book/intro.html")


def test_search_finds_massive_activations(page, site):
    page.goto(f"{site}book/method.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("massive activations")
    page.keyboard.press("Enter")
    results = page.locator("#search-results ul.search li a")
    results.first.wait_for()
    page.wait_for_function("() => /found|matching/.test(document.querySelector('.search-summary').textContent)")
    found = [link.get_attribute("href") for link in results.all()]
    assert any("01_layer_properties.html" in link for link in found)
    results.first.click()
    assert page.locator(".highlighted").count() or "massive" in page.locator("main").inner_text().lower()


def test_dark_mode_toggles_and_stays(page, site):
    def brightness() -> int:
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", colour)[:3])

    page.emulate_media(color_scheme="light")
    page.goto(f"{site}book/intro.html")
    assert brightness() > 600
    while page.evaluate("() => document.documentElement.dataset.mode") != "dark":  # auto, light, dark
        page.locator("button.theme-switch-button:visible").first.click()
    assert brightness() < 150
    page.goto(f"{site}book/method.html")
    assert brightness() < 150


def pixels(slider) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both images of a slider, (H, W, 3), and what the screen shows of it, one pixel for each of theirs."""
    sides = []
    for image in slider.locator("img").all():
        code = image.get_attribute("src").partition("base64,")[2]
        sides.append(np.array(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB")))
    shown = np.array(Image.open(io.BytesIO(slider.screenshot())).convert("RGB"))
    step = shown.shape[1] // sides[0].shape[1]
    return sides[0], sides[1], shown[step // 2 :: step, step // 2 :: step]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", CHAPTERS)
def test_the_slider_shows_either_image_with_its_true_pixels(page, site, name, theme):
    page.emulate_media(color_scheme=theme)
    page.goto(f"{site}{name}")
    slider = page.locator("img-comparison-slider").first
    slider.focus()
    page.keyboard.press("End")
    left, right, shown = pixels(slider)
    assert not np.array_equal(left, right)
    part = np.s_[2:12, 2:-2]  # below the focus ring, above the handle and the labels
    assert np.array_equal(shown[part], left[part])
    page.keyboard.press("Home")
    page.wait_for_timeout(200)  # it glides for a tenth of a second
    assert np.array_equal(pixels(slider)[2][part], right[part])


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_slider_moves_by_key_mouse_and_touch(browser, site, name):
    context = browser.new_context(viewport=NARROW, has_touch=True, reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{site}{name}")
    slider = page.locator("img-comparison-slider").first
    assert slider.get_attribute("role") == "slider" and CHAPTERS[name] in slider.get_attribute("aria-label")

    def value() -> int:
        assert int(slider.get_attribute("aria-valuenow")) == round(slider.evaluate("e => e.value"))
        return int(slider.get_attribute("aria-valuenow"))

    slider.focus()
    top = page.evaluate("() => scrollY")
    for key, expected in [("ArrowRight", 55), ("Home", 0), ("ArrowLeft", 0), ("PageUp", 25), ("End", 100)]:
        page.keyboard.press(key)
        assert value() == expected
    assert page.evaluate("() => scrollY") == top
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2

    def at(share: float) -> float:
        return box["x"] + share * box["width"]

    page.mouse.move(at(0.9), y)
    page.mouse.down()
    page.mouse.move(at(0.25), y)
    page.mouse.up()
    assert abs(value() - 25) <= 1
    touch = context.new_cdp_session(page)
    for kind, share in [("touchStart", 0.3), ("touchMove", 0.5), ("touchMove", 0.75)]:
        points = [{"x": at(share), "y": y}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert abs(value() - 75) <= 1
    context.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_without_scripts_both_images_stand_side_by_side(browser, site, name):
    context = browser.new_context(viewport=WIDE, java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{site}{name}")
    left, right = (image.bounding_box() for image in page.locator("img-comparison-slider").first.locator("img").all())
    assert left["x"] + left["width"] <= right["x"] and left["y"] == right["y"]
    assert min(left["width"], left["height"]) > 32 and left["width"] == pytest.approx(right["width"])
    context.close()


def test_figures_open_at_full_size_by_click_and_by_key(page, site):
    page.set_viewport_size(NARROW)
    page.goto(f"{site}notebooks/01_layer_properties.html")
    figure = page.locator(".cell_output img").first
    dialog = page.locator("dialog.zoom")
    large = dialog.locator("img")
    assert not dialog.is_visible()
    figure.click()
    assert large.get_attribute("src").endswith(figure.get_attribute("src").removeprefix("../"))
    assert large.get_attribute("alt") == figure.get_attribute("alt")
    assert large.bounding_box()["width"] > 2 * figure.bounding_box()["width"]
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert figure.evaluate("e => e === document.activeElement")
    page.keyboard.press("Enter")
    assert dialog.is_visible()
    dialog.get_by_role("button", name="Close").click()
    assert not dialog.is_visible()


def test_wide_tables_scroll_inside_themselves(browser: Browser, site: str) -> None:
    page: Page = browser.new_page(viewport=NARROW)
    page.goto(f"{site}notebooks/05_ablations.html")
    table = page.locator("table.dataframe", has_text="CFG-Zero*")
    frame = table.locator("xpath=..")
    assert table.evaluate("e => e.scrollWidth") > frame.evaluate("e => e.clientWidth")
    frame.evaluate("e => e.scrollTo(1000, 0)")
    assert frame.evaluate("e => e.scrollLeft") > 0
    page.close()
