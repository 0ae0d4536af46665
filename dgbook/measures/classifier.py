"""Scores from a classifier's logits, and the shipped Fashion-MNIST classifier."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn

from dgbook.measures import datasets
from dgbook.measures.arrays import numbers
from dgbook.readers import read_weights
from dgkit.checks import integer
from dgkit.errors import DataError, DgkitError, LoadError, first_line
from dgkit.paths import DATA

FEATURES = 64


def inception_score(logits: Any, splits: int = 1) -> float:
    """exp of the mean KL divergence from p(y|x) to p(y) (Salimans et al. 2016), averaged over consecutive splits.

    Between 1 and the number of classes. It is the Inception Score only on Inception's logits; elsewhere name the
    classifier.

    Args:
        logits: (N, classes), NumPy or CPU tensor.
        splits: Number of parts of (almost) equal size.

    Raises:
        DgkitError: `logits` is not a finite table, or `splits` is not in 1..N.
    """
    table = numbers("logits", logits, 2)
    integer("splits", splits, 1, len(table))
    scores = []
    for part in np.array_split(log_softmax(table, axis=1), splits):
        marginal = logsumexp(part, axis=0) - np.log(len(part))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


def agreement(logits: Any, labels: Any) -> NDArray[np.bool_]:
    """Whether the most probable class is the label, per image (N,).

    Args:
        logits: (N, classes), NumPy or CPU tensor.
        labels: Class indices (N,).

    Raises:
        DgkitError: `logits` is not a finite table, or `labels` has another length.
    """
    table, classes = numbers("logits", logits, 2), np.asarray(labels)
    if classes.shape != (len(table),):
        raise DgkitError(f"labels has shape {classes.shape}: one label for each of {len(table)} images is needed")
    return table.argmax(axis=1) == classes


class FashionClassifier(nn.Module):
    """Three convolution stages, 64 features averaged over the image, one linear layer.

    Images are uint8 (N, 28, 28, 3), as `dgkit.sampling.generate` returns them; `datasets.as_samples` turns
    Fashion-MNIST's own layout into this one. Colours are averaged.
    """

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, FEATURES)):
            stages += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        stages += [nn.Conv2d(FEATURES, FEATURES, 3, padding=1), nn.BatchNorm2d(FEATURES), nn.ReLU()]
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(FEATURES, len(datasets.FASHION_MNIST_CLASSES))

    def features(self, images: Tensor | np.ndarray) -> Tensor:
        """Penultimate features (N, 64) of uint8 images (N, 28, 28, 3).

        Raises:
            DgkitError: `images` has another shape or type.
        """
        pixels = torch.as_tensor(images)
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (28, 28, 3):
            found = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise DgkitError(f"images={found} is not allowed: use torch.uint8 (N, 28, 28, 3)")
        grey = pixels.to(self.head.weight.device).float().mean(-1).unsqueeze(1) / 127.5 - 1
        return torch.cat([self.stages(part) for part in grey.split(500)])  # bounded memory

    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        """Logits (N, 10) of uint8 images (N, 28, 28, 3)."""
        return self.head(self.features(images))


@torch.no_grad()
def accuracy(model: FashionClassifier, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Share of uint8 images (N, 28, 28, 3) that `model` assigns to their `labels` (N,)."""
    return (model(images).argmax(1).cpu() == torch.as_tensor(labels)).double().mean().item()


def load_classifier(folder: Path = DATA / "models" / "fashion-classifier") -> FashionClassifier:
    """The classifier in `folder`, in float32 and ready to judge.

    Raises:
        LoadError: `folder` lacks a file, or its weights are broken or of another network.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise LoadError(f"folder={str(folder)!r} is not allowed: {path.name} of a FashionClassifier is missing there")
    model = FashionClassifier()
    try:
        model.load_state_dict(read_weights(path))
    except (DataError, RuntimeError) as error:
        raise LoadError(f"{path} does not hold the weights of a FashionClassifier: {first_line(error)}") from error
    return model.requires_grad_(False).eval()


@cache
def fashion_classifier() -> FashionClassifier:
    """The shipped Fashion-MNIST classifier: logits (N, 10) of uint8 images, and their 64 penultimate `.features`.

    Raises:
        DgkitError: its weights are missing or do not fit.
    """
    return load_classifier()
