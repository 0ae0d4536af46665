"""Bad inputs of the companion, one row each: every one is refused in one sentence. To add one, add a row to `BAD`.

A row is a call, which gets an empty folder, and words that its error must have; beside them is what is right after all.
"""

import gzip
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from dgbook.claims import results
from dgbook.claims.acceptance import Tolerances
from dgbook.measures import datasets, stats
from dgbook.measures.base import as_images
from dgbook.measures.classifier import agreement, inception_score, load_classifier
from dgbook.measures.detail import sharpness_score, structure_similarity
from dgbook.measures.frechet import frechet_distance, frechet_distance_to
from dgbook.measures.matcher import load_matcher
from dgbook.measures.precision_recall import precision_recall
from dgbook.measures.spectrum import luminance
from dgbook.paper_scale import comparing, scoring
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.store import Store, load_images
from dgbook.paper_scale.prompts import read_conditions
from dgbook.paper_scale.scores.sets import read_reference
from dgbook.paper_scale.scores.weights import tensors
from dgbook.paper_scale.study.analysis import analyse, two_way_share
from dgbook.paper_scale.study.page import Key, make
from dgbook.readers import read_image
from dgkit.errors import DgkitError
from tests.fake_images import expected, job

Call = Callable[[Path], Any]

NAN, INF = float("nan"), float("inf")
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(8, 3))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"  # what a clone without LFS has


def holed(value: float, shape: tuple[int, ...] = (8, 3)) -> np.ndarray:
    """A table with one value that is not finite."""
    table = np.zeros(shape)
    table.flat[4] = value
    return table


# ------------------------------------------------------------------------------------------------------------ prompts


def prompts(content: bytes, name: str = "prompts.txt") -> Call:
    """Read conditions from a file of this content."""

    def call(folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return read_conditions(str(folder / name), None)[0]

    return call


LINES = {
    "empty": (b"", "is empty"),
    "mark alone": (b"\xef\xbb\xbf", "is empty"),
    "newline alone": (b"\n", "line 1 is empty"),
    "an empty line": (b"a cat\n\na dog\n", "line 2 is empty"),
    "a line of spaces": (b"a cat\n \t\na dog\n", "line 2 is empty"),
    "a line of wide spaces": ("a cat\n\u3000\u2003\n".encode(), "line 2 is empty"),
    "UTF-16 with mark": ("a cat\n".encode("utf-16"), "UTF-8"),
    "UTF-16 without mark": ("a cat\n".encode("utf-16-le"), "UTF-8"),
    "UTF-32": ("a cat\n".encode("utf-32"), "UTF-8"),
    "Latin-1": ("ein Kätzchen\n".encode("latin-1"), "UTF-8"),
    "a zero character": (b"a cat\0\n", "zero character"),
    "a zipped file": (gzip.compress(b"a cat\n"), "UTF-8"),
    "cut within a character": ("a cät".encode()[:4], "UTF-8"),
}
TABLES = {
    "empty CSV": (b"", "is empty"),
    "CSV without a column prompt": (b"text,seed\na cat,1\n", "prompt"),
    "CSV of two columns prompt": (b"prompt,prompt\na cat,a dog\n", "prompt"),
    "CSV without rows": (b"prompt,seed\n", "no rows"),
    "CSV with an empty prompt": (b"prompt,seed\n,1\n", "prompt"),
    "CSV with a prompt of spaces": (b"prompt,seed\n  ,1\n", "prompt"),
    "CSV with a long row": (b"prompt,seed\na cat,1,2\n", "line 2"),
    "CSV with a short row": (b"seed,prompt\n1\n", "line 2"),
    "CSV with semicolons": (b"prompt;seed\na cat;1\n", "prompt"),
    "CSV with an open quote": (b'prompt,seed\n"a cat,1\n', "line"),
    "CSV with text behind a quote": (b'prompt,seed\n"a" cat,1\n', "no line of a CSV file"),
    "CSV in UTF-16": ("prompt\na cat\n".encode("utf-16"), "UTF-8"),
    "CSV with a giant field": (b'prompt\n"' + b"a" * 200_000 + b'"\n', "field"),
}
OTHERS = ("prompts.json", "prompts.jsonl", "prompts.tsv", "prompts.parquet", "prompts.XLSX", "prompts.yaml")

BAD: dict[str, tuple[Call, str]] = {
    **{f"prompts: {name}": (prompts(content), words) for name, (content, words) in LINES.items()},
    **{f"prompts: {name}": (prompts(content, "p.csv"), words) for name, (content, words) in TABLES.items()},
    **{f"prompts: {name}": (prompts(b'{"prompt": "a cat"}\n', name), ".csv") for name in OTHERS},
    "prompts: a folder": (lambda folder: read_conditions(str(folder), None), "a text file"),
    "prompts: no file": (lambda folder: read_conditions(str(folder / "no.txt"), None), "a text file"),
    "prompts: nothing": (lambda folder: read_conditions("", None), "a text file"),
    "prompts: a set misspelt": (lambda folder: read_conditions("offlin", None), "offline"),
    "classes: backwards": (lambda folder: read_conditions(None, "9-0"), "FIRST-LAST"),
    "classes: words": (lambda folder: read_conditions(None, "all"), "FIRST-LAST"),
    "classes: one number": (lambda folder: read_conditions(None, "3"), "FIRST-LAST"),
    "classes: negative": (lambda folder: read_conditions(None, "-1-3"), "FIRST-LAST"),
    "classes: more than there are images": (lambda folder: read_conditions(None, "0-99999999999"), "FIRST-LAST"),
}


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"a cat\na dog\n", ["a cat", "a dog"]),
        (b"a cat\r\na dog\r\n", ["a cat", "a dog"]),
        (b"a cat\na dog", ["a cat", "a dog"]),
        (b"\xef\xbb\xbfa cat\n", ["a cat"]),
        ("a cat\u2028a dog\u2029a \x85cow\n".encode(), ["a cat\u2028a dog\u2029a \x85cow"]),
        (b"a\x0ccat\x0b\x1c\x1d\x1edog\n", ["a\x0ccat\x0b\x1c\x1d\x1edog"]),
        ("ein Kätzchen\n猫\n".encode(), ["ein Kätzchen", "猫"]),
        (b" a cat \n", [" a cat "]),
    ],
)
def test_lines_end_where_an_editor_ends_them(content: bytes, texts: list[str], tmp_path: Path) -> None:
    assert prompts(content)(tmp_path) == texts


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"prompt\na cat\n", ["a cat"]),
        (b'\xef\xbb\xbfseed,prompt\r\n1,"a cat, asleep"\r\n2,a dog\r\n', ["a cat, asleep", "a dog"]),
        (b'prompt\n"a cat\nand a ""dog"""\n', ['a cat\nand a "dog"']),
        (b"prompt,seed\ra cat,1\ra dog,2\r", ["a cat", "a dog"]),  # as a spreadsheet on an old Mac writes it
        ("prompt\na cat\u2028a dog\n".encode(), ["a cat\u2028a dog"]),
    ],
)
def test_prompts_of_a_table_are_its_column(content: bytes, texts: list[str], tmp_path: Path) -> None:
    assert prompts(content, "p.CSV")(tmp_path) == texts


