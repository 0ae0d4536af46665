"""No number in prose is typed: `{measured}` or the code of a notebook makes it, or there is a reason for it.

A number in a page's own text has to be a reference (section 4.2, Figs. 2 and 3, Eq. 5, a year, an arXiv id), a number
that the paper prints (`data/paper/*.csv`), or a part of a phrase in `allowed_numbers.toml`, which says why.
"""

import json
import re
import tomllib
from pathlib import Path

import pytest

from dgkit.paths import CHECKOUT, DATA

assert CHECKOUT is not None
PAGES = {
    str(path.relative_to(CHECKOUT)): path
    for path in (*CHECKOUT.glob("book/*.md"), *CHECKOUT.glob("notebooks/*.ipynb"), CHECKOUT / "README.md")
}
ALLOWED = tomllib.loads((Path(__file__).parents[1] / "allowed_numbers.toml").read_text())

NUMBER = re.compile(r"(?<![A-Za-z0-9_.])\d[\d,]*(?:\.\d+)*")
_LIST = r"[(\[]?\d[\d.]*[a-z]?\)?(?:\s?\([a-z]\))?"
_DROPPED = [
    re.compile(r"^(`{3,})[^`{\n]*\n.*?^\1\s*$", re.DOTALL | re.MULTILINE),  # code; not directives, which may hold prose
    re.compile(r"<!--.*?-->", re.DOTALL),
    re.compile(r"^\s*(`{3,}|:{3,}).*$", re.MULTILINE),  # the first and last line of a directive
    re.compile(r"^:[\w-]+:.*$", re.MULTILINE),  # its options
    re.compile(r"^\([\w-]+\)=\s*$", re.MULTILINE),  # a label
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"\$[^$\n]*(?:\n[^$\n]+)?\$"),
    re.compile(r"(`+)[^`]+?\1"),  # code spans, and what a role is applied to
    re.compile(r"\]\([^)\s]*\)"),  # where a link goes
    re.compile(r"https?://\S+"),
    re.compile(r"^\s*\d+\.\s", re.MULTILINE),  # the number of a list's item
    re.compile(  # references to the paper's and the book's parts
        rf"\b(?:eqs?|figs?|figures?|tables?|sections?|chapters?)\.?\s+{_LIST}(?:(?:,\s|\s(?:and|to|or)\s|-){_LIST})*",
        re.IGNORECASE,
    ),
    re.compile(r"\barxiv[: ]\d{4}\.\d{4,5}\b|\b\d{4}\.\d{5}\b", re.IGNORECASE),
    re.compile(r"\b(?:19[5-9]\d|20[0-3]\d)\b"),  # years
]


def prose(path: Path) -> str:
    """What people wrote on a page: of a notebook, the Markdown cells and the captions of figures."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return "\n\n".join(
        texts + [cell["metadata"].get("mystnb", {}).get("figure", {}).get("caption", "") for cell in cells]
    )


def printed() -> set[str]:
    """The paper's numbers of three digits or more; shorter ones would back too much by chance."""
    files = set((DATA / "paper").glob("*.csv")) - {DATA / "paper" / "parts.csv"}  # whose numbers are this book's
    found = {number for path in files for number in NUMBER.findall(path.read_text())}
    return {number for number in found if sum(c.isdigit() for c in number) >= 3}


def typed(text: str, allowed: list[str], backed: set[str]) -> list[str]:
    """The numbers of a text that nothing backs, each with what stands around it."""
    for phrase in sorted(allowed, key=len, reverse=True):  # with any space between its words
        text = re.sub(r"\s+".join(map(re.escape, phrase.split())), " ", text)
    for dropped in _DROPPED:
        text = dropped.sub(" ", text)
    return [
        " ".join(text[max(0, match.start() - 40) : match.end() + 30].split())
        for match in NUMBER.finditer(text)
        if match[0].rstrip(",") not in backed
    ]


def phrases(page: str) -> list[str]:
    return [entry["text"] for entry in ALLOWED["allowed"] if page in entry.get("pages", PAGES)]


@pytest.mark.parametrize("page", PAGES)
def test_every_number_in_prose_is_backed(page: str) -> None:
    found = typed(prose(PAGES[page]), phrases(page), printed())
    assert not found, f"{page}: use {{measured}}, or give a reason in tests/allowed_numbers.toml: {found}"


def test_what_is_allowed_is_on_the_page_and_has_a_reason() -> None:
    for entry in ALLOWED["allowed"]:
        assert NUMBER.search(entry["text"]) and len(entry["reason"].split()) >= 2, entry
        texts = {page: " ".join(prose(PAGES[page]).split()) for page in entry.get("pages", PAGES)}
        found = [page for page, text in texts.items() if " ".join(entry["text"].split()) in text]
        assert found and (found == [*texts] or "pages" not in entry), f"{entry['text']!r} is no longer there"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(the paper's Figures 5a and 16), Figures 3b and 3c, chapter\n[3](../x.ipynb)", 0),
        ("The error is 0.23 there.", 1),
        ("in 4 of 8 blocks", 2),
        ("| tiny-sd3 | 0.12 [0.09, 0.15] |", 3),
        ("50k iterations, 256x256 pixels, 95 %, -3.5", 4),
        ("see section 4.2 (0.46 against 0.54), Table 12", 2),
        (":::{note}\n12 images\n:::", 1),
        ("```{note}\n12 images\n```", 1),
        ("1. first\n2. second", 0),
        ("section 4.2, Figs. 2 and 3, Figures 6 to 9, Tables 1-3, Eq. 4, Fig. 5(b), chapter 3", 0),
        ("SD3, SD3.5 and HPSv2.1 (Kirstain et al. 2023, arXiv 2305.01569, 2605.13974)", 0),
        ("`block=5` and ```bash\nx 12\n```", 1),
        ("text\n\n```python\nx = 12\n```\n\n$2N - m$ and\n\n$$ 3N $$", 0),
        ("[a 1.5 link](https://example.org/12.3) {doc}`chapter 4 <x4>` https://example.org/77", 1),
        ("Blipscore from 70.09 to 83.66", 0),
        ("w = 0.61", 0),
        ("s is 28, and 28.4", 2),
    ],
)
def test_typed_numbers_are_found_and_references_are_not(text: str, found: int) -> None:
    assert len(typed(text, [], {"70.09", "83.66", "0.61"})) == found, typed(text, [], set())


def test_only_long_numbers_of_the_paper_count() -> None:
    assert {"70.09", "810", "0.462", "16.95"} <= printed() and not {"4", "28", "50"} & printed()


def test_an_allowed_phrase_covers_its_own_numbers_only() -> None:
    assert typed("at least 5 times\nthe median, in 7 cases", ["5 times the median"], set()) == ["at least , in 7 cases"]
