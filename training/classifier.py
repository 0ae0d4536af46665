"""The recipe of `fashion-classifier`: the small convolutional network that judges samples of `tiny-dit`.

It is trained on Fashion-MNIST alone and never sees a sample. Its ten outputs say whether a sample shows its class; its
64 penultimate features take the place that Inception's features have on ImageNet.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dgbook.measures import datasets
from dgbook.measures.classifier import FEATURES, FashionClassifier
from training.loop import Schedule, device, train


def train_classifier(schedule: Schedule, folder: Path) -> FashionClassifier:
    """Train the classifier with cross-entropy on the training split."""
    torch.manual_seed(schedule.seed)
    model = FashionClassifier().to(device())
    images, labels = datasets.fashion_mnist("train")
    samples = datasets.as_samples(images)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (schedule.batch,), generator=generator)
        return F.cross_entropy(model(samples[rows]), labels[rows].to(device()))

    train(model, loss, schedule, folder)
    return model


def save_classifier(model: FashionClassifier, folder: Path) -> None:
    """Write `model.safetensors` (float16) and `config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.half() if t.is_floating_point() else t for name, t in model.cpu().state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    config = {"architecture": "FashionClassifier", "features": FEATURES, "classes": datasets.FASHION_MNIST_CLASSES}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
