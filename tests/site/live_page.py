"""The live page in a real browser, against dgkit: `make test-book` after `make book`, which exports the models."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

import dgkit
from dgkit import sampling
from dgkit.zoo import MODELS
from tests.local_server import Server, serving
from tests.site import live_site

if not (live_site.DATA / "models.js").is_file():
    raise FileNotFoundError(f"{live_site.DATA} has no models: run `make book` first")


WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
NAMES = [name for name, row in MODELS.items() if row.source is None]
PANELS = ("plain", "disrupted", "dg", "cfg", "cfg-dg")
PATIENCE = 120_000  # milliseconds; the machine may be busy

# name, settings that are not the model's own
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"steps": 6, "seed": 3}) for name in NAMES),
    (
        "tiny-sd3",
        {"steps": 7, "seed": 12345, "start": 0.3, "stop": 0.8, "w": 0.5, "s": 2.5, "block": 1, "dims": [3, 50]},
    ),
    ("tiny-dit", {"steps": 5, "seed": 2**32 - 1, "start": 0.4, "w": 0.3, "class": 8}),
    ("tiny-flux", {"steps": 5, "s": 1, "block": 6, "caption": "a red xylophone"}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("live")
    live_site.make(folder)
    with serving(folder) as server:
        yield server


@pytest.fixture(scope="module")
def address(server: Server) -> str:
    return f"{server.address}/book/live.html"


@pytest.fixture(scope="module")
def warm(browser: Browser, address: str) -> Iterator[Page]:
    """One page that stays open, so that each model is loaded once."""
    page = opened(browser, address)
    yield page
    page.close()


def opened(browser: Browser, address: str, viewport: Any = WIDE) -> Page:
    """A page that fails its test if anything goes wrong in it."""
    page = browser.new_page(viewport=viewport)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    return page


def drawn(page: Page) -> None:
    """Wait for the pictures of the settings."""
    page.wait_for_function("() => document.querySelector('#live').dataset.seconds || shown('.live-error')")
    assert error(page) == ""


def error(page: Page) -> str:
    return page.locator(".live-error").inner_text() if page.locator(".live-error").is_visible() else ""


def run(page: Page, **settings: Any) -> None:
    """Open settings by the address and wait for their pictures."""
    values = {k: ",".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in settings.items()}
    page.evaluate(
        """(hash) => {
          window.shown = (query) => !document.querySelector(query).hidden;
          delete document.querySelector('#live').dataset.seconds;
          location.hash = hash;
        }""",
        urlencode(values),
    )
    page.wait_for_function("(model) => document.querySelector(`[value=${model}]`).checked", arg=settings["model"])
    if page.locator("#live [name=run]").is_visible():
        page.click("#live [name=run]")
    drawn(page)


def pictures(page: Page) -> dict[str, np.ndarray]:
    read = """() => Object.fromEntries([...document.querySelectorAll("canvas[data-panel]")].map((e) =>
        [e.dataset.panel, [e.width, [...e.getContext("2d").getImageData(0, 0, e.width, e.height).data]]]))"""
    return {
        name: np.array(data, np.uint8).reshape(width, width, 4)[..., :3]
        for name, (width, data) in page.evaluate(read).items()
    }


def by_dgkit(name: str, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    pipe = dgkit.load(name)
    preset = MODELS[name].preset
    edit: Any = {"block": settings.get("block", preset.block), "dims": settings.get("dims", preset.dims)}
    edit |= {"start": settings.get("start", 0.0), "stop": settings.get("stop", 1.0)}
    guided = {"scale": settings.get("w", preset.scale_with_cfg), **edit}
    s = settings.get("s", preset.guidance_scale)
    condition = settings.get("caption", settings.get("class", sampling.own_conditions(pipe, 1)[0]))

    def image(context: Any, guidance_scale: float) -> np.ndarray:
        with context:
            return sampling.generate(
                pipe,
                [condition],
                [settings.get("seed", 0)],
                num_inference_steps=settings.get("steps", preset.steps),
                guidance_scale=guidance_scale,
            )[0]

    return {
        "plain": image(nullcontext(), 1),
        "disrupted": image(dgkit.disrupt(pipe, **edit), 1),
        "dg": image(dgkit.detail_guidance(pipe, **guided), 1),
        "cfg": image(nullcontext(), s),
        "cfg-dg": image(dgkit.detail_guidance(pipe, **guided), s),
    }


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_every_picture_is_dgkits_own_to_one_grey_level(warm: Page, name: str, settings: dict[str, Any]) -> None:
    run(warm, model=name, **settings)
    found, expected = pictures(warm), by_dgkit(name, settings)
    assert set(found) == set(PANELS) == set(expected)
    worst = {panel: int(np.abs(found[panel].astype(int) - expected[panel].astype(int)).max()) for panel in PANELS}
    assert max(worst.values()) <= 1, worst
    if settings.get("s") != 1:
        assert not np.array_equal(found["plain"], found["cfg"])


def test_the_map_and_the_energy_are_what_record_measures(warm: Page) -> None:
    pipe = dgkit.load("tiny-sd3")
    preset = MODELS["tiny-sd3"].preset
    condition = sampling.own_conditions(pipe, 1)
    run(warm, model="tiny-sd3", steps=4)
    with dgkit.record(pipe) as trace:
        sampling.generate(pipe, condition, [0], num_inference_steps=4)
    last = trace.timesteps()[-1]
    mean = trace.mean_abs(timestep=last)
    mean = mean[preset.block]
    ordered = mean.sort(descending=True)
    top, ratio = int(ordered.indices[0]), float(ordered.values[0] / mean.quantile(0.5))
    assert warm.locator(".live-chips button").first.inner_text() == f"{top} ({ratio:.1f}×)"
    share = float(trace.energy_share(preset.dims, timestep=last)[preset.block])
    assert warm.locator("[data-live=share]").inner_text() == f"{100 * share:.0f} % at this step"


def test_the_first_picture_comes_soon_and_nothing_is_asked_for_before_the_click(
    browser: Browser, server: Server, address: str
) -> None:
    server.asked.clear()
    page = opened(browser, address)
    page.wait_for_timeout(300)
    assert [path for path in server.asked if "runtime" in path or path.endswith(".0.js")] == []
    size = page.locator("[data-live=size]").inner_text()
    begun = time.perf_counter()
    page.evaluate("() => { window.shown = (query) => !document.querySelector(query).hidden; }")
    page.click("#live [name=run]")
    assert page.locator("#live progress").is_visible()
    drawn(page)
    first = time.perf_counter() - begun
    loaded = [path for path in server.asked if "runtime" in path or ".js" in path and "tiny" in path]
    total = sum((server.folder / path.lstrip("/")).stat().st_size for path in loaded)
    assert f"{total / 1e6:.1f} MB" in size
    seconds = float(page.locator("#live").get_attribute("data-seconds") or "nan")
    print(f"click to finished pictures {first:.1f} s; a run of five settings, 20 steps {seconds:.1f} s")
    assert first < 60 and seconds < 40  # 10 and 5 on an idle machine
    page.close()


def test_it_runs_from_a_file_on_disk(browser: Browser, server: Server) -> None:
    page = opened(browser, (server.folder / "book" / "live.html").as_uri())
    run(page, model="tiny-dit", steps=3)
    found, expected = pictures(page), by_dgkit("tiny-dit", {"steps": 3})
    assert all(np.abs(found[name].astype(int) - expected[name].astype(int)).max() <= 1 for name in PANELS)
    page.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "tiny-sd9"}, 'Model "tiny-sd9" is not here'),
        ({"model": "tiny-sd3", "steps": 0}, "Steps 0 is not possible: give a whole number from 1 to 50"),
        ({"model": "tiny-sd3", "seed": -1}, "Seed -1 is not possible"),
        ({"model": "tiny-sd3", "block": 8}, "Block 8 is not possible: give a block from 0 to 7"),
        ({"model": "tiny-sd3", "dims": "3,96"}, "Channel 96 is not there: this model has 0 to 95"),
        ({"model": "tiny-sd3", "s": 0.5}, "s 0.5 is not possible: give a number from 1 (no CFG)"),
        ({"model": "tiny-sd3", "w": "much"}, "w NaN is not possible"),
        ({"model": "tiny-dit", "class": 10}, "Class 10 is not possible: give a class from 0 to 9"),
    ],
)
def test_bad_settings_are_told_in_words(warm: Page, settings: dict[str, Any], words: str) -> None:
    warm.evaluate("(hash) => { location.hash = hash; }", urlencode(settings))
    warm.locator(".live-error", has_text=words).wait_for()


def test_a_file_that_is_missing_is_told_and_can_be_tried_again(browser: Browser, address: str) -> None:
    page = opened(browser, address)
    page.route("**/runtime.0.js", lambda route: route.abort())
    page.click("#live [name=run]")
    page.locator(".live-error", has_text="The file runtime.0.js could not be loaded").wait_for()
    page.unroute("**/runtime.0.js")
    run(page, model="tiny-dit", steps=2)
    page.close()


def test_without_models_it_says_so(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, live_site.make(tmp_path, data=None).as_uri())
    assert error(page).startswith("The models are not here")
    page.close()


def test_captions_that_the_model_cannot_read_are_remarked_on(warm: Page) -> None:
    run(warm, model="tiny-sd3", steps=2, caption="dark brick wall dungeon")
    remark = warm.locator("[data-live=remark]")
    assert remark.inner_text() == ""
    warm.fill("#live [name=caption]", "dark xylophone wall " + "dungeon " * 20)
    warm.press("#live [name=caption]", "Enter")
    warm.locator("[data-live=remark]", has_text="letter by letter: xylophone.").wait_for()
    assert "its end is cut off" in remark.inner_text()


def test_keys_reach_everything(warm: Page) -> None:
    run(warm, model="tiny-sd3", steps=2, block=0, dims=[5])
    canvas = warm.locator(".live-map canvas")
    canvas.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        warm.keyboard.press(key)
    told = warm.locator("[data-live=told]").inner_text()
    assert told.startswith("block 1, channel 7: ") and "times the median" in told
    warm.keyboard.press("Enter")
    assert "block=1" in warm.url and "dims=7" in warm.url
    warm.keyboard.press("ArrowLeft")
    warm.keyboard.press("Enter")
    assert "dims=7%2C6" in warm.url
    slider = warm.locator("img-comparison-slider")
    assert slider.get_attribute("role") == "slider" and slider.get_attribute("aria-label") == "Plain | Channels zeroed"
    named = "e => (e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim()) ? null : e.outerHTML"
    controls = warm.locator("#live :is(input, select, button, canvas, progress)").all()
    assert [found for control in controls if (found := control.evaluate(named))] == []


def test_the_address_brings_back_what_was_set(browser: Browser, warm: Page, address: str) -> None:
    run(warm, model="tiny-flux", steps=3, seed=5, block=1, dims=[2, 9], w=0.5, left="cfg", right="cfg-dg")
    first = pictures(warm)
    page = opened(browser, warm.url)
    assert page.url == warm.url
    page.evaluate("() => { window.shown = (query) => !document.querySelector(query).hidden; }")
    page.click("#live [name=run]")
    drawn(page)
    assert all(np.array_equal(image, first[name]) for name, image in pictures(page).items())
    page.close()


def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, address: str) -> None:
    page = opened(browser, f"{address}#model=tiny-dit&steps=2", NARROW)
    page.evaluate("() => { window.shown = (query) => !document.querySelector(query).hidden; }")
    page.click("#live [name=run]")
    drawn(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= NARROW["width"]
    assert page.locator(".live-picture").first.bounding_box()["width"] >= 5 * MODELS["tiny-dit"].side  # type: ignore[index]
    page.close()
