"""The live page by itself, without the book around it: what its tests open."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "book" / "_static"
DATA = ROOT / "_build" / "live"


def scripts() -> list[str]:
    """The scripts of the page, in the order in which the book has them."""
    listed = re.search(r"SCRIPTS = \((.*?)\)", (ROOT / "book" / "_ext" / "live.py").read_text(), re.DOTALL)
    assert listed
    return re.findall(r'"([^"]+)"', listed[1])


def make(folder: Path, data: Path | None = DATA) -> Path:
    """A folder with the page, `book/live.html`, and what it loads; without models where `data` is None."""
    live = folder / "_static" / "live"
    shutil.copytree(STATIC / "live", live, ignore=shutil.ignore_patterns("data"))
    shutil.copytree(STATIC / "img-comparison-slider", folder / "_static" / "img-comparison-slider")
    shutil.copy(STATIC / "looking.js", folder / "_static")
    if data is not None:
        (live / "data").symlink_to(data)
    names = ["img-comparison-slider/index", "looking", *(f"live/{name}" for name in scripts())]
    tags = "".join(f'<script defer src="../_static/{name}.js"></script>\n' for name in names)
    page = folder / "book" / "live.html"
    page.parent.mkdir()
    page.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>live</title><link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="../_static/live/live.css">'
        f"{tags}</head><body><main>{(live / 'app.html').read_text()}</main></body></html>"
    )
    return page
