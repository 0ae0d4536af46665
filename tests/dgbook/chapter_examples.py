"""Images and a judge for the chapters' tests, simple enough to know every number."""

import numpy as np
from scipy.linalg import sqrtm

from dgbook.chapters.sampling import observe
from dgbook.chapters.settings import Outcome, Setting
from dgbook.chapters.study import Study
from dgbook.measures.judges import Judge

BLOCKS, CHANNELS, BLOCK, DIMS = 3, 16, 1, [3, 7]  # of the fixture `pipe`, and where the tests edit it


def random_images(count=4, size=28, seed=0):
    even = np.random.default_rng(seed).integers(0, 128, (count, size, size, 3), dtype=np.uint8) * 2
    return even  # so that halving is exact


def halved(images):
    return images // 2


def outcome(images, block_evaluations=0, cost_ratio=1.0, setting=None, steps=2):
    """An outcome of which the tests look at the images and what is given."""
    return Outcome(images, setting or Setting(), steps, block_evaluations, cost_ratio)


def study_of(pipe, run, dims=DIMS, block=BLOCK, seed=9):
    """What `intervene` takes, of a few recorded images."""
    trace = observe(pipe, run.first(1))
    return Study(pipe, run, trace, block, list(dims), 1.0, 1.0, 1.0, {"model": "m", "seed": seed})


class WhiteJudge(Judge):
    """Finds what was asked for where an image's first value is the condition; its features are the means of three
    parts of the image, those of real images standard normal."""

    data = "white"
    network = None

    def agreement(self, images):
        return images[:, 0, 0, 0] == self.conditions

    def features(self, images):
        return np.stack([part.mean((1, 2, 3)) for part in np.array_split(images.astype(float), 3, axis=1)], axis=1)

    def frechet_contributions(self, features):
        return np.full(len(features), self.frechet(features))

    def detail_distance(self, images):
        return images[:, 0, 0, 1].astype(float)

    def frechet(self, features):  # to a standard normal, with scipy
        covariance = np.cov(np.asarray(features).T)
        root = sqrtm(covariance + 1e-12 * np.eye(3)).real
        return (features.mean(0) ** 2).sum() + np.trace(covariance + np.eye(3) - 2 * root)
