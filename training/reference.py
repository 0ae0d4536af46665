"""Statistics of the real images, shipped so that notebooks need no data set, and the captions to sample with.

`python -m training.reference` writes them again from the data and the shipped judges.
"""

import hashlib

import numpy as np
import torch
from safetensors.numpy import save_file

from dgbook.measures.classifier import load_classifier
from dgbook.measures.datasets import as_samples, fashion_mnist
from dgbook.measures.matcher import load_matcher
from dgbook.measures.spectrum import radial_power_spectrum, sharpness
from dgkit.paths import DATA
from training.tiles import Tiles

SAMPLE = 2000
PROMPTS = 1000


def fashion_mnist_reference() -> dict[str, np.ndarray]:
    """`statistics` of the training set and of the first 2,000 test images, by the shipped classifier."""
    return statistics(
        load_classifier(), as_samples(fashion_mnist("train")[0]), as_samples(fashion_mnist("test")[0][:SAMPLE])
    )


def dungeon_tiles_reference(tiles: Tiles) -> dict[str, np.ndarray]:
    """`statistics` of the training tiles and of those held out, by the shipped matcher."""
    pixels = tiles.pixels.movedim(1, -1)
    return statistics(load_matcher(), pixels[~tiles.held_out], pixels[tiles.held_out])


@torch.no_grad()
def statistics(judge: torch.nn.Module, train: torch.Tensor, test: torch.Tensor) -> dict[str, np.ndarray]:
    """What `dgbook.measures.judges` compares with, from uint8 images (N, H, W, 3).

    Returns:
        "mean" (F,) and "covariance" (F, F) of the judge's features over `train`; "sample", the features of `test`
        (float16), against which precision and recall are measured; over `train` the means of `spectrum.sharpness`,
        "sharpness", and of `spectrum.radial_power_spectrum`, "spectrum".
    """
    features = judge.features(train).double().numpy()  # type: ignore[operator]
    parts = [part.numpy() for part in train.split(5000)]  # bounded memory
    sharp = np.concatenate([sharpness(part) for part in parts])
    power = np.concatenate([radial_power_spectrum(part)[0] for part in parts])
    return {
        "mean": features.mean(0).astype(np.float32),
        "covariance": np.cov(features, rowvar=False).astype(np.float32),
        "sample": judge.features(test).numpy().astype(np.float16),  # type: ignore[operator]
        "sharpness": np.array(sharp.mean(), np.float32),
        "spectrum": power.mean(0).astype(np.float32),
    }


def tile_prompts(tiles: Tiles) -> list[str]:
    """`PROMPTS` distinct captions of training tiles, of two or more words of which one names an object.

    Their order, by SHA-256, has nothing to do with what they say, so the first ones are a fair sample.
    """
    training = [caption for caption, held_out in zip(tiles.captions, tiles.held_out, strict=True) if not held_out]
    eligible = {str(caption) for caption in training if caption.objects and len(str(caption).split()) > 1}
    return sorted(eligible, key=lambda caption: hashlib.sha256(caption.encode()).digest())[:PROMPTS]


if __name__ == "__main__":
    tiles = Tiles.load()
    references = {"fashion-mnist": fashion_mnist_reference(), "dungeon-tiles": dungeon_tiles_reference(tiles)}
    (DATA / "reference").mkdir(exist_ok=True)
    for name, arrays in references.items():
        save_file(arrays, DATA / "reference" / f"{name}.safetensors")
    (DATA / "prompts" / "dungeon-tiles.txt").write_text("\n".join(tile_prompts(tiles)) + "\n", encoding="utf-8")
