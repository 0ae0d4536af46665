"""How much do trainings of `tiny-sd3` differ, and what do the rate, the length and the width do?

Beside the shipped training: `tiny-sd3-first` was shipped before it, at an untuned rate; `tiny-sd3-long` repeats its
schedule from where it ended (its first half is `tiny-sd3-first`, to the bit), and `tiny-sd3-wide` has a third more
channels; `tiny-sd3-fast` is the shipped one with the transformer's rate for its text encoders, too. What was measured
of them is in `data/ladder`; the weights are not kept here (those of `tiny-sd3-first` and `tiny-sd3-fast` are in the
history). To train and measure one again, and to repeat the reference runs on it:

    python -m training train tiny-sd3-long && python -m training measure tiny-sd3-long
    cp -r _build/training/tiny-sd3-long/model tiny-sd3-long
    for name in layer-properties intervention detail-guidance; do
        dgkit run $name --model ./tiny-sd3-long --reference
    done
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from dgbook.measures.matcher import load_matcher, matching_score
from dgbook.pages.trainings import FOLDER, SHIPPED, TRAININGS
from dgkit.errors import DgkitError
from dgkit.recording import record
from dgkit.sampling import generate
from dgkit.zoo import MODELS
from training import flow, text_quality
from training.ladder import largest_of_blocks
from training.loop import device
from training.measuring import captioned_sheet, finished, largest_channels, save_sheet
from training.text_quality import captions_of, loss_on_tiles, share
from training.tiles import Tiles, unseen_combinations


def measure_training(run: Path) -> dict[str, Any]:
    """Measure the training that `train(run.name, run)` left in `run`.

    Writes the numbers to `data/ladder/NAME.json` and, of one that is not shipped, a sheet of samples beside it.

    Args:
        run: the training's folder, whose name is in `TRAININGS`.

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
    if run.name not in TRAININGS:
        raise DgkitError(f"run={str(run)!r} is not allowed: a training's folder is called {' or '.join(TRAININGS)}")
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
    (FOLDER / f"{run.name}.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if run.name != SHIPPED:
        save_sheet(captioned_sheet(images, unseen, columns=8, zoom=1), FOLDER / f"{run.name}.webp")
    return measured


def history_of(recipe: flow.Recipe, tiles: Tiles, vae: Any, snapshots: Path) -> list[dict[str, Any]]:
    """One row per training snapshot in the folder `snapshots`, see `measure_training`; raises as `largest_channels`."""
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
