"""How much it matters how the paper is read: Detail Guidance beside CFG under its possible readings."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from dgbook.chapters.comparison import distance
from dgbook.chapters.guidance import GuidedRun, Setting
from dgbook.claims import paper
from dgbook.claims.results import references
from dgbook.measures import stats
from dgbook.measures.spectrum import sharpness
from dgkit.anatomy import dissect
from dgkit.guidance import DG
from dgkit.recording import Trace

CFG, OURS = "CFG alone", "as in this book"


def points() -> pd.DataFrame:
    """The points of `paper.ambiguities`, under headings for a page."""
    names = {"where": "where", "issue": "what", "taken_as": "taken here as", "matters": "does it matter?"}
    return paper.ambiguities()[list(names)].rename(columns=names)


def settings(
    pipe: Any, trace: Trace, guidance_scale: float, w: float, block: int, dims: Sequence[int]
) -> dict[str, Setting]:
    """CFG alone, CFG + DG as this book reads the paper, and the other readings of `data/paper/ambiguities.csv`.

    Args:
        pipe: a pipeline.
        trace: of the same model; "another channel" is the largest of mean |z| at `block` that is not in `dims`.
        guidance_scale: s of CFG; the reading that takes s for lambda of Eq. 5 gives s - 1.
        w, block, dims: of Detail Guidance.
    """

    def dg(**changed: Any) -> Setting:
        # at least 1, which is no CFG: s = lambda has no smaller value
        s = max(1.0, changed.pop("guidance_scale", guidance_scale))
        options: dict[str, Any] = {"scale": w, "block": block, "dims": list(dims)} | changed
        return Setting(s, method=DG(**options))

    ordered = trace.mean_abs()[block].argsort(descending=True).tolist()
    other = next(dim for dim in ordered if dim not in dims)
    readings = {CFG: Setting(guidance_scale), OURS: dg()}
    if block + 1 < len(dissect(pipe).blocks):
        readings["m counts from zero"] = dg(block=block + 1)
    return readings | {
        "lambda is s": dg(guidance_scale=guidance_scale - 1),
        "another channel": dg(dims=[other]),
        "first half of the steps": dg(stop=0.5),
        "second half of the steps": dg(start=0.5),
    }


def values(runs: Mapping[str, GuidedRun]) -> dict[str, Any]:
    """What each reading changes, as "READING.MEASURE".

    "distance": root mean square distance of the images to those of this book's reading, over that of CFG's images to
    them (0: the same images; 1: as far as without DG), with its interval. "sharpness_ratio": over CFG's.
    """
    ours, plain = runs[OURS].images, runs[CFG].images
    moved, sharp = distance(plain, ours).mean(), sharpness(plain).mean()
    measured: dict[str, Any] = {}
    for name, run in runs.items():
        measured[f"{name}.distance"] = stats.bootstrap(distance(run.images, ours) / moved)
        measured[f"{name}.sharpness_ratio"] = stats.bootstrap(sharpness(run.images) / sharp)
    return measured


def table(measured: Mapping[str, Any]) -> pd.DataFrame:
    """`values` for people: one row per reading."""
    columns = {"distance": "distance to our reading", "sharpness_ratio": "sharpness over CFG's"}
    names = [key.removesuffix(".distance") for key in measured if key.endswith(".distance")]
    rows = {
        name: {title: f"{measured[f'{name}.{measure}']:.2f}" for measure, title in columns.items()} for name in names
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def across_models(name: str) -> pd.DataFrame:
    """The distance to this book's reading in the reference run of each model: a row per reading, a column per model."""
    return pd.DataFrame({model: table(record.decoded()).iloc[:, 0] for model, record in references(name).items()})