# ------------------------------------------------------------------------------------------------------------- images

PIXELS = RNG.integers(0, 256, (16, 12, 3), np.uint8)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks."""
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int, depth: int, colour: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def rgb16() -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in PIXELS.astype(np.uint16) * 257 // 3)
    return png(header(12, 16, 16, 2), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def tiff16() -> bytes:
    """Little-endian TIFF, RGB of 16 bits, one strip."""
    pixels = (PIXELS.astype("<u2") * 200).tobytes()
    entries = [(256, 3, 1, 12), (257, 3, 1, 16), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140)]
    entries += [(277, 3, 1, 3), (278, 3, 1, 16), (279, 4, 1, len(pixels))]
    body = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)
    body += struct.pack("<I", 0)
    return body.ljust(134, b"\0") + struct.pack("<3H", 16, 16, 16) + pixels


def saved(image: Image.Image, name: str, **options: Any) -> Callable[[Path], None]:
    return lambda folder: image.save(folder / name, **options)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def drawn(folder: Path, name: str = "fox.png", shift: int = 7) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS + np.uint8(shift)).save(folder / name)


def images(*put: Callable[[Path], Any]) -> Call:
    """Make a study of folder a, with what is put there, and folder b, with a good image fox."""

    def call(folder: Path) -> Any:
        (folder / "a").mkdir()
        drawn(folder / "b")
        for one in put:
            one(folder / "a")
        return make(folder / "a", folder / "b", folder / "study.html")

    return call


def long_text() -> PngInfo:
    info = PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    return info


WHOLE = Image.fromarray(PIXELS)
FRAMES = [Image.fromarray(PIXELS + np.uint8(i)) for i in range(3)]
IMAGES: dict[str, tuple[tuple[Callable[[Path], Any], ...], str]] = {
    "none": ((), "no images"),
    "of no bytes": ((written("fox.png", b""),), "fox.png"),
    "text": ((written("fox.png", b"not an image"),), "fox.png"),
    "a pointer": ((written("fox.png", LFS),), "fox.png"),
    "a folder of that name": ((lambda folder: (folder / "fox.png").mkdir(),), "fox.png"),
    "cut short": ((written("fox.png", b""), lambda f: cut(f / "fox.png")), "fox.png"),
    "a header alone": ((written("fox.png", png(header(12, 16, 8, 2))),), "fox.png"),
    "a broken sum": ((written("fox.png", png(header(12, 16, 8, 2), (b"IDAT", b"x"), (b"IEND", b""))),), "fox.png"),
    "2 MB of text": ((saved(WHOLE, "fox.png", pnginfo=long_text()),), "fox.png"),
    "900 megapixels": ((written("fox.png", png(header(30_000, 30_000, 8, 2), (b"IDAT", b""))),), "pixels"),
    "RGB of 16 bits": ((written("fox.png", rgb16()),), "16 bits"),
    "RGB of 16 bits in TIFF": ((written("fox.tif", tiff16()),), "16 bits"),
    "grey of 16 bits": ((saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "fox.png"),), "8-bit"),
    "grey in floating point": ((saved(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "fox.tif"),), "8-bit"),
    "CMYK": ((saved(WHOLE.convert("CMYK"), "fox.jpg"),), "CMYK"),
    "a profile": ((saved(WHOLE, "fox.png", icc_profile=b"profile"),), "profile"),
    "transparent": ((saved(Image.fromarray(np.full((16, 12, 4), 9, np.uint8)), "fox.png"),), "transparent"),
    "an animated WebP": ((saved(FRAMES[0], "fox.webp", save_all=True, append_images=FRAMES[1:]),), "3 frames"),
    "an animated PNG": ((saved(FRAMES[0], "fox.png", save_all=True, append_images=FRAMES[1:]),), "3 frames"),
    "a TIFF of pages": ((saved(FRAMES[0], "fox.tif", save_all=True, append_images=FRAMES[1:]),), "3 frames"),
    "two of one name": ((drawn, lambda f: drawn(f, "fox.webp")), "two images named 'fox'"),
    "names that differ by case": ((lambda f: drawn(f, "Fox.png"),), "lacks"),
    "one too many": ((drawn, lambda f: drawn(f, "fox.v2.png")), "lacks"),
    "of another size": ((saved(Image.fromarray(PIXELS[:8]), "fox.png"),), "size"),
    "a prompt in Latin-1": ((drawn, written("fox.txt", "Füchse".encode("latin-1"))), "UTF-8"),
    "an empty prompt": ((drawn, written("fox.txt", b"\n")), "empty"),
}


def cut(path: Path) -> None:
    drawn(path.parent, path.name)
    path.write_bytes(path.read_bytes()[:-200])


BAD |= {f"images: {name}": (images(*put), words) for name, (put, words) in IMAGES.items()}


def decoded(page: Path, key: Key) -> dict[str, dict[str, np.ndarray]]:
    """The images "a" and "b" of a study by the name of the pair, out of the page as a browser has it."""
    import base64
    import io
    import re

    blocks = dict(re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)</script>', page.read_text("utf-8")))
    read = {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for name, text in blocks.items()}
    return {pair["name"]: {side: read[pair[side]] for side in "ab"} for pair in key.pairs.values()}


def test_images_are_paired_by_stem_whatever_the_suffix_sorts_them_to(tmp_path: Path) -> None:
    for name, shift in (("fox", 1), ("fox.v2", 2), ("fox-3", 3)):
        drawn(tmp_path / "a", f"{name}.png", shift)
        (tmp_path / "b").mkdir(exist_ok=True)
        Image.fromarray(PIXELS + np.uint8(shift + 100)).save(tmp_path / "b" / f"{name}.webp", lossless=True)
    key = make(tmp_path / "a", tmp_path / "b", tmp_path / "study.html")
    shown = decoded(tmp_path / "study.html", key)
    for name, shift in (("fox", 1), ("fox.v2", 2), ("fox-3", 3)):
        assert np.array_equal(shown[name]["a"], PIXELS + np.uint8(shift))
        assert np.array_equal(shown[name]["b"], PIXELS + np.uint8(shift + 100))


@pytest.mark.parametrize(
    ("image", "options", "pixels"),
    [
        (WHOLE.convert("L"), {}, np.asarray(WHOLE.convert("L"))[..., None].repeat(3, 2)),
        (WHOLE.quantize(8), {}, np.asarray(WHOLE.quantize(8).convert("RGB"))),
        (Image.fromarray(np.rot90(PIXELS)), {"exif": {0x0112: 6}}, PIXELS),  # a camera held upright
        (Image.fromarray(np.dstack([PIXELS, np.full((16, 12), 255, np.uint8)])), {}, PIXELS),
    ],
)
def test_other_images_are_converted(image: Image.Image, options: Any, pixels: np.ndarray, tmp_path: Path) -> None:
    if "exif" in options:
        tags = Image.Exif()
        tags.update(options["exif"])
        options = {"exif": tags}
    key = images(saved(image, "fox.png", **options))(tmp_path)
    assert np.array_equal(decoded(tmp_path / "study.html", key)["fox"]["a"], pixels)


# ------------------------------------------------------------------------------------------------------------ answers

KEY = Key("s1", "a", "b", 0, ("detail_preservation",), {"p1": {"name": "fox", "a": "i1", "b": "i2"}})
HEAD = "study,annotator,pair,question,left,right,chosen\n"
ROW = "s1,ann,p1,detail_preservation,i1,i2,i1\n"


def answers(content: str | bytes, key: str | None = None) -> Call:
    def call(folder: Path) -> Any:
        fields = {**vars(KEY), "pairs": dict(KEY.pairs)}
        (folder / "study.key.json").write_text(json.dumps(fields) if key is None else key, encoding="utf-8")
        (folder / "ann.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return analyse([folder / "ann.csv"])

    return call


ANSWERS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "no rows": (HEAD, "no rows"),
    "other columns": ("study,annotator\ns1,ann\n", "study,annotator,pair"),
    "semicolons": ((HEAD + ROW).replace(",", ";"), "study,annotator,pair"),
    "a short row": (HEAD + "s1,ann,p1\n", "line 2"),
    "a long row": (HEAD + ROW.strip() + ",more\n", "line 2"),
    "an empty cell": (HEAD + ROW.replace("ann", ""), "line 2"),
    "another study": (HEAD + ROW.replace("s1", "s2"), "study"),
    "another pair": (HEAD + ROW.replace("p1", "p9"), "p9"),
    "another question": (HEAD + ROW.replace("detail", "retail"), "retail"),
    "another image": (HEAD + ROW.replace("i2", "i3"), "pair p1"),
    "two ways": (HEAD + ROW + ROW.replace(",i1\n", ",i2\n"), "otherwise"),
    "an open quote": (HEAD + '"s1,ann', "line"),
    "UTF-16": ((HEAD + ROW).encode("utf-16"), "UTF-8"),
    "zeros": ((HEAD + ROW).encode() + b"\0\0", "zero character"),
}
KEYS = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "1",
    "no questions": json.dumps({**vars(KEY), "pairs": dict(KEY.pairs), "questions": []}),
    "no pairs": json.dumps({**vars(KEY), "pairs": {}}),
    "pairs as a list": json.dumps({**vars(KEY), "pairs": [1]}),
    "questions null": json.dumps({**vars(KEY), "pairs": dict(KEY.pairs), "questions": None}),
}
BAD |= {f"answers: {name}": (answers(content), words) for name, (content, words) in ANSWERS.items()}
BAD |= {f"key: {name}": (answers(HEAD + ROW, key), "key") for name, key in KEYS.items()}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_names_of_annotators_may_hold_what_a_table_quotes(end: str, tmp_path: Path) -> None:
    for name in ('"Doe, Jane"', '"a\nb"', '"a ""b"""', "a\u2028b", "a\x85b"):
        found = answers((HEAD + ROW.replace("ann", name)).replace("\n", end) if end == "\n" else HEAD + ROW)(tmp_path)
        assert found.counts == {"detail_preservation": 1}
        expected_name = name[1:-1].replace('""', '"') if name[0] == '"' else name
        assert list(found.answers) == [expected_name if end == "\n" else "ann"]


