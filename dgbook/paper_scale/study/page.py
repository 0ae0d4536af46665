"""The page: two folders of images become one HTML file that asks which image of each pair is better.

Blinding. The page holds pixels, prompts and random ids; which id is of which folder is in the key file alone. Pairs,
and the two images of a pair, are in an order drawn from a hash of all images, so that nobody without the folders can
repeat the draw. Images are decoded and written anew, without loss: no metadata, and no format, tells them apart.
Within the page the annotator's id seeds the order of the pairs and which image is on the left.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dgbook.files import replacing, write_whole
from dgbook.paper_scale.generate.store import Store, images
from dgbook.readers import read_image
from dgkit import checks
from dgkit.errors import DgkitError, first_line
from dgkit.files import read_json, read_text

QUESTIONS: dict[str, tuple[str, str]] = {
    "prompt_alignment": ("Prompt alignment", "Which image matches the prompt better?"),
    "detail_preservation": ("Detail preservation", "Which image shows fine-grained details with more fidelity?"),
    "color_consistency": ("Color consistency", "Which image has the more natural and realistic colors?"),
}
"""Title and text by id. The titles, and what each measures, are appendix I's; it does not print the wording asked."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Key:
    """What blinds a study, and resolves its answers.

    Attributes:
        study: id of the study.
        a, b: the folders, by name; of a run, the name of its job.
        seed: of the draw.
        questions: ids, as in `QUESTIONS`.
        pairs: by the pair's id in the page: "name" of the pair in the folders, and the ids of its images "a" and "b".
    """

    study: str
    a: str
    b: str
    seed: int
    questions: tuple[str, ...]
    pairs: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, path: Path) -> "Key":
        """The key in a file.

        Raises:
            DgkitError: the file cannot be read or is no key.
        """
        try:
            values = read_json(Path(path))
            key = cls(**values | {"questions": tuple(values["questions"])})
            if not key.pairs or any(set(pair) != {"name", "a", "b"} for pair in key.pairs.values()):
                raise ValueError("its pairs are not complete")
            if not key.questions or not set(key.questions) <= set(QUESTIONS):
                raise ValueError("its questions are not known")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DgkitError(f"key={str(path)!r} is not the key file of a study: {first_line(error)}") from error
        return key


def key_path(page: Path) -> Path:
    """Where the key of a page is kept: study.html has study.key.json."""
    return Path(page).with_suffix(".key.json")


def make(a: Path, b: Path, output: Path, seed: int = 0) -> Key:
    """Write the page of a study, and its key beside it; the same folders and seed give the same bytes.

    Images are paired by file name without suffix, or by index if the folders are runs of `dgkit generate`. Prompts are
    those of the runs, or `NAME.txt` beside `NAME.png`; without any the first question is left out. The images, encoded,
    are held in memory.

    Args:
        a, b: the folders.
        output: the page, `.html`; replaced if it is there.
        seed: of the draw of ids and orders.

    Raises:
        DgkitError: a folder is missing or empty, the names do not pair up, a pair differs in size, is identical or has
            two prompts, an image cannot be read or is transparent or has a colour profile, some pairs have prompts and
            others none, two runs have other conditions or seeds, `output` is not allowed or cannot be written, or the
            key of another study is there.
        DataError: a run is not finished, or damaged.
    """
    output = Path(output)
    if output.suffix != ".html" or not output.parent.is_dir():
        checks.refuse("output", str(output), "give a file .html in a folder that exists")
    checks.integer("seed", seed, 0)
    first, second = _Folder(Path(a)), _Folder(Path(b))
    _check_pairing(first, second)
    prompts = _prompts(first, second)

    names, encoded, digest = [], [], hashlib.sha256(f"{seed}".encode())
    for (name, image), (_, other) in zip(first.images(), second.images(), strict=True):
        if image.shape != other.shape:
            sizes = " and ".join(f"{x.shape[1]} x {x.shape[0]}" for x in (image, other))
            raise DgkitError(f"the images {name!r} differ in size: {sizes} pixels")
        if np.array_equal(image, other):
            raise DgkitError(f"the images {name!r} are identical: there is nothing to choose between")
        names.append(name)
        encoded.append((_encode(image), _encode(other)))
        for part in (name.encode(), prompts.get(name, "").encode(), image.tobytes(), other.tobytes()):
            digest.update(hashlib.sha256(part).digest())

    generator = np.random.default_rng(int.from_bytes(digest.digest()))
    order = generator.permutation(len(names))
    swapped = generator.integers(2, size=len(names), dtype=bool)
    ids = iter(_ids(generator, 2 * len(names)))
    key_pairs: dict[str, dict[str, str]] = {}
    page_pairs: list[dict[str, Any]] = []
    blocks: dict[str, bytes] = {}
    for number, index in enumerate(order, 1):
        pair, name = f"p{number:0{len(str(len(names)))}d}", names[index]
        mine = (next(ids), next(ids))
        blocks |= dict(zip(mine, encoded[index], strict=True))
        key_pairs[pair] = {"name": name, "a": mine[0], "b": mine[1]}
        page_pairs.append({"id": pair, "images": mine[:: -1 if swapped[index] else 1]})
        if prompts:
            page_pairs[-1]["prompt"] = prompts[name]
    questions = tuple(question for question in QUESTIONS if prompts or question != "prompt_alignment")
    labels = (first.label, second.label) if first.label != second.label else (str(a), str(b))
    key = Key(f"s{digest.hexdigest()[:12]}", *labels, seed, questions, key_pairs)
    study = {
        "study": key.study,
        "questions": [
            {"id": question, "title": QUESTIONS[question][0], "text": QUESTIONS[question][1]} for question in questions
        ],
        "pairs": page_pairs,
    }

    there = key_path(output)
    if there.exists() and Key.read(there).study != key.study:
        raise DgkitError(f"{there} is the key of another study, whose answers need it: give another output")
    write_whole(there, json.dumps(asdict(key), indent=1, ensure_ascii=False))
    with replacing(output) as partial, partial.open("wb") as file:
        file.writelines(_html(study, blocks))
    return key


