"""`tiny-sd3`, trained for longer or wider: what was measured (`training.variants`), as the models page says it."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from dgbook.claims import results
from dgbook.claims.results import Record
from dgbook.claims.verdicts import verdict
from dgbook.markdown import code, table
from dgbook.measures.stats import Interval
from dgbook.pages.across import side_by_side
from dgbook.pages.runs import commit
from dgbook.pages.text import chapter_link
from dgkit.errors import DgkitError
from dgkit.paths import DATA
from dgkit.zoo import MODELS

CHAPTERS = ("01_layer_properties", "03_intervention", "04_detail_guidance")
FOLDER = DATA / "ladder"
SHIPPED = "tiny-sd3"
VARIANTS = ("tiny-sd3-long", "tiny-sd3-wide")
LONGER = VARIANTS[0]


def trainings() -> str:
    """The largest channels along the trainings, in words and step by step."""
    shown = table_of_steps()
    return f"{sentence()}\n\n{table(shown.columns, shown.to_numpy().tolist())}"


def outcomes() -> str:
    """The claims of the chapters on the shipped model and after a longer training, part by part, and the latter's runs.

    Both edit the same block and channels.
    """
    lines = []
    for chapter in CHAPTERS:
        found = {model: verdict(chapter, record.decoded()) for model, record in records(chapter).items()}
        rows = [*side_by_side(found), ("verdict", *map(str, found.values()))]
        lines += [(chapter_link(chapter, ""), *row) for row in rows]
    shown = table(("chapter", "", code(SHIPPED), code(LONGER)), lines)
    longer = [records(chapter)[LONGER].provenance for chapter in CHAPTERS]
    made = "; ".join(f"{code(facts['command'])} at commit {commit(facts)}" for facts in longer)
    return f"{shown}\n\nThe runs on {code(LONGER)}: {made}."


def records(chapter: str) -> Mapping[str, Record]:
    """A chapter's reference run on the shipped model, and the same on the longer trained, from `data/ladder`."""
    shipped = results.references(chapter)[SHIPPED]
    return {SHIPPED: shipped, LONGER: results.read(FOLDER / LONGER / f"{chapter}.json")}


def measurements() -> dict[str, dict[str, Any]]:
    """What `measure_variant` wrote, by name; a variant that nobody measured is left out."""
    files = {name: FOLDER / f"{name}.json" for name in VARIANTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def table_of_steps() -> pd.DataFrame:
    """The largest channel of any block along the trainings: one row per step, one column per width.

    The interval (95 %) is over the tiles, see `ladder.largest_of_blocks`. Until its step 5,000, `tiny-sd3-long` is the
    shipped `tiny-sd3`.
    """
    columns: dict[str, dict[int, str]] = {}
    for measured in measurements().values():
        column = columns.setdefault(f"{measured['width']} channels", {})
        for row in measured["history"]:
            block = int(np.argmax(row["ratio"]))
            column[row["step"]] = f"{_largest(row):.1f} (block {block}, channel {row['dim'][block]})"
    steps = sorted({step for column in columns.values() for step in column})
    return pd.DataFrame(
        {"step": [f"{step:,}" for step in steps]}
        | {name: [column.get(step, "") for step in steps] for name, column in columns.items()}
    )


def sentence() -> str:
    """What `measurements` say, in words.

    Raises:
        DgkitError: a variant was not measured.
    """
    found = measurements()
    missing = [name for name in VARIANTS if name not in found]
    if missing:
        raise DgkitError(f"not measured: {', '.join(missing)}; training.variants says how to")
    long, wide = (found[name] for name in VARIANTS)
    steps = {row["step"]: row for row in long["history"]}
    shipped, last, wider = steps[shipped_steps()], long["history"][-1], wide["history"][-1]
    same = steps[wider["step"]]
    card = json.loads((DATA / "models" / SHIPPED / "quality.json").read_text())
    scale = MODELS[SHIPPED].preset.guidance_scale
    matching = next(row for row in card["matching"]["unseen_combinations"] if row["guidance_scale"] == scale)
    copies = card["memorisation"]["samples"]["near"]
    return (
        f"After {shipped['step']:,} steps, which is the shipped model, the largest channel is {_largest(shipped):.1f} "
        f"times its block's median; after {last['step']:,} steps, {_largest(last):.1f}. With {wide['width']} channels "
        f"it is {_largest(wider):.1f} after {wider['step']:,} steps, where the model of {long['width']} channels has "
        f"{_largest(same):.1f}. From step {shipped['step']:,} to {last['step']:,}, the longer training takes the loss "
        f"from {shipped['training_loss']:.3f} to {last['training_loss']:.3f} on training tiles and from "
        f"{shipped['loss']:.3f} to {last['loss']:.3f} on held-out ones; the matcher recognises "
        f"{_share(long['matching'])} of the unseen combinations instead of {_share(matching)}, and "
        f"{_share(long['copies'])} instead of {_share(copies)} of the samples for captions of training tiles are "
        f"near-copies of one. Each model was trained once, and the intervals say nothing of another training."
    )


def shipped_steps() -> int:
    """How many steps the shipped `tiny-sd3` was trained for."""
    facts = json.loads((DATA / "models" / SHIPPED / "training.json").read_text())
    return int(facts["networks"]["transformer"]["steps"])


def _largest(row: dict[str, Any]) -> Interval:
    """The largest ratio of a row of the history."""
    block = int(np.argmax(row["ratio"]))
    return Interval(*(row[key][block] for key in ("ratio", "low", "high")))


def _share(row: dict[str, float]) -> str:
    return f"{Interval(row['share'], row['low'], row['high']):.1%}"
