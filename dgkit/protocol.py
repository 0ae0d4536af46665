"""The paper's tables as settings: what each row samples, and the scores that it reports.

Every number comes from `data/paper` or from the presets of the zoo, which are Tables 4 and 5. What the paper does not
state is listed in `Row.assumed`, and what cannot be assumed, in `Row.lacking`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from dgkit import paper
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS, Preset

NAMES = {"SD3": "sd3", "SD3.5": "sd3.5-large", "Flux": "flux-dev"}
"""The models of Tables 1 to 5 by their names there."""

SMALL = {"sd3": "tiny-sd3", "sd3.5-large": "tiny-sd3", "flux-dev": "tiny-flux", "dit-xl-2": "tiny-dit"}
"""The embedded model that stands in for a large one when the whole path is tried in small."""

SMALL_COUNT, SMALL_STEPS = 24, 10

SCORES = ("clipscore", "blipscore", "hpsv2.1", "aesthetic")
STYLES = {"anime": "anime", "concept": "concept-art", "painting": "paintings", "photo": "photo"}
"""Table 2's columns and the styles of the HPSv2 benchmark."""


@dataclass(frozen=True)
class Row:
    """One row of one table.

    Attributes:
        table: "table1", ...
        label: the row as the table names it.
        model: a name of the zoo.
        prompts: a set of `dgkit.prompts`.
        count, steps: images and sampling steps.
        guidance_scale: s of u + s (c - u); 1 for none.
        methods: guidance methods by name, with their parameters, as in `dgkit.generate.job.Job`.
        paper: the scores as printed, by the name of the metric; "hpsv2.1/anime" for one style.
        conditional: False for unconditional sampling (the null class).
        assumed: what the paper does not state and is assumed here.
        lacking: what the paper does not state and nothing can be assumed for: "block", "dims" or "scale".
    """

    table: str
    label: str
    model: str
    prompts: str
    count: int
    steps: int
    guidance_scale: float
    methods: Mapping[str, Mapping[str, Any]]
    paper: Mapping[str, float]
    conditional: bool = True
    assumed: tuple[str, ...] = ()
    lacking: tuple[str, ...] = field(default=())


def rows(table: str, model: str | None = None) -> list[Row]:
    """The rows of one table.

    Args:
        table: a key of `TABLES`.
        model: only the rows of this model of the zoo.

    Raises:
        DgkitError: unknown table, or the table has no row of `model`.
    """
    if table not in TABLES:
        raise DgkitError(f"table={table!r} is not allowed: use one of {', '.join(TABLES)}")
    found = TABLES[table]()
    if model is None:
        return found
    kept = [row for row in found if row.model == model]
    if not kept:
        known = ", ".join(dict.fromkeys(row.model for row in found))
        raise DgkitError(f"model={model!r} is not in {table}: it has {known}")
    return kept


def small(row: Row) -> Row:
    """The same row on an embedded model and its own conditions, a few images of it; without the paper's scores."""
    model = SMALL[row.model]
    preset = MODELS[model].preset
    methods = {
        name: _dg(preset, row.guidance_scale) if name == "dg" else parameters
        for name, parameters in row.methods.items()
    }
    return replace(
        row,
        model=model,
        prompts=MODELS[model].data,
        count=SMALL_COUNT,
        steps=SMALL_STEPS,
        guidance_scale=preset.guidance_scale if row.guidance_scale > 1 else 1.0,
        methods=methods,
        paper={},
        assumed=(),
        lacking=(),
    )


def filled(row: Row, **values: Any) -> Row:
    """The row with Detail Guidance's `block`, `dims` or `scale` set where the paper is silent.

    Raises:
        DgkitError: something is still lacking.
    """
    given = {key: value for key, value in values.items() if value is not None}
    lacking = tuple(name for name in row.lacking if name not in given)
    if lacking:
        raise DgkitError(
            f"{row.table}, {row.label}: the paper does not state {' and '.join(lacking)} for {row.model}: give "
            f"{' and '.join('--' + name for name in lacking)}"
        )
    if "dg" not in row.methods:
        return row
    own = {key: value for key, value in given.items() if key in row.lacking}
    return replace(row, methods=dict(row.methods) | {"dg": dict(row.methods["dg"]) | own}, lacking=())


def _dg(preset: Preset, guidance_scale: float) -> dict[str, Any]:
    """Detail Guidance's parameters by Tables 4 and 5, without what they do not state."""
    scale = preset.scale if guidance_scale == 1 else preset.scale_with_cfg
    stated = {"block": preset.block, "dims": preset.dims and list(preset.dims), "scale": scale}
    return {name: value for name, value in stated.items() if value is not None}


