"""Section 5.3: Detail Guidance over depth and scales."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from dgbook.chapters import study
from dgbook.chapters.intervention import contrast, image_effects, image_measures, summarise
from dgbook.chapters.sampling import Images
from dgbook.chapters.settings import Outcome, Setting, with_dg
from dgbook.measures.judges import Judge
from dgkit.anatomy import dissect


def open_study(
    *,
    w_values: Sequence[float],
    lambda_values: Sequence[float],
    channel_counts: Sequence[int],
    swept_samples: int,
    compared_samples: int,
    calibration_samples: int,
    **sampled: Any,
) -> study.Study:
    """Chapter 5: see `study.open_study`."""
    opened = study.open_study(**sampled)
    return opened.begin(
        "05_ablations",
        block=opened.block,
        dims=opened.dims,
        w=opened.w,
        w_cfg=opened.w_cfg,
        w_values=w_values,
        lambda_values=lambda_values,
        guidance_scale=opened.guidance_scale,
        compared_samples=compared_samples,
        calibration_samples=calibration_samples,
        channel_counts=channel_counts,
        swept_samples=swept_samples,
    )


def ablation_settings(
    pipe: Any,
    scales: tuple[float, float],
    block: int,
    dims: Sequence[int],
    w_values: Sequence[float],
    lambda_values: Sequence[float],
) -> dict[str, dict[float, Setting]]:
    """The three sweeps of Fig. 8, by the quantity on the x axis; CFG's s is lambda + 1.

    `scales` are w of the depth sweep (DG alone) and of the lambda sweep (beside CFG).
    """
    w, w_cfg = scales
    return {
        "block": {b: with_dg(w, b, dims) for b in range(len(dissect(pipe).blocks))},
        "w": {value: with_dg(value, block, dims) for value in w_values},
        "lambda": {value: with_dg(w_cfg, block, dims, value + 1) for value in lambda_values},
    }


def sweep(outcomes: Mapping[Any, Outcome], baseline: Images, judge: Judge | None) -> pd.DataFrame:
    """Fig. 8: effects of each setting of a sweep against the paired `baseline`.

    One row per (key, measure): key is the setting's key, then value, low, high.
    """
    rows = []
    for key, guided in outcomes.items():
        effects = image_effects(image_measures({"baseline": baseline, "guided": guided.images}, "baseline", judge))
        measured = summarise(effects[effects["setting"] == "guided"])["guided"]
        if judge is not None:
            measured["agreement_change"] = contrast(effects, "guided", "baseline", "agreement")
        rows += [{"key": key, "measure": name} | asdict(interval) for name, interval in measured.items()]
    return pd.DataFrame(rows)


def depth_strip(baseline: Images, outcomes: Mapping[int, Outcome]) -> dict[str, Images]:
    """Images without guidance, and with DG at each block."""
    return {"none": baseline} | {f"block {block}": guided.images for block, guided in outcomes.items()}


def sweep_values(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Every sweep as arrays (key, value, low, high), and what it does to sharpness.

    "rank_correlation" is Spearman's over the sweep's points; "strongest" is the block where the edit moves sharpness
    most, by its ratio to no guidance, and "last_ratio" that ratio at the last block.
    """
    sweeps: dict[str, dict[str, Any]] = {
        name: {
            str(measure): part[["key", "value", "low", "high"]].to_numpy(float)
            for measure, part in table.groupby("measure", sort=False)
        }
        for name, table in tables.items()
    }
    for name in ("w", "lambda"):
        sharp = sweeps[name]["sharpness_ratio"]
        sweeps[name]["rank_correlation"] = float(spearmanr(sharp[:, 0], sharp[:, 1]).statistic)
    ratios = sweeps["block"]["sharpness_ratio"][:, 1]
    strongest = int(np.abs(np.log(ratios)).argmax())
    sweeps["block"] |= {
        "strongest": strongest,
        "strongest_ratio": float(ratios[strongest]),
        "last_ratio": float(ratios[-1]),
    }
    return {"sweeps": sweeps, "blocks": len(ratios)}
