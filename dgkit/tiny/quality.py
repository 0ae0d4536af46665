"""How good the shipped models are: measured numbers, and the model cards made from them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor

from dgkit.errors import DgkitError, LoadError
from dgkit.generate import generate
from dgkit.guidance import detail_guidance
from dgkit.hooks import record
from dgkit.massive import channel_ratio
from dgkit.metrics.frechet import frechet_distance_to
from dgkit.metrics.spectrum import sharpness
from dgkit.paths import DATA
from dgkit.tiny import data
from dgkit.tiny.classifier import accuracy, load_classifier
from dgkit.tiny.dit import encode, to_rgb
from dgkit.tiny.loop import device
from dgkit.zoo import preset_of

PSNR_BAR, AGREEMENT_BAR, RATIO_BAR = 28.0, 0.85, 8.0
CLASSES = len(data.FASHION_MNIST_CLASSES)
SAMPLES, SHEET = 1000, 10 * CLASSES
CALIBRATION_SAMPLES, CALIBRATION_SEED = 300, 900_000_000
CALIBRATION_GRID = (0.0, 0.02, 0.05, 0.1, 0.2)


def measure(run: Path, *, guidance_scale: float = 4.0, steps: int = 20) -> dict[str, Any]:
    """Measure the `tiny-dit` that `train("tiny-dit", run)` left in `run/model`.

    Writes `quality.json`, a sheet of samples (`samples.png`) and the card (`README.md`) into `run/model`.

    Args:
        run: the training's folder; its snapshots show the massive activations over training.
        guidance_scale: diffusers' guidance scale of the guided samples.
        steps: sampling steps.

    Returns:
        The numbers of `quality.json`.

    Raises:
        LoadError: `run` does not hold a finished training.
    """
    folder = run / "model"
    if not (folder / "training.json").is_file():
        raise LoadError(f"run={str(run)!r} is not allowed: it holds no finished training (no model/training.json)")
    pipe = DiffusionPipeline.from_pretrained(folder).to(device())
    judge = load_classifier().to(device())
    labels = np.arange(SAMPLES) % CLASSES
    unguided, guided = (
        generate(pipe, labels.tolist(), range(SAMPLES), num_inference_steps=steps, guidance_scale=scale, batch_size=100)
        for scale in (1.0, guidance_scale)
    )
    real, _ = data.fashion_mnist("test")
    guidance_by_w = calibrate_guidance(pipe, guidance_scale=guidance_scale, steps=steps)
    quality = {
        "bytes": sum(file.stat().st_size for file in folder.rglob("*.safetensors")),
        "psnr_db": autoencoder_psnr(pipe, real),
        "psnr_images": len(real),
        "samples": SAMPLES,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "agreement": accuracy(judge, guided, labels),
        "agreement_of_class": {
            name: accuracy(judge, guided[labels == c], labels[labels == c])
            for c, name in enumerate(data.FASHION_MNIST_CLASSES)
        },
        "agreement_without_cfg": accuracy(judge, unguided, labels),
        "guidance": guidance_by_w,
        "massive": massive_over_training(pipe, run / "transformer"),
        "device": str(device()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    contact_sheet(guided[:SHEET]).save(folder / "samples.png", optimize=True)
    write_card(folder, json.loads((folder / "training.json").read_text()), quality)
    return quality


@torch.no_grad()
def calibrate_guidance(pipe: DiTPipeline, *, guidance_scale: float = 4.0, steps: int = 20) -> list[dict[str, float]]:
    """Detail Guidance at the preset's block and dims over a grid of w, without and with CFG.

    300 images of balanced classes from seeds that no notebook uses. The preset's w are those whose images come closest
    to the sharpness of real ones.

    Returns:
        One row per (guidance_scale, w): frechet, agreement with the class, sharpness over that of real test images.
    """
    preset = preset_of(pipe)
    if preset is None or preset.block is None or preset.dims is None:
        raise DgkitError("this model has no preset block and dims to calibrate w for")
    judge, real = load_classifier(), load_file(DATA / "reference" / "fashion-mnist.safetensors")
    labels = np.arange(CALIBRATION_SAMPLES) % CLASSES
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + CALIBRATION_SAMPLES)
    real_sharpness = sharpness(data.as_samples(data.fashion_mnist("test")[0][:CALIBRATION_SAMPLES]).numpy()).mean()
    rows = []
    for scale in (1.0, guidance_scale):
        for w in CALIBRATION_GRID:
            with detail_guidance(pipe, scale=w, block=preset.block, dims=preset.dims):
                images = generate(pipe, labels.tolist(), seeds, num_inference_steps=steps, guidance_scale=scale)
            distance = frechet_distance_to(judge.features(images), real["mean"], real["covariance"])
            rows.append(
                {
                    "guidance_scale": scale,
                    "w": w,
                    "frechet": round(distance, 3),
                    "agreement": round(accuracy(judge, images, labels), 3),
                    "sharpness_of_real": round(float(sharpness(images).mean() / real_sharpness), 3),
                }
            )
    return rows


def checked_name(name: str) -> str:
    """`name` if there is something to measure under it.

    Raises:
        DgkitError: there is not.
    """
    if name not in MEASURES:
        raise DgkitError(f"name={name!r} is not allowed: use one of {', '.join(MEASURES)}")
    return name


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


@torch.no_grad()
def massive_over_training(pipe: DiTPipeline, snapshots: Path) -> list[dict[str, Any]]:
    """The largest channel of each block at each training snapshot, for the same noised test images.

    100 test images, encoded, each with DDPM noise at ten timesteps 50, 150, ..., 950, under their own class.

    Args:
        pipe: the trained pipeline; its transformer's weights are those of the last snapshot afterwards.
        snapshots: the folder of the `step-N.safetensors`.

    Returns:
        One row per snapshot, in order of training: "step"; per block "ratio", the mean |z| of the largest channel over
        that of the median channel; and "dim", which channel it is.

    Raises:
        LoadError: there is no snapshot, or one does not fit the transformer.
    """
    files = sorted(snapshots.glob("step-*.safetensors"), key=_step)
    if not files:
        raise LoadError(f"snapshots={str(snapshots)!r} is not allowed: there is no step-N.safetensors in it")
    images, labels = (tensor[:100] for tensor in data.fashion_mnist("test"))
    latents = encode(pipe.vae, images)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((10, *latents.shape), generator=generator).to(latents.device)
    times = torch.arange(50, 1000, 100, device=latents.device)
    rows = []
    for file in files:
        loaded = pipe.transformer.load_state_dict(load_file(file), strict=False)  # snapshots hold no buffers
        missing = set(loaded.missing_keys) - {name for name, _ in pipe.transformer.named_buffers()}
        if missing or loaded.unexpected_keys:
            raise LoadError(f"{file} does not fit the transformer: {sorted(missing) + loaded.unexpected_keys}")
        with record(pipe.transformer) as trace:
            for time, noise_at_time in zip(times, noise, strict=True):
                timestep = time.expand(len(latents))
                noisy = pipe.scheduler.add_noise(latents, noise_at_time, timestep)
                pipe.transformer(noisy, timestep=timestep, class_labels=labels.to(latents.device))
        ratio, dim = channel_ratio(trace.mean_abs()).max(1)
        rows.append({"step": _step(file), "ratio": [round(r, 2) for r in ratio.tolist()], "dim": dim.tolist()})
    return rows


def _step(snapshot: Path) -> int:
    return int(snapshot.stem.removeprefix("step-"))


def contact_sheet(images: np.ndarray, *, zoom: int = 3, gap: int = 2, margin: int = 84) -> Image.Image:
    """A row per class, named, of uint8 samples (N, 28, 28, 3) in class order 0, 1, ..., 9, 0, 1, ..."""
    side = images.shape[1] * zoom + gap
    sheet = Image.new("RGB", (margin + len(images) // CLASSES * side, CLASSES * side), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for index, image in enumerate(images):
        column, row = divmod(index, CLASSES)
        tile = Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1))
        sheet.paste(tile, (margin + column * side, row * side))
    for row, name in enumerate(data.FASHION_MNIST_CLASSES):
        pen.text((4, (row + 0.5) * side), name, "black", font, anchor="lm")
    return sheet


def measure_classifier(run: Path) -> dict[str, Any]:
    """Measure the `fashion-classifier` that `train("fashion-classifier", run)` left in `run/model`.

    Writes `quality.json` and the card (`README.md`) into `run/model`.

    Raises:
        LoadError: `run` does not hold a finished training.
    """
    folder = run / "model"
    model = load_classifier(folder)
    images, labels = data.fashion_mnist("test")
    samples = data.as_samples(images)
    quality = {
        "bytes": (folder / "model.safetensors").stat().st_size,
        "test_images": len(images),
        "accuracy": accuracy(model, samples, labels),
        "accuracy_of_class": {
            name: accuracy(model, samples[labels == c], labels[labels == c])
            for c, name in enumerate(data.FASHION_MNIST_CLASSES)
        },
    }
    (folder / "quality.json").write_text(json.dumps(quality, indent=2) + "\n")
    write_classifier_card(folder, json.loads((folder / "training.json").read_text()), quality)
    return quality


def write_card(folder: Path, training: dict[str, Any], quality: dict[str, Any]) -> None:
    """Write the card of `tiny-dit` (`README.md`) from the contents of `training.json` and `quality.json`."""
    last = quality["massive"][-1]
    peak = max(last["ratio"])
    fixed, blocks_with_it = Counter(last["dim"]).most_common(1)[0]
    blocks = range(len(last["ratio"]))
    guidance = f"guidance scale {quality['guidance_scale']:g}, {quality['steps']} steps"
    measured: list[tuple[str, ...]] = [
        ("", "measured", "bar", ""),
        (
            f"PSNR of the autoencoder, mean over {quality['psnr_images']:,} test images",
            f"{quality['psnr_db']:.2f} dB",
            f"{PSNR_BAR:g} dB",
            _verdict(quality["psnr_db"] >= PSNR_BAR),
        ),
        (
            f"samples that the classifier assigns to their class, {guidance}",
            f"{quality['agreement']:.1%}",
            f"{AGREEMENT_BAR:.0%}",
            _verdict(quality["agreement"] >= AGREEMENT_BAR),
        ),
        ("the same without classifier-free guidance", f"{quality['agreement_without_cfg']:.1%}", "", ""),
        (
            "largest channel over its block's median, last snapshot",
            f"{peak:.1f}",
            f"{RATIO_BAR:g}",
            _verdict(peak >= RATIO_BAR),
        ),
    ]
    ratios = [("step", *(f"block {b}" for b in blocks))] + [
        (f"{row['step']:,}", *(f"{r:.1f} ({d})" for r, d in zip(row["ratio"], row["dim"], strict=True)))
        for row in quality["massive"]
    ]
    guidance_rows: list[tuple[str, ...]] = [
        ("guidance scale", "w", "Frechet distance", "agreement", "sharpness / real")
    ]
    for row in quality["guidance"]:
        numbers = f"{row['frechet']:.2f}", f"{row['agreement']:.1%}", f"{row['sharpness_of_real']:.2f}"
        guidance_rows.append((f"{row['guidance_scale']:g}", f"{row['w']:g}", *numbers))
    card = f"""# tiny-dit

