"""The user study's page as a file: what it holds, what it hides, and what is refused."""

import base64
import errno
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from scipy.stats import binomtest

from dgbook import cli
from dgbook.paper_scale.generate.run import run
from dgbook.paper_scale.generate.store import load_images
from dgbook.paper_scale.study import page as module
from dgbook.paper_scale.study.page import QUESTIONS, Key, make
from dgkit.errors import DataError, DgkitError
from tests.fake_images import Fake, job
from tests.study_images import folders, pixels


def blocks(page: Path) -> dict[str, bytes]:
    """The images in the page, by id."""
    found = re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)</script>', page.read_text(encoding="utf-8"))
    return {name: base64.b64decode(text) for name, text in found}


def data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="study">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    return json.loads(found[1])


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_every_pair_is_in_the_page_to_the_bit(tmp_path: Path) -> None:
    ours, theirs = folders(tmp_path)
    key = make(ours, theirs, tmp_path / "study.html")
    assert key == Key.read(tmp_path / "study.key.json")
    assert (key.a, key.b, key.questions) == ("ours", "theirs", tuple(QUESTIONS))
    images, study = blocks(tmp_path / "study.html"), data(tmp_path / "study.html")
    assert sorted(pair["name"] for pair in key.pairs.values()) == ["img0", "img1", "img2"]
    for pair in study["pairs"]:
        secret = key.pairs[pair["id"]]
        assert sorted(pair["images"]) == sorted([secret["a"], secret["b"]])
        assert np.array_equal(decoded(images[secret["a"]]), pixels(ours / f"{secret['name']}.png"))
        assert np.array_equal(decoded(images[secret["b"]]), pixels(theirs / f"{secret['name']}.png"))
        assert pair["prompt"] == (ours / f"{secret['name']}.txt").read_text(encoding="utf-8").strip()
    assert len(images) == 6


def test_the_questions_are_those_of_the_paper() -> None:
    """Appendix I: "three key aspects: prompt alignment, detail preservation, and color consistency"."""
    assert [title.lower() for title, _ in QUESTIONS.values()] == [
        "prompt alignment", "detail preservation", "color consistency",
    ]  # fmt: skip


def test_the_page_does_not_say_which_is_which(tmp_path: Path) -> None:
    ours, theirs = folders(tmp_path, prompts=False)
    key = make(ours, theirs, tmp_path / "study.html")
    text = re.sub(r'(<script type="text/plain" id="\w+">)[^<]*', r"\1", (tmp_path / "study.html").read_text())
    for word in ("ours", "theirs", "img0", ".png", "CFG", "etail guidance", "dgkit", str(tmp_path)):
        assert word not in text
    assert set(data(tmp_path / "study.html")) == {"study", "questions", "pairs"}
    assert all(set(pair) == {"id", "images"} for pair in data(tmp_path / "study.html")["pairs"])
    assert list(blocks(tmp_path / "study.html")) == sorted(id for p in key.pairs.values() for id in (p["a"], p["b"]))
    for content in blocks(tmp_path / "study.html").values():
        image = Image.open(io.BytesIO(content))
        assert image.format == "WEBP" and set(image.info) <= {"loop", "background", "timestamp", "duration"}


def test_the_order_of_ids_and_images_tells_nothing(tmp_path: Path) -> None:
    ours, theirs = folders(tmp_path, count=20, prompts=False)
    first_is_a = smaller_is_a = in_order = 0
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        page = tmp_path / str(seed) / "study.html"
        key = make(ours, theirs, page, seed=seed)
        for pair in data(page)["pairs"]:
            first_is_a += pair["images"][0] == key.pairs[pair["id"]]["a"]
            smaller_is_a += key.pairs[pair["id"]]["a"] < key.pairs[pair["id"]]["b"]
        names = [pair["name"] for pair in key.pairs.values()]
        in_order += sum(x < y for x, y in zip(names, names[1:], strict=False))
    assert binomtest(first_is_a, 400).pvalue > 0.001
    assert binomtest(smaller_is_a, 400).pvalue > 0.001
    assert 0.4 < in_order / 380 < 0.6


