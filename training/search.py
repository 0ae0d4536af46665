"""Which peak learning rate, width, batch and beta2? Short trainings, of which the loss on held-out images decides.

For each model first the rates; then, at the best of them, what else `VARIATIONS` names. Every trial is a whole
schedule. The size of the largest channel is noted beside the loss, for the reader: it is not used.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

from dgbook.files import write_whole
from dgbook.pages.search import FILE
from dgkit.paths import DATA
from dgkit.recording import record
from training import dit, flow
from training.ladder import largest_of_blocks
from training.text_quality import loss_on_tiles
from training.tiles import Tiles

RATES = (1e-3, 2e-3, 3e-3, 6e-3)
STEPS, WARMUP = 600, 100
HEAD = 32
"""Channels of one attention head: a model is widened by whole heads."""

HALF_BATCH = {"batch": 32, "steps": 2 * STEPS}
"""As many images in smaller batches."""

VARIATIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "tiny-sd3": ({"width": 128}, HALF_BATCH, {"beta2": 0.95}, HALF_BATCH | {"text_lr": 1e-3}),
    "tiny-dit": (HALF_BATCH, {"beta2": 0.95}),
    "tiny-flux": (HALF_BATCH, {"beta2": 0.95}),
}


@dataclass(frozen=True)
class Trial:
    """One short training.

    Attributes:
        model: a key of `VARIATIONS`.
        lr: peak learning rate.
        width: channels of the transformer.
        batch: images per step.
        beta2: Adam's.
        steps: of the whole schedule.
        text_lr: peak learning rate of the text encoders; 0 for that of the transformer.
    """

    model: str
    lr: float
    width: int
    batch: int = 64
    beta2: float = 0.999
    steps: int = STEPS
    text_lr: float = 0.0

    @property
    def name(self) -> str:
        """The folder of the training."""
        text = f"-text{self.text_lr:g}" if self.text_lr else ""
        return f"{self.model}-lr{self.lr:g}-w{self.width}-b{self.batch}-beta{self.beta2:g}-{self.steps}{text}"


def search(model: str, folder: Path) -> list[dict[str, Any]]:
    """Run the trials of `model` in folders below `folder`; those in `FILE` are not repeated, a killed one goes on.

    Returns:
        A row per trial: its settings; "loss" on held-out images (see `loss_on_tiles`, `loss_on_test_images`); "seconds"
        of the training; and "ratio" and "dim" of the largest channel of any block, which decide nothing.
    """
    rows = [_row(trial, folder) for trial in _rates(model)]
    best = min(rows, key=lambda row: row["loss"])
    start = replace(_rates(model)[0], lr=best["lr"])
    return rows + [_row(replace(start, **variation), folder) for variation in VARIATIONS[model]]


def known() -> list[dict[str, Any]]:
    """The rows of `FILE`: of the trials that were run so far."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else []


def _rates(model: str) -> list[Trial]:
    return [Trial(model, lr, 128 if model == "tiny-dit" else 96) for lr in RATES]


def _row(trial: Trial, folder: Path) -> dict[str, Any]:
    """The row of one trial: from `FILE`, or measured now and added there."""
    settings = asdict(trial)
    for row in known():
        if ({"text_lr": 0.0} | row).items() >= settings.items():  # which the first rows do not name
            return row
    row = settings | (_dit if trial.model == "tiny-dit" else _text_to_image)(trial, folder / trial.name)
    write_whole(FILE, json.dumps([*known(), row], indent=1) + "\n")
    print(row, flush=True)
    return row


def _schedule(trial: Trial, schedule: Any) -> Any:
    return replace(
        schedule, steps=trial.steps, decay_steps=0, warmup=WARMUP, lr=trial.lr, batch=trial.batch, beta2=trial.beta2
    )


def _text_to_image(trial: Trial, folder: Path) -> dict[str, Any]:
    recipe = flow.Recipe.read(Path(__file__).parent / f"{trial.model}.toml")
    transformer = recipe.transformer | {"num_attention_heads": trial.width // HEAD}
    if "caption_projection_dim" in transformer:
        transformer["caption_projection_dim"] = trial.width
    text_rate = trial.text_lr / trial.lr if trial.text_lr else 1.0
    schedule = _schedule(trial, recipe.schedule)
    recipe = replace(recipe, transformer=transformer, schedule=schedule, snapshots=(), text_rate=text_rate)
    tiles, vae = Tiles.load(), AutoencoderKL.from_pretrained(DATA / "models" / trial.model / "vae").float()
    network = flow.build_model(recipe, tiles)
    flow.train_model(recipe, network, vae, tiles, folder)
    with torch.no_grad(), record(network.transformer, track=range(trial.width)) as trace:
        loss = loss_on_tiles(network, vae, tiles, held_out=True)
    return {"loss": round(loss, 5), **_seconds(folder), **_largest(trace)}


def _dit(trial: Trial, folder: Path) -> dict[str, Any]:
    recipe = dit.Recipe.read(Path(__file__).parent / f"{trial.model}.toml")
    recipe = replace(recipe, transformer_schedule=_schedule(trial, recipe.transformer_schedule), snapshots=())
    vae = AutoencoderKL.from_pretrained(DATA / "models" / trial.model / "vae").float()
    transformer = dit.train_transformer(recipe, vae, folder)
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(**recipe.scheduler))
    with record(transformer, track=range(trial.width)) as trace:
        loss = dit.loss_on_test_images(pipe)
    return {"loss": round(loss, 5), **_seconds(folder), **_largest(trace)}


def _seconds(folder: Path) -> dict[str, Any]:
    return {"seconds": json.loads((folder / "training.json").read_text(encoding="utf-8"))["seconds"]}


def _largest(trace: Any) -> dict[str, Any]:
    blocks: dict[str, list[Any]] = largest_of_blocks(trace)
    block = max(range(len(blocks["ratio"])), key=blocks["ratio"].__getitem__)
    return {"ratio": blocks["ratio"][block], "block": block, "dim": blocks["dim"][block]}
