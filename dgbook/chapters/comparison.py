"""All guidance methods on one model, at equal cost: what chapter 5 compares beyond the paper's own ablations."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dgbook.chapters.sampling import Images, Samples, samples
from dgbook.chapters.settings import Outcome, Setting, sample, sample_all, with_dg, worse_copy
from dgbook.claims.names import label
from dgbook.claims.results import Record
from dgbook.measures import stats
from dgbook.measures.judges import Judge, judge_of
from dgbook.measures.spectrum import sharpness
from dgkit.anatomy import dissect, predicted
from dgkit.errors import DgkitError
from dgkit.guidance import (
    APG,
    CFG,
    PAG,
    SEG,
    SLG,
    TPG,
    Autoguidance,
    BlockDrop,
    CFGPlusPlus,
    CFGZeroStar,
    Every,
    Schedule,
    SGPrev,
)

ENOUGH_FOR_FRECHET = 150  # images, for the judges' 64 or 48 features; below, the distance is mostly bias
BASELINE = "cfg"
CFG_SCALES = (2.0, 3.0, 5.0)  # s
BRANCH_SCALES = (0.1, 0.3, 1.0)  # w
BESIDE = ("cfg+dg", "cfg+pag", "cfg+seg", "cfg+slg", "cfg+tpg", "cfg+block-drop", "cfg+autoguidance")
SCALES = {
    **dict.fromkeys((BASELINE, "cfg-middle", "apg", "cfg-zero*"), CFG_SCALES),
    "cfg++": (0.3, 0.5, 0.8),
    **dict.fromkeys(BESIDE, BRANCH_SCALES),
}
"""The scales to choose from, for each method that has one."""


def methods(pipe: Any, guidance_scale: float, block: int, dims: Sequence[int], seed: int) -> dict[str, Setting]:
    """The methods compared.

    PAG, SEG, SLG, TPG work on the middle block. Autoguidance's worse model is `settings.worse_copy`; without one it is
    left out. CFG-Zero* has its zero step in models that predict the velocity; DiT predicts noise.
    """
    s, velocity, worse = guidance_scale, predicted(pipe) == "velocity", worse_copy(pipe, seed)
    return {
        "none": Setting(),
        BASELINE: Setting(s),
        "cfg-middle": Setting(s, CFG(scale=s, start=0.25, stop=0.75)),
        "apg": Setting(s, APG(scale=s)),
        "cfg++": Setting(s, CFGPlusPlus(scale=0.5)),
        "cfg-zero*": Setting(s, CFGZeroStar(scale=s, zero_steps=int(velocity))),
        "cfg+dg": with_dg(1.0, block, dims, s),
        "cfg+pag": Setting(s, PAG(scale=1.0)),
        "cfg+seg": Setting(s, SEG(scale=1.0)),
        "cfg+slg": Setting(s, SLG(scale=1.0)),
        "cfg+tpg": Setting(s, TPG(scale=1.0)),
        "cfg+block-drop": Setting(s, BlockDrop(scale=1.0)),
        **({} if worse is None else {"cfg+autoguidance": Setting(s, Autoguidance(scale=1.0, bad=worse))}),
    }


def steps_within(pipe: Any, run: Samples, setting: Setting, budget: float) -> int:
    """The number of steps whose cost comes nearest to `budget` block evaluations per image, from a run of one image."""
    cost = sample(pipe, run.first(1), setting).block_evaluations
    return max(1, round(budget / (cost / run.steps)))


def compare(
    pipe: Any, run: Samples, settings: Mapping[str, Setting], scales: Mapping[str, float]
) -> dict[str, Outcome]:
    """Every method at the cost of CFG in `run.steps` steps, from the same noise; `scales` by name override its own."""
    budget = 2 * run.steps * len(dissect(pipe).blocks)
    compared = {}
    for name, setting in settings.items():
        chosen = setting.at(scales.get(name, setting.scale))
        steps = steps_within(pipe, run, chosen, budget)
        compared[name] = sample(pipe, replace(run, steps=steps), chosen)
    return compared


def choose_scales(pipe: Any, run: Samples, settings: Mapping[str, Setting]) -> pd.DataFrame:
    """Each method at each of its `SCALES`, at equal cost: columns method, scale, frechet, chosen.

    Chosen is the lowest Frechet distance of the judge's features to real images; `run` should have other seeds than the
    comparison.

    Raises:
        DgkitError: too few images for a Frechet distance, or a model that has no judge.
    """
    judge = judge_of(pipe, run.conditions)
    if judge is None:
        raise DgkitError(
            f"calibration_samples={len(run.seeds)} is not allowed: scales are chosen with a judge of the model's data "
            "(see dgbook.measures.judges), which this model has not; give 0"
        )
    if len(run.seeds) < ENOUGH_FOR_FRECHET:
        raise DgkitError(
            f"calibration_samples={len(run.seeds)} is not allowed: give {ENOUGH_FOR_FRECHET} or more, or 0 for the "
            "scales of the reference run"
        )
    rows = []
    for name, setting in settings.items():
        for scale in SCALES.get(name, ()):
            images = compare(pipe, run, {name: setting.at(scale)}, {})[name].images
            rows.append({"method": name, "scale": scale, "frechet": judge.frechet(judge.features(images))})
    table = pd.DataFrame(rows)
    table["chosen"] = table.groupby("method")["frechet"].transform("min") == table["frechet"]
    return table


def chosen_scales(table: pd.DataFrame) -> dict[str, float]:
    """The chosen scale of each method in `choose_scales`' table."""
    return table[table["chosen"]].groupby("method")["scale"].first().to_dict()