# --------------------------------------------------------------------------------------------------------- containers


def npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def reference(write: Callable[[Path], Any]) -> Call:
    """Read a reference of Inception's whose features are the means over the images."""
    inception: Any = SimpleNamespace(
        features=lambda arrays: SimpleNamespace(pool=as_images(arrays).reshape(len(arrays), -1).astype(np.float32))
    )

    def call(folder: Path) -> Any:
        write(folder / "ref.npz")
        return read_reference(folder / "ref.npz", inception, "ref")

    return call


BATCH = RNG.integers(0, 256, (5, 2, 2, 3), np.uint8)
GAUSS = {"mu": np.zeros(12), "sigma": np.eye(12)}
NPZ: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "ref.npz"),
    "empty": (lambda path: path.write_bytes(b""), "ref.npz"),
    "text": (lambda path: path.write_text("x"), "ref.npz"),
    "a pointer": (lambda path: path.write_bytes(LFS), "Git LFS"),
    "a folder": (lambda path: path.mkdir(), "ref.npz"),
    "an npy of that name": (lambda path: np.save(path.open("wb"), BATCH), "ref.npz"),
    "a pickle": (lambda path: np.save(path.open("wb"), np.array([{}]), allow_pickle=True), "ref.npz"),
    "no images": (npz(mu=GAUSS["mu"], sigma=GAUSS["sigma"]), "arr_0"),
    "objects": (npz(arr_0=np.array([1, "a", None], dtype=object)), "Object arrays"),
    "images in floating point": (npz(arr_0=BATCH / 255), "uint8"),
    "images of one row": (npz(arr_0=BATCH[:, 0]), "(N, H, W, 3)"),
    "a mean with NaN": (npz(arr_0=BATCH, **GAUSS | {"mu": holed(NAN, (12,))}), "mu"),
    "a covariance with infinity": (npz(arr_0=BATCH, **GAUSS | {"sigma": holed(INF, (12, 12))}), "sigma"),
    "a mean of words": (npz(arr_0=BATCH, **GAUSS | {"mu": np.array(["a"] * 12)}), "mu"),
    "a mean of another width": (npz(arr_0=BATCH, **GAUSS | {"mu": np.zeros(4)}), "mu"),
}
BAD |= {f"npz: {name}": (reference(write), words) for name, (write, words) in NPZ.items()}


