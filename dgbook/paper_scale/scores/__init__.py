"""Scores of images by the names that the paper's tables use, and what stands in for them on small images.

`scorer(name)` builds one of `METRICS`; one that this machine lacks the weights or packages for raises
`MetricUnavailable`, and `available(name)` says so without loading anything.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dgbook.downloads import local
from dgbook.paper_scale.scores.weights import WEIGHTS
from dgkit.checks import one_of


@dataclass(frozen=True)
class MetricRow:
    """One metric.

    Attributes:
        label: for tables.
        kind: "image": scores per image and prompt; "pair": per image and reference image; "set": one number for all.
        builder: what makes its scorer, "module:name"; for sets the network whose features they share.
        weights: names in `WEIGHTS`.
        packages: optional ones, as imported and as installed.
    """

    label: str
    kind: Literal["image", "pair", "set"]
    builder: str
    weights: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)


_CLIP = "clip-vit-large-patch14"
_INCEPTION: tuple[Any, ...] = (".sets:Inception", ("inception-2015-12-05",), {"torch_fidelity": "torch-fidelity"})

METRICS: dict[str, MetricRow] = {
    "clipscore": MetricRow("CLIPScore", "image", ".clip:CLIPScore", (_CLIP,)),
    "blipscore": MetricRow("BLIPScore", "image", ".blip:BLIPScore", ("blip-itm-large-coco",)),
    "hpsv2.1": MetricRow("HPSv2.1", "image", ".clip:HPSv2", ("hpsv2.1",), {"open_clip": "open_clip_torch"}),
    "aesthetic": MetricRow("Aesthetic", "image", ".clip:Aesthetic", (_CLIP, "laion-aesthetics")),
    "fid": MetricRow("FID", "set", *_INCEPTION),
    "is": MetricRow("IS", "set", *_INCEPTION),
    "precision": MetricRow("Precision", "set", *_INCEPTION),
    "recall": MetricRow("Recall", "set", *_INCEPTION),
    "sharpness": MetricRow("Sharpness", "image", "dgbook.measures.detail:sharpness_score"),
    "high-frequency-energy": MetricRow("High frequencies", "image", "dgbook.measures.detail:high_frequency_score"),
    "structure-similarity": MetricRow("Structure", "pair", "dgbook.measures.detail:structure_score"),
}


def available(name: str) -> str | None:
    """Why a metric cannot be computed here without a download; None if it can. Nothing is loaded or hashed.

    Raises:
        DgkitError: unknown name.
    """
    row = METRICS[one_of("metric", name, METRICS)]
    for module, install in row.packages.items():
        if importlib.util.find_spec(module) is None:
            return f'{install} is not installed: pip install "dgkit[scores]"'
    for item in (WEIGHTS[weights] for weights in row.weights):
        if local(item) is None:
            return f"{item.files[0]} ({item.gigabytes:g} GB, {item.licence}) is not on this machine: {item.command}"
    return None


def scorer(name: str, device: str = "cpu") -> Any:
    """A metric ready to use: a `Scorer`, a `PairScorer`, or for sets the `Inception` that they share.

    Weights that are not here are downloaded.

    Raises:
        MetricUnavailable: packages are missing, or weights are neither here nor to be downloaded.
        DataError: weights are not the published ones.
        DgkitError: unknown name.
    """
    row = METRICS[one_of("metric", name, METRICS)]
    module, _, attribute = row.builder.partition(":")
    build = getattr(importlib.import_module(module, __name__), attribute)
    return build(device) if row.weights else build()