def _with_cfg(printed: str) -> float:
    """s of the rows CFG + DG: Table 5's lambda of Eq. 5, plus 1."""
    table = paper.table(5)
    return float(table[(table["model"] == printed) & (table["type"] == "CFG+DG")]["lambda"].iloc[0]) + 1


def _scored(number: int) -> list[Row]:
    """Tables 1 and 3: prompts of Pick-a-Pic, four scores, with and without CFG and DG."""
    made = []
    for line in paper.table(number).to_dict("records"):
        name = NAMES[line["model"]]
        preset, dg, cfg = MODELS[name].preset, line["dg"] == "yes", line["type"] == "CFG"
        scale = (_with_cfg(line["model"]) if dg else preset.guidance_scale) if cfg else 1.0
        assumed: tuple[str, ...] = ("the prompts: the paper names none for this table",) if number == 3 else ()
        if name == "flux-dev":
            assumed += ("which de-distilled Flux: the paper does not say; a model of your own takes its place",)
        made.append(
            Row(
                table=f"table{number}",
                label=f"{line['model']} {line['type']}{' + DG' if dg else ''}",
                model=name,
                prompts="pickapic",
                count=500,
                steps=preset.steps,
                guidance_scale=scale,
                methods={"dg": _dg(preset, scale)} if dg else {},
                paper={score: float(line[score]) for score in SCORES},
                assumed=assumed,
            )
        )
    return made


def _table_2() -> list[Row]:
    """Guidance methods on the HPSv2.1 benchmark with SD3."""
    preset = MODELS["sd3"].preset
    ours = "its parameters: the paper states none, these are its authors' or dgkit's defaults"
    settings: dict[str, tuple[float, dict[str, dict[str, Any]], tuple[str, ...]]] = {
        "CFG": (preset.guidance_scale, {}, ()),
        "APG": (preset.guidance_scale, {"apg": {"scale": preset.guidance_scale}}, (ours,)),
        "CFG++": (preset.guidance_scale, {"cfg++": {}}, (ours,)),
        "CFG-Zero": (preset.guidance_scale, {"cfg-zero*": {"scale": preset.guidance_scale}}, (ours,)),
        "DG": (1.0, {"dg": _dg(preset, 1.0)}, ()),
        "CFG+DG": (_with_cfg("SD3"), {"dg": _dg(preset, 2.0)}, ()),
    }
    made = []
    for line in paper.table(2).to_dict("records"):
        scale, methods, assumed = settings[line["method"]]
        styles = {f"hpsv2.1/{style}": float(line[column]) for column, style in STYLES.items()}
        scores = styles | {"hpsv2.1": float(line["average"]), "aesthetic": float(line["aesthetic"])}
        made.append(
            Row(
                table="table2",
                label=line["method"],
                model="sd3",
                prompts="hpsv2.1",
                count=3200,
                steps=preset.steps,
                guidance_scale=scale,
                methods=methods,
                paper=scores,
                assumed=assumed,
            )
        )
    return made


def _table_6() -> list[Row]:
    """DiT-XL/2 on ImageNet: no CFG, with and without a class."""
    preset = MODELS["dit-xl-2"].preset
    made = []
    for line in paper.table(6).to_dict("records"):
        dg, parameters = line["dg"] == "yes", _dg(preset, 1.0)
        made.append(
            Row(
                table="table6",
                label=f"{line['type']}{' + DG' if dg else ''}",
                model="dit-xl-2",
                prompts="imagenet",
                count=50_000,
                steps=preset.steps,
                guidance_scale=1.0,
                methods={"dg": parameters} if dg else {},
                paper={score: float(line[score]) for score in ("fid", "is", "precision", "recall")},
                conditional=line["type"] == "Cond",
                assumed=("the number of images and of steps: DiT's own protocol",),
                lacking=tuple(name for name in ("block", "dims", "scale") if dg and name not in parameters),
            )
        )
    return made


TABLES: dict[str, Callable[[], list[Row]]] = {
    "table1": lambda: _scored(1),
    "table2": _table_2,
    "table3": lambda: _scored(3),
    "table6": _table_6,
}
"""The tables that can be regenerated, by name."""


def overview() -> pd.DataFrame:
    """Every row of every table: what it samples."""
    return pd.DataFrame(
        {
            "table": row.table,
            "row": row.label,
            "model": row.model,
            "prompts": row.prompts,
            "images": row.count,
            "steps": row.steps,
            "s": row.guidance_scale,
            "methods": ", ".join(f"{name} {dict(parameters)}" for name, parameters in row.methods.items()) or "none",
            "not stated": "; ".join((*row.lacking, *row.assumed)),
        }
        for table in TABLES
        for row in rows(table)
    )