def test_the_same_input_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    ours, theirs = folders(tmp_path)
    for name in ("1", "2", "3", "4"):
        (tmp_path / name).mkdir()
    make(ours, theirs, tmp_path / "1" / "s.html")
    make(ours, theirs, tmp_path / "2" / "s.html")
    for name in ("s.html", "s.key.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    make(ours, theirs, tmp_path / "3" / "s.html", seed=1)
    make(theirs, ours, tmp_path / "4" / "s.html")
    assert len({Key.read(tmp_path / name / "s.key.json").study for name in "134"}) == 3


def test_runs_are_paired_by_index_with_their_prompts(tmp_path: Path) -> None:
    for name, steps in (("a", 1), ("b", 2)):
        run(job(steps=steps), tmp_path / name, sampler=Fake)
    # the stand-in's images depend on condition and seed alone: two runs of it are identical
    with pytest.raises(DgkitError, match="'000000' are identical"):
        make(tmp_path / "a", tmp_path / "b", tmp_path / "study.html")

    class Other(Fake):
        def __call__(self, *arguments: Any) -> Any:
            return 255 - super().__call__(*arguments)

    run(job(steps=2), tmp_path / "c", sampler=Other)
    key = make(tmp_path / "a", tmp_path / "c", tmp_path / "study.html")
    assert (key.a, key.b) == (job(steps=1).name, job(steps=2).name)
    images, of_a, of_c = blocks(tmp_path / "study.html"), load_images(tmp_path / "a"), load_images(tmp_path / "c")
    for pair in data(tmp_path / "study.html")["pairs"]:
        secret = key.pairs[pair["id"]]
        index = int(secret["name"])
        assert pair["prompt"] == ("one", "two", "three")[index % 3]
        assert np.array_equal(decoded(images[secret["a"]]), of_a[index])
        assert np.array_equal(decoded(images[secret["b"]]), of_c[index])
    assert len(key.pairs) == 10

    for change in ({"seed": 1}, {"count": 9}, {"conditions": ["one", "two", "four"]}):
        run(job(**change), tmp_path / next(iter(change)), sampler=Other)
        with pytest.raises(DgkitError, match=f"not paired.*{next(iter(change))}: "):
            make(tmp_path / "a", tmp_path / next(iter(change)), tmp_path / "no.html")


def test_classes_are_no_prompts(tmp_path: Path) -> None:
    class Other(Fake):
        def __call__(self, *arguments: Any) -> Any:
            return 255 - super().__call__(*arguments)

    run(job(conditions=[3, 4]), tmp_path / "a", sampler=Fake)
    run(job(conditions=[3, 4], steps=2), tmp_path / "b", sampler=Other)
    assert make(tmp_path / "a", tmp_path / "b", tmp_path / "s.html").questions == tuple(QUESTIONS)[1:]


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    run(job(), tmp_path / "a", sampler=Fake)
    run(job(steps=2), tmp_path / "b", sampler=Fake)
    next((tmp_path / "b" / "shards").iterdir()).unlink()
    with pytest.raises(DataError, match="lacks 4 of 10 images|lacks 2 of 10 images"):
        make(tmp_path / "a", tmp_path / "b", tmp_path / "s.html")


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    Image.fromarray(array).save(path, **options)


def break_file(ours: Path, theirs: Path) -> None:
    (ours / "img0.png").write_bytes((ours / "img0.png").read_bytes()[:90])


def profile(ours: Path, theirs: Path) -> None:
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    save(ours / "img0.png", pixels(ours / "img0.png"), icc_profile=made)


BAD = {
    "theirs lacks extra of .*ours": lambda a, b: save(a / "extra.png", pixels(a / "img0.png")),
    "ours lacks extra of .*theirs": lambda a, b: save(b / "extra.png", pixels(a / "img0.png")),
    "img1' differ in size: 12 x 12 and 13 x 12": lambda a, b: save(b / "img1.png", np.zeros((12, 13, 3), np.uint8)),
    "img1' are identical": lambda a, b: save(b / "img1.png", pixels(a / "img1.png")),
    "two images named 'img0': img0.bmp, img0.png": lambda a, b: save(a / "img0.bmp", pixels(a / "img0.png")),
    "ours holds no images": lambda a, b: [path.unlink() for path in a.iterdir()],
    "theirs is not a folder": lambda a, b: b.rename(b.with_name("gone")),
    "img0.png cannot be read as an image": break_file,
    "img2.png cannot be read as an image": lambda a, b: (b / "img2.png").write_text("no image"),
    "img0.png has a colour profile": profile,
    "img0.png is transparent": lambda a, b: save(a / "img0.png", np.full((12, 12, 4), 9, np.uint8)),
    "img0.png has pixels of mode 'I;16'": lambda a, b: save(a / "img0.png", np.full((12, 12), 9, np.uint16)),
    "img0' have two prompts: 'prompt 0.*' and 'else'": lambda a, b: (b / "img0.txt").write_text("else"),
    "1 of 3 pairs have no prompt, 'img1' first": lambda a, b: (a / "img1.txt").unlink(),
    "img1.txt is empty": lambda a, b: (a / "img1.txt").write_text("\n"),
    "img1.txt is not text in UTF-8": lambda a, b: (a / "img1.txt").write_bytes(b"\xff\xfe"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_folders_are_one_clear_error_and_no_file(tmp_path: Path, message: str) -> None:
    ours, theirs = folders(tmp_path)
    BAD[message](ours, theirs)
    with pytest.raises(DgkitError, match=message):
        make(ours, theirs, tmp_path / "study.html")
    assert not list(tmp_path.glob("*study*"))


def test_opaque_alpha_grey_and_jpeg_are_fine(tmp_path: Path) -> None:
    ours, theirs = folders(tmp_path, count=2, prompts=False)
    save(ours / "img0.png", np.dstack([pixels(ours / "img0.png"), np.full((12, 12), 255, np.uint8)]))
    (theirs / "img0.png").unlink()
    save(theirs / "img0.jpg", np.full((12, 12), 50, np.uint8))
    key = make(ours, theirs, tmp_path / "study.html")
    images = blocks(tmp_path / "study.html")
    pair = next(pair for pair in key.pairs.values() if pair["name"] == "img0")
    assert np.array_equal(decoded(images[pair["a"]]), pixels(ours / "img0.png"))
    assert np.array_equal(decoded(images[pair["b"]]), np.full((12, 12, 3), 50))


def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    ours, theirs = folders(tmp_path, count=1, prompts=False)
    tall = np.random.default_rng(0).integers(0, 256, (12, 7, 3), np.uint8)
    save(ours / "img0.png", tall)
    turned = Image.fromarray(np.rot90(255 - tall))  # 12 wide: orientation 6 says, turn it clockwise to view
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(theirs / "img0.png", exif=exif)
    key = make(ours, theirs, tmp_path / "study.html")
    assert np.array_equal(decoded(blocks(tmp_path / "study.html")[key.pairs["p1"]["b"]]), 255 - tall)


@pytest.mark.parametrize(("output", "seed", "message"), [
    ("study.htm", 0, "output=.*give a file .html"),
    ("nowhere/study.html", 0, "output=.*in a folder that exists"),
    ("study.html", -1, "seed=-1 is not allowed"),
    ("study.html", True, "seed=True is not allowed"),
])  # fmt: skip
def test_bad_arguments(tmp_path: Path, output: str, seed: int, message: str) -> None:
    with pytest.raises(DgkitError, match=message):
        make(*folders(tmp_path), tmp_path / output, seed=seed)


def test_the_key_of_another_study_is_never_lost(tmp_path: Path) -> None:
    ours, theirs = folders(tmp_path)
    make(ours, theirs, tmp_path / "study.html")
    before = (tmp_path / "study.key.json").read_bytes()
    with pytest.raises(DgkitError, match="study.key.json is the key of another study"):
        make(ours, theirs, tmp_path / "study.html", seed=1)
    make(ours, theirs, tmp_path / "study.html")
    assert (tmp_path / "study.key.json").read_bytes() == before
    (tmp_path / "study.key.json").write_text("{}")
    with pytest.raises(DgkitError, match="is not the key file of a study"):
        make(ours, theirs, tmp_path / "study.html")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = folders(tmp_path)

    def full(*arguments: Any) -> Any:
        yield b"<!doctype html>"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_html", full)
    with pytest.raises(DgkitError, match="study.html cannot be written: No space left on device"):
        make(ours, theirs, tmp_path / "study.html")
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "theirs", "study.key.json"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = folders(tmp_path, prompts=False)
    output = tmp_path / "study.html"
    assert cli.main(["study", "make", str(ours), str(theirs), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "3 pairs, 2 questions" in printed and "study.key.json" in printed and "is left out" in printed
    assert output.exists()
    assert cli.main(["study", "make", str(ours), str(tmp_path / "no"), "--output", str(output)]) == 2
    assert capsys.readouterr().err == f"dgkit: {tmp_path / 'no'} is not a folder\n"
