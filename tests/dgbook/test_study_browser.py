"""The user study in a real browser: from the first click, over a reload, to the table of win rates."""

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest, chisquare

from dgbook import cli
from dgbook.paper_scale.study.page import make
from tests.local_server import serving
from tests.study_images import SIDE, folders, pixels

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[test]")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: install chromium for the browser tests")

COUNT = 5


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page, its key beside it, and the folders it was made of."""
    root = tmp_path_factory.mktemp("study")
    ours, theirs = folders(root, COUNT)
    make(ours, theirs, root / "study.html")
    return root / "study.html"


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A fresh profile, in which any error on the console and any request to elsewhere fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(5000)
    errors: list[str] = []
    requests: list[str] = []
    context.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("request", lambda request: requests.append(request.url))
    yield context
    context.close()
    outside = [url for url in requests if not url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))]
    assert requests and not outside and not errors


def start(context: Any, page_file: Path, annotator: str) -> Any:
    page = context.new_page()
    page.goto(page_file.as_uri())
    page.get_by_label("Your annotator id").fill(annotator)
    page.get_by_role("button", name="Start").click()
    return page


def shown(page: Any, side: str, study: Path) -> tuple[str, str]:
    """Folder and name of what is on a side, by its pixels: the only thing that a person sees."""
    source = page.get_by_alt_text(f"{side} image").get_attribute("src")
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))))
    for path in study.parent.glob("*/*.png"):
        if np.array_equal(pixels(path), seen):
            return path.parent.name, path.stem
    raise AssertionError("the image is in neither folder")


def preference(question: str, name: str) -> str:
    """Whom the simulated annotators choose: "theirs" for detail, "ours" for color, by the pair for the prompt."""
    by_pair = "ours" if int(name.removeprefix("img")) < 2 else "theirs"
    return {"Prompt alignment": by_pair, "Detail preservation": "theirs", "Color consistency": "ours"}[question]


def click(page: Any, study: Path) -> None:
    """Answer a pair with the mouse."""
    (left, name), (right, other) = shown(page, "Left", study), shown(page, "Right", study)
    assert name == other and {left, right} == {"ours", "theirs"}
    for field in page.get_by_role("group").all():
        question = field.locator("b").inner_text()
        field.get_by_text("Left" if left == preference(question, name) else "Right", exact=True).click()
    page.locator("#next").click()


def press(page: Any, study: Path) -> None:
    """Answer a pair with the keyboard alone."""
    left, name = shown(page, "Left", study)
    for question in ("Prompt alignment", "Detail preservation", "Color consistency"):
        focused = page.evaluate("document.activeElement.closest('fieldset').querySelector('b').textContent")
        assert focused == question
        page.keyboard.press("ArrowLeft" if left == preference(question, name) else "ArrowRight")
    assert page.evaluate("document.activeElement.id") == "next"
    page.keyboard.press("Enter")


def finish(page: Any, study: Path, answer: Callable[[Any, Path], None], pairs: int, to: Path) -> Path:
    """Answer the remaining pairs; the last one saves the file without another click."""
    for _ in range(pairs - 1):
        answer(page, study)
    with page.expect_download() as download:
        answer(page, study)
    assert page.get_by_role("heading", name="All pairs answered").is_visible()
    path = to / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_from_click_to_table(
    browser: Any, context: Any, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = start(context, study, "ann")
    click(page, study)
    click(page, study)
    page.locator("#questions label").first.click()  # one question of the third pair
    page.reload()
    assert page.locator("#count").inner_text() == f"Pair 3 of {COUNT}"
    assert page.locator("#progress").get_attribute("value") == "2"
    assert page.locator("#questions input:checked").count() == 1
    files = [finish(page, study, click, COUNT - 2, tmp_path)]
    page.reload()
    assert page.get_by_role("heading", name="All pairs answered").is_visible()
    with page.expect_download() as again:
        page.get_by_role("button", name="Save the file again").click()
    assert Path(again.value.path()).read_bytes() == files[0].read_bytes()

    page.get_by_role("button", name="Another annotator").click()
    page.get_by_label("Your annotator id").fill("ben")
    page.keyboard.press("Enter")
    files.append(finish(page, study, press, COUNT, tmp_path))

    shutil.copy(study.with_suffix(".key.json"), tmp_path)
    assert cli.main(["study", "analyse", *map(str, files)]) == 0
    assert "Color consistency" in capsys.readouterr().out
    found = json.loads((tmp_path / "study.results.json").read_text())
    assert (found["a"], found["b"]) == ("ours", "theirs")
    assert found["annotators"] == {"ann": 3 * COUNT, "ben": 3 * COUNT}
    wins = {question: values["a_wins"]["value"] for question, values in found["questions"].items()}
    assert wins == {"prompt_alignment": 2 / COUNT, "detail_preservation": 0, "color_consistency": 1}


def test_answers_can_be_changed_and_saved_early(context: Any, study: Path, tmp_path: Path) -> None:
    page = start(context, study, "ann")
    assert page.locator("#next").is_disabled() and page.locator("#back").is_disabled()
    click(page, study)
    page.locator("#back").click()
    before = page.locator("#questions input:checked").evaluate_all("all => all.map((input) => input.value)")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft" if before[1] == "right" else "ArrowRight")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save the answers so far").click()
    header, *rows = Path(download.value.path()).read_text().splitlines()
    assert header == "study,annotator,pair,question,left,right,chosen" and len(rows) == 3
    sides = ["left" if row.split(",")[4] == row.split(",")[6] else "right" for row in rows]
    assert [a == b for a, b in zip(sides, before, strict=True)] == [True, False, True]


def test_two_tabs_do_not_lose_each_others_answers(context: Any, study: Path) -> None:
    first = start(context, study, "ann")
    second = context.new_page()
    second.goto(study.as_uri())
    assert second.locator("#count").inner_text() == f"Pair 1 of {COUNT}"
    first.locator("#questions label").nth(0).click()
    second.locator("#questions label").nth(3).click()
    first.reload()
    assert first.locator("#questions input:checked").count() == 2


def test_annotators_with_other_ids_are_apart(context: Any, study: Path) -> None:
    page = start(context, study, "ann")
    click(page, study)
    page.get_by_role("button", name="Another annotator").click()
    page.get_by_label("Your annotator id").fill("ben")
    page.keyboard.press("Enter")
    assert page.locator("#count").inner_text() == f"Pair 1 of {COUNT}"
    assert page.locator("#progress").get_attribute("value") == "0"
    page.get_by_role("button", name="Another annotator").click()
    page.get_by_label("Your annotator id").fill("ann")
    page.keyboard.press("Enter")
    assert page.locator("#count").inner_text() == f"Pair 2 of {COUNT}"


@pytest.mark.parametrize("annotator", ["", "a b", "a,b", "=1+1", "é", "x" * 33])
def test_ids_that_would_harm_a_file_are_refused(context: Any, study: Path, annotator: str) -> None:
    page = start(context, study, annotator)
    assert page.locator("#start").is_visible() and page.locator("#trial").is_hidden()


def test_order_and_sides_are_drawn_for_each_annotator(context: Any, study: Path) -> None:
    page = start(context, study, "ann")
    drawn = page.evaluate(
        """() => [...Array(1000).keys()].map((k) => plan(`a${k}`).map(({ pair, left }) =>
             [pair, left === STUDY.pairs.find(({ id }) => id === pair).images[0]]))"""
    )
    assert page.evaluate("JSON.stringify(plan('a1')) === JSON.stringify(plan('a1'))")
    assert all(sorted(pair for pair, _ in order) == [f"p{k}" for k in range(1, COUNT + 1)] for order in drawn)
    assert binomtest(sum(first for order in drawn for _, first in order), 1000 * COUNT).pvalue > 0.001
    for place in range(COUNT):
        counts = np.unique([order[place][0] for order in drawn], return_counts=True)[1]
        assert len(counts) == COUNT and chisquare(counts).pvalue > 0.001
    together = sum(order[0][1] == order[1][1] for order in drawn)  # neighbouring sides are independent
    assert binomtest(together, 1000).pvalue > 0.001


def test_a_browser_without_storage_says_so_and_still_saves(context: Any, study: Path, tmp_path: Path) -> None:
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    page = start(context, study, "ann")
    assert page.get_by_text("does not let the page keep your answers").is_visible()
    assert len(finish(page, study, click, COUNT, tmp_path).read_text().splitlines()) == 1 + 3 * COUNT


def test_prompts_are_text(context: Any, study: Path) -> None:
    page = start(context, study, "ann")
    name = shown(page, "Left", study)[1].removeprefix("img")
    assert page.locator("#prompt").inner_text() == f"Prompt: “prompt {name} <b>é</b> </script>”"


def test_without_prompts_two_questions_are_asked(context: Any, tmp_path: Path) -> None:
    make(*folders(tmp_path, 1, prompts=False), tmp_path / "study.html")
    page = start(context, tmp_path / "study.html", "ann")
    assert page.locator("#prompt").is_hidden()
    assert page.locator("#questions b").all_inner_texts() == ["Detail preservation", "Color consistency"]
    assert page.locator("#next").inner_text() == "Finish"


def test_images_are_enlarged_in_place(context: Any, study: Path) -> None:
    page = start(context, study, "ann")
    page.get_by_role("button", name="Right image").click()
    image = page.locator("#box img")
    assert image.get_attribute("src") == page.get_by_alt_text("Right image").first.get_attribute("src")
    box = image.bounding_box()
    assert (
        box["height"] == box["width"] > 600 and image.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    )
    page.get_by_role("button", name="Close").focus()
    page.keyboard.press("ArrowLeft")
    assert image.get_attribute("src") == page.locator("#left img").get_attribute("src")
    assert image.bounding_box() == box
    page.keyboard.press("Escape")
    assert page.locator("#zoom").is_hidden() and page.locator("#questions input:checked").count() == 0
    page.keyboard.press("z")
    assert page.locator("#zoom").is_visible()


def test_images_larger_than_the_window_are_shown_pixel_by_pixel(context: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (1500, 900), "navy" if name == "a" else "teal").save(tmp_path / name / "x.png")
    make(tmp_path / "a", tmp_path / "b", tmp_path / "study.html")
    page = start(context, tmp_path / "study.html", "ann")
    left, right = (page.locator(f"#{side} img").bounding_box() for side in ("left", "right"))
    assert (
        left["width"] == right["width"]
        and left["y"] == right["y"]
        and left["width"] / left["height"] == pytest.approx(1500 / 900, abs=0.01)
    )
    page.get_by_role("button", name="Left image").click()
    assert page.locator("#box img").bounding_box()["width"] == 1500
    page.locator("#box").evaluate("box => box.scrollTo(120, 40)")
    page.get_by_role("button", name="Right", exact=True).click()
    assert page.locator("#box").evaluate("box => [box.scrollLeft, box.scrollTop]") == [120, 40]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_all_without_sideways_scrolling(browser: Any, study: Path, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.goto(study.as_uri())
    overflow = "document.documentElement.scrollWidth - innerWidth"
    assert page.evaluate(overflow) <= 0
    page.get_by_label("Your annotator id").fill("ann")
    page.get_by_role("button", name="Start").click()
    assert page.evaluate(overflow) <= 0
    for control in page.locator("#questions label, #trial button:not(.images button)").all():
        box = control.bounding_box()
        assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 390
    assert page.locator("#next").bounding_box()["y"] < 844  # no scrolling between images and answers
    assert page.locator("#left img").bounding_box()["width"] > 170
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)")
    assert (red + green + blue < 150) == (scheme == "dark")
    assert page.locator("#left img").evaluate("e => getComputedStyle(e).filter") == "none"
    context.close()


def test_any_static_host_will_do(context: Any, study: Path) -> None:
    with serving(study.parent) as server:
        page = context.new_page()
        page.goto(f"{server.address}/study.html")
        page.get_by_label("Your annotator id").fill("ann")
        page.get_by_role("button", name="Start").click()
        click(page, study)
        page.reload()
        assert page.locator("#count").inner_text() == f"Pair 2 of {COUNT}"
        assert page.get_by_alt_text("Left image").first.evaluate("e => e.naturalWidth") == SIDE
        assert server.asked == ["/study.html", "/study.html"]