def text_file(read: Callable[[Path], Any], name: str, content: str | bytes) -> Call:
    def call(folder: Path) -> Any:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read(path)

    return call


RESULT = {"name": "demo", "parameters": {"model": "m"}, "provenance": {}, "values": {"x": 1.5}}
RESULTS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "null": "null",
    "one more field": json.dumps(RESULT | {"more": 1}),
    "no values": json.dumps({k: v for k, v in RESULT.items() if k != "values"}),
    "values as a list": json.dumps(RESULT | {"values": [1]}),
    "values null": json.dumps(RESULT | {"values": None}),
    "parameters as text": json.dumps(RESULT | {"parameters": "m"}),
    "NaN": json.dumps(RESULT | {"values": {"x": NAN}}),
    "infinity": json.dumps(RESULT | {"values": {"x": [1, INF]}}),
    "an interval with NaN": json.dumps(RESULT | {"values": {"x": {"value": 1.0, "low": NAN, "high": 1.0}}}),
    "a number too large": json.dumps(RESULT).replace("1.5", "1e999"),
    "UTF-16": json.dumps(RESULT).encode("utf-16"),
    "a pointer": LFS,
    "a thousand brackets": "[" * 100_000,
}
BAD |= {f"result: {name}": (text_file(results.read, "r.json", text), "r.json") for name, text in RESULTS.items()}

