"""Do massive activations grow with training and with size? The ladder of `tiny-dit`s for Fig. 3(b) and (c).

Four sizes in the proportions of DiT-S, -B, -L and -XL (Peebles & Xie 2023), all trained for as many steps, the two
smallest from two seeds; L is as large as the shipped `tiny-dit`, but another training. What was measured is in
`data/ladder`; the weights are not kept. To train and measure them again:

    for size in s b l xl; do dgkit tiny train tiny-dit-$size && dgkit tiny measure tiny-dit-$size; done
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import permutations
from math import factorial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pandas as pd
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from dgkit.errors import DgkitError
from dgkit.gates import gate_agreement
from dgkit.generate import generate
from dgkit.hooks import Trace, record
from dgkit.massive import channel_ratio
from dgkit.paths import DATA
from dgkit.stats import LEVEL, RESAMPLES, Interval, wilson
from dgkit.tiny import data
from dgkit.tiny.classifier import accuracy, load_classifier
from dgkit.tiny.dit import Recipe, loss_on_test_images
from dgkit.tiny.loop import device
from dgkit.tiny.measuring import finished, largest_channels
from dgkit.tiny.quality import contact_sheet

RUNGS = ("tiny-dit-s", "tiny-dit-b", "tiny-dit-l", "tiny-dit-xl")
"""The sizes, smallest first."""

SAMPLES, SHEET, STEPS, GUIDANCE_SCALE = 200, 50, 20, 4.0

# ----------------------------------------------------------------------------------------------------------- measuring


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
    (DATA / "ladder" / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n")
    contact_sheet(images[:SHEET]).convert("L").save(DATA / "ladder" / f"{name}.png", optimize=True)
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
    labels = np.arange(SAMPLES) % len(data.FASHION_MNIST_CLASSES)
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


# ------------------------------------------------------------------------------------------------------------- reading


def measurements() -> dict[str, dict[str, Any]]:
    """What `measure_rung` wrote of each size, the smallest first; a size that nobody measured is left out."""
    files = {name: DATA / "ladder" / f"{name}.json" for name in RUNGS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def history() -> pd.DataFrame:
    """Fig. 3(b) and (c): the largest channel of each block along each training of each size.

    Columns: size, parameters, width, depth, seed, step, block, ratio, low, high, dim.
    """
    columns = ["size", "parameters", "width", "depth", "seed", "step", "block", "ratio", "low", "high", "dim"]
    rows = [
        (*_shape(name, measured), training["seed"], snapshot["step"], block, *largest)
        for name, measured in measurements().items()
        for training in measured["trainings"]
        for snapshot in training["history"]
        for block, largest in enumerate(zip(*(snapshot[key] for key in columns[-4:]), strict=True))
    ]
    return pd.DataFrame(rows, columns=columns)


def sizes(table: pd.DataFrame) -> pd.DataFrame:
    """The sizes at equal steps: the largest that all of them have a snapshot of.

    Args:
        table: see `history`.

    Returns:
        One row per size and training: that of the block with the largest ratio, and "massive_blocks", the share of its
        blocks whose largest channel exceeds five times the median.

    Raises:
        DgkitError: the trainings have no step in common.
    """
    trainings = ["size", "seed"]
    steps = set.intersection(*table.groupby(trainings)["step"].agg(set)) if len(table) else set()
    if not steps:
        raise DgkitError("the ladder's sizes have no training step in common: measure them with `dgkit tiny measure`")
    rows = table[table["step"] == max(steps)].groupby(trainings, sort=False)
    largest = table.loc[rows["ratio"].idxmax()].reset_index(drop=True)
    return largest.assign(massive_blocks=rows["ratio"].agg(lambda ratios: (ratios > 5).mean()).to_numpy())


def rungs() -> pd.DataFrame:
    """How good each size is at the end of its first training, one row each.

    Columns: size, parameters, width, depth, steps, loss (of the noise of test images), agreement (share of guided
    samples that the classifier assigns to their class), ratio, block and dim of the largest channel, token_share (the
    share of image tokens in which it is massive), rank_in_alpha (its best rank in a gate of its block).
    """
    columns = ["size", "parameters", "width", "depth", "steps", "loss", "agreement"]
    columns += ["ratio", "block", "dim", "token_share", "rank_in_alpha"]
    rows = []
    for name, measured in measurements().items():
        last, samples = measured["last"], measured["samples"]
        block = int(np.argmax(last["ratio"]))
        rows.append(
            (
                *_shape(name, measured),
                measured["trainings"][0]["steps"],
                last["loss"],
                Interval(samples["agreement"], samples["low"], samples["high"]),
                Interval(*(last[key][block] for key in ("ratio", "low", "high"))),
                block,
                last["dim"][block],
                last["token_share"][block],
                min(ranks[block] for ranks in last["rank_in_alpha"].values()),
            )
        )
    return pd.DataFrame(rows, columns=columns)


def values() -> dict[str, Any]:
    """Do massive activations grow with size? The numbers at equal steps, one per training, for a result.

    "ladder.largest_spread" is the most that trainings of one size differ. "ladder.rank_correlation" is that between the
    sizes' parameters and their largest ratios, means over a size's trainings, which are no independent samples of size;
    "ladder.p" its two-sided p-value over all orders of the ratios, and "ladder.smallest_p" the smallest that so few
    sizes can have. Width and depth grow together and one recipe trained all, so it speaks of this ladder only.

    Raises:
        DgkitError: fewer than three sizes are measured, or they have no step in common.
    """
    table = sizes(history())
    means = table.groupby("size", sort=False)[["parameters", "ratio"]].mean()
    if len(means) < 3:
        raise DgkitError(f"the ladder has {len(means)} measured sizes in {DATA / 'ladder'}: at least 3 are needed")
    correlation, p = _rank_correlation(means["parameters"].to_numpy(), means["ratio"].to_numpy())
    return {
        "ladder.sizes": table["size"].tolist(),
        "ladder.seeds": table["seed"].tolist(),
        "ladder.step": int(table["step"].iloc[0]),
        "ladder.parameters": table["parameters"].tolist(),
        "ladder.largest_ratio": table["ratio"].tolist(),
        "ladder.largest_spread": float(table.groupby("size")["ratio"].agg(np.ptp).max()),
        "ladder.massive_blocks": table["massive_blocks"].tolist(),
        "ladder.rank_correlation": correlation,
        "ladder.p": p,
        "ladder.smallest_p": 2 / factorial(len(means)),
    }


def sentence(v: Mapping[str, Any]) -> str:
    """`values` in words."""
    correlation, count = v["ladder.rank_correlation"], len(v["ladder.sizes"])
    grows = "do not grow" if correlation <= 0 else "grow" if correlation > 1 - 1e-9 else "do not grow steadily"
    ratios = ratios_of_sizes(v["ladder.sizes"], v["ladder.largest_ratio"])
    millions = ", ".join(f"{n / 1e6:.1f}" for n in dict.fromkeys(v["ladder.parameters"]))
    massive = sum(share > 0 for share in v["ladder.massive_blocks"])
    return (
        f"After {v['ladder.step']:,} training steps, the largest channel is {ratios} times its block's median in "
        f"models of {millions} million parameters, and above five times in {massive} of the {count} trainings: in this "
        f"ladder massive activations {grows} with size (rank correlation of the sizes' means {correlation:.2f}, "
        f"p = {v['ladder.p']:.2f}; as few sizes as these cannot have less than p = {v['ladder.smallest_p']:.2f}), but "
        f"trainings of one size differ by up to {v['ladder.largest_spread']:.1f}."
    )


def ratios_of_sizes(names: Sequence[str], ratios: Sequence[float]) -> str:
    """The ratio of each training, by size: "7.2 and 7.4 (S), 10.2 and 9.9 (B)"."""
    by_size: dict[str, list[str]] = {}
    for name, ratio in zip(names, ratios, strict=True):
        by_size.setdefault(name, []).append(f"{ratio:.1f}")
    return ", ".join(f"{' and '.join(found)} ({name})" for name, found in by_size.items())


def _shape(name: str, measured: Mapping[str, Any]) -> tuple[str, int, int, int]:
    """Size, parameters, width and depth."""
    config = measured["recipe"]["transformer"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    parameters = measured["trainings"][0]["parameters"]
    return name.removeprefix("tiny-dit-").upper(), parameters, width, config["num_layers"]


def _rank_correlation(x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
    """Spearman's rank correlation and its exact two-sided p-value, over all orders of the (few) values.

    No correlation, p = 1, where all y are equal.
    """
    if np.ptp(y) == 0:
        return 0.0, 1.0
    observed = float(spearmanr(x, y).statistic)
    ranks = rankdata(x)
    orders = [np.corrcoef(ranks, order)[0, 1] for order in permutations(rankdata(y))]
    return observed, float(np.mean(np.abs(orders) >= abs(observed) - 1e-9))
