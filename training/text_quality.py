"""How good `tiny-sd3`, `tiny-flux` and their judge `tile-matcher` are.

Image-forwards of `measure` at 20 steps (one image through the transformer once; CFG needs two a step): 2,560 for the
sheet and 6,400 for the other guidance scales, 15,360 for the held-out captions, 8,000 for the search for copies, some
40,000 for the calibration of Detail Guidance and 1,000 per snapshot: about 80,000, or 10 to 15 minutes of a CPU core.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dgbook.measures.matcher import TileMatcher, load_matcher, matching_score
from dgbook.measures.stats import bootstrap, wilson
from dgbook.pages.figures import training_curve
from dgkit.anatomy import pipeline_row
from dgkit.sampling import generate
from dgkit.zoo import MODELS
from training import cards, flow
from training.autoencoder import encode, posterior_means, psnr
from training.loop import device
from training.measuring import (
    CALIBRATION_GRID,
    Images,
    as_images,
    calibrate_guidance,
    captioned_sheet,
    finished,
    largest_channels,
    mean_losses,
    save_sheet,
    size_of,
    write_losses,
)
from training.tiles import COLOURS, NEAR, Caption, Tiles, unseen_combinations

CHOICES = 16
PROMPTS, COPIES, CALIBRATION_SAMPLES, NOISED = 256, 200, 100, 100
OTHER_SCALES = (1.0, 2.0, 7.0)
PROMPT_SEED, COPY_SEED = 910_000_000, 920_000_000
NEIGHBOURS = 24
DISTANCES = [*range(0, 100, 5), 256]
"""Edges of the histogram of distances, in grey levels."""


def measure(run: Path) -> dict[str, Any]:
    """Measure the `tiny-sd3` or `tiny-flux` that `train(NAME, run)` left in `run/model`.

    Samples with the zoo's guidance scale and steps. Writes `quality.json`, `loss.csv` (see `measuring.mean_losses`) and
    its plot, a sheet of samples (`samples.webp`), the samples nearest to training tiles above these (`neighbours.webp`)
    and the card (`README.md`) into `run/model`.

    Args:
        run: the training's folder; its snapshots show the massive activations over training.

    Returns:
        The numbers of `quality.json`.

    Raises:
        LoadError: `run` does not hold a finished training, or the shipped `tile-matcher` is missing.
        DataError: the tiles are missing or altered.
    """
    folder, training = finished(run)
    name, tiles = training["model"], Tiles.load()
    recipe = flow.Recipe.read(folder / f"{name}.toml")
    pipe = DiffusionPipeline.from_pretrained(folder).to(device())
    matcher = load_matcher().to(device())
    s, steps, call = MODELS[name].preset.guidance_scale, MODELS[name].preset.steps, flow.FAMILIES[name].call

    def sample(captions: Sequence[str], seeds: Sequence[int], scale: float) -> Images:
        return generate(pipe, captions, seeds, num_inference_steps=steps, guidance_scale=scale, **call)

    known = captions_of(tiles, held_out=False)
    unseen = unseen_combinations(known)
    sheets = {scale: sample([*map(str, unseen)], range(len(unseen)), scale) for scale in sorted({s, *OTHER_SCALES})}
    of_held_out = [*map(str, captions_of(tiles, held_out=True))]
    prompts = [of_held_out[i % len(of_held_out)] for i in range(PROMPTS)]
    prompted = {scale: sample(prompts, range(PROMPT_SEED, PROMPT_SEED + PROMPTS), scale) for scale in (1.0, s)}
    asked = asked_for_copies(known)
    copies = sample(asked, range(COPY_SEED, COPY_SEED + len(asked)), s)
    memorisation, neighbours = search_for_copies(pipe.vae, tiles, copies, asked)
    calibration = calibrate_guidance(
        pipe, asked[:CALIBRATION_SAMPLES], CALIBRATION_GRID, guidance_scale=s, steps=steps, **call
    )
    log = run / "transformer" / "loss.csv"
    quality = {
        "bytes": size_of(folder),
        "training_tiles": len(known),
        "held_out_tiles": int(tiles.held_out.sum()),
        "psnr_db": psnr(pipe.vae, tiles.pixels[tiles.held_out]).mean().item(),
        "call": pipeline_row(pipe).guidance(s, 1) | {"num_inference_steps": steps} | call,
        "guidance_scale": s,
        "steps": steps,
        "matching": {
            "choices": CHOICES,
            **scores_of_real(matcher, tiles, held_out=True),
            **scores_of_real(matcher, tiles, held_out=False),
            "held_out_captions": [
                at(scale, matching_score(matcher, images, prompts, CHOICES, pool=of_held_out))
                for scale, images in prompted.items()
            ],
            "unseen_combinations": [
                at(scale, matching_score(matcher, images, [*map(str, unseen)], CHOICES))
                for scale, images in sheets.items()
            ],
            "unseen_colours": [at(scale, colour_score(matcher, images, unseen)) for scale, images in sheets.items()],
        },
        "memorisation": memorisation,
        "guidance_block": calibration["block"],
        "guidance_dims": calibration["dims"],
        "guidance_samples": len(asked[:CALIBRATION_SAMPLES]),
        "guidance": calibration["rows"],
        "massive": massive_over_training(recipe, tiles, pipe.vae, run / "transformer"),
        "loss": mean_losses(log, 8),
        "device": str(device()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    write_losses(mean_losses(log, 150), folder / "loss.csv")
    training_curve(pd.read_csv(folder / "loss.csv")).savefig(folder / "loss.webp", pil_kwargs={"lossless": True})
    save_sheet(captioned_sheet(sheets[s], [*map(str, unseen)], columns=8), folder / "samples.webp")
    save_sheet(neighbours, folder / "neighbours.webp")
    cards.write(folder, training, quality, caption_dropout=recipe.caption_dropout)
    return quality


def measure_matcher(run: Path) -> dict[str, Any]:
    """Measure the `tile-matcher` that `train("tile-matcher", run)` left in `run/model`, on real tiles.

    Writes `quality.json` and the card (`README.md`) into `run/model`.

    Raises:
        LoadError: `run` does not hold a finished training.
        DataError: the tiles are missing or altered.
    """
    folder, training = finished(run)
    matcher, tiles = load_matcher(folder), Tiles.load()
    quality = {
        "bytes": size_of(folder),
        "choices": CHOICES,
        "colours": len(colours_of(matcher)),
        **scores_of_real(matcher, tiles, held_out=True),
        **scores_of_real(matcher, tiles, held_out=False),
    }
    (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    cards.write(folder, training, quality)
    return quality


def captions_of(tiles: Tiles, *, held_out: bool) -> list[Caption]:
    """The captions of the tiles that are held out, or of the others."""
    return [caption for caption, out in zip(tiles.captions, tiles.held_out, strict=True) if bool(out) == held_out]


def asked_for_copies(known: Sequence[Caption]) -> list[str]:
    """Captions of training tiles, drawn at random, whose samples are searched for copies."""
    rows = np.random.default_rng(0).choice(len(known), min(COPIES, len(known)), replace=False)
    return [str(known[row]) for row in rows]


def scores_of_real(matcher: TileMatcher, tiles: Tiles, *, held_out: bool) -> dict[str, Any]:
    """How often `matcher` is right on real tiles that are held out, or on the others: "held_out" or "training", and the
    same with "_colours" (see `colour_score`)."""
    images, captions = as_images(tiles.pixels[tiles.held_out == held_out]), captions_of(tiles, held_out=held_out)
    split = "held_out" if held_out else "training"
    return {
        split: share(matching_score(matcher, images, [*map(str, captions)], CHOICES)),
        f"{split}_colours": share(colour_score(matcher, images, captions)),
    }


def share(right: ArrayLike) -> dict[str, float]:
    """The share of True with Wilson's interval, as numbers: share, low, high, n."""
    hits = np.asarray(right, bool)
    interval = wilson(int(hits.sum()), len(hits))
    return {"share": interval.value, "low": interval.low, "high": interval.high, "n": len(hits)}


