"""The dungeon tiles as captioned images: what `tiny-sd3`, `tiny-flux` and their autoencoder are trained on."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dgbook.measures import datasets

BACKGROUND = 128
"""The grey (0 to 255) behind all tiles.

One colour for all, because no caption tells backgrounds apart; the colour in the middle, which is 0 for the networks
and contrasts with the black shadows and outlines as well as with the highlights of the sprites.
"""

COLOURS = (
    "black", "blue", "brown", "copper", "cyan", "gold", "green", "grey", "magenta", "orange", "pink", "purple", "red",
    "silver", "white", "yellow",
)  # fmt: skip

SHADES = ("dark", "light")
"""Said of a colour, or of a material: "light red", "dark stone"."""

RENAMED = {
    "dngn": "dungeon", "mon": "monster", "draco": "draconian", "gray": "grey", "golden": "gold", "gateways": "gateway",
    "simulacra": "simulacrum", "spells": "spell", "torches": "torch",
}  # fmt: skip

NOT_VISIBLE = {
    # releases ("dc-mon", "old", "new"), artists, what the game's code says of an item
    "dc", "old", "new", "lorc", "ego", "job", "urand", "unrand", "unrandart", "spwpn", "calc", "doll", "only",
    "the", "and", "with",
}  # fmt: skip

RARE = 3
"""Words of fewer tiles are left out: a word seen once or twice is learned by heart, not as a word."""

NEAR = 10.0
"""Tiles whose pixels differ by less than this (root mean square, 0 to 255; 28 dB) count as near-duplicates."""


class Caption(NamedTuple):
    """The words of a tile, the more special first: "cyan | dragon | monster", "red | robe | armour item"."""

    colours: tuple[str, ...]
    objects: tuple[str, ...]
    categories: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((*self.colours, *self.objects, *self.categories))


@dataclass(frozen=True)
class Tiles:
    """All tiles.

    Attributes:
        pixels: RGB over `BACKGROUND`, uint8 (N, 3, 32, 32).
        captions: one per tile.
        paths: one per tile.
        held_out: bool (N,), True for the tiles that nothing is trained on.
    """

    pixels: Tensor
    captions: list[Caption]
    paths: list[str]
    held_out: Tensor

    @classmethod
    def load(cls) -> "Tiles":
        """The dungeon tiles of `data.dungeon_tiles`, whose errors it raises."""
        images, paths = datasets.dungeon_tiles()
        pixels = composite(images)
        return cls(pixels, captions(paths), paths, held_out(pixels, paths))


def composite(images: Tensor) -> Tensor:
    """RGBA images (N, 4, H, W) in uint8 over `BACKGROUND`, as RGB (N, 3, H, W) in uint8."""
    opacity = images[:, 3:].float() / 255
    return (images[:, :3] * opacity + BACKGROUND * (1 - opacity)).round().byte()


def captions(paths: list[str]) -> list[Caption]:
    """The words of each path: colours and shades, then the file's other words, then the folders, the innermost first.

    Left out are the release and its date, digits, words of one or two letters, those of `NOT_VISIBLE` and those of
    fewer than `RARE` tiles. A plural becomes its singular where that occurs too.
    """
    raw = [_words(path) for path in paths]
    known = {word for file, folders in raw for word in (*file, *folders)}

    def singular(word: str) -> str:
        return word[:-1] if len(word) > 3 and word.endswith("s") and word[:-1] in known else word

    tidy = []
    for file, folders in raw:
        file, folders = ([RENAMED.get(w, singular(w)) for w in part] for part in (file, folders))
        tidy.append((list(dict.fromkeys(w for w in file if w not in folders)), list(dict.fromkeys(folders))))
    tiles_of_word = Counter(word for file, folders in tidy for word in (*file, *folders))

    def kept(words: list[str]) -> list[str]:
        return [w for w in words if len(w) > 2 and w not in NOT_VISIBLE and tiles_of_word[w] >= RARE]

    return [
        Caption(
            tuple(word for word in kept(file) if word in (*COLOURS, *SHADES)),
            tuple(word for word in kept(file) if word not in (*COLOURS, *SHADES)),
            tuple(kept(folders)),
        )
        for file, folders in tidy
    ]


def held_out(pixels: Tensor, paths: list[str]) -> Tensor:
    """Which tiles are kept from training: about one in sixteen, bool (N,).

    The two releases share many tiles, redrawn or recoloured, and most names have numbered variants. So the split is
    between groups: tiles of the same file name (but for digits and compass points) or nearer than `NEAR`, and whatever
    these are linked with. The SHA-256 of a group's first path decides.
    """
    flat = pixels.flatten(1).double()  # exact, so the same on every machine
    near = torch.cdist(flat, flat) < NEAR * flat.shape[1] ** 0.5
    links = near.numpy()
    first: dict[object, int] = {}
    for tile, path in enumerate(paths):
        links[tile, first.setdefault(tuple(w for w in _words(path)[0] if len(w) > 2) or path, tile)] = True
    _, group = connected_components(coo_array(links), directed=False)
    name = {g: min(paths[tile] for tile in np.flatnonzero(group == g)) for g in set(group.tolist())}
    return torch.tensor([hashlib.sha256(name[g].encode()).digest()[0] < 16 for g in group.tolist()])


def unseen_combinations(tiles: list[Caption], count: int = 64, common: int = 10) -> list[Caption]:
    """Captions of a colour, an object and its category that are new, though each of their words is known.

    Each word occurs in at least `common` of the `tiles`. Object and categories make up the caption of a tile, with or
    without a colour (of several categories, those of most tiles); this colour comes with this object in none. Every
    object occurs once; the SHA-256 of the captions decides between the combinations.

    Args:
        tiles: the captions of the training tiles.
        count: number of captions.
        common: see above.
    """
    tiles_of_word = Counter(word for caption in tiles for part in caption for word in part)
    seen = {(colour, word) for caption in tiles for colour in caption.colours for word in caption.objects}
    alone = Counter((c.objects, c.categories) for c in tiles if len(c.objects) == 1)
    usual = {objects: categories for (objects, categories), _ in sorted(alone.items(), key=lambda item: item[::-1])}
    candidates = [
        Caption((colour,), objects, categories)
        for objects, categories in usual.items()
        for colour in COLOURS
        if (colour, *objects) not in seen and min(tiles_of_word[w] for w in (colour, *objects, *categories)) >= common
    ]
    candidates.sort(key=lambda caption: hashlib.sha256(str(caption).encode()).digest())
    first: dict[tuple[str, ...], Caption] = {}
    for caption in candidates:
        first.setdefault(caption.objects, caption)
    return list(first.values())[:count]


def _words(path: str) -> tuple[list[str], list[str]]:
    """The words of the file's name and of its folders, the innermost first, without the release and its date."""
    folders = list(PurePosixPath(path).parent.parts)[1:]
    if folders and folders[0] == "Oct-5-2010":
        del folders[0]
    # "lightred" and "darkgray" are two words
    split = re.compile(rf"(?:{'|'.join(SHADES)})(?=red|gray|grey|green|blue|cyan|magenta|brown)|[a-z]+")
    return split.findall(PurePosixPath(path).stem.lower()), split.findall(" ".join(reversed(folders)).lower())