MANIFEST = job().to_dict()
MANIFESTS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "UTF-16": json.dumps(MANIFEST).encode("utf-16"),
    "a field missing": json.dumps({k: v for k, v in MANIFEST.items() if k != "seed"}),
    "a field more": json.dumps(MANIFEST | {"more": 1}),
    **{
        f"{name} {value!r}": json.dumps(MANIFEST | {name: value})
        for name, value in (
            ("count", "10"), ("count", 0), ("count", None), ("seed", -1), ("seed", 0.5), ("steps", True), ("steps", 0),
            ("block_size", 0), ("conditions", None), ("conditions", []), ("conditions", "a cat"), ("conditions", 3),
            ("conditions", ["a", 1]), ("conditions", [["a"]]), ("conditions", [None]), ("conditions", [True, False]),
            ("methods", None), ("methods", []), ("methods", {"dg": None}), ("methods", {"dgg": {}}), ("call", None),
            ("call", ["height"]), ("disruption", [1]), ("disruption", {"block": 1}), ("versions", None),
            ("versions", [1]), ("model", None), ("model", 5), ("dtype", "int8"), ("dtype", 4), ("prompt_set", 3),
            ("guidance_scale", "4"), ("guidance_scale", 0.5), ("guidance_scale", None),
        )
    },
}  # fmt: skip
BAD |= {
    f"manifest: {name}": (text_file(lambda path: Store(path.parent), "manifest.json", text), "")
    for name, text in MANIFESTS.items()
}


def run_folder(damage: Callable[[Path], Any], use: Callable[[Store], Any]) -> Call:
    """A finished run, damaged, and what is done with it."""

    def call(folder: Path) -> Any:
        from dgbook.paper_scale.generate.store import Shard

        store, whole = Store.create(folder, job()), expected(job())
        for block in range(store.job.blocks):
            store.write(block, Shard({i: whole[i] for i in store.job.block(block)}, {"device": "fake"}))
        damage(folder)
        return use(store)

    return call


def put(name: str, content: str | bytes) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


