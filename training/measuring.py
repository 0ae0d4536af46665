"""What the measurements of all shipped models share: runs, losses, snapshots, Detail Guidance, sheets of images."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import Tensor, nn

from dgbook.chapters.sampling import subject
from dgbook.measures.judges import judge_of
from dgbook.measures.spectrum import sharpness
from dgkit.errors import DgkitError, LoadError
from dgkit.guidance import detail_guidance
from dgkit.massive import channel_ratio
from dgkit.recording import record
from dgkit.sampling import generate

CALIBRATION_SEED = 900_000_000
CALIBRATION_GRID = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

Images = NDArray[np.uint8]


def finished(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder `run/model` of a finished training and the contents of its `training.json`.

    Raises:
        LoadError: `run` does not hold one.
    """
    facts = run / "model" / "training.json"
    if not facts.is_file():
        raise LoadError(f"run={str(run)!r} is not allowed: it holds no finished training (no model/training.json)")
    return facts.parent, json.loads(facts.read_text(encoding="utf-8"))


def size_of(folder: Path) -> int:
    """Bytes of all safetensors in `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def mean_losses(log: Path, points: int) -> list[dict[str, float]]:
    """A training's `loss.csv` as means over at most `points` spans of steps, each longer than the last by one ratio.

    Returns:
        One row per span: "step", its last step; "loss", its mean; "seconds" since the training's start at its end.
    """
    with log.open(encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row["loss"]), float(row["seconds"])) for row in csv.DictReader(file)]
    ends = np.unique(np.geomspace(1, len(rows), points).round().astype(int)).tolist()
    return [
        {"step": rows[end - 1][0], "loss": float(np.mean([r[1] for r in rows[start:end]])), "seconds": rows[end - 1][2]}
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def write_losses(losses: list[dict[str, float]], path: Path) -> None:
    """Write `mean_losses` as a CSV file of a few kB."""
    lines = [f"{row['step']},{row['loss']:.5f},{row['seconds']:.0f}\n" for row in losses]
    path.write_text("".join(["step,loss,seconds\n", *lines]), encoding="utf-8")


@torch.no_grad()
def largest_channels(
    model: nn.Module, transformer: nn.Module, snapshots: Path, passes: Callable[[], object]
) -> list[dict[str, Any]]:
    """The largest channel of each block of `transformer` at each training snapshot of `model`.

    Args:
        model: what was trained; its weights are those of the last snapshot afterwards.
        transformer: the part of `model` (or all of it) that is looked at.
        snapshots: the folder of the `step-N.safetensors`.
        passes: calls the transformer with the same inputs each time.

    Returns:
        One row per snapshot, in order of training: "step"; per block "ratio", the mean |z| of the largest channel over
        that of the median channel; "dim", which channel it is; and "energy", its share of the image tokens' energy (see
        `Trace.energy_share`), which unlike the ratio does not depend on the width.

    Raises:
        LoadError: there is no snapshot, or one does not fit `model`.
    """
    files = {int(file.stem.removeprefix("step-")): file for file in snapshots.glob("step-*.safetensors")}
    if not files:
        raise LoadError(f"snapshots={str(snapshots)!r} is not allowed: there is no step-N.safetensors in it")
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    rows = []
    for step, file in sorted(files.items()):
        weights = load_file(file)
        if {name: weight.shape for name, weight in weights.items()} != parameters:
            raise LoadError(f"{file} does not fit the model: it holds other names or shapes")
        model.load_state_dict(weights, strict=False)  # snapshots hold no buffers, and shared tensors once
        with record(transformer) as trace:
            passes()
        ratio, dim = channel_ratio(trace.mean_abs()).max(1)
        energy = trace.energy_share().gather(1, dim[:, None])[:, 0]
        rounded = {"ratio": [round(r, 2) for r in ratio.tolist()], "energy": [round(e, 3) for e in energy.tolist()]}
        rows.append({"step": step, **rounded, "dim": dim.tolist()})
    return rows


def calibrate_guidance(
    pipe: Any, conditions: Sequence[Any], grid: Sequence[float], *, guidance_scale: float, steps: int, **call: Any
) -> dict[str, Any]:
    """Detail Guidance over a grid of w, without and with CFG, from seeds that no notebook uses.

    At the preset's block and dims, or where `subject` finds them. The w to be used are the positive ones of the lowest
    Frechet distance.

    Args:
        pipe: a pipeline that `dgbook.measures.judges` has a judge for.
        conditions: one per image.
        grid: values of w.
        guidance_scale: s of the rows with CFG.
        steps: sampling steps.
        call: further arguments of the pipeline's call.

    Returns:
        "block"; "dims"; and "rows", one per (guidance_scale, w): frechet (of the judge's features to real images'),
        agreement with the condition, sharpness over that of real images.

    Raises:
        DgkitError: the model has no judge.
    """
    judge = judge_of(pipe, conditions)
    if judge is None:
        raise DgkitError(
            "this model has no judge to calibrate w with: dgbook.measures.judges knows the shipped models'"
        )

    def sample(scale: float) -> Images:
        seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + len(conditions))
        return generate(pipe, conditions, seeds, num_inference_steps=steps, guidance_scale=scale, **call)

    with record(pipe) as trace:  # of all samples: which channels are massive can depend on what is sampled
        without_dg = {scale: sample(scale) for scale in (1.0, guidance_scale)}
    block, dims = subject(trace, None, None)
    rows = []
    for scale in without_dg:
        for w in grid:
            with detail_guidance(pipe, scale=w, block=block, dims=dims):
                images = sample(scale) if w else without_dg[scale]
            rows.append(
                {
                    "guidance_scale": scale,
                    "w": w,
                    "frechet": round(judge.frechet(judge.features(images)), 4),
                    "agreement": round(float(judge.agreement(images).mean()), 3),
                    "sharpness_of_real": round(float(sharpness(images).mean() / judge.sharpness_of_real), 3),
                }
            )
    return {"block": block, "dims": dims, "rows": rows}


def as_images(pixels: Tensor) -> Images:
    """uint8 pixels (N, 3, H, W) in the layout of generated images, (N, H, W, 3)."""
    return pixels.movedim(1, -1).cpu().numpy()


def captioned_sheet(
    images: Images, captions: Sequence[str], *, columns: int, zoom: int = 3, gap: int = 6
) -> Image.Image:
    """uint8 images (N, H, W, 3), enlarged without smoothing, each above its caption; row by row."""
    size, line = 10, 12
    font = ImageFont.load_default(size)
    height, width = images.shape[1] * zoom, images.shape[2] * zoom
    texts = [wrapped(caption, width, font) for caption in captions]
    across, down = width + gap, height + gap + line * max(map(len, texts))
    sheet = Image.new("RGB", (columns * across, -(-len(images) // columns) * down), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = index % columns * across + gap // 2, index // columns * down + gap // 2
        sheet.paste(Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1)), (left, top))
        for number, part in enumerate(text):
            pen.text((left, top + height + number * line), part, "black", font)
    return sheet


def save_sheet(image: Image.Image, path: Path) -> None:
    """Write an image without loss as WebP, which takes four fifths of what PNG does."""
    image.save(path, lossless=True, quality=100, method=6)


def wrapped(caption: str, width: int, font: Any) -> list[str]:
    """The words of `caption` in lines of at most `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