def scales_of(reference: Record | None) -> dict[str, float]:
    """The scales that a reference run chose, by method; none without one."""
    return {name: measured["scale"] for name, measured in reference["methods"].items()} if reference else {}


def scales_for(
    pipe: Any, settings: Mapping[str, Setting], reference: Record | None, count: int, seed: int, steps: int
) -> dict[str, float]:
    """The scale of each method: chosen with `count` images, or with 0 images those of the reference run.

    Args:
        pipe: a pipeline.
        settings: see `methods`; one that neither way names keeps its scale.
        reference: the reference run, if there is one.
        count: images to choose with; see `choose_scales`.
        seed: of these images, another than that of the comparison.
        steps: sampling steps of CFG.

    Raises:
        DgkitError: as for `samples` and `choose_scales`.
    """
    if count == 0:
        return scales_of(reference)
    return chosen_scales(choose_scales(pipe, samples(pipe, count, seed, steps), settings))


def comparison_values(compared: Mapping[str, Outcome], judge: Judge | None) -> dict[str, Any]:
    """What `compare` measured, as "methods".

    Scale, steps, cost per image, sharpness over CFG's; with a judge agreement with the condition, and with enough
    images the Frechet distance and its change against CFG, paired, with its interval.
    """
    base = compared[BASELINE].images
    sharp = sharpness(base).mean()
    distances = _frechet(judge, base) if judge is not None and len(base) >= ENOUGH_FOR_FRECHET else None
    methods: dict[str, dict[str, Any]] = {}
    for name, outcome in compared.items():
        measured = methods[name] = {
            "scale": outcome.setting.scale,
            "steps": outcome.steps,
            "cost": outcome.block_evaluations / len(outcome.images),
            "sharpness_ratio": stats.bootstrap(sharpness(outcome.images) / sharp),
        }
        if judge is not None:
            right = judge.agreement(outcome.images)
            measured["agreement"] = stats.wilson(right.sum(), len(right))
        if judge is not None and distances is not None:
            own = _frechet(judge, outcome.images)
            measured["frechet"] = own.mean()
            measured["frechet_change"] = stats.paired_bootstrap(own, distances)
    return {"methods": methods}


def _frechet(judge: Judge, images: Images) -> NDArray[np.float64]:
    """What each image adds to the Frechet distance, (N,)."""
    return judge.frechet_contributions(judge.features(images))


def larger_run(values: Mapping[str, Any], reference: Record | None) -> Mapping[str, Any]:
    """The numbers of this run if it is large enough for a Frechet distance, else those of the reference run, if any."""
    if "frechet" in values["methods"][BASELINE] or reference is None:
        return values
    return reference.decoded()