SHARD = "shards/000001.safetensors"
BAD |= {
    "run: a shard of text": (run_folder(put(SHARD, "x"), lambda s: s.read(1)), "damaged"),
    "run: a shard that is a pointer": (run_folder(put(SHARD, LFS), lambda s: s.read(1)), "damaged"),
    "run: an empty shard": (run_folder(put(SHARD, ""), lambda s: load_images(s.folder)), "lacks"),
    "run: a damaged shard's provenance": (run_folder(put(SHARD, "x"), lambda s: list(s.provenance())), "damaged"),
    "run: model.json cut": (run_folder(put("model.json", "{"), lambda s: s.pin({})), "model.json"),
    "run: model.json a list": (run_folder(put("model.json", "[]"), lambda s: s.pin({})), "model.json"),
    "run: failures cut": (run_folder(put("failures/000001.json", "{"), lambda s: s.failures()), "000001.json"),
    "run: failures a list": (run_folder(put("failures/000001.json", "[1]"), lambda s: s.failures()), "000001.json"),
    "run: failures of words": (run_folder(put("failures/000001.json", '{"a": "b"}'), lambda s: s.failures()), "json"),
    "run: scores cut": (
        run_folder(put("scores/x.json", "{"), lambda s: scoring._kept(s.folder, "x", "id", lambda: [1.0])), "x.json",
    ),
    "run: scores of another kind": (
        run_folder(put("scores/x.json", "[]"), lambda s: scoring._kept(s.folder, "x", "id", lambda: [1.0])), "x.json",
    ),
    "run: scores with NaN": (
        run_folder(
            put("scores/x.json", '{"id": "id", "values": [NaN]}'),
            lambda s: scoring._kept(s.folder, "x", "id", lambda: [1.0]),
        ), "x.json",
    ),
    "tolerances: no TOML": (text_file(Tolerances, "t.toml", "["), "t.toml"),
    "tolerances: UTF-16": (text_file(Tolerances, "t.toml", "[default]".encode("utf-16")), "UTF-8"),
    "tolerances: words": (text_file(Tolerances, "t.toml", 'default = "a"'), "t.toml"),
    "tolerances: NaN": (text_file(Tolerances, "t.toml", "[default]\nabs = nan"), "t.toml"),
    "tolerances: text for a number": (text_file(Tolerances, "t.toml", '[default]\nabs = "1"'), "t.toml"),
}  # fmt: skip

WEIGHTS: dict[str, bytes] = {
    "nothing": b"",
    "text": b"weights",
    "a pointer": LFS,
    "a long header": struct.pack("<Q", 2**40) + b"{}",
}
BAD |= {
    f"{kind}: {name}": (text_file(read, "model.safetensors", content), "model.safetensors")
    for name, content in WEIGHTS.items()
    for kind, read in (
        ("classifier", lambda path: load_classifier(path.parent)),
        ("weights", lambda path: tensors(SimpleNamespace(path=path, sha256="0"))),  # type: ignore[arg-type]
    )
}


