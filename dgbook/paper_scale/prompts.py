"""Prompt sets by name, checked against their published size and content.

| name | prompts | from |
|---|---|---|
| pickapic | 500 | Pick-a-Pic v1, split `test_unique` (Kirstain et al. 2023) |
| hpsv2.1 | 4 x 800 | the benchmark of HPSv2 (Wu et al. 2023): anime, concept-art, paintings, photo |
| imagenet | 50,000 | the 1,000 classes in turn, 50 times each |
| offline, dungeon-tiles | 24, 1,000 | written by this project, shipped in `data/prompts` |

Files that are not shipped are found or downloaded as `dgbook.downloads` says.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import snapshot_download

from dgbook.downloads import Published, check_first_use, fetch
from dgbook.paper_scale.generate.job import SEEDS
from dgbook.readers import read_table
from dgkit import checks
from dgkit.errors import DataError
from dgkit.files import read_json, read_lines
from dgkit.paths import DATA


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set.

    Attributes:
        index: position in the set, which also names its image.
        text: the prompt as published, or "class 207".
        category: the set's own grouping, "" if it has none.
        label: class id for class-conditional models.
    """

    index: int
    text: str
    category: str = ""
    label: int | None = None

    @property
    def condition(self) -> str | int:
        """What `generate` takes."""
        return self.text if self.label is None else self.label


HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
HPS_PER_STYLE = 800
PICKAPIC_PROMPTS = 500
IMAGENET_CLASSES = 1_000
IMAGENET_IMAGES = 50_000

_NOT_LINES = (
    ".json",
    ".jsonl",
    ".tsv",
    ".parquet",
    ".xlsx",
    ".yaml",
    ".yml",
    ".toml",
)  # files of prompts, but no lines

PICKAPIC = "yuvalkirstain/pickapic_v1_no_images"

# stated by another project that checks these four files at this commit
_HPS_SHA256 = (
    "6b38a479cc6f899866e9b7a8bf91f096b4afc6883b95275a61891327182b14ae",
    "530d057deafcb82c581e9d1be2ffcb98828fe99f0b54257414d2ab8a5cf2b83e",
    "6570d39467e08b24b64e5b8a4177b0f61c525631121dc5a91fe2ab956eab4d5f",
    "92a3c9a0f743f66eb87bd112cdda830d6bdb4c073c86021d53b74001fcb18052",
)
HPS_FILES: dict[str, Published] = {
    style: Published(
        files=(f"benchmark/{style}.json",), licence="Apache-2.0 (HPSv2)", gigabytes=0.0001, sha256=sha256, dataset=True,
        hub="zhwang/HPDv2", revision="b9517430f34b1080d4f741118d2a440155a165cd",
    )
    for style, sha256 in zip(HPS_STYLES, _HPS_SHA256, strict=True)
}  # fmt: skip


def load(name: str) -> list[Prompt]:
    """All prompts of a set, in its own order.

    "imagenet" gives image i the class i % 1000, so that any multiple of 1,000 images is balanced and a class does not
    depend on the number of workers. (DiT's own `sample_ddp.py` draws classes at random: 50 +- 7 images per class.)

    Raises:
        DgkitError: unknown name.
        DataError: the set is neither here nor to be downloaded, or not the published one.
    """
    return SETS[checks.one_of("prompts", name, SETS)]()


