"""Statistics of the real Fashion-MNIST images, shipped so that notebook 06 needs no data set.

`python -m dgkit.tiny.reference` writes them again from the data and the shipped classifier.
"""

import numpy as np
import torch
from safetensors.numpy import save_file

from dgkit.paths import DATA
from dgkit.tiny.classifier import load_classifier
from dgkit.tiny.data import as_samples, fashion_mnist

SAMPLE = 2000


@torch.no_grad()
def fashion_mnist_reference() -> dict[str, np.ndarray]:
    """Features of the shipped classifier: mean (64,) and covariance (64, 64) over the training set, and the features
    of the first 2,000 test images (float16), against which precision and recall are measured."""
    classifier = load_classifier()
    train = classifier.features(as_samples(fashion_mnist("train")[0])).double().numpy()
    test = classifier.features(as_samples(fashion_mnist("test")[0][:SAMPLE])).numpy()
    return {
        "mean": train.mean(0).astype(np.float32),
        "covariance": np.cov(train, rowvar=False).astype(np.float32),
        "sample": test.astype(np.float16),
    }


if __name__ == "__main__":
    (DATA / "reference").mkdir(exist_ok=True)
    save_file(fashion_mnist_reference(), DATA / "reference" / "fashion-mnist.safetensors")
