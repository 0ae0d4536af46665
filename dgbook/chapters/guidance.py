"""Sections 4.3 and 5: Detail Guidance and its controls."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dgbook.chapters.intervention import contrast, image_effects, summarise
from dgbook.chapters.sampling import Images, Samples
from dgbook.measures.judges import Judge
from dgbook.measures.stats import Interval
from dgkit.anatomy import dissect
from dgkit.guidance import DG, SEG, Autoguidance, Method
from dgkit.guidance import guide as guided_by
from dgkit.zoo import settings_for


@dataclass
class GuidedRun:
    """Images of one guidance setting and what they cost."""

    images: Images
    cost_ratio: float = 1.0
    block_evaluations: int = 0


@dataclass(frozen=True)
class Setting:
    """One guidance setting: s of CFG (1 for none), w of DG (0 for none) and where DG edits, or another method."""

    guidance_scale: float = 1.0
    w: float = 0.0
    block: int = 0
    dims: Sequence[int] = field(default_factory=list)
    method: Method | None = None


def guide(pipe: Any, run: Samples, setting: Setting) -> GuidedRun:
    """Sample `run` under one guidance setting; the cost is relative to full passes for every branch."""
    evaluations = len(dissect(pipe).blocks) * run.steps * len(run.seeds) * (2 if setting.guidance_scale > 1 else 1)
    method = setting.method
    if method is None and setting.w == 0:
        return GuidedRun(run.images(pipe, setting.guidance_scale), 1.0, evaluations)
    if method is None:
        method = DG(scale=setting.w, block=setting.block, dims=setting.dims)
    with guided_by(pipe, method) as guided:
        images = run.images(pipe, setting.guidance_scale)
    return GuidedRun(images, guided.cost.ratio, guided.cost.block_evaluations)


def dg_scales(pipe: Any, scale: float | None) -> tuple[float, float]:
    """w without and beside CFG: as given for both, else the model's preset, else 1."""
    known = settings_for(pipe, scale=scale)
    if known.scale is None or known.scale_with_cfg is None:
        return 1.0, 1.0
    return known.scale, known.scale_with_cfg


def cfg_scale(pipe: Any, guidance_scale: float | None) -> float:
    """s of CFG: as given, else the model's preset, else 4, the paper's for SD3."""
    return settings_for(pipe, guidance_scale=guidance_scale).guidance_scale


def guide_all(pipe: Any, run: Samples, settings: Mapping[Any, Setting]) -> dict[Any, GuidedRun]:
    """Sample `run` under each setting, from the same noise."""
    return {name: guide(pipe, run, setting) for name, setting in settings.items()}


def guidance_settings(
    w: float, w_cfg: float, guidance_scale: float, block: int, dims: Sequence[int]
) -> dict[str, Setting]:
    """The four settings of Table 1 and Fig. 6, 7: no guidance, DG (Eq. 4), CFG (Eq. 1), CFG + DG (Eq. 5)."""
    return {
        "none": Setting(),
        "DG": Setting(w=w, block=block, dims=dims),
        "CFG": Setting(guidance_scale),
        "CFG+DG": Setting(guidance_scale, w_cfg, block, dims),
    }


LARGEST_COPY = 1_000_000_000  # parameters


def worse_copy(pipe: Any, seed: int) -> nn.Module | None:
    """The worse model of autoguidance, in place of an earlier checkpoint; None for models too large to copy.

    Every weight matrix has Gaussian noise of a tenth of its standard deviation.
    """
    if sum(parameter.numel() for parameter in pipe.transformer.parameters()) > LARGEST_COPY:
        return None
    return noisy_copy(pipe.transformer, seed)


def noisy_copy(model: nn.Module, seed: int, relative: float = 0.1) -> nn.Module:
    """A worse version of `model`: every weight matrix with Gaussian noise of `relative` its standard deviation."""
    worse, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in worse.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(relative * parameter.std() * noise)
    return worse


def control_settings(pipe: Any, w: float, seed: int) -> dict[str, Setting]:
    """Other worse models in the place of DG's, at the same w, without CFG.

    "blurred": the attention of the middle block with blurred queries (SEG); "autoguidance": see `worse_copy`.
    """
    settings = {"blurred": Setting(method=SEG(scale=w))}
    worse = worse_copy(pipe, seed)
    if worse is not None:
        settings["autoguidance"] = Setting(method=Autoguidance(scale=w, bad=worse))
    return settings


def guidance_values(runs: Mapping[str, GuidedRun], judge: Judge | None) -> dict[str, Any]:
    """What Fig. 6 and 7 show, as numbers: effects against no guidance, DG's own (alone, beside CFG), and costs.

    "contrast.NAME" is DG alone minus no guidance ("none") or minus a control, and CFG + DG minus CFG ("cfg").
    """
    effects = image_effects({name: run.images for name, run in runs.items()}, "none", judge)
    values: dict[str, Any] = summarise(effects)
    values |= {f"{name}.cost": run.cost_ratio for name, run in runs.items()}
    measures = [column for column in effects.columns if column not in ("setting", "image")]
    controls = [name for name in ("blurred", "autoguidance") if name in runs]
    pairs = [("none", "DG", "none"), ("cfg", "CFG+DG", "CFG"), *((name, "DG", name) for name in controls)]
    for name, a, b in pairs:
        values |= {f"contrast.{name}.{m}": contrast(effects, a, b, m) for m in measures}
    if judge is not None:
        features = {name: judge.features(run.images) for name, run in runs.items()}
        values |= {f"{name}.frechet": judge.frechet(f) for name, f in features.items()}
        values |= {f"contrast.{name}.frechet": frechet_change(judge, features[a], features[b]) for name, a, b in pairs}
    return values


def frechet_change(judge: Judge, a: NDArray[np.float64], b: NDArray[np.float64], resamples: int = 500) -> Interval:
    """The judge's Frechet distance to real images of features `a` minus that of the paired features `b`, (N, F) each.

    The interval is a percentile bootstrap over the pairs; both distances carry the same upward bias of N images.
    """
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(a), size=len(a)) for _ in range(resamples)]
    changes = [judge.frechet(a[rows]) - judge.frechet(b[rows]) for rows in draws]
    low, high = np.quantile(changes, [0.025, 0.975])
    return Interval(judge.frechet(a) - judge.frechet(b), float(low), float(high))
