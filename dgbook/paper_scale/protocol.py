"""The paper's tables, and the figures of numbers, as settings: what each row samples, and the scores that it reports.

Every printed number comes from `data/paper` or from the presets of the zoo, which are Tables 4 and 5. What the paper
does not state is listed in `Row.assumed`, and what cannot be assumed, in `Row.lacking`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from dgbook.claims import paper
from dgbook.paper_scale.row import NAMES, Row, depth_label, detail_guidance, disruption
from dgkit.checks import one_of
from dgkit.errors import DgkitError
from dgkit.paths import DATA
from dgkit.zoo import MODELS

UNNAMED = {"flux-dev": "flux-dev-de-distill"}
"""Models in whose place the paper used a checkpoint that it does not name, and the zoo's that may take its place."""

SCORES = ("clipscore", "blipscore", "hpsv2.1", "aesthetic")
SEED_BLOCKS = 3  # of scores of whole sets, which have no interval of their own
STYLES = {"anime": "anime", "concept": "concept-art", "painting": "paintings", "photo": "photo"}
"""Table 2's columns and the styles of the HPSv2 benchmark."""


def rows(table: str, model: str | None = None) -> list[Row]:
    """The rows of one table.

    Args:
        table: a key of `TABLES`.
        model: only the rows of this model of the zoo.

    Raises:
        DgkitError: unknown table, or the table has no row of `model`.
    """
    found = TABLES[one_of("table", table, TABLES)]()
    if model is None:
        return found
    kept = [row for row in found if row.model == model]
    if not kept:
        known = ", ".join(dict.fromkeys(row.model for row in found))
        raise DgkitError(f"model={model!r} is not in {table}: it has {known}")
    return kept


def options(table: str, model: str) -> str:
    """What `dgkit reproduce` has to be told of a table on this model beside both names: "" or " --dims DIM --scale W".

    Raises:
        DgkitError: as for `rows`.
    """
    lacking = {name for row in rows(table, model) for name in row.lacking}
    given = {"weights": UNNAMED[model]} if model in UNNAMED else {}
    given |= {name: value for name, value in (("dims", "DIM"), ("scale", "W")) if name in lacking}
    return "".join(f" --{name} {value}" for name, value in given.items())


def printed_rounding(number: int) -> pd.DataFrame:
    """Half a unit of the last digit of each number that a table of the paper prints; nan where there is none."""
    return pd.read_csv(DATA / "paper" / f"table{number}.csv", dtype=str).map(half_unit, na_action="ignore")


def half_unit(printed: str) -> float:
    """Half a unit of the last digit of a number as printed: 0.005 of "28.70"; nan of what is no such number."""
    digits = re.fullmatch(r"-?\d+\.?(\d*)", printed)
    return 0.5 / 10 ** len(digits[1]) if digits else float("nan")


def _with_cfg(printed: str) -> float:
    """s of the rows CFG + DG: Table 5's lambda of Eq. 5, plus 1."""
    table = paper.table(5)
    return float(table[(table["model"] == printed) & (table["type"] == "CFG+DG")]["lambda"].iloc[0]) + 1


def _scored(number: int) -> list[Row]:
    """Tables 1 and 3: prompts of Pick-a-Pic, four scores, with and without CFG and DG."""
    made, rounding = [], printed_rounding(number)
    for index, line in enumerate(paper.table(number).to_dict("records")):
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
                methods={"dg": detail_guidance(preset, scale)} if dg else {},
                paper={score: float(line[score]) for score in SCORES},
                rounding={score: float(rounding[score][index]) for score in SCORES},
                scores=SCORES,
                baseline=f"{line['model']} {line['type']}" if dg else "",
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
        "DG": (1.0, {"dg": detail_guidance(preset, 1.0)}, ()),
        "CFG+DG": (_with_cfg("SD3"), {"dg": detail_guidance(preset, 2.0)}, ()),
    }
    columns = {f"hpsv2.1/{style}": column for column, style in STYLES.items()}
    columns |= {"hpsv2.1": "average", "aesthetic": "aesthetic"}
    made, rounding = [], printed_rounding(2)
    for index, line in enumerate(paper.table(2).to_dict("records")):
        scale, methods, assumed = settings[line["method"]]
        scores = {score: float(line[column]) for score, column in columns.items()}
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
                rounding={score: float(rounding[column][index]) for score, column in columns.items()},
                scores=tuple(scores),
                baseline="CFG" if line["method"] != "CFG" else "",
                assumed=assumed,
            )
        )
    return made