def at(scale: float, right: ArrayLike) -> dict[str, float]:
    """`share` at one guidance scale."""
    return {"guidance_scale": scale} | share(right)


@torch.no_grad()
def colour_score(matcher: TileMatcher, images: Images, captions: Sequence[Caption]) -> NDArray[np.bool_]:
    """Whether each image whose caption names one colour is nearer to it than to the same caption in any other colour.

    Args:
        matcher: the judge, which has to know a colour for it to count.
        images: uint8 (N, 32, 32, 3).
        captions: one per image.

    Returns:
        One value per image of one colour; by chance one in as many as the matcher knows of `tiles.COLOURS`.
    """
    known = colours_of(matcher)
    right = []
    for image, caption in zip(images, captions, strict=True):
        if len(caption.colours) == 1 and caption.colours[0] in known:
            similarity = matcher.similarity(image[None], [str(caption._replace(colours=(c,))) for c in known])
            right.append(known[int(similarity.argmax())] == caption.colours[0])
    return np.array(right, bool)


def colours_of(matcher: TileMatcher) -> list[str]:
    """The colours that the matcher knows."""
    return [colour for colour in COLOURS if colour in matcher.vocabulary]


@torch.no_grad()
def reconstructions(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """uint8 `pixels` (N, 3, H, W) as the autoencoder decodes them, which is as near as a sample can come to them."""
    decoded = [vae.decode(posterior_means(vae, part)).sample for part in pixels.split(250)]
    return ((torch.cat(decoded) / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu()


def nearest_tiles(images: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The root-mean-square distance (N,) in grey levels of uint8 images (N, 3, H, W) to the nearest of the `tiles`
    (M, 3, H, W), and which it is (N,)."""
    a, b = images.flatten(1).double(), tiles.flatten(1).double()
    distance, index = torch.cdist(a, b).min(1)
    return distance / a.shape[1] ** 0.5, index


def search_for_copies(
    vae: AutoencoderKL, tiles: Tiles, samples: Images, captions: Sequence[str]
) -> tuple[dict[str, Any], Image.Image]:
    """Compare the distances of samples to their nearest training tiles with those of held-out tiles to theirs.

    All tiles are taken as the autoencoder decodes them, which is what a perfect copy would look like.

    Args:
        vae: the autoencoder.
        tiles: all tiles.
        samples: uint8 (N, H, W, 3).
        captions: of training tiles, one per sample.

    Returns:
        "threshold" (`tiles.NEAR`); "edges" of the histograms; for "samples" and "held_out" each "near" (the share below
        the threshold), "median" and "histogram" (counts); "nearest_has_the_caption", the share of samples with
        the caption of their nearest tile. And a sheet of the nearest samples, "shown" of them, each above its tile.
    """
    known, fresh = (reconstructions(vae, tiles.pixels[tiles.held_out == out]) for out in (False, True))
    distance, nearest = nearest_tiles(torch.from_numpy(samples).movedim(-1, 1), known)
    own = [str(caption) for caption in captions_of(tiles, held_out=False)]
    order = distance.argsort()[:NEIGHBOURS].tolist()
    line = np.full((len(order), 1, samples.shape[2], 3), 255, np.uint8)
    pairs = np.concatenate([samples[order], line, as_images(known[nearest[order]])], 1)
    facts = {
        "threshold": NEAR,
        "edges": DISTANCES,
        "samples": distance_facts(distance),
        "held_out": distance_facts(nearest_tiles(fresh, known)[0]),
        "nearest_has_the_caption": share([own[n] == c for n, c in zip(nearest.tolist(), captions, strict=True)]),
        "shown": len(order),
    }
    return facts, captioned_sheet(pairs, [f"{distance[row]:.1f}" for row in order], columns=12)


def distance_facts(distances: Tensor) -> dict[str, Any]:
    """The part of `search_for_copies` about one set of distances (N,)."""
    values = distances.numpy()
    return {
        "near": share(values < NEAR),
        "median": asdict(bootstrap(values, "median")),
        "histogram": np.histogram(values, DISTANCES)[0].tolist(),
    }


def massive_over_training(
    recipe: flow.Recipe, tiles: Tiles, vae: AutoencoderKL, snapshots: Path
) -> list[dict[str, Any]]:
    """The largest channel of each block at each training snapshot, for the image tokens of `loss_on_tiles`.

    Returns:
        See `measuring.largest_channels`, whose errors it raises.
    """
    network = flow.build_model(recipe, tiles).to(vae.device).eval()
    return largest_channels(
        network, network.transformer, snapshots, lambda: loss_on_tiles(network, vae, tiles, held_out=True)
    )


@torch.no_grad()
def loss_on_tiles(network: flow.TextToImage, vae: AutoencoderKL, tiles: Tiles, *, held_out: bool) -> float:
    """Mean squared error of the velocity that `network` predicts, always for the same noised tiles.

    100 tiles, encoded, each at ten noise levels 0.05, 0.15, ..., 0.95, under their own captions: the first that are
    held out, or of the many others a random sample, since tiles of one kind follow one another.
    """
    rows = (tiles.held_out == held_out).nonzero()[:, 0].numpy()
    chosen = rows[:NOISED] if held_out else np.random.default_rng(0).permutation(rows)[:NOISED]
    latents = encode(vae, tiles.pixels[torch.from_numpy(chosen)])
    tokens = network.tokenize([str(tiles.captions[row]) for row in chosen]).to(vae.device)
    noise = torch.randn((10, *latents.shape), generator=torch.Generator().manual_seed(0)).to(vae.device)
    losses = []
    for level, noise_at_level in enumerate(noise):
        sigma = torch.full((len(latents),), 0.05 + level / 10, device=vae.device)
        noisy, velocity = flow.noised(latents, noise_at_level, sigma)
        losses.append(F.mse_loss(network(noisy, sigma, tokens), velocity))
    return torch.stack(losses).mean().item()