def _html(study: Mapping[str, Any], blocks: Mapping[str, bytes]) -> Iterator[bytes]:
    head, _, tail = (
        files("dgbook.paper_scale.study").joinpath("study.html").read_text(encoding="utf-8").partition("<!--DATA-->")
    )
    yield head.encode()
    # "</script>" in a prompt would end the element
    data = json.dumps(study, ensure_ascii=False).replace("<", "\\u003c")
    yield f'<script type="application/json" id="study">{data}</script>\n'.encode()
    for name in sorted(blocks):  # ids are random, so this order tells nothing
        yield f'<script type="text/plain" id="{name}">'.encode() + base64.b64encode(blocks[name]) + b"</script>\n"
    yield tail.encode()


def _ids(generator: np.random.Generator, count: int) -> list[str]:
    """Different random ids; the letter keeps spreadsheets from reading a number."""
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[f"i{generator.bytes(5).hex()}"] = None
    return list(ids)


def _encode(image: Pixels) -> bytes:
    """Lossless: a judgement of fine detail must not be one of a compressor's. Small effort; more saves little."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- folders


class _Folder:
    """Images (H, W, 3) and prompts by name, of a run of `dgkit generate` or of any folder of image files."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DgkitError(f"{folder} is not a folder")
        self.folder, self.job, self.label = folder, None, folder.resolve().name
        self.prompts: dict[str, str] = {}
        self.files: dict[str, Path] = {}
        if (folder / "manifest.json").exists():
            self.job = job = Store(folder).job
            self.label = job.name
            self.names = [f"{index:06d}" for index in range(job.count)]
            if isinstance(job.conditions[0], str):  # a class id is no prompt to a reader
                self.prompts = {name: job.condition(index) for index, name in enumerate(self.names)}
            return
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                if path.stem in self.files:
                    raise DgkitError(
                        f"{folder} has two images named {path.stem!r}: {self.files[path.stem].name}, {path.name}"
                    )
                self.files[path.stem] = path
        self.names = sorted(self.files)  # not by suffix too, which the other folder may have another of
        if not self.names:
            raise DgkitError(f"{folder} holds no images ({', '.join(SUFFIXES)}) and is not the folder of a run")
        for name in self.names:
            path = folder / f"{name}.txt"
            if path.exists():
                self.prompts[name] = read_text(path).strip()
                if not self.prompts[name]:
                    raise DgkitError(f"{path} is empty: give the prompt of {self.files[name].name}, or no such file")

    def images(self) -> Iterator[tuple[str, Pixels]]:
        """In the order of `names`."""
        if self.job is None:
            yield from ((name, read_image(self.files[name])) for name in self.names)
        else:
            yield from ((self.names[index], image) for index, image in images(self.folder))


def _check_pairing(a: _Folder, b: _Folder) -> None:
    if a.job is not None and b.job is not None:
        decisive = ("conditions", "count", "seed")
        if found := [text for text in a.job.differences(b.job) if text.split(":")[0] in decisive]:
            raise DgkitError(f"{a.folder} and {b.folder} are not paired, the same prompt and noise: {'; '.join(found)}")
    for mine, other in ((a, b), (b, a)):
        if lone := sorted(set(mine.names) - set(other.names)):
            shown = ", ".join(lone[:5]) + (f" and {len(lone) - 5} more" if len(lone) > 5 else "")
            raise DgkitError(f"images are paired by name, and {other.folder} lacks {shown} of {mine.folder}")


def _prompts(a: _Folder, b: _Folder) -> dict[str, str]:
    for name in a.prompts.keys() & b.prompts.keys():
        if a.prompts[name] != b.prompts[name]:
            raise DgkitError(f"the images {name!r} have two prompts: {a.prompts[name]!r} and {b.prompts[name]!r}")
    prompts = b.prompts | a.prompts
    if prompts and (lacking := [name for name in a.names if name not in prompts]):
        raise DgkitError(
            f"{len(lacking)} of {len(a.names)} pairs have no prompt, {lacking[0]!r} first: give all or none"
        )
    return prompts
