"""What changes in the images: spectra and sharpness without a network, and scores on a network's features or logits.

`METRICS` lists every metric by the name that the paper's tables use. `scorer(name)` builds one; one that this machine
lacks the weights or packages for raises `MetricUnavailable`, and `available(name)` says so without loading anything.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dgbook.downloads import local
from dgbook.paper_scale.scores.weights import WEIGHTS, MetricUnavailable
from dgkit.errors import DgkitError

__all__ = ["METRICS", "MetricRow", "MetricUnavailable", "available", "scorer"]


@dataclass(frozen=True)
class MetricRow:
    """One metric.

    Attributes:
        label: for tables.
        kind: "image": scores per image and prompt; "pair": per image and reference image; "set": one number for all.
        builder: what makes its scorer, "module:name"; for sets the network whose features they share.
        unit: what a value means.
        higher_is_better: None for what has no better end.
        tables: of the paper in which it stands.
        weights: names in `WEIGHTS`.
        packages: optional ones, as imported and as installed.
        options: arguments of the builder.
    """

    label: str
    kind: Literal["image", "pair", "set"]
    builder: str
    unit: str
    higher_is_better: bool | None
    tables: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


_INCEPTION: dict[str, Any] = {
    "weights": ("inception-2015-12-05",), "packages": {"torch_fidelity": "torch-fidelity"}, "tables": (6,)
}  # fmt: skip
_HPS: dict[str, Any] = {"weights": ("hpsv2.1",), "packages": {"open_clip": "open_clip_torch"}}
_CLIP = "clip-vit-large-patch14"

METRICS: dict[str, MetricRow] = {
    "clipscore": MetricRow(
        "CLIPScore", "image", "clip:CLIPScore", "100 max(cos, 0)", True, (1, 3), (_CLIP,)),
    "blipscore": MetricRow(
        "BLIPScore", "image", "blip:BLIPScore", "100 softmax(itm)[1]", True, (1, 3), ("blip-itm-large-coco",)),
    "hpsv2.1": MetricRow("HPSv2.1", "image", "clip:HPSv2", "100 cos", True, (1, 2, 3), **_HPS),
    "hpsv2.1-amp": MetricRow("HPSv2.1 (amp)", "image", "clip:HPSv2", "100 cos", True, **_HPS, options={"amp": True}),
    "aesthetic": MetricRow(
        "Aesthetic", "image", "clip:Aesthetic", "rating, about 1 to 10", True, (1, 2, 3), (_CLIP, "laion-aesthetics")),
    "fid": MetricRow("FID", "set", "sets:Inception", "squared distance", False, **_INCEPTION),
    "is": MetricRow("IS", "set", "sets:Inception", "exp(KL), 1 to 1008", True, **_INCEPTION),
    "precision": MetricRow("Precision", "set", "sets:Inception", "share", True, **_INCEPTION),
    "recall": MetricRow("Recall", "set", "sets:Inception", "share", True, **_INCEPTION),
    "sharpness": MetricRow("Sharpness", "image", "detail:sharpness_score", "variance of the Laplacian", None),
    "high-frequency-energy": MetricRow(
        "High frequencies", "image", "detail:high_frequency_score", "share of power above 0.25 cycles/pixel", None),
    "structure-similarity": MetricRow(
        "Structure", "pair", "detail:structure_score", "SSIM below 0.125 cycles/pixel", None),
    "self-similarity": MetricRow("Self-similarity", "pair", "detail:self_similarity_score", "correlation", None),
}  # fmt: skip


def available(name: str) -> str | None:
    """Why a metric cannot be computed here without a download; None if it can. Nothing is loaded or hashed.

    Raises:
        DgkitError: unknown name.
    """
    row = _row(name)
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
    row = _row(name)
    module, _, attribute = row.builder.partition(":")
    build = getattr(importlib.import_module(f"dgbook.paper_scale.scores.{module}"), attribute)
    return build(device=device, **row.options) if row.weights else build()


def _row(name: str) -> MetricRow:
    if name not in METRICS:
        raise DgkitError(f"metric={name!r} is not known: use one of {', '.join(METRICS)}")
    return METRICS[name]