def comparison_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """`comparison_values` for people: one row per method, without the intervals that the figure shows."""
    columns = {
        "scale": ("scale", "{:g}"),
        "steps": ("steps", "{}"),
        "cost": ("cost", "{:.0f}"),
        "sharpness_ratio": ("sharpness", "{:.2f}"),
        "agreement": ("agreement", "{:.2f}"),
        "frechet": ("Frechet", "{:.2f}"),
        "frechet_change": ("change", "{:+.2f}"),
    }
    rows = []
    for name, measured in values["methods"].items():
        row = {"method": label(name)}
        for measure, (column, form) in columns.items():
            if measure in measured:
                value = measured[measure]
                row[column] = form.format(value.value if isinstance(value, stats.Interval) else value)
        rows.append(row)
    return pd.DataFrame(rows).set_index("method")


# ------------------------------------------------------------------------------------------------------------ schedules

SCHEDULES: dict[str, Schedule | str] = {
    "every-1": "full",
    "every-2": Schedule(Every(2)),
    "every-3": Schedule(Every(3)),
    "every-4": Schedule(Every(4)),
    "cosine-90": Schedule(Every(4, cosine=0.9)),
    "cosine-70": Schedule(Every(4, cosine=0.7)),
    "every 2nd step, extrapolated": Schedule(Every(2, missing="extrapolate")),
    "every 3rd step, extrapolated": Schedule(Every(3, missing="extrapolate")),
    "first half, then dropped": Schedule(Every(None, 0.5, "drop")),
    "first half, then kept": Schedule(Every(None, 0.5, "reuse")),
    "CFG dropped in the last quarter": Schedule(uncond=Every(None, 0.75, "drop")),
    "CFG every 2nd step": Schedule(uncond=Every(2)),
    "CFG every 2nd step, extrapolated": Schedule(uncond=Every(2, missing="extrapolate")),
    "both every 2nd step, extrapolated": Schedule(*[Every(2, missing="extrapolate")] * 2),
    "cheap": "cheap",
}
"""When DG's and CFG's directions are computed, by what the tables call it."""


def schedule_values(
    pipe: Any,
    run: Samples,
    w: float,
    block: int,
    dims: Sequence[int],
    guidance_scale: float,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """What CFG + DG costs, and what is lost, when not all is computed in every step; by `SCHEDULES`, as "reuse".

    Beside them SG-prev in DG's place at the same w, and CFG alone. "cost": block evaluations over those of CFG alone.
    "distance": the images' root mean square distance to full CFG + DG's, over that of CFG's images to them (0: the same
    images; 1: as far as without DG), with its interval. With a judge and enough images also the Frechet distance, and
    its change against full CFG + DG, paired, with its interval.
    """
    settings = {
        **{name: with_dg(w, block, dims, guidance_scale, schedule=chosen) for name, chosen in SCHEDULES.items()},
        "SG-prev in place of DG": Setting(guidance_scale, SGPrev(scale=w)),
        "none": Setting(guidance_scale),
    }
    outcomes = sample_all(pipe, run, settings)
    plain, full = outcomes["none"], outcomes["every-1"].images
    moved = distance(plain.images, full).mean()
    judged = judge if judge is not None and len(full) >= ENOUGH_FOR_FRECHET else None
    distances = _frechet(judged, full) if judged is not None else None
    values: dict[str, dict[str, Any]] = {}
    for name, outcome in outcomes.items():
        measured = values[name] = {
            "cost": outcome.block_evaluations / plain.block_evaluations,
            "distance": stats.bootstrap(distance(outcome.images, full) / moved),
        }
        if judged is not None and distances is not None:
            own = _frechet(judged, outcome.images)
            measured["frechet"] = own.mean()
            measured["frechet_change"] = stats.paired_bootstrap(own, distances)
    return {"reuse": values}


def distance(a: Images, b: Images) -> NDArray[np.float64]:
    """Root mean square difference of each pair of images, (N,)."""
    return np.sqrt(((a.astype(float) - b) ** 2).mean((1, 2, 3)))


def schedule_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """`schedule_values` for people: one row per schedule."""
    rows = []
    for name, measured in values["reuse"].items():
        row = {
            "computed": label(name),
            "block evaluations of CFG's": f"{measured['cost']:.2f}",
            "distance to full CFG + DG": f"{measured['distance']:.3f}",
        }
        if "frechet" in measured:
            row |= {"Frechet": f"{measured['frechet']:.2f}", "change": f"{measured['frechet_change']:+.2f}"}
        rows.append(row)
    return pd.DataFrame(rows).set_index("computed")
