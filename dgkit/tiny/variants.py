"""Would `tiny-sd3` have larger massive activations after a longer training, or if it were wider?

Two trainings beside its own: `tiny-sd3-long` repeats its schedule from where it ended (its first half is `tiny-sd3`, to
the bit), `tiny-sd3-wide` has a third more channels. What was measured of them is in `data/ladder`; the weights are not
kept. To train and measure them again, and to repeat the reference runs on the longer trained:

    for name in tiny-sd3-long tiny-sd3-wide; do dgkit tiny train $name && dgkit tiny measure $name; done
    cp -r _build/tiny/tiny-sd3-long/model tiny-sd3-long
    for name in layer-properties intervention detail-guidance; do
        dgkit run $name --model ./tiny-sd3-long --reference
    done
    cp -r _build/reference/tiny-sd3-long data/ladder
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline

from dgkit.errors import DgkitError
from dgkit.generate import generate
from dgkit.hooks import record
from dgkit.paths import DATA
from dgkit.stats import Interval
from dgkit.tiny import flow, text_quality
from dgkit.tiny.ladder import largest_of_blocks
from dgkit.tiny.loop import device
from dgkit.tiny.matcher import load_matcher, matching_score
from dgkit.tiny.measuring import captioned_sheet, finished, largest_channels
from dgkit.tiny.text_quality import captions_of, loss_on_tiles, share
from dgkit.tiny.tiles import Tiles, unseen_combinations
from dgkit.zoo import MODELS

FOLDER = DATA / "ladder"
SHIPPED = "tiny-sd3"
VARIANTS = ("tiny-sd3-long", "tiny-sd3-wide")


def measure_variant(run: Path) -> dict[str, Any]:
    """Measure the variant that `train(run.name, run)` left in `run`.

    Writes the numbers to `data/ladder/NAME.json` and a sheet of samples beside it.

    Args:
        run: the training's folder, whose name is in `VARIANTS`.

    Returns:
        The contents of the JSON file: "recipe"; "width"; "training", what it took; "history", per snapshot "step", per
        block what `ladder.largest_of_blocks` says of noised held-out tiles, and "loss" on these and "training_loss" on
        training tiles (see `text_quality.loss_on_tiles`); and of samples at the zoo's guidance scale "matching", the
        share of unseen combinations nearest to their own caption, and "copies", the share near a training tile.

    Raises:
        DgkitError: `run` has another name.
        LoadError: `run` does not hold a finished training.
        DataError: the tiles are missing or altered.
    """
    if run.name not in VARIANTS:
        raise DgkitError(f"run={str(run)!r} is not allowed: a variant's folder is called {' or '.join(VARIANTS)}")
    folder, facts = finished(run)
    recipe, tiles = flow.Recipe.read(folder / f"{run.name}.toml"), Tiles.load()
    pipe, preset = DiffusionPipeline.from_pretrained(folder).to(device()), MODELS[SHIPPED].preset

    def sample(captions: list[str], first_seed: int) -> Any:
        setting: dict[str, Any] = {"num_inference_steps": preset.steps, "guidance_scale": preset.guidance_scale}
        seeds = range(first_seed, first_seed + len(captions))
        return generate(pipe, captions, seeds, **setting, **MODELS[SHIPPED].call)

    known = captions_of(tiles, held_out=False)
    unseen, asked = [*map(str, unseen_combinations(known))], text_quality.asked_for_copies(known)
    images = sample(unseen, 0)
    copies, _ = text_quality.search_for_copies(pipe.vae, tiles, sample(asked, text_quality.COPY_SEED), asked)
    measured = {
        "model": run.name,
        "recipe": asdict(recipe),
        "width": pipe.transformer.inner_dim,
        "training": facts["networks"]["transformer"],
        "history": history_of(recipe, tiles, pipe.vae, run / "transformer"),
        "matching": share(matching_score(load_matcher().to(device()), images, unseen, text_quality.CHOICES)),
        "copies": copies["samples"]["near"],
        "device": str(device()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{run.name}.json").write_text(json.dumps(measured, indent=1) + "\n")
    captioned_sheet(images, unseen, columns=8, zoom=1).save(FOLDER / f"{run.name}.png", optimize=True)
    return measured


def history_of(recipe: flow.Recipe, tiles: Tiles, vae: Any, snapshots: Path) -> list[dict[str, Any]]:
    """One row per training snapshot in the folder `snapshots`, see `measure_variant`; raises as `largest_channels`."""
    network = flow.build_model(recipe, tiles).to(vae.device).eval()
    found: list[dict[str, Any]] = []

    def look() -> None:
        with record(network.transformer, track=range(network.transformer.inner_dim)) as trace:
            loss = loss_on_tiles(network, vae, tiles, held_out=True)
        known = loss_on_tiles(network, vae, tiles, held_out=False)
        found.append(largest_of_blocks(trace) | {"loss": round(loss, 5), "training_loss": round(known, 5)})

    rows = largest_channels(network, network.transformer, snapshots, look)
    # its own ratios are of all passes, with those of the training tiles; these are replaced
    return [row | largest for row, largest in zip(rows, found, strict=True)]


# ------------------------------------------------------------------------------------------------------------- reading


def measurements() -> dict[str, dict[str, Any]]:
    """What `measure_variant` wrote, by name; a variant that nobody measured is left out."""
    files = {name: FOLDER / f"{name}.json" for name in VARIANTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def table() -> pd.DataFrame:
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
        raise DgkitError(f"not measured: {', '.join(missing)}; dgkit.tiny.variants says how to")
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