def read_conditions(prompts: str | None, classes: str | None) -> tuple[list[Any], str]:
    """Conditions and their name from what a command line gives: one of the two.

    Args:
        prompts: the name of a prompt set, a text file with one prompt per line, or a CSV file with a column "prompt".
        classes: class ids, "FIRST-LAST".

    Raises:
        DgkitError: neither a set nor such a file, an empty line or prompt in the file, or no range.
    """
    if classes is not None:
        found = re.fullmatch(r"(\d+)-(\d+)", classes)
        if not found or not int(found[1]) <= int(found[2]) < SEEDS:
            checks.refuse("classes", classes, f"give FIRST-LAST below {SEEDS}, such as 0-999")
        return list(range(int(found[1]), int(found[2]) + 1)), ""
    if prompts in SETS:
        return [prompt.condition for prompt in load(prompts)], prompts
    path = Path(prompts or "")
    if not path.is_file():
        checks.refuse("prompts", prompts, f"give a text file, a .csv file, or a set: {', '.join(SETS)}")
    if path.suffix.lower() == ".csv":
        return [row["prompt"] for _, row in read_table(path, ["prompt"])], path.stem
    if path.suffix.lower() in _NOT_LINES:
        checks.refuse("prompts", prompts, "give one prompt per line of text, or a .csv file with a column prompt")
    return list(read_lines(path)), path.stem


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of the set's texts and categories in order, for the manifest of a run."""
    lines = json.dumps([[prompt.text, prompt.category] for prompt in prompts], ensure_ascii=False)
    return hashlib.sha256(lines.encode()).hexdigest()


def _shipped(name: str) -> list[Prompt]:
    return [Prompt(i, line) for i, line in enumerate(read_lines(DATA / "prompts" / f"{name}.txt"))]


def _imagenet() -> list[Prompt]:
    labels = (i % IMAGENET_CLASSES for i in range(IMAGENET_IMAGES))
    return [Prompt(i, f"class {label}", "", label) for i, label in enumerate(labels)]


def _hps() -> list[Prompt]:
    prompts: list[Prompt] = []
    for style, item in HPS_FILES.items():
        path = fetch(item).path
        texts = _list_of_texts(path)
        prompts += [Prompt(len(prompts) + i, text, style) for i, text in enumerate(texts)]
        _counted(prompts[-len(texts) :], HPS_PER_STYLE, path)
    return prompts


def _list_of_texts(path: Path) -> list[str]:
    texts = read_json(path, list)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{path} is not a list of prompts")
    return texts


def _pickapic() -> list[Prompt]:
    """No source states a commit or a hash: the first download's captions are noted, and later ones must agree."""
    folder = _pickapic_folder()
    files = sorted(folder.rglob("*test_unique*.parquet"))
    if not files:
        raise DataError(f"{PICKAPIC} has no file *test_unique*.parquet in {folder}")
    texts = [text for file in files for text in _captions(file)]
    prompts = _counted([Prompt(i, text) for i, text in enumerate(texts)], PICKAPIC_PROMPTS, folder)
    check_first_use("pickapic-test-unique", fingerprint(prompts))
    return prompts


def _pickapic_folder() -> Path:
    try:
        return Path(snapshot_download(PICKAPIC, repo_type="dataset", allow_patterns="*test_unique*.parquet"))
    except Exception as error:  # the hub has no common base of its errors
        raise DataError(
            f"{PICKAPIC} is not on this machine and could not be downloaded ({type(error).__name__}). On a machine "
            f"with a network: hf download {PICKAPIC} --repo-type dataset --include '*test_unique*.parquet'"
        ) from error


def _captions(path: Path) -> list[str]:
    try:
        return pd.read_parquet(path, columns=["caption"])["caption"].tolist()
    except ImportError as error:
        raise DataError(f'{path.name} needs pyarrow to be read: pip install "dgkit[scores]"') from error
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} has no column caption: {error}") from error


def _counted(prompts: list[Prompt], count: int, path: Path) -> list[Prompt]:
    if len(prompts) != count:
        raise DataError(f"{path} has {len(prompts)} prompts, {count} were published")
    empty = [prompt.index for prompt in prompts if not isinstance(prompt.text, str) or not prompt.text.strip()]
    if empty:
        raise DataError(f"{path}: prompt {empty[0]} is empty")
    return prompts


SETS: dict[str, Callable[[], list[Prompt]]] = {
    "pickapic": _pickapic,
    "hpsv2.1": _hps,
    "imagenet": _imagenet,
    "offline": lambda: _shipped("offline"),
    "dungeon-tiles": lambda: _shipped("dungeon-tiles"),
}
"""The sets by name."""