def matcher(config: str, weights: dict[str, np.ndarray] | None = None) -> Call:
    def call(folder: Path) -> Any:
        (folder / "config.json").write_text(config, encoding="utf-8")
        save_file(weights or {"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
        return load_matcher(folder)

    return call


BAD |= {
    "classifier: no file": (load_classifier, "model.safetensors"),
    "matcher: no file": (load_matcher, "model.safetensors"),
    "matcher: no JSON": (matcher("{"), "config.json"),
    "matcher: a list": (matcher("[]"), "TileMatcher"),
    "matcher: no vocabulary": (matcher("{}"), "TileMatcher"),
    "matcher: a vocabulary of numbers": (matcher('{"vocabulary": 3}'), "TileMatcher"),
    "matcher: other weights": (matcher('{"vocabulary": "a cat"}'), "TileMatcher"),
}


def data_folder(read: Callable[[], Any], name: str, content: bytes) -> Call:
    def call(folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DGKIT_DATA_DIR", str(folder))
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
            return read()

    return call


MNIST, TILES = "fashion-mnist/t10k-images-idx3-ubyte.gz", "dcss_tiles_32.npz"
BAD |= {
    "tiles: text": (data_folder(datasets.dungeon_tiles, TILES, b"x"), TILES),
    "tiles: a pointer": (data_folder(datasets.dungeon_tiles, TILES, LFS), "Git LFS"),
    "tiles: a zip cut short": (data_folder(datasets.dungeon_tiles, TILES, b"PK\x03\x04" + b"\0" * 40), TILES),
    "fashion: no gzip": (data_folder(lambda: datasets.fashion_mnist("test"), MNIST, b"x"), "t10k"),
    "fashion: cut": (data_folder(lambda: datasets.fashion_mnist("test"), MNIST, gzip.compress(b"x" * 99)[:-9]), "t10k"),
    "fashion: bits": (
        data_folder(lambda: datasets.fashion_mnist("test"), MNIST, gzip.compress(b"x" * 99)[:12] + b"\xff" * 20), "t10k"
    ),
    "fashion: short": (data_folder(lambda: datasets.fashion_mnist("test"), MNIST, gzip.compress(b"x" * 99)), "t10k"),
    "fashion: shorter": (data_folder(lambda: datasets.fashion_mnist("test"), MNIST, gzip.compress(b"x")), "t10k"),
    "fashion: a split": (lambda folder: datasets.fashion_mnist("valid"), "train"),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------------ numbers

RAGGED: Any = [[1.0], [1.0, 2.0]]
NUMBERS: dict[str, tuple[Callable[[], Any], str]] = {
    "features with NaN": (lambda: frechet_distance(holed(NAN), TABLE), "features_a"),
    "features with infinity": (lambda: frechet_distance(TABLE, holed(INF)), "features_b"),
    "features too large": (lambda: frechet_distance(TABLE * 1e200, TABLE), "large"),
    "a mean with NaN": (lambda: frechet_distance_to(TABLE, [0, NAN, 0], np.eye(3)), "mean"),
    "a covariance with NaN": (lambda: frechet_distance_to(TABLE, np.zeros(3), holed(NAN, (3, 3))), "covariance"),
    "a covariance with infinity": (lambda: frechet_distance_to(TABLE, np.zeros(3), holed(INF, (3, 3))), "covariance"),
    "a mean too large": (lambda: frechet_distance_to(TABLE, np.full(3, 1e300), np.eye(3)), "large"),
    "a mean of another width": (lambda: frechet_distance_to(TABLE, np.zeros(4), np.eye(3)), "3 features"),
    "ragged features": (lambda: frechet_distance(RAGGED, TABLE), "features_a"),
    "no features": (lambda: frechet_distance(None, TABLE), "features_a"),
    "words for features": (lambda: frechet_distance([["a"], ["b"]], TABLE), "features_a"),
    "real with NaN": (lambda: precision_recall(holed(NAN), TABLE), "real"),
    "ragged generated": (lambda: precision_recall(TABLE, RAGGED), "generated"),
    "half a neighbour": (lambda: precision_recall(TABLE, TABLE, k=1.5), "k="),  # type: ignore[arg-type]
    "logits with infinity": (lambda: inception_score(holed(INF)), "logits"),
    "ragged logits": (lambda: inception_score(RAGGED), "logits"),
    "logits None": (lambda: agreement(None, [1]), "logits"),
    "half a split": (lambda: inception_score(TABLE, splits=1.5), "splits"),  # type: ignore[arg-type]
    "values with NaN": (lambda: stats.mean([1.0, NAN]), "values"),
    "ragged values": (lambda: stats.bootstrap(RAGGED), "values"),
    "values None": (lambda: stats.mean(None), "values"),  # type: ignore[arg-type]
    "values of words": (lambda: stats.mean(["a", "b"]), "values"),
    "a pair with infinity": (lambda: stats.paired_bootstrap([1.0, INF], [1.0, INF]), "a holds"),
    "a win of NaN": (lambda: stats.win_probability([1.0, NAN], [1.0, 2.0]), "a holds"),
    "wins NaN": (lambda: stats.wilson(NAN, 3), "wins"),
    "trials NaN": (lambda: stats.wilson(1, NAN), "n="),  # type: ignore[arg-type]
    "a table with NaN": (lambda: stats.variance_explained(holed(NAN)), "values"),
    "answers with NaN": (lambda: two_way_share([0, 1, NAN], ["a"] * 3, ["b"] * 3), "0 or 1"),
    "answers of halves": (lambda: two_way_share([0, 0.5], ["a"] * 2, ["b"] * 2), "0 or 1"),
    "blocks with NaN": (lambda: comparing.over_blocks(np.array([1.0, NAN])), "values"),
    "a single block": (lambda: comparing.over_blocks(np.array([1.0])), "values"),
    "a result of NaN": (lambda: results.encoded(NAN, "x"), "x"),
    "a result with infinity": (lambda: results.encoded([1.0, [INF]], "x"), "x"),
    "a result of a set": (lambda: results.encoded({1}, "x"), "x"),
    "ragged images": (lambda: as_images(RAGGED), "images"),
    "images None": (lambda: as_images(None), "images"),
    "luma with NaN": (lambda: luminance(np.full((1, 4, 4, 3), NAN)), "images"),
    "ragged luma": (lambda: luminance(RAGGED), "images"),
    "structure with NaN": (lambda: structure_similarity(holed(NAN, (1, 16, 16, 3)), BATCH), "images"),
    "prompts None": (lambda: sharpness_score()(BATCH, None), "prompts"),  # type: ignore[arg-type]
    "a prompt for all": (lambda: sharpness_score()(BATCH, "a cat"), "one prompt per image"),
    "prompts of one None": (lambda: sharpness_score()(BATCH, [None] * 5), "prompts"),  # type: ignore[list-item]
    "conditions with NaN": (lambda: Job(model="m", conditions=(NAN,), count=1, steps=1), "conditions"),
    "a scale of NaN": (lambda: Job(model="m", conditions=("a",), count=1, steps=1, guidance_scale=NAN), "guidance"),
    "a call with NaN": (lambda: Job(model="m", conditions=("a",), count=1, steps=1, call={"x": NAN}), "call"),
    "a method with infinity": (
        lambda: Job(model="m", conditions=("a",), count=1, steps=1, methods={"dg": {"scale": INF}}), "",
    ),
}  # fmt: skip
BAD |= {f"numbers: {name}": (lambda folder, call=call: call(), words) for name, (call, words) in NUMBERS.items()}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    call, words = BAD[name]
    with pytest.raises(DgkitError) as caught:
        call(tmp_path)
    message = str(caught.value)
    assert words in message and message.strip() and "\n" not in message


# --------------------------------------------------------------------------------------------------------- corruptions


def whole_reference(path: Path) -> None:
    np.savez(path, arr_0=BATCH, **GAUSS)


def whole_result(path: Path) -> None:
    path.write_text(json.dumps(RESULT))


def whole_manifest(path: Path) -> None:
    path.write_text(json.dumps(MANIFEST))


def whole_key(path: Path) -> None:
    path.write_text(json.dumps({**vars(KEY), "pairs": dict(KEY.pairs)}))


def whole_image(path: Path) -> None:
    drawn(path.parent, path.name)


def whole_answers(path: Path) -> None:
    answers(HEAD + ROW)(path.parent)


def whole_prompts(path: Path) -> None:
    path.write_text('prompt,seed\n"a cät",1\na dog,2\n', encoding="utf-8")


def whole_weights(path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32)}, path)


READERS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], Any]]] = {
    "npz": ("ref.npz", whole_reference, lambda path: reference(lambda _: None)(path.parent)),
    "result": ("r.json", whole_result, lambda path: results.read(path)["x"]),
    "manifest": ("manifest.json", whole_manifest, lambda path: Store(path.parent)),
    "key": ("study.key.json", whole_key, Key.read),
    "image": ("fox.png", whole_image, read_image),
    "answers": ("ann.csv", whole_answers, lambda path: analyse([path])),
    "prompts": ("p.csv", whole_prompts, lambda path: read_conditions(str(path), None)),
    "weights": ("w.safetensors", whole_weights, lambda p: tensors(SimpleNamespace(path=p, sha256=""))),  # type: ignore
}


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of file as it should be, each in a folder of its own."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in READERS}
    for kind, (name, write, read) in READERS.items():
        write(folders[kind] / name)
        read(folders[kind] / name)
    return {kind: folder / READERS[kind][0] for kind, folder in folders.items()}


