"""Sections 4.3 and 5: Detail Guidance and its controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbook.chapters import study
from dgbook.chapters.intervention import contrasts, image_effects, measures, summarise
from dgbook.chapters.settings import Outcome, Setting, with_dg, worse_copy
from dgkit.guidance import SEG, Autoguidance


def open_study(**sampled: Any) -> study.Study:
    """Chapter 4: see `study.open_study`."""
    opened = study.open_study(**sampled)
    return opened.begin(
        "04_detail_guidance",
        block=opened.block,
        dims=opened.dims,
        guidance_scale=opened.guidance_scale,
        w=opened.w,
        w_cfg=opened.w_cfg,
    )


def guidance_settings(
    w: float, w_cfg: float, guidance_scale: float, block: int, dims: Sequence[int]
) -> dict[str, Setting]:
    """The four settings of Table 1 and Fig. 6, 7: no guidance, DG (Eq. 4), CFG (Eq. 1), CFG + DG (Eq. 5)."""
    return {
        "none": Setting(),
        "dg": with_dg(w, block, dims),
        "cfg": Setting(guidance_scale),
        "cfg+dg": with_dg(w_cfg, block, dims, guidance_scale),
    }


def control_settings(pipe: Any, w: float, seed: int) -> dict[str, Setting]:
    """Other worse models in the place of DG's, at the same w, without CFG.

    "blurred": the attention of the middle block with blurred queries (SEG); "autoguidance": see `worse_copy`.
    """
    settings = {"blurred": Setting(method=SEG(scale=w))}
    worse = worse_copy(pipe, seed)
    if worse is not None:
        settings["autoguidance"] = Setting(method=Autoguidance(scale=w, bad=worse))
    return settings


def guidance_values(outcomes: Mapping[str, Outcome], measured: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """What Fig. 6 and 7 show, as numbers: "settings" has the effects against no guidance, and costs.

    "contrast" is DG's own effect, alone ("dg - none") and beside CFG ("cfg+dg - cfg"), and DG minus each control.
    `measured` are the outcomes' `image_measures` against no guidance.
    """
    effects = image_effects(measured)
    settings: dict[str, dict[str, Any]] = {
        name: {**summary, "cost": outcomes[name].cost_ratio} for name, summary in summarise(effects).items()
    }
    controls = [name for name in ("blurred", "autoguidance") if name in outcomes]
    pairs = [("dg", "none"), ("cfg+dg", "cfg"), *(("dg", control) for control in controls)]
    contrast = contrasts(effects, pairs, measures(effects))
    return {"settings": settings, "contrast": contrast}
