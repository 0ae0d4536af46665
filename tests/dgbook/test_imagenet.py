"""Table 6 in small against scipy and NumPy alone."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from scipy.special import softmax

from dgbook.chapters import imagenet, sampling
from dgbook.chapters.settings import Setting, with_dg
from dgbook.measures.classifier import fashion_classifier
from dgbook.measures.stats import Interval
from dgkit.paths import DATA
from tests.dgbook.chapter_examples import BLOCK, DIMS, outcome


def test_table_6_settings():
    assert imagenet.table_6_settings(1.5, BLOCK, DIMS) == {
        "uncond": (Setting(), False),
        "uncond+dg": (with_dg(1.5, BLOCK, DIMS), False),
        "cond": (Setting(), True),
        "cond+dg": (with_dg(1.5, BLOCK, DIMS), True),
    }


def by_hand(images):
    """The four measures with scipy and NumPy alone."""
    stored = load_file(DATA / "reference" / "fashion-mnist.safetensors")
    real = {name: array.astype(np.float64) for name, array in stored.items()}
    classifier = fashion_classifier()
    features = np.asarray(classifier.features(images), np.float64)
    covariance = np.cov(features.T)
    # a little ridge: scipy's root needs a regular matrix
    root = sqrtm((covariance + 1e-9 * np.eye(64)) @ real["covariance"]).real
    frechet = ((features.mean(0) - real["mean"]) ** 2).sum() + np.trace(covariance + real["covariance"] - 2 * root)
    p = softmax(np.asarray(classifier(images), np.float64), axis=1)
    score = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())

    def covered(points, manifold):
        radii = np.sort(cdist(manifold, manifold), axis=1)[:, 3]
        return (cdist(points, manifold) <= radii).any(1).mean()

    return [frechet, score, covered(features, real["sample"]), covered(real["sample"], features)]


@pytest.fixture
def blobs(monkeypatch):
    """Stand-ins for `sample`'s images, which the random pipeline makes too small: smooth blobs, and what was asked."""
    asked = []

    def sample(pipe, run, setting):
        rng = np.random.default_rng(len(asked))
        noise = gaussian_filter(rng.normal(size=(len(run.seeds), 28, 28)), (0, 3, 3))
        images = np.repeat(((noise > 0) * 200).astype(np.uint8)[..., None], 3, axis=-1)
        asked.append((run, setting, images))
        return outcome(images)

    monkeypatch.setattr(imagenet, "sample", sample)
    return asked


def test_table_6(pipe, blobs):
    settings = imagenet.table_6_settings(1.5, BLOCK, DIMS)
    table = imagenet.table_6(imagenet.table_6_runs(pipe, settings, 12, [4, 5], 2))
    assert list(table.columns) == ["setting", "seed", "frechet", "is", "precision", "recall"]
    assert table["setting"].tolist() == np.repeat(list(settings), 2).tolist()
    assert table["seed"].tolist() == [4, 5] * 4
    for (run, setting, images), (_, row) in zip(blobs, table.iterrows(), strict=True):
        guidance, conditional = settings[row["setting"]]
        assert setting == guidance and run.guidance_scale == 1 and run.steps == 2
        assert run.conditions == ([*range(10), 0, 1] if conditional else [1000] * 12)
        assert run.seeds == sampling.samples(pipe, 12, row["seed"], 2).seeds
        measured = row[["frechet", "is", "precision", "recall"]].astype(float).to_numpy()
        assert measured == pytest.approx(by_hand(images), rel=1e-3)


def test_efficientnet_values(monkeypatch, pipe, blobs):
    given = []

    def features(images):  # any two features will do for the plumbing
        given.append(len(images))
        return np.asarray(images, float).reshape(len(images), -1)[:, [300, 1200]]

    real = torch.randint(0, 256, (100, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(imagenet, "efficientnet_features", features)
    monkeypatch.setattr(imagenet, "fashion_mnist", lambda split: (real, torch.zeros(100)))
    runs = imagenet.table_6_runs(pipe, {"cond": (Setting(), True)}, 12, [4, 5], 2)
    values = imagenet.efficientnet_values(runs)
    theirs = features(real[:24].movedim(1, -1).expand(-1, -1, -1, 3))
    ours = np.concatenate([batch for _, _, batch in blobs]).reshape(24, -1)[:, [300, 1200]].astype(float)
    a, b = np.cov(ours.T), np.cov(theirs.T)
    expected = ((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert given[:2] == [24, 24]
    assert values == {"efficientnet": {"count": 24, "frechet": {"cond": pytest.approx(expected, rel=1e-5)}}}


TABLE = pd.DataFrame(
    {
        "setting": np.repeat(["uncond", "uncond+dg", "cond", "cond+dg"], 3),
        "seed": [0, 1, 2] * 4,
        "frechet": [10.0, 12, 14, 9, 8, 16, 6, 6, 6, 5, 4, 3],
        "is": np.arange(12.0),
        "precision": np.arange(12.0) / 12,
        "recall": np.arange(12.0)[::-1] / 12,
    }
)


def test_table_6_values():
    values = imagenet.table_6_values(TABLE.sample(frac=1, random_state=0))
    found = values["settings"]
    assert found["uncond"]["frechet"] == Interval(12, 10, 14) and found["uncond+dg"]["frechet"] == Interval(11, 8, 16)
    assert found["cond+dg"]["is"] == Interval(10, 9, 11)
    assert values["contrast"] == {
        "uncond+dg - uncond": {"frechet": Interval(-1, -4, 2)},  # -1, -4, 2: guided minus plain of the same seed
        "cond+dg - cond": {"frechet": Interval(-2, -3, -1)},
    }
    assert [list(measured) for measured in found.values()] == [["frechet", "is", "precision", "recall"]] * 4


def test_table_6_beside_the_papers():
    beside = imagenet.table_6_beside_paper(imagenet.table_6_values(TABLE))
    assert list(beside.columns) == ["measure", "setting", "ours", "paper"]
    beside = beside.set_index(["measure", "setting"])
    printed = [line.split(",") for line in (DATA / "paper" / "table6.csv").read_text().split()[1:]]
    measures = ("frechet (paper: fid)", "is", "precision", "recall")
    settings = ["uncond", "uncond + DG", "cond", "cond + DG"]
    assert beside.index.tolist() == [(measure, setting) for measure in measures for setting in settings]
    for (_, _, *numbers), setting in zip(printed, settings, strict=True):
        assert [beside.loc[(m, setting), "paper"] for m in measures] == [float(n) for n in numbers]
    assert beside.loc[(measures[0], "uncond")].tolist() == ["12 [10, 14]", 16.95]
    assert beside.loc[(measures[0], "cond + DG"), "paper"] == 5.77
    assert beside.loc[("is", "cond + DG"), "ours"] == "10 [9, 11]"
