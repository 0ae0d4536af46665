"""Pixels or latents, noise or velocity: which makes massive activations, and makes them act as the paper says?

Four trainings of one transformer on Fashion-MNIST that differ in nothing else: as many tokens, numbers per token,
width, blocks, steps, batches; uniform times; images and latents of mean 0 and variance 1. What was measured is in
`data/ladder/ingredients.json` and `ingredients.webp`; the weights are not kept:

    python -m training ingredients
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import dgkit
from dgbook.measures import datasets
from dgbook.measures.classifier import fashion_classifier
from dgbook.measures.spectrum import band_error, sharpness
from dgkit.massive import channel_ratio
from dgkit.paths import DATA
from training.dit import NULL_CLASS, Recipe, build_transformer, encode
from training.loop import Schedule, device, train
from training.measuring import save_sheet

STEPS, SAMPLES, SAMPLING_STEPS, GUIDANCE_SCALE = 800, 100, 20, 4.0
BLOCK, DIMS = 4, 3
"""After this block the three largest channels are zeroed, or three others: the first look at a pixel-space model."""

SPACES: dict[str, dict[str, int]] = {
    "pixel": {"in_channels": 1, "out_channels": 1, "sample_size": 28, "patch_size": 4},
    "latent": {"in_channels": 4, "out_channels": 4, "sample_size": 14, "patch_size": 2},
}
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of the training split, black 0 and white 1
OBJECTIVES = ("noise", "velocity")


@dataclass(frozen=True)
class Ingredients:
    """One of the four trainings: `space` is a key of `SPACES`, `objective` one of `OBJECTIVES`."""

    space: str
    objective: str
    vae: AutoencoderKL
    scheduler: DDIMScheduler

    def data(self, split: str) -> tuple[Tensor, Tensor]:
        """Standardised images or latents (N, C, H, W) of Fashion-MNIST, and their labels (N,)."""
        images, labels = datasets.fashion_mnist(split)
        if self.space == "latent":  # the autoencoder's latents have mean 0 and variance 1
            return encode(self.vae, images), labels
        pixels = images.float() / 255
        return (pixels - PIXEL_MEAN) / PIXEL_STD, labels

    def images(self, x: Tensor) -> NDArray[np.uint8]:
        """uint8 images (N, 28, 28, 3) from `x` as in `data`."""
        if self.space == "latent":
            grey = self.vae.decode(x).sample.mean(1, keepdim=True) / 2 + 0.5
        else:
            grey = x * PIXEL_STD + PIXEL_MEAN
        pixels = (grey.clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.expand(-1, 3, -1, -1).movedim(1, -1).cpu().numpy()

    def noised(self, x: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noised `x` at times `level` (N,) from 0 to 1, the timestep (N,) given to the transformer, and its target."""
        if self.objective == "velocity":
            sigma = level.view(-1, 1, 1, 1)
            return (1 - sigma) * x + sigma * noise, 1000 * level, noise - x
        timestep = (1000 * level).long().clamp(max=999)
        return self.scheduler.add_noise(x, noise, timestep), timestep, noise

    def sample(self, model: DiTTransformer2DModel, labels: Tensor) -> NDArray[np.uint8]:
        """Guided samples (N, 28, 28, 3), sample i from seed i: DDIM steps for noise, Euler steps for velocity."""
        shape = tuple(SPACES[self.space][key] for key in ("in_channels", "sample_size", "sample_size"))
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(len(labels))])
        x, both = x.to(model.device), torch.cat([labels, torch.full_like(labels, NULL_CLASS)]).to(model.device)
        levels = torch.linspace(1, 0, SAMPLING_STEPS + 1)
        self.scheduler.set_timesteps(SAMPLING_STEPS)
        for step in range(SAMPLING_STEPS):
            time = 1000 * levels[step] if self.objective == "velocity" else self.scheduler.timesteps[step]
            out = model(torch.cat([x, x]), time.to(x.device).expand(len(both)), both).sample
            cond, uncond = out.chunk(2)
            guided = uncond + GUIDANCE_SCALE * (cond - uncond)
            if self.objective == "velocity":
                x = x + (levels[step + 1] - levels[step]) * guided
            else:
                x = self.scheduler.step(guided, time, x, eta=0.0).prev_sample
        return self.images(x)


