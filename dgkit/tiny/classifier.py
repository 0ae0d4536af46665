"""The recipe of `fashion-classifier`: the small convolutional network that judges samples of `tiny-dit`.

It is trained on Fashion-MNIST alone and never sees a sample. Its ten outputs say whether a sample shows its class; its
64 penultimate features take the place that Inception's features have on ImageNet.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dgkit.errors import DgkitError, LoadError
from dgkit.paths import DATA
from dgkit.tiny import data
from dgkit.tiny.loop import Schedule, device, train

FEATURES = 64


class FashionClassifier(nn.Module):
    """Three convolution stages, 64 features averaged over the image, one linear layer.

    Images are uint8 (N, 28, 28, 3), as `dgkit.generate` returns them; `data.as_samples` turns Fashion-MNIST's own
    layout into this one. Colours are averaged.
    """

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, FEATURES)):
            stages += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        stages += [nn.Conv2d(FEATURES, FEATURES, 3, padding=1), nn.BatchNorm2d(FEATURES), nn.ReLU()]
        self.stages = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(FEATURES, len(data.FASHION_MNIST_CLASSES))

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


def train_classifier(schedule: Schedule, folder: Path) -> FashionClassifier:
    """Train the classifier with cross-entropy on the training split."""
    torch.manual_seed(schedule.seed)
    model = FashionClassifier().to(device())
    images, labels = data.fashion_mnist("train")
    samples = data.as_samples(images)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (schedule.batch,), generator=generator)
        return F.cross_entropy(model(samples[rows]), labels[rows].to(device()))

    train(model, loss, schedule, folder)
    return model


@torch.no_grad()
def accuracy(model: FashionClassifier, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Share of uint8 images (N, 28, 28, 3) that `model` assigns to their `labels` (N,)."""
    return (model(images).argmax(1).cpu() == torch.as_tensor(labels)).double().mean().item()


def save_classifier(model: FashionClassifier, folder: Path) -> None:
    """Write `model.safetensors` (float16) and `config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.half() if t.is_floating_point() else t for name, t in model.cpu().state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    config = {"architecture": "FashionClassifier", "features": FEATURES, "classes": data.FASHION_MNIST_CLASSES}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise LoadError(f"{path} does not hold the weights of a FashionClassifier: {error}") from error
    return model.requires_grad_(False).eval()
