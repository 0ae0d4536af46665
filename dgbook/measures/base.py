"""What every per-image metric has in common: an id that says exactly what was computed, and one call."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dgkit.errors import DgkitError, first_line

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation per channel with which CLIP, BLIP and HPSv2 normalise images."""

_BATCH = 16


@dataclass(frozen=True)
class MetricId:
    """What was computed; two results may be compared only if their ids agree.

    Attributes:
        name: of the metric.
        weights: name and hash of each file of weights, "none" without a network.
        preprocessing: from the uint8 image to the network's input.
        antialias: whether images are low-passed when they are made smaller; None if they are not resized.
        dtype: what the network computes in.
        scale: what a value means.
    """

    name: str
    weights: str
    preprocessing: str
    antialias: bool | None
    dtype: str
    scale: str

    def __str__(self) -> str:
        antialias = {True: "antialias", False: "no-antialias", None: "no-resize"}[self.antialias]
        return "|".join((self.name, self.weights, self.preprocessing, antialias, self.dtype, self.scale))


class Scorer(ABC):
    """One number per image. A scorer's network computes on its device; images and scores are NumPy on the CPU."""

    id: MetricId

    def __call__(self, images: Any, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Scores (N,) of uint8 images (N, H, W, 3), each for its prompt.

        Raises:
            DgkitError: images of another shape or type, not one prompt per image, or a score that is not finite.
        """
        array = as_images(images)
        if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
            raise DgkitError(f"prompts={prompts!r} is not allowed: give a list of texts")
        if isinstance(prompts, str) or len(prompts) != len(array):
            raise DgkitError(f"give one prompt per image, got {len(prompts)} prompts and {len(array)} images")
        with full_float32():
            scores = [
                np.asarray(self._score(array[i : i + _BATCH], list(prompts[i : i + _BATCH])), np.float64)
                for i in range(0, len(array), _BATCH)
            ]
        return finite(np.concatenate(scores), self.id.name)

    @abstractmethod
    def _score(self, images: NDArray[np.uint8], prompts: list[str]) -> Any:
        """Scores of at most `_BATCH` images."""


class PairScorer(ABC):
    """One number per image and the image that it is compared with."""

    id: MetricId

    @abstractmethod
    def __call__(self, images: Any, reference: Any) -> NDArray[np.float64]:
        """Scores (N,) of uint8 images (N, H, W, 3) against reference images of the same shape."""


@contextmanager
def full_float32() -> Iterator[None]:
    """No TensorFloat-32 inside: PyTorch lets GPUs round the inputs of float32 convolutions to 10 bits by default."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def as_images(images: Any) -> NDArray[np.uint8]:
    """The images, if they are uint8 (N, H, W, 3), NumPy or CPU tensor.

    Raises:
        DgkitError: another shape or type.
    """
    try:
        array = np.ascontiguousarray(images)
    except (TypeError, ValueError) as error:  # ragged, or a tensor on a GPU
        raise DgkitError(f"images is not an array: {first_line(error)}") from error
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape or array.dtype != np.uint8:
        raise DgkitError(f"images has shape {array.shape}, {array.dtype}: (N, H, W, 3) in uint8 is needed")
    return array


def finite(scores: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """The scores, if all are finite.

    Raises:
        DgkitError: one is not.
    """
    if not np.isfinite(scores).all():
        raise DgkitError(f"{name} of image {int(np.flatnonzero(~np.isfinite(scores))[0])} is not finite")
    return scores


def normalise(pixels: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1], normalised as CLIP's input."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine (N,) of each row of a (N, F) and its row of b, in float64."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