A small latent, class-conditional diffusion transformer in the classes of the real one: `DiTTransformer2DModel`,
`AutoencoderKL` and `DDIMScheduler` in a `DiTPipeline`. 28 x 28 images of ten classes of clothing. Nothing in it
is planted: whatever its activations do came from training alone.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("data/models/tiny-dit")
images = pipe(pipe.get_label_ids(["sneaker", "coat"]), guidance_scale={quality["guidance_scale"]:g}, \
num_inference_steps={quality["steps"]}).images
```

![ten samples of each class](samples.png)

{guidance.capitalize()}, seeds 0 to {SHEET - 1}, none left out.

## Data and recipe

Data: {training["data"]}; its training split only. Grey pixels are repeated to three channels.
The whole recipe is `tiny-dit.toml` beside this card; `dgkit tiny train tiny-dit` repeats it. Weights: \
{quality["bytes"] / 1e6:.1f} MB of safetensors in bfloat16.

{_table(_networks(training))}

## Measured quality

{_table(measured)}

{quality["samples"]:,} samples of balanced classes, sample i from the noise of seed i, judged by `fashion-classifier`,
which never saw a sample. With guidance, by class: {_by_class(quality["agreement_of_class"])}.

## Massive activations over training

Mean |z| of the block's largest channel over that of its median channel (and which channel that is), after so many steps
of training: averaged weights, 100 noised test images, ten timesteps. In the last snapshot, channel {fixed} is
the largest in {blocks_with_it} of {len(blocks)} blocks.

{_table(ratios)}

## Detail Guidance

Over a grid of w at the preset's block and dims: {CALIBRATION_SAMPLES} samples from seeds of their own, Frechet
distance of `fashion-classifier`'s features to the training set (not an FID), agreement with the class, and sharpness
(variance of the Laplacian) relative to real test images. The preset's w, without and with classifier-free guidance,
are those of the grid whose sharpness comes closest to real images'.

{_table(guidance_rows)}

## Limits

* Only the noise half of the output is trained. The learned-sigma half stays exactly zero, as initialised, so samplers
  that use it (DDPM with learned variance) do not work; DDIM does not use it.
* Ten labels, 0 to 9, and the null label 1000; the other rows of the label tables are zero and mean nothing.
* 28 x 28 grey images: what holds here need not hold for large models.

Licence: MIT, as the data.
"""
    (folder / "README.md").write_text(card)


def write_classifier_card(folder: Path, training: dict[str, Any], quality: dict[str, Any]) -> None:
    """Write the card of `fashion-classifier` (`README.md`) from the contents of `training.json` and `quality.json`."""
    card = f"""# fashion-classifier

A small convolutional network that judges samples of `tiny-dit`: ten logits say which class an image shows; its 64
penultimate features take the place that Inception's features have on ImageNet. Distances between them are not FID.

```python
from dgkit.tiny.classifier import load_classifier

