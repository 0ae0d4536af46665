"""How much it matters how the paper is read: Detail Guidance beside CFG under its possible readings."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from dgbook.chapters import study
from dgbook.chapters.comparison import distance
from dgbook.chapters.settings import Outcome, Setting, with_dg
from dgbook.claims import paper
from dgbook.claims.names import label
from dgbook.claims.results import references
from dgbook.measures import stats
from dgbook.measures.spectrum import sharpness
from dgkit.anatomy import dissect
from dgkit.recording import Trace

CFG, OURS = "cfg", "ours"


def open_study(**sampled: Any) -> study.Study:
    """Chapter 7: see `study.open_study`."""
    opened = study.open_study(**sampled)
    return opened.begin(
        "07_ambiguities",
        block=opened.block,
        dims=opened.dims,
        guidance_scale=opened.guidance_scale,
        w=opened.w_cfg,
    )


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
        options: dict[str, Any] = {"w": w, "block": block, "dims": dims, "guidance_scale": guidance_scale}
        return with_dg(**options | changed)

    ordered = trace.mean_abs()[block].argsort(descending=True).tolist()
    other = next(dim for dim in ordered if dim not in dims)
    readings = {CFG: Setting(guidance_scale), OURS: dg()}
    if block + 1 < len(dissect(pipe).blocks):
        readings["m counts from zero"] = dg(block=block + 1)
    return readings | {
        "CFG at s + 1": Setting(guidance_scale + 1),  # Table 5's CFG row by Eq. 5
        "lambda is s": dg(guidance_scale=max(1.0, guidance_scale - 1)),  # 1 is no CFG: lambda has no smaller value
        "another channel": dg(dims=[other]),
        "first half of the steps": dg(stop=0.5),
        "second half of the steps": dg(start=0.5),
    }


def values(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What each reading changes, as "settings".

    "distance": root mean square distance of the images to those of this book's reading, over that of CFG's images to
    them (0: the same images; 1: as far as without DG), with its interval. "sharpness_ratio": over CFG's.
    """
    ours, plain = outcomes[OURS].images, outcomes[CFG].images
    moved, sharp = distance(plain, ours).mean(), sharpness(plain).mean()
    settings = {
        name: {
            "distance": stats.bootstrap(distance(outcome.images, ours) / moved),
            "sharpness_ratio": stats.bootstrap(sharpness(outcome.images) / sharp),
        }
        for name, outcome in outcomes.items()
    }
    return {"settings": settings}


def table(measured: Mapping[str, Any]) -> pd.DataFrame:
    """`values` for people: one row per reading."""
    columns = {"distance": "distance to our reading", "sharpness_ratio": "sharpness over CFG's"}
    rows = {
        label(name): {title: f"{found[measure]:.2f}" for measure, title in columns.items()}
        for name, found in measured["settings"].items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def across_models(name: str) -> pd.DataFrame:
    """The distance to this book's reading in the reference run of each model: a row per reading, a column per model."""
    return pd.DataFrame({model: table(record.decoded()).iloc[:, 0] for model, record in references(name).items()})