def _table_6() -> list[Row]:
    """DiT-XL/2 on ImageNet: no CFG, with and without a class."""
    preset, scores = MODELS["dit-xl-2"].preset, ("fid", "is", "precision", "recall")
    made, rounding = [], printed_rounding(6)
    for index, line in enumerate(paper.table(6).to_dict("records")):
        dg, parameters = line["dg"] == "yes", detail_guidance(preset, 1.0)
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
                paper={score: float(line[score]) for score in scores},
                rounding={score: float(rounding[score][index]) for score in scores},
                scores=scores,
                baseline=line["type"] if dg else "",
                seed_blocks=SEED_BLOCKS,
                conditional=line["type"] == "Cond",
                assumed=("the number of images and of steps: DiT's own protocol",),
                lacking=tuple(name for name in ("dims", "scale") if dg and name not in parameters),
            )
        )
    return made


_COUNT_ASSUMED = "the prompts and their number: the paper states neither for this figure, these are Table 1's"


def _figure_5b() -> list[Row]:
    """Win probabilities of disrupted models against the original."""
    assumed = (
        _COUNT_ASSUMED,
        "block and dims of the disruption: Table 4's",
        "CFG at Table 5's scale: the paper says that sampling is as by default",
        "that the printed probabilities are SD3's: the paper does not name their model",
    )
    printed = pd.read_csv(DATA / "paper" / "fig5b.csv").set_index("score")["win_probability"].astype(float).to_dict()
    made = []
    for name, model in NAMES.items():
        preset = MODELS[model].preset
        original = f"{name} original"
        alignment, detail = ("clipscore", "blipscore"), ("hpsv2.1", "aesthetic")
        massive = dict.fromkeys(alignment, 0) | dict.fromkeys(detail, -1)
        settings: dict[str, tuple[str, Mapping[str, float], Mapping[str, int]]] = {
            original: ("", {}, {}),
            f"{name} MAs disrupted": ("zero", printed if model == "sd3" else {}, massive),
            f"{name} non-MAs disrupted": ("random", {}, dict.fromkeys(SCORES, 0)),
        }
        for label, (kind, scores, claims) in settings.items():
            made.append(
                Row(
                    table="fig5b",
                    label=label,
                    model=model,
                    prompts="pickapic",
                    count=500,
                    steps=preset.steps,
                    guidance_scale=preset.guidance_scale,
                    methods={},
                    paper=scores,
                    scores=SCORES,
                    baseline=original if kind else "",
                    wins=bool(kind),
                    claims=claims,
                    disruption=disruption(preset, kind) if kind else {},
                    assumed=assumed,
                )
            )
    return made


FIG_8_BLOCKS = tuple(range(1, 24, 2))
"""m = 2, 4, ... of SD3's 24 blocks."""
FIG_8_W = (0.5, 1.0, 2.0, 3.0, 4.0)
FIG_8_LAMBDA = (1.0, 2.0, 3.0, 5.0, 7.0)


def _figure_8() -> list[Row]:
    """Depth m, w without CFG, lambda beside CFG, each with the others as in Tables 4 and 5, on SD3."""
    preset = MODELS["sd3"].preset
    alone, beside = detail_guidance(preset, 1.0), detail_guidance(preset, 2.0)
    higher = {"clipscore": 1, "aesthetic": 1}
    settings: dict[str, tuple[float, dict[str, Any], str, dict[str, int]]] = {"Cond": (1.0, {}, "", {})}
    for block in FIG_8_BLOCKS:
        best = 4 <= block + 1 <= 10  # section 5.3
        settings[depth_label(block)] = (1.0, {"dg": alone | {"block": block}}, "Cond", higher if best else {})
    for w in FIG_8_W:
        settings[f"DG, w = {w:g}"] = (1.0, {"dg": alone | {"scale": w}}, "Cond", higher)
    for value in FIG_8_LAMBDA:
        cfg = f"CFG, lambda = {value:g}"
        settings[cfg] = (value + 1, {}, "", {})
        settings[f"CFG + DG, lambda = {value:g}"] = (value + 1, {"dg": beside}, cfg, {"aesthetic": 1})
    return [
        Row(
            table="fig8",
            label=label,
            model="sd3",
            prompts="pickapic",
            count=500,
            steps=preset.steps,
            guidance_scale=scale,
            methods=methods,
            paper={},
            scores=("clipscore", "aesthetic"),
            baseline=baseline,
            claims=claims,
            assumed=(_COUNT_ASSUMED, "the values of m, w and lambda: the text prints none but m = 4 to 10"),
        )
        for label, (scale, methods, baseline, claims) in settings.items()
    ]


TABLES: dict[str, Callable[[], list[Row]]] = {
    "table1": lambda: _scored(1),
    "table2": _table_2,
    "table3": lambda: _scored(3),
    "table6": _table_6,
    "fig5b": _figure_5b,
    "fig8": _figure_8,
}
"""The tables and figures that can be regenerated, by name."""
