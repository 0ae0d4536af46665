"""How good the shipped models are: measured numbers, and the model cards made from them.

`tiny-dit` and its judge are measured here, the text-to-image models and theirs in `training.text_quality`.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dgbook.measures import datasets
from dgbook.measures.classifier import accuracy, load_classifier
from dgkit.sampling import generate
from training import cards
from training.dit import encode, to_rgb
from training.loop import device
from training.measuring import CALIBRATION_GRID, calibrate_guidance, finished, largest_channels, save_sheet, size_of

CLASSES = len(datasets.FASHION_MNIST_CLASSES)
SAMPLES, SHEET = 1000, 10 * CLASSES
CALIBRATION_SAMPLES = 300


def measure(run: Path, *, guidance_scale: float = 4.0, steps: int = 20) -> dict[str, Any]:
    """Measure the `tiny-dit` that `train("tiny-dit", run)` left in `run/model`.

    Writes `quality.json`, a sheet of samples (`samples.webp`) and the card (`README.md`) into `run/model`.

    Args:
        run: the training's folder; its snapshots show the massive activations over training.
        guidance_scale: diffusers' guidance scale of the guided samples.
        steps: sampling steps.

    Returns:
        The numbers of `quality.json`.

    Raises:
        LoadError: `run` does not hold a finished training.
    """
    folder, training = finished(run)
    pipe = DiffusionPipeline.from_pretrained(folder).to(device())
    judge = load_classifier().to(device())
    labels = np.arange(SAMPLES) % CLASSES
    unguided, guided = (
        generate(pipe, labels.tolist(), range(SAMPLES), num_inference_steps=steps, guidance_scale=scale, batch_size=100)
        for scale in (1.0, guidance_scale)
    )
    real, _ = datasets.fashion_mnist("test")
    calibration_labels = (np.arange(CALIBRATION_SAMPLES) % CLASSES).tolist()
    calibration = calibrate_guidance(
        pipe, calibration_labels, CALIBRATION_GRID, guidance_scale=guidance_scale, steps=steps
    )
    quality = {
        "bytes": size_of(folder),
        "psnr_db": autoencoder_psnr(pipe, real),
        "psnr_images": len(real),
        "samples": SAMPLES,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "agreement": accuracy(judge, guided, labels),
        "agreement_of_class": {
            name: accuracy(judge, guided[labels == c], labels[labels == c])
            for c, name in enumerate(datasets.FASHION_MNIST_CLASSES)
        },
        "agreement_without_cfg": accuracy(judge, unguided, labels),
        "guidance_block": calibration["block"],
        "guidance_dims": calibration["dims"],
        "guidance_samples": CALIBRATION_SAMPLES,
        "guidance": calibration["rows"],
        "massive": massive_over_training(pipe, run / "transformer"),
        "device": str(device()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    save_sheet(contact_sheet(guided[:SHEET]), folder / "samples.webp")
    cards.write(folder, training, quality)
    return quality


def autoencoder_psnr(pipe: DiTPipeline, images: Tensor) -> float:
    """Mean over grey uint8 images (N, 1, H, W) of the PSNR of their reconstructions, in dB.

    An image is decoded from its posterior mean; the peak is the range of the pixels.
    """
    values = []
    for part in images.split(250):
        decoded = pipe.vae.decode(encode(pipe.vae, part)).sample.clamp(-1, 1)
        error = (decoded - to_rgb(part.to(decoded.device))).square().mean((1, 2, 3))
        values.append(10 * torch.log10(2**2 / error))
    return torch.cat(values).mean().item()


def massive_over_training(pipe: DiTPipeline, snapshots: Path) -> list[dict[str, Any]]:
    """The largest channel of each block at each training snapshot, for the same noised test images.

    100 test images, encoded, each with DDPM noise at ten timesteps 50, 150, ..., 950, under their own class.

    Args:
        pipe: the trained pipeline; its transformer's weights are those of the last snapshot afterwards.
        snapshots: the folder of the `step-N.safetensors`.

    Returns:
        See `measuring.largest_channels`, whose errors it raises.
    """
    images, labels = (tensor[:100] for tensor in datasets.fashion_mnist("test"))
    latents = encode(pipe.vae, images)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((10, *latents.shape), generator=generator).to(latents.device)
    times = torch.arange(50, 1000, 100, device=latents.device)

    def passes() -> None:
        for time, noise_at_time in zip(times, noise, strict=True):
            timestep = time.expand(len(latents))
            noisy = pipe.scheduler.add_noise(latents, noise_at_time, timestep)
            pipe.transformer(noisy, timestep=timestep, class_labels=labels.to(latents.device))

    return largest_channels(pipe.transformer, pipe.transformer, snapshots, passes)


def contact_sheet(images: np.ndarray, *, zoom: int = 3, gap: int = 2, margin: int = 84) -> Image.Image:
    """A row per class, named, of uint8 samples (N, 28, 28, 3) in class order 0, 1, ..., 9, 0, 1, ..."""
    side = images.shape[1] * zoom + gap
    sheet = Image.new("RGB", (margin + len(images) // CLASSES * side, CLASSES * side), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, image in enumerate(images):
        column, row = divmod(index, CLASSES)
        tile = Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1))
        sheet.paste(tile, (margin + column * side, row * side))
    for row, name in enumerate(datasets.FASHION_MNIST_CLASSES):
        pen.text((4, (row + 0.5) * side), name, "black", font, anchor="lm")
    return sheet


def measure_classifier(run: Path) -> dict[str, Any]:
    """Measure the `fashion-classifier` that `train("fashion-classifier", run)` left in `run/model`.

    Writes `quality.json` and the card (`README.md`) into `run/model`.

    Raises:
        LoadError: `run` does not hold a finished training.
    """
    folder, training = finished(run)
    model = load_classifier(folder)
    images, labels = datasets.fashion_mnist("test")
    samples = datasets.as_samples(images)
    quality = {
        "bytes": size_of(folder),
        "test_images": len(images),
        "accuracy": accuracy(model, samples, labels),
        "accuracy_of_class": {
            name: accuracy(model, samples[labels == c], labels[labels == c])
            for c, name in enumerate(datasets.FASHION_MNIST_CLASSES)
        },
    }
    (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    cards.write(folder, training, quality)
    return quality