model = load_classifier()
logits, features = model(images), model.features(images)  # images: uint8 (N, 28, 28, 3)
```

Accuracy on the {quality["test_images"]:,} images of the real test set: {quality["accuracy"]:.2%}.
By class: {_by_class(quality["accuracy_of_class"])}.

Data: {training["data"]}; its training split only, never a generated image.
The whole recipe is `fashion-classifier.toml` beside this card; `dgkit tiny train fashion-classifier` repeats it. \
Weights: {quality["bytes"] / 1e3:.0f} kB of safetensors in float16, loaded as float32.

{_table(_networks(training))}

Licence: MIT, as the data.
"""
    (folder / "README.md").write_text(card)


def _networks(training: dict[str, Any]) -> list[tuple[str, ...]]:
    """What each network's training took."""
    rows: list[tuple[str, ...]] = [
        ("network", "parameters", "steps", "batch", "time", "device", "mean loss of the last 100 steps", "torch")
    ]
    for name, n in training["networks"].items():
        place = f"CPU, {n['threads']} thread(s)" if n["device"] == "CPU" else n["device"]
        facts = (f"{n['parameters']:,}", f"{n['steps']:,}", f"{n['batch']}", f"{n['seconds'] / 60:.0f} min")
        rows.append((name, *facts, place, f"{n['mean_loss_of_last_100_steps']:.4f}", n["torch"]))
    return rows


def _table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def _by_class(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


MEASURES = {"tiny-dit": measure, "fashion-classifier": measure_classifier}
"""What measures each shipped model, by name: takes the run's folder."""
