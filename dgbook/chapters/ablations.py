"""Section 5.3: Detail Guidance over depth and scales."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from dgbook.chapters.guidance import GuidedRun, Setting
from dgbook.chapters.intervention import contrast, image_effects, summarise
from dgbook.chapters.sampling import Images
from dgbook.measures.judges import Judge
from dgkit.anatomy import dissect


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
    return {
        "block": {b: Setting(w=scales[0], block=b, dims=dims) for b in range(len(dissect(pipe).blocks))},
        "w": {value: Setting(w=value, block=block, dims=dims) for value in w_values},
        "lambda": {value: Setting(value + 1, scales[1], block, dims) for value in lambda_values},
    }


def cost_table(runs: Mapping[str, GuidedRun]) -> pd.DataFrame:
    """What each run cost in block evaluations, and relative to full passes for every branch."""
    columns = {"block evaluations": "block_evaluations", "of full passes": "cost_ratio"}
    return pd.DataFrame({c: {name: getattr(run, a) for name, run in runs.items()} for c, a in columns.items()})


def total_cost(runs: Mapping[str, Mapping[Any, GuidedRun]]) -> int:
    """Block evaluations of all runs of all sweeps."""
    return sum(run.block_evaluations for group in runs.values() for run in group.values())


def sweep(runs: Mapping[Any, GuidedRun], baseline: Images, judge: Judge | None) -> pd.DataFrame:
    """Fig. 8: effects of each run of a sweep against the paired `baseline`.

    One row per (key, measure): key is the run's key, then value, low, high.
    """
    rows = []
    for key, guided in runs.items():
        effects = image_effects({"baseline": baseline, "guided": guided.images}, "baseline", judge)
        measured = summarise(effects[effects["setting"] == "guided"])
        if judge is not None:
            measured["guided.agreement_change"] = contrast(effects, "guided", "baseline", "agreement")
        for name, interval in measured.items():
            rows.append({"key": key, "measure": name.removeprefix("guided.")} | asdict(interval))
    return pd.DataFrame(rows)


def sweep_values(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Every sweep as arrays (key, value, low, high), and what it does to sharpness.

    "NAME.rank_correlation" is Spearman's over the sweep's points; "block.strongest" is the block where the edit moves
    sharpness most, by its ratio to no guidance, and "block.last_ratio" that ratio at the last block.
    """
    values: dict[str, Any] = {}
    for name, table in tables.items():
        for measure, part in table.groupby("measure", sort=False):
            values[f"{name}.{measure}"] = part[["key", "value", "low", "high"]].to_numpy(float)
    sharp = {name: values[f"{name}.sharpness_ratio"] for name in tables}
    for name in ("w", "lambda"):
        values[f"{name}.rank_correlation"] = float(spearmanr(sharp[name][:, 0], sharp[name][:, 1]).statistic)
    strongest = int(np.abs(np.log(sharp["block"][:, 1])).argmax())
    return values | {
        "blocks": len(sharp["block"]),
        "block.strongest": strongest,
        "block.strongest_ratio": float(sharp["block"][strongest, 1]),
        "block.last_ratio": float(sharp["block"][-1, 1]),
    }
