"""All guidance methods on one model, at equal cost: what chapter 5 compares beyond the paper's own ablations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dgbook.chapters.guidance import frechet_change, worse_copy
from dgbook.chapters.sampling import Samples, samples
from dgbook.claims.results import Record
from dgbook.measures import stats
from dgbook.measures.judges import Judge, judge_of
from dgbook.measures.spectrum import sharpness
from dgkit.anatomy import dissect, pipeline_row
from dgkit.errors import DgkitError
from dgkit.guidance import (
    APG,
    CFG,
    DG,
    PAG,
    SEG,
    SLG,
    TPG,
    Autoguidance,
    BlockDrop,
    CFGPlusPlus,
    CFGZeroStar,
    Method,
    Reuse,
    guide,
)

ENOUGH_FOR_FRECHET = 150  # images, for the judges' 64 or 48 features; below, the distance is mostly bias
BRANCH_SCALES = (0.1, 0.3, 1.0)  # w
CFG_SCALES = (2.0, 3.0, 5.0)  # s
BASELINE = "CFG"


@dataclass(frozen=True)
class Entry:
    """One method of the comparison: `method` beside the pipeline's CFG at `guidance_scale`, or in its place."""

    method: Method | None
    guidance_scale: float
    grid: tuple[float, ...] = ()

    def at(self, scale: float) -> "Entry":
        """The same method at another scale; for plain CFG it is s."""
        if self.method is None:
            return replace(self, guidance_scale=scale)
        return replace(self, method=replace(self.method, scale=scale))


def entries(pipe: Any, guidance_scale: float, block: int, dims: Sequence[int], seed: int) -> dict[str, Entry]:
    """The methods compared, by name, each with the scales to choose from.

    PAG, SEG, SLG, TPG work on the middle block. Autoguidance's worse model is `experiments.worse_copy`; without one it
    is left out. CFG-Zero* has its zero step in models that predict the velocity; DiT predicts noise.
    """
    s, velocity = guidance_scale, pipeline_row(pipe).velocity
    beside: dict[str, Method] = {
        "DG": DG(scale=1.0, block=block, dims=dims),
        "PAG": PAG(scale=1.0),
        "SEG": SEG(scale=1.0),
        "SLG": SLG(scale=1.0),
        "token shuffling": TPG(scale=1.0),
        "block drop": BlockDrop(scale=1.0),
    }
    worse = worse_copy(pipe, seed)
    if worse is not None:
        beside["autoguidance"] = Autoguidance(scale=1.0, bad=worse)
    instead: dict[str, tuple[Method, tuple[float, ...]]] = {
        "CFG, middle steps": (CFG(scale=s, start=0.25, stop=0.75), CFG_SCALES),
        "APG": (APG(scale=s), CFG_SCALES),
        "CFG++": (CFGPlusPlus(scale=0.5), (0.3, 0.5, 0.8)),
        "CFG-Zero*": (CFGZeroStar(scale=s, zero_steps=int(velocity)), CFG_SCALES),
    }
    return (
        {"none": Entry(None, 1.0), BASELINE: Entry(None, s, CFG_SCALES)}
        | {name: Entry(method, s, grid) for name, (method, grid) in instead.items()}
        | {f"CFG + {name}": Entry(method, s, BRANCH_SCALES) for name, method in beside.items()}
    )


@dataclass(frozen=True)
class Compared:
    """One method's images at equal cost.

    Attributes:
        images: (N, H, W, 3).
        scale: s or w.
        steps: sampling steps that the budget allows.
        per_image: block evaluations per image.
    """

    images: NDArray[np.uint8]
    scale: float
    steps: int
    per_image: float


def sample(pipe: Any, run: Samples, entry: Entry, steps: int) -> tuple[NDArray[np.uint8], int]:
    """Images of `run` with one method in a given number of steps, and the block evaluations."""
    run = replace(run, steps=steps, guidance_scale=entry.guidance_scale)
    if entry.method is None:
        passes = 2 if entry.guidance_scale > 1 else 1
        return run.images(pipe), passes * steps * len(run.seeds) * len(dissect(pipe).blocks)
    with guide(pipe, entry.method) as guidance:
        images = run.images(pipe)
    return images, guidance.cost.block_evaluations


def steps_within(pipe: Any, run: Samples, entry: Entry, budget: float) -> int:
    """The number of steps whose cost comes nearest to `budget` block evaluations per image, from a run of one image."""
    _, cost = sample(pipe, run.first(1), entry, run.steps)
    return max(1, round(budget / (cost / run.steps)))


def compare(pipe: Any, run: Samples, methods: Mapping[str, Entry], scales: Mapping[str, float]) -> dict[str, Compared]:
    """Every method at the cost of CFG in `run.steps` steps, from the same noise; `scales` by name override its own."""
    budget = 2 * run.steps * len(dissect(pipe).blocks)
    compared = {}
    for name, entry in methods.items():
        scale = scales.get(name, _scale(entry))
        chosen = entry.at(scale) if entry.grid else entry
        steps = steps_within(pipe, run, chosen, budget)
        images, cost = sample(pipe, run, chosen, steps)
        compared[name] = Compared(images, scale, steps, cost / len(run.seeds))
    return compared


def _scale(entry: Entry) -> float:
    return entry.guidance_scale if entry.method is None else float(entry.method.scale)  # type: ignore[arg-type]


