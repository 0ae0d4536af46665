"""`tile-matcher`: a small dual encoder that judges samples of the text-to-image models, and its score.

It takes the place that CLIP has for large models (Radford et al. 2021): images and captions become points on one
sphere, a tile near its own caption. `training.matcher` is its recipe. Its 48 penultimate image features take the place
of Inception's.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dgbook.readers import read_weights
from dgkit.errors import DgkitError, LoadError, first_line
from dgkit.files import read_json
from dgkit.paths import DATA

FEATURES = 48
"""Width of the penultimate image features."""

WIDTH = 24
"""Dimensions of the space that images and captions share."""


def to_input(pixels: Tensor) -> Tensor:
    """uint8 pixels as the autoencoder's input in [-1, 1]."""
    return pixels.float() / 127.5 - 1


class TileMatcher(nn.Module):
    """Four convolutions for images, one vector per word for captions, cosine similarity between them.

    A caption is the mean of its words' vectors: its words are an unordered set, and projecting their mean would be the
    same as projecting each of them. Images are uint8 (N, 32, 32, 3), as `dgkit.sampling.generate` returns them.

    Args:
        vocabulary: the words it knows.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.vocabulary = {word: index for index, word in enumerate(vocabulary)}
        stages: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 40)):
            stages += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        stages += [nn.Conv2d(40, FEATURES, 3, padding=1), nn.BatchNorm2d(FEATURES), nn.ReLU()]
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(FEATURES, WIDTH, bias=False)
        self.words = nn.Parameter(torch.randn(len(vocabulary), WIDTH) / WIDTH**0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's first temperature

    def bags(self, captions: Sequence[str]) -> Tensor:
        """Which words each caption has, 0 or 1 (M, words of the vocabulary); unknown words are ignored.

        Raises:
            DgkitError: a caption without any known word.
        """
        bags = torch.zeros(len(captions), len(self.vocabulary))
        for bag, caption in zip(bags, captions, strict=True):
            known = [self.vocabulary[word] for word in caption.lower().split() if word in self.vocabulary]
            if not known:
                raise DgkitError(f"caption {caption!r} is not allowed: the tile matcher knows none of its words")
            bag[known] = 1
        return bags.to(self.words.device)

    def embed_images(self, inputs: Tensor) -> Tensor:
        """Unit vectors (N, WIDTH) of images (N, 3, 32, 32) in [-1, 1]."""
        return F.normalize(self.head(self.stages(inputs)), dim=-1)

    def embed_bags(self, bags: Tensor) -> Tensor:
        """Unit vectors (M, WIDTH) of bags of words."""
        return F.normalize(bags @ self.words, dim=-1)

    def features(self, images: Tensor | np.ndarray) -> Tensor:
        """Penultimate features (N, 48) of uint8 images (N, 32, 32, 3).

        Raises:
            DgkitError: `images` has another shape or type.
        """
        pixels = torch.as_tensor(images)
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (32, 32, 3):
            found = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise DgkitError(f"images={found} is not allowed: use torch.uint8 (N, 32, 32, 3)")
        inputs = to_input(pixels.to(self.words.device).movedim(-1, 1))
        return torch.cat([self.stages(part) for part in inputs.split(500)])  # bounded memory

    def similarity(self, images: Tensor | np.ndarray, captions: Sequence[str]) -> Tensor:
        """Cosine similarities (N, M) of uint8 images (N, 32, 32, 3) and M captions.

        Raises:
            DgkitError: as for `features` and `bags`.
        """
        return F.normalize(self.head(self.features(images)), dim=-1) @ self.embed_bags(self.bags(captions)).T


@torch.no_grad()
def matching_score(
    matcher: TileMatcher,
    images: Tensor | np.ndarray,
    captions: Sequence[str],
    choices: int = 16,
    seed: int = 0,
    pool: Sequence[str] | None = None,
) -> NDArray[np.bool_]:
    """Whether each image is nearer to its own caption than to `choices` - 1 others, (N,); by chance in 1 / `choices`.

    The others are distinct, differ from the image's caption and are drawn from the distinct captions of `pool`. The
    draw depends on `seed`, the image's position and its caption alone.

    Args:
        matcher: the judge.
        images: uint8 (N, 32, 32, 3).
        captions: one per image.
        choices: number of captions to choose from.
        seed: see above.
        pool: captions to draw from; those of all images by default.

    Raises:
        DgkitError: not one caption per image, too few captions to draw from, or as for `TileMatcher.similarity`.
    """
    if len(captions) != len(images):
        raise DgkitError(f"{len(captions)} captions are given: one for each of {len(images)} images is needed")
    others = sorted(set(captions if pool is None else pool))
    if not 2 <= choices <= len(others):
        raise DgkitError(f"choices={choices} is not allowed: 2 to {len(others)} with that many captions to draw from")
    asked = sorted(set(captions))
    similarity = matcher.similarity(images, [*asked, *others]).cpu().numpy()
    row, column = {c: i for i, c in enumerate(asked)}, {c: len(asked) + i for i, c in enumerate(others)}
    right = np.empty(len(images), bool)
    for i, caption in enumerate(captions):
        digest = hashlib.sha256(f"{seed} {i} {caption}".encode()).digest()
        order = np.random.default_rng(list(digest)).permutation(len(others))
        drawn = [others[j] for j in order[:choices] if others[j] != caption][: choices - 1]
        right[i] = similarity[i, row[caption]] > similarity[i, [column[c] for c in drawn]].max()
    return right


def load_matcher(folder: Path = DATA / "models" / "tile-matcher") -> TileMatcher:
    """The matcher in `folder`, in float32 and ready to judge.

    Raises:
        LoadError: `folder` lacks a file, or its weights are broken or of another network.
    """
    weights, config = folder / "model.safetensors", folder / "config.json"
    for path in (weights, config):
        if not path.is_file():
            raise LoadError(f"folder={str(folder)!r} is not allowed: {path.name} of a TileMatcher is missing there")
    try:
        model = TileMatcher(read_json(config)["vocabulary"].split())
        model.load_state_dict(read_weights(weights))
    except (AttributeError, RuntimeError, ValueError, KeyError) as error:
        raise LoadError(f"{folder} does not hold a TileMatcher: {first_line(error)}") from error
    return model.requires_grad_(False).eval()
