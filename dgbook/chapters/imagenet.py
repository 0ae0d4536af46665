"""Appendix H: Table 6 in small."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dgbook.chapters.guidance import GuidedRun, Setting, guide
from dgbook.chapters.sampling import Images, samples
from dgbook.claims import paper
from dgbook.measures.datasets import as_samples, fashion_mnist
from dgbook.measures.features import efficientnet_features
from dgbook.measures.frechet import frechet_distance
from dgbook.measures.judges import FashionJudge, judge_set_scores
from dgbook.measures.stats import Interval
from dgkit.errors import DgkitError


def table_6_settings(w: float, block: int, dims: Sequence[int]) -> dict[str, tuple[Setting, bool]]:
    """The rows of Table 6: name to (guidance setting, conditional?). The paper uses no CFG here."""
    plain, guided = Setting(), Setting(w=w, block=block, dims=dims)
    return {"uncond": (plain, False), "uncond+DG": (guided, False), "cond": (plain, True), "cond+DG": (guided, True)}


def table_6_runs(
    pipe: Any,
    settings: Mapping[str, tuple[Setting, bool]],
    count: int,
    seeds: Sequence[int],
    steps: int,
    batch: int = 64,
) -> dict[tuple[str, int], GuidedRun]:
    """Images of every (setting, seed block) of Table 6, and what they cost.

    Args:
        pipe: a class-conditional pipeline.
        settings: name to (guidance setting, conditional?); unconditional sampling uses DiT's null class.
        count: images per seed block.
        seeds: one per seed block.
        steps: sampling steps.
        batch: images per call of the pipeline.

    Raises:
        DgkitError: no seed block, or as for `samples`.
    """
    if not seeds:
        raise DgkitError("seed_blocks=0 is not allowed: give an integer, 1 or above")
    runs = {}
    for name, (setting, conditional) in settings.items():
        for seed in seeds:
            run = samples(pipe, count, seed, steps, batch_size=batch)
            if not conditional:
                run = replace(run, conditions=[1000] * count)
            runs[name, seed] = guide(pipe, run, setting)
    return runs


def table_6(runs: Mapping[tuple[str, int], GuidedRun]) -> pd.DataFrame:
    """Table 6 in small, on Fashion-MNIST: one row per (setting, seed block).

    Columns: frechet (distance of the shipped classifier's 64 features to those of the training set), is (inception
    score with the classifier's probabilities), precision, recall (Kynkaanniemi et al. 2019, k = 3, against the shipped
    sample of real features).
    """
    judge, rows = FashionJudge(()), []  # only its features count here, not what was asked for
    for (name, seed), run in runs.items():
        rows.append({"setting": name, "seed": seed} | judge_set_scores(judge, run.images))
    return pd.DataFrame(rows)


def efficientnet_values(runs: Mapping[tuple[str, int], GuidedRun]) -> dict[str, float]:
    """Frechet distance of EfficientNet-Lite0's 1280 features, "SETTING.frechet_efficientnet", over all seed blocks.

    Against as many real test images, which need the data set. With fewer images than features the covariance is not
    of full rank and the distance mostly bias, so use 2,000 or more.
    """
    union: dict[str, list[Images]] = {}
    for (name, _), run in runs.items():
        union.setdefault(name, []).append(run.images)
    count = sum(len(batch) for batch in next(iter(union.values())))
    real = efficientnet_features(as_samples(fashion_mnist("test")[0][:count]))
    distances = {
        f"{name}.frechet_efficientnet": frechet_distance(real, efficientnet_features(np.concatenate(batches)))
        for name, batches in union.items()
    }
    return {"efficientnet_count": count} | distances


def table_6_values(table: pd.DataFrame) -> dict[str, Any]:
    """Mean over seed blocks with the smallest and largest block, and the change of the Frechet distance by DG."""
    measures = [column for column in table.columns if column not in ("setting", "seed")]
    values: dict[str, Any] = {}
    for setting, group in table.groupby("setting", sort=False):
        for m in measures:
            values[f"{setting}.{m}"] = Interval(group[m].mean(), group[m].min(), group[m].max())
    pivot = table.pivot(index="seed", columns="setting", values="frechet")
    for kind in ("uncond", "cond"):
        change = pivot[f"{kind}+DG"] - pivot[kind]
        values[f"{kind}.frechet_change"] = Interval(change.mean(), change.min(), change.max())
    return values


def table_6_beside_paper(values: Mapping[str, Any]) -> pd.DataFrame:
    """The paper's Table 6 (ImageNet, DiT-XL/2) beside ours: same settings and measures; model, data and network differ.

    Columns: measure, setting, ours, paper.
    """
    measures = {"frechet": "fid", "is": "is", "precision": "precision", "recall": "recall"}
    rows = []
    for ours, theirs in measures.items():
        for _, line in paper.table(6).iterrows():
            kind = line["type"].lower() + ("+DG" if line["dg"] == "yes" else "")
            measure = ours if ours == theirs else f"{ours} (paper: {theirs})"
            rows.append((measure, kind, f"{values[f'{kind}.{ours}']:.3g}", line[theirs]))
    return pd.DataFrame(rows, columns=["measure", "setting", "ours", "paper"])