@pytest.mark.parametrize("kind", READERS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_of_damaged_files_comes_one_sentence_or_a_value(
    kind: str, wholes: dict[str, Path], data: st.DataObject
) -> None:
    """Cut short, bytes altered or put in, or another kind of file under the name: no other error comes through."""
    path = wholes[kind]
    content = path.read_bytes()
    damaged = bytearray(content)
    way = data.draw(st.sampled_from(["cut", "alter", "insert", "swap"]))
    if way == "cut":
        del damaged[data.draw(st.integers(0, len(content) - 1)) :]
    elif way == "insert":
        at = data.draw(st.integers(0, len(content)))
        damaged[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    elif way == "alter":
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        damaged = bytearray(
            wholes[data.draw(st.sampled_from([other for other in READERS if other != kind]))].read_bytes()
        )
    path.write_bytes(damaged)
    try:
        READERS[kind][2](path)
    except DgkitError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(content)


def test_a_run_may_have_infinity_where_a_method_takes_it(tmp_path: Path) -> None:
    blurred = job(methods={"seg": {"sigma": INF}})
    store = Store.create(tmp_path, blurred)
    store.pin({"methods": {"seg": {"sigma": INF}}})
    store.pin({"methods": {"seg": {"sigma": INF}}})
    assert Store(tmp_path).job == blurred and Store(tmp_path).job.guidance()[0].sigma == INF
