"""The trainings of `tiny-sd3`, shipped and not: what `training.trainings` measured of each, as tables of a page."""

import json
from typing import Any

import numpy as np

from dgbook.markdown import code, table
from dgbook.measures.stats import Interval
from dgkit.errors import DgkitError
from dgkit.paths import DATA

FOLDER = DATA / "ladder"
SHIPPED, FIRST = "tiny-sd3", "tiny-sd3-first"
TRAININGS = (SHIPPED, "tiny-sd3-first", "tiny-sd3-long", "tiny-sd3-wide", "tiny-sd3-fast")


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
                _rate(measured["recipe"]),
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
    found = {name: measured for name, measured in measurements().items() if name != FIRST}  # half of the longer
    columns: dict[str, dict[int, str]] = {}
    for name, measured in found.items():
        batch = measured["recipe"]["schedule"]["batch"]
        columns[name] = {row["step"] * batch: f"{_largest(row):.1f}" for row in measured["history"]}
    images = sorted({count for column in columns.values() for count in column})
    rows = [(f"{count:,}", *(column.get(count, "") for column in columns.values())) for count in images]
    return table(("images", *map(code, columns)), rows)


def measurements() -> dict[str, dict[str, Any]]:
    """What `training.trainings.measure_training` wrote, by name.

    Raises:
        DgkitError: a training was not measured.
    """
    missing = [name for name in TRAININGS if not (FOLDER / f"{name}.json").is_file()]
    if missing:
        raise DgkitError(f"not measured: {', '.join(missing)}; training.trainings says how to")
    return {name: json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in TRAININGS}


def _rate(recipe: dict[str, Any]) -> str:
    """The peak learning rate, and that of the text encoders where they have another."""
    rate, text = recipe["schedule"]["lr"], recipe.get("text_rate", 1.0)
    return f"{rate:g}" if text == 1 else f"{rate:g}, text {rate * text:.1g}"


def _largest(row: dict[str, Any]) -> Interval:
    """The largest ratio of a row of the history."""
    block = int(np.argmax(row["ratio"]))
    return Interval(*(row[key][block] for key in ("ratio", "low", "high")))


def _share(row: dict[str, float]) -> str:
    return f"{Interval(row['share'], row['low'], row['high']):.1%}"