def measure(folder: Path, lr: float) -> Path:
    """Train the four in folders below `folder` (finished ones are not repeated) and write what they are.

    Args:
        folder: of the trainings.
        lr: peak learning rate of each.

    Returns:
        The JSON file: a row per training with what `_facts` says.
    """
    recipe = Recipe.read(Path(__file__).parent / "tiny-dit.toml")
    vae = AutoencoderKL.from_pretrained(DATA / "models" / "tiny-dit" / "vae").float().to(device())
    schedule = Schedule(steps=STEPS, batch=64, lr=lr, warmup=100, ema=0.999)
    rows, sheets = [], []
    for space in SPACES:
        for objective in OBJECTIVES:
            kind = Ingredients(space, objective, vae, DDIMScheduler(**recipe.scheduler | {"clip_sample": False}))
            model = _trained(kind, recipe, schedule, folder / f"{space}-{objective}")
            facts, sheet = _facts(kind, model)
            rows.append({"space": space, "objective": objective} | facts)
            sheets.append(sheet)
            print(rows[-1], flush=True)
    path = DATA / "ladder" / "ingredients.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    save_sheet(Image.fromarray(np.concatenate(sheets)), path.with_suffix(".webp"))
    return path


def _trained(kind: Ingredients, recipe: Recipe, schedule: Schedule, folder: Path) -> DiTTransformer2DModel:
    torch.manual_seed(schedule.seed)
    model = build_transformer(recipe.transformer | SPACES[kind.space]).to(device())
    x, labels = kind.data("train")

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(x), (schedule.batch,), generator=generator)
        dropped = torch.rand(schedule.batch, generator=generator) < recipe.label_dropout
        condition = labels[rows].masked_fill(dropped, NULL_CLASS).to(device())
        level = torch.rand(schedule.batch, generator=generator)
        noise = torch.randn(x[rows].shape, generator=generator)
        noisy, timestep, target = kind.noised(x[rows].cpu(), noise, level)
        return F.mse_loss(model(noisy.to(device()), timestep.to(device()), condition).sample, target.to(device()))

    return train(model, loss, schedule, folder)  # type: ignore[return-value]


@torch.no_grad()
def _facts(kind: Ingredients, model: DiTTransformer2DModel) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """What the trained model is, and a sheet of its samples: as they are, massive channels zeroed, others zeroed.

    "loss" on 100 noised test images at ten levels; per block there "ratio" (largest channel's mean |z| over the
    median's), "dim" and "energy" (its share of the tokens' sum of squares); "low_error", "high_error",
    "sharpness_ratio" and "agreement" of each way of zeroing (see `dgbook.chapters`), and "agreement" of the samples.
    """
    x, labels = (part[:100] for part in kind.data("test"))
    losses = []
    with dgkit.record(model, keep=range(len(model.transformer_blocks))) as trace:
        for index in range(10):
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
            noisy, timestep, target = kind.noised(x.cpu(), noise, torch.full((len(x),), 0.05 + index / 10))
            out = model(noisy.to(device()), timestep.to(device()), labels.to(device())).sample
            losses.append(F.mse_loss(out, target.to(device())).item())
    ratio, dim = channel_ratio(trace.mean_abs()).max(1)
    energy = []
    for block, channel in enumerate(dim.tolist()):
        square = trace.tensors(block).double().square()
        energy.append(float((square[..., channel] / square.sum(-1)).mean()))
    largest = trace.mean_abs()[BLOCK].argsort(descending=True).tolist()
    asked = torch.arange(SAMPLES) % len(datasets.FASHION_MNIST_CLASSES)
    pictures = {"original": kind.sample(model, asked)}
    for name, edit in (("massive", {"dims": largest[:DIMS]}), ("random", {"dims": largest[:DIMS], "kind": "random"})):
        with dgkit.disrupt(model, block=BLOCK, **edit):  # type: ignore[arg-type]
            pictures[name] = kind.sample(model, asked)
    facts: dict[str, Any] = {
        "loss": float(np.mean(losses)),
        "ratio": [round(value, 3) for value in ratio.tolist()],
        "dim": dim.tolist(),
        "energy": [round(value, 4) for value in energy],
        "zeroed": largest[:DIMS],
    }
    judge, original = fashion_classifier(), pictures["original"]
    for name, batch in pictures.items():
        low, high = band_error(batch, original)
        right = judge(batch).argmax(1).cpu() == asked
        facts[name] = {
            "low_error": round(float(low.mean()), 4),
            "high_error": round(float(high.mean()), 4),
            "sharpness_ratio": round(float(sharpness(batch).mean() / sharpness(original).mean()), 3),
            "agreement": round(float(right.double().mean()), 3),
        }
    rows = [np.concatenate(list(batch[:20]), 1).repeat(2, 0).repeat(2, 1) for batch in pictures.values()]
    return facts, np.concatenate(rows)
