"""Do massive activations grow with training and with size? The ladder of `tiny-dit`s for Fig. 3(b) and (c).

Four sizes in the proportions of DiT-S, -B, -L and -XL (Peebles & Xie 2023), all trained for as many steps, the two
smallest from two seeds; L is as large as the shipped `tiny-dit`, but another training. What was measured is in
`data/ladder`; the weights are not kept. To train and measure them again:

    for size in s b l xl; do python -m training train tiny-dit-$size && python -m training measure tiny-dit-$size; done
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from numpy.typing import NDArray

from dgbook.chapters.ladder import RUNGS
from dgbook.measures import datasets
from dgbook.measures.classifier import accuracy, load_classifier
from dgbook.measures.stats import LEVEL, RESAMPLES, Interval, wilson
from dgkit.errors import DgkitError
from dgkit.gates import gate_agreement
from dgkit.massive import channel_ratio
from dgkit.paths import DATA
from dgkit.recording import Trace, record
from dgkit.sampling import generate
from training.dit import Recipe, loss_on_test_images
from training.loop import device
from training.measuring import finished, largest_channels, save_sheet
from training.quality import contact_sheet

SAMPLES, SHEET, STEPS, GUIDANCE_SCALE = 200, 50, 20, 4.0


def measure_rung(run: Path) -> dict[str, Any]:
    """Measure the size that `train(run.name, run)` left in `run`.

    Writes the numbers to `data/ladder/NAME.json` and a sheet of samples beside it.

    Args:
        run: the training's folder, whose name is in `RUNGS`.

    Returns:
        The contents of the JSON file: "recipe"; "trainings", for each seed what it took and its "history" (see
        `over_training`); of the first training "last" (see `measure_last`) and "samples".

    Raises:
        DgkitError: `run` has another name.
        LoadError: `run` does not hold a finished training.
    """
    name = run.name
    if name not in RUNGS:
        raise DgkitError(f"run={str(run)!r} is not allowed: a rung's folder is called {', '.join(RUNGS)}")
    folder, facts = finished(run)
    recipe = Recipe.read(folder / f"{name}.toml")
    pipe = DiffusionPipeline.from_pretrained(folder).to(device())
    last, (images, samples) = measure_last(pipe), measure_samples(pipe)
    measured = {
        "model": name,
        "recipe": {
            "transformer": recipe.transformer,
            "schedule": asdict(recipe.transformer_schedule),
            "label_dropout": recipe.label_dropout,
            "scheduler": recipe.scheduler,
        },
        "trainings": [
            {
                "seed": seed,
                **facts["networks"][f"transformer-{seed}"],
                "history": over_training(pipe, run / f"transformer-{seed}"),
            }
            for seed in recipe.seeds
        ],
        "last": last,
        "samples": samples,
        "device": str(device()),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    (DATA / "ladder").mkdir(exist_ok=True)
    (DATA / "ladder" / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    save_sheet(contact_sheet(images[:SHEET]).convert("L"), DATA / "ladder" / f"{name}.webp")
    return measured


def over_training(pipe: DiTPipeline, snapshots: Path) -> list[dict[str, Any]]:
    """The largest channel of each block at each training snapshot, with intervals.

    Args:
        pipe: the trained pipeline; its transformer's weights are those of the last snapshot afterwards.
        snapshots: the folder of the `step-N.safetensors`.

    Returns:
        One row per snapshot, in order of training: "step" and what `largest_of_blocks` says of it.

    Raises:
        LoadError: there is no snapshot, or one does not fit the transformer.
    """
    found: list[dict[str, Any]] = []
    rows = largest_channels(
        pipe.transformer, pipe.transformer, snapshots, lambda: found.append(largest_of_blocks(observe(pipe)[0]))
    )
    return [row | largest for row, largest in zip(rows, found, strict=True)]


def measure_last(pipe: DiTPipeline) -> dict[str, Any]:
    """What the trained pipeline's activations are on noised test images.

    Returns:
        Per block "ratio", "low", "high" and "dim" (see `largest_of_blocks`); "token_share", the share of image tokens
        in which that channel is massive (see `Trace.ratio`); per branch "rank_in_alpha", the rank (1 = largest) that it
        has in mean |alpha|; and "loss" (see `loss_on_test_images`).
    """
    trace, loss = observe(pipe)
    largest = largest_of_blocks(trace)
    share = trace.token_share()
    gates = gate_agreement(trace).sort_values("block", kind="stable")
    return {
        **largest,
        "token_share": [round(share[block, dim].item(), 4) for block, dim in enumerate(largest["dim"])],
        "rank_in_alpha": {
            branch: rows["rank_of_largest"].tolist() for branch, rows in gates.groupby("branch", sort=False)
        },
        "loss": round(loss, 5),
    }


def measure_samples(pipe: DiTPipeline) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """Guided samples (200, 28, 28, 3) of all classes in turn, sample i from seed i, and the classifier's agreement.

    Returns:
        The samples, and "count", "steps", "guidance_scale" and "agreement" with "low" and "high" (Wilson's interval).
    """
    labels = np.arange(SAMPLES) % len(datasets.FASHION_MNIST_CLASSES)
    setting: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    images = generate(pipe, labels.tolist(), range(SAMPLES), **setting)
    agreement = wilson(SAMPLES * accuracy(load_classifier().to(device()), images, labels), SAMPLES)
    return images, {
        "count": SAMPLES,
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
        "agreement": round(agreement.value, 4),
        "low": round(agreement.low, 4),
        "high": round(agreement.high, 4),
    }


def observe(pipe: DiTPipeline) -> tuple[Trace, float]:
    """Record every channel of each of the noised images of `loss_on_test_images`, and measure that loss."""
    with record(pipe.transformer, track=range(pipe.transformer.inner_dim)) as trace:
        loss = loss_on_test_images(pipe)
    return trace, loss


def largest_of_blocks(trace: Trace) -> dict[str, list[Any]]:
    """Per block, the channel of largest mean |z|: "dim", its "ratio" to the median channel, with "low" and "high".

    The interval (95 %) is over the images, with the channel held fixed. It says how well these images determine the
    ratio of these weights, not how another training of the same recipe would turn out.
    """
    per_image = trace.tracked().double().mean(0).movedim(1, 0).numpy()  # (L, images, C)
    dims = channel_ratio(trace.mean_abs()).argmax(1).tolist()
    intervals = [ratio_interval(values, dim) for values, dim in zip(per_image, dims, strict=True)]
    return {
        "ratio": [round(interval.value, 3) for interval in intervals],
        "low": [round(interval.low, 3) for interval in intervals],
        "high": [round(interval.high, 3) for interval in intervals],
        "dim": dims,
    }


def ratio_interval(values: NDArray[np.float64], dim: int) -> Interval:
    """Mean of channel `dim` over that of the median channel, with a bootstrap interval over images.

    Args:
        values: mean |z| of each image and channel, (images, C).
        dim: the channel.
    """
    count = len(values)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    means = np.concatenate([values.mean(0)[None], draws @ values / count])
    ratios = means[:, dim] / np.median(means, 1)
    low, high = np.quantile(ratios[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(ratios[0]), float(low), float(high))
