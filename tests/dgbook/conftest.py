"""Fixtures of the chapters' tests."""

from typing import Any

import pytest

from dgbook.chapters.sampling import Samples, samples
from dgbook.measures.datasets import FASHION_MNIST_CLASSES
from tests import tiny_models


@pytest.fixture
def pipe() -> Any:
    """A random DiT of three blocks and 16 channels whose labels are those of Fashion-MNIST."""
    pipe = tiny_models.pipeline("dit")
    pipe.labels = {name: i for i, name in enumerate(FASHION_MNIST_CLASSES)}
    return pipe


@pytest.fixture
def run(pipe: Any) -> Samples:
    """Three images of it in two steps."""
    return samples(pipe, 3, seed=5, steps=2)
