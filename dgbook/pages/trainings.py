"""The trainings of `tiny-sd3`, shipped and not: what `training.trainings` measured of each, as tables of a page."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

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

CHAPTERS = ("01_layer_properties", "03_intervention", "04_detail_guidance")
FOLDER = DATA / "ladder"
SHIPPED = "tiny-sd3"
TRAININGS = (SHIPPED, "tiny-sd3-long", "tiny-sd3-wide", "tiny-sd3-fast")
WITH_RUNS = ("tiny-sd3-long", "tiny-sd3-fast")
"""Those that are not shipped of which `data/ladder` has the reference runs of `CHAPTERS`."""


def trainings() -> str:
    """A row per training: how it was made, and what it came to.

    Loss on held-out and on training tiles; the largest channel of any block over the block's median; unseen
    combinations that the matcher recognises; samples for training captions that are near-copies. Intervals (95 %) are
    over tiles and samples: they say nothing of another training.
    """
    rows = []
    for name, measured in measurements().items():
        schedule, last = measured["recipe"]["schedule"], measured["history"][-1]
        block = int(np.argmax(last["ratio"]))
        rows.append(
            (
                code(name),
                str(measured["width"]),
                f"{schedule['steps']:,} of {schedule['batch']}",
                f"{schedule['lr']:g}",
                f"{last['loss']:.3f}",
                f"{last['training_loss']:.3f}",
                f"{_largest(last):.1f} (block {block}, channel {last['dim'][block]})",
                _share(measured["matching"]),
                _share(measured["copies"]),
            )
        )
    heads = ("", "width", "steps", "peak rate", "held-out loss", "training loss", "largest channel", "recognised")
    return table((*heads, "near-copies"), rows)


def growth() -> str:
    """The largest channel of any block along the trainings: a row per number of training images seen."""
    found = {name: measured for name, measured in measurements().items() if name != SHIPPED}  # half of the longer
    columns: dict[str, dict[int, str]] = {}
    for name, measured in found.items():
        batch = measured["recipe"]["schedule"]["batch"]
        columns[name] = {row["step"] * batch: f"{_largest(row):.1f}" for row in measured["history"]}
    images = sorted({count for column in columns.values() for count in column})
    rows = [(f"{count:,}", *(column.get(count, "") for column in columns.values())) for count in images]
    return table(("images", *map(code, columns)), rows)


def outcomes() -> str:
    """The claims of the chapters on each training, part by part, and the runs on those that are not shipped.

    On each the block and the channels of its own preset are edited.
    """
    lines = []
    for chapter in CHAPTERS:
        found = {model: verdict(chapter, record.decoded()) for model, record in records(chapter).items()}
        rows = [*side_by_side(found), ("verdict", *map(str, found.values()))]
        lines += [(chapter_link(chapter, ""), *row) for row in rows]
    shown = table(("chapter", "", code(SHIPPED), *map(code, WITH_RUNS)), lines)
    facts = [records(chapter)[name].provenance for name in WITH_RUNS for chapter in CHAPTERS]
    made = "; ".join(f"{code(of_run['command'])} at commit {commit(of_run)}" for of_run in facts)
    return f"{shown}\n\nThe runs on the trainings that are not shipped: {made}."


def records(chapter: str) -> Mapping[str, Record]:
    """A chapter's reference run on each training."""
    shipped = results.references(chapter)[SHIPPED]
    return {SHIPPED: shipped} | {name: results.read(FOLDER / name / f"{chapter}.json") for name in WITH_RUNS}


def measurements() -> dict[str, dict[str, Any]]:
    """What `training.trainings.measure_training` wrote, by name.

    Raises:
        DgkitError: a training was not measured.
    """
    missing = [name for name in TRAININGS if not (FOLDER / f"{name}.json").is_file()]
    if missing:
        raise DgkitError(f"not measured: {', '.join(missing)}; training.trainings says how to")
    return {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in TRAININGS}


def _largest(row: dict[str, Any]) -> Interval:
    """The largest ratio of a row of the history."""
    block = int(np.argmax(row["ratio"]))
    return Interval(*(row[key][block] for key in ("ratio", "low", "high")))


def _share(row: dict[str, float]) -> str:
    return f"{Interval(row['share'], row['low'], row['high']):.1%}"
