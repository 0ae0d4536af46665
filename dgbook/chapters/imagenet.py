"""Appendix H: Table 6 in small."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dgbook.chapters import study
from dgbook.chapters.sampling import Images, samples
from dgbook.chapters.settings import Outcome, Setting, sample, with_dg
from dgbook.claims import paper
from dgbook.claims.names import label
from dgbook.measures.datasets import as_samples, fashion_mnist
from dgbook.measures.features import efficientnet_features
from dgbook.measures.frechet import frechet_distance
from dgbook.measures.judges import FashionJudge, judge_set_scores
from dgbook.measures.stats import Interval
from dgkit import checks


def open_study(*, seed_blocks: int, imagenet_features: bool, **sampled: Any) -> study.Study:
    """Chapter 6: see `study.open_study`; `num_samples` are those of a seed block."""
    opened = study.open_study(**sampled)
    return opened.begin(
        "06_imagenet",
        block=opened.block,
        dims=opened.dims,
        seed_blocks=seed_blocks,
        w=opened.w,
        imagenet_features=imagenet_features,
    )


def table_6_settings(w: float, block: int, dims: Sequence[int]) -> dict[str, tuple[Setting, bool]]:
    """The rows of Table 6: name to (setting, conditional?). The paper uses no CFG here."""
    plain, guided = Setting(), with_dg(w, block, dims)
    return {"uncond": (plain, False), "uncond+dg": (guided, False), "cond": (plain, True), "cond+dg": (guided, True)}


def table_6_runs(
    pipe: Any,
    settings: Mapping[str, tuple[Setting, bool]],
    count: int,
    seeds: Sequence[int],
    steps: int,
    batch: int = 64,
) -> dict[tuple[str, int], Outcome]:
    """Images of every (setting, seed block) of Table 6, and what they cost.

    Args:
        pipe: a class-conditional pipeline.
        settings: name to (setting, conditional?); unconditional sampling uses DiT's null class.
        count: images per seed block.
        seeds: one per seed block.
        steps: sampling steps.
        batch: images per call of the pipeline.

    Raises:
        DgkitError: no seed block, or as for `samples`.
    """
    checks.integer("seed_blocks", len(seeds), 1)
    runs = {}
    for name, (setting, conditional) in settings.items():
        for seed in seeds:
            run = samples(pipe, count, seed, steps, batch_size=batch)
            if not conditional:
                run = replace(run, conditions=[1000] * count)
            runs[name, seed] = sample(pipe, run, setting)
    return runs


def table_6(runs: Mapping[tuple[str, int], Outcome]) -> pd.DataFrame:
    """Table 6 in small, on Fashion-MNIST: one row per (setting, seed block).

    Columns: frechet (distance of the shipped classifier's 64 features to those of the training set), is (inception
    score with the classifier's probabilities), precision, recall (Kynkaanniemi et al. 2019, k = 3, against the shipped
    sample of real features).
    """
    judge, rows = FashionJudge(()), []  # only its features count here, not what was asked for
    for (name, seed), run in runs.items():
        rows.append({"setting": name, "seed": seed} | judge_set_scores(judge, run.images))
    return pd.DataFrame(rows)


def efficientnet_values(runs: Mapping[tuple[str, int], Outcome]) -> dict[str, Any]:
    """Frechet distance of EfficientNet-Lite0's 1280 features by setting, over all seed blocks.

    Against as many real test images, which need the data set. With fewer images than features the covariance is not
    of full rank and the distance mostly bias, so use 2,000 or more.
    """
    union: dict[str, list[Images]] = {}
    for (name, _), run in runs.items():
        union.setdefault(name, []).append(run.images)
    count = sum(len(batch) for batch in next(iter(union.values())))
    real = efficientnet_features(as_samples(fashion_mnist("test")[0][:count]))
    distances = {
        name: frechet_distance(real, efficientnet_features(np.concatenate(batches))) for name, batches in union.items()
    }
    return {"efficientnet": {"count": count, "frechet": distances}}


def table_6_values(table: pd.DataFrame) -> dict[str, Any]:
    """Mean over seed blocks with the smallest and largest block, and the change of the Frechet distance by DG.

    "settings" has the measures of each setting, "contrast" the changes, under "cond+dg - cond" for example.
    """
    measures = [column for column in table.columns if column not in ("setting", "seed")]
    settings = {
        str(setting): {measure: _over_blocks(group[measure]) for measure in measures}
        for setting, group in table.groupby("setting", sort=False)
    }
    pivot = table.pivot(index="seed", columns="setting", values="frechet")
    pairs = (("uncond+dg", "uncond"), ("cond+dg", "cond"))
    contrast = {f"{a} - {b}": {"frechet": _over_blocks(pivot[a] - pivot[b])} for a, b in pairs}
    return {"settings": settings, "contrast": contrast}


def _over_blocks(numbers: "pd.Series[float]") -> Interval:
    return Interval(numbers.mean(), numbers.min(), numbers.max())


def table_6_beside_paper(values: Mapping[str, Any]) -> pd.DataFrame:
    """The paper's Table 6 (ImageNet, DiT-XL/2) beside ours: same settings and measures; model, data and network differ.

    Columns: measure, setting, ours, paper.
    """
    measures = {"frechet": "fid", "is": "is", "precision": "precision", "recall": "recall"}
    rows = []
    for ours, theirs in measures.items():
        for _, line in paper.table(6).iterrows():
            setting = line["type"].lower() + ("+dg" if line["dg"] == "yes" else "")
            measure = ours if ours == theirs else f"{ours} (paper: {theirs})"
            rows.append((measure, label(setting), f"{values['settings'][setting][ours]:.3g}", line[theirs]))
    return pd.DataFrame(rows, columns=["measure", "setting", "ours", "paper"])