def choose_scales(pipe: Any, run: Samples, methods: Mapping[str, Entry]) -> pd.DataFrame:
    """Each method at each scale of its grid, at equal cost: columns method, scale, frechet, chosen.

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
    for name, entry in methods.items():
        for scale in entry.grid:
            images = compare(pipe, run, {name: entry.at(scale)}, {})[name].images
            rows.append({"method": name, "scale": scale, "frechet": judge.frechet(judge.features(images))})
    table = pd.DataFrame(rows)
    table["chosen"] = table.groupby("method")["frechet"].transform("min") == table["frechet"]
    return table


def chosen_scales(table: pd.DataFrame) -> dict[str, float]:
    """The chosen scale of each method in `choose_scales`' table."""
    return table[table["chosen"]].groupby("method")["scale"].first().to_dict()


def scales_of(reference: Record | None) -> dict[str, float]:
    """The scales that a reference run chose, by method; none without one."""
    values = reference.values if reference else {}
    return {key.removesuffix(".scale"): value for key, value in values.items() if key.endswith(".scale")}


def scales_for(
    pipe: Any, methods: Mapping[str, Entry], reference: Record | None, count: int, seed: int, steps: int
) -> dict[str, float]:
    """The scale of each method: chosen with `count` images, or with 0 images those of the reference run.

    Args:
        pipe: a pipeline.
        methods: see `entries`; one that neither way names keeps the scale of its entry.
        reference: the reference run, if there is one.
        count: images to choose with; see `choose_scales`.
        seed: of these images, another than that of the comparison.
        steps: sampling steps of CFG.

    Raises:
        DgkitError: as for `samples` and `choose_scales`.
    """
    if count == 0:
        return scales_of(reference)
    return chosen_scales(choose_scales(pipe, samples(pipe, count, seed, steps), methods))


def comparison_values(compared: Mapping[str, Compared], judge: Judge | None) -> dict[str, Any]:
    """What `compare` measured, as "METHOD.MEASURE".

    Scale, steps, cost per image, sharpness over CFG's; with a judge agreement with the condition, and with enough
    images the Frechet distance and its change against CFG, paired, with its interval.
    """
    values: dict[str, Any] = {}
    base = compared[BASELINE].images
    sharp = sharpness(base)
    base_features = judge.features(base) if judge is not None and len(base) >= ENOUGH_FOR_FRECHET else None
    for name, c in compared.items():
        values |= {f"{name}.scale": c.scale, f"{name}.steps": c.steps, f"{name}.cost": c.per_image}
        values[f"{name}.sharpness_ratio"] = stats.bootstrap(sharpness(c.images) / sharp.mean())
        if judge is not None:
            right = judge.agreement(c.images)
            values[f"{name}.agreement"] = stats.wilson(right.sum(), len(right))
        if judge is not None and base_features is not None:
            features = judge.features(c.images)
            values[f"{name}.frechet"] = judge.frechet(features)
            values[f"{name}.frechet_change"] = frechet_change(judge, features, base_features)
    return values


def larger_run(values: Mapping[str, Any], reference: Record | None) -> Mapping[str, Any]:
    """The numbers of this run if it is large enough for a Frechet distance, else those of the reference run, if any."""
    if f"{BASELINE}.frechet" in values or reference is None:
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
    for name in (key.removesuffix(".steps") for key in values if key.endswith(".steps")):
        row = {"method": name}
        for measure, (column, form) in columns.items():
            value = values.get(f"{name}.{measure}")
            if value is not None:
                row[column] = form.format(value.value if isinstance(value, stats.Interval) else value)
        rows.append(row)
    return pd.DataFrame(rows).set_index("method")


# ------------------------------------------------------------------------------------------------------ direction reuse

REUSES: dict[str, Reuse | None] = {
    "every step": None,
    "every 2nd step": Reuse(2),
    "every 3rd": Reuse(3),
    "every 4th": Reuse(4),
    "cosine 0.9, at most 4": Reuse(4, 0.9),
    "cosine 0.7, at most 4": Reuse(4, 0.7),
}


def reuse_values(
    pipe: Any, run: Samples, w: float, block: int, dims: Sequence[int], guidance_scale: float
) -> dict[str, Any]:
    """What it saves and costs to take DG's direction for several steps, beside CFG; "SETTING.MEASURE".

    "reuse_cost": block evaluations over those of CFG alone. "reuse_distance": the images' root mean square distance to
    full DG's, over that of CFG's images to full DG's (0: the same as full DG; 1: as far as no DG), with its interval.
    """
    run = replace(run, guidance_scale=guidance_scale)
    plain = run.images(pipe)
    alone = 2 * run.steps * len(run.seeds) * len(dissect(pipe).blocks)
    images: dict[str, NDArray[np.uint8]] = {}
    values: dict[str, Any] = {}
    for name, reuse in REUSES.items():
        with guide(pipe, DG(scale=w, block=block, dims=dims, reuse=reuse)) as guidance:
            images[name] = run.images(pipe)
        values[f"{name}.reuse_cost"] = guidance.cost.block_evaluations / alone
    full = images["every step"]
    moved = distance(plain, full)
    for name, batch in images.items():
        values[f"{name}.reuse_distance"] = stats.bootstrap(distance(batch, full) / moved.mean())
    return values


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square difference of each pair of images, (N,)."""
    return np.sqrt(((a.astype(float) - b) ** 2).mean((1, 2, 3)))


def reuse_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """`reuse_values` for people: one row per setting."""
    rows = [
        {
            "direction computed": name,
            "block evaluations of CFG's": f"{values[f'{name}.reuse_cost']:.2f}",
            "distance to full DG": f"{values[f'{name}.reuse_distance']:.3f}",
        }
        for name in REUSES
    ]
    return pd.DataFrame(rows).set_index("direction computed")
