"""Folders of small images for the tests of the user study."""

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 12


def folders(root: Path, count: int = 3, prompts: bool = True) -> tuple[Path, Path]:
    """Two folders of `count` random images with the same names, and prompts in the first."""
    generator = np.random.default_rng(7)
    for folder in ("ours", "theirs"):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"img{index}.png")
            if prompts and folder == "ours":
                (root / folder / f"img{index}.txt").write_text(f"prompt {index} <b>é</b> </script>\n", encoding="utf-8")
    return root / "ours", root / "theirs"


def pixels(path: Path) -> np.ndarray:
    """An image file (H, W, 3)."""
    return np.asarray(Image.open(path).convert("RGB"))
