"""Section 4.1, Figures 2 and 3: where massive activations are."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dgbook.chapters import study
from dgbook.chapters.sampling import Samples, observe, side_of_square
from dgkit.anatomy import dissect
from dgkit.massive import Massive, channel_ratio
from dgkit.paths import DATA
from dgkit.recording import Trace

THRESHOLDS = (3, 4, 5, 6, 8, 10)
"""Times the block's median: from which on a channel counts as massive is a choice."""


def open_study(*, threshold: float, **sampled: Any) -> study.Study:
    """Chapter 1: every image of a run with CFG is recorded; see `study.open_study`."""
    opened = study.open_study(cfg=True, observed=None, ratio=threshold, **sampled)
    return opened.begin("01_layer_properties", threshold=threshold, guidance_scale=opened.guidance_scale)


def layer_values(trace: Trace, massive: Massive, threshold: float) -> dict[str, Any]:
    """What Fig. 2 and 3(a) show, as numbers: how many blocks have massive channels, which, on how many tokens.

    "largest" is the channel with the largest ratio to its block's median: with its share of the image tokens' energy
    and its largest |z|. "over": how many blocks have a channel above each of `THRESHOLDS` times their median.
    """
    ratios = channel_ratio(trace.mean_abs())
    block, dim = divmod(int(ratios.argmax()), trace.anatomy.channels)
    return {
        "blocks": len(ratios),
        "threshold": threshold,
        "blocks_with_massive": int(massive.rows["block"].nunique()),
        "massive_dims": massive.dims,
        "largest": {
            "block": block,
            "dim": dim,
            "ratio": float(ratios[block, dim]),
            "token_share": float(trace.token_share()[block, dim]),
            "energy": float(trace.energy_share()[block, dim]),
            "max_abs": float(trace.max_abs()[block, dim]),
        },
        "over": np.array([[t, int((ratios.amax(1) > t).sum())] for t in THRESHOLDS]),
        "largest_ratio_by_block": ratios.amax(1),
        "mean_abs": trace.mean_abs(),
    }


def fixed_channels(pipe: Any, run: Samples, *, images: int = 8, steps: int = 4, count: int = 3) -> dict[str, Any]:
    """Whether the largest channel is one of a few, whatever the block, the token, the step, the prompt and the noise.

    Args:
        pipe: a pipeline.
        run: what to sample; its first `images`, one by one, in `steps` steps.
        count: how many channels are a few.

    Returns:
        As "fixed": "channels", the `count` channels that are most often the largest of a token's hidden state, over all
        blocks, steps and images; "share", how often one of them is.
    """
    counts: NDArray[np.int64] = np.zeros(0, np.int64)
    for i in range(min(images, len(run.seeds))):
        one = replace(run, conditions=run.conditions[i : i + 1], seeds=run.seeds[i : i + 1], steps=steps)
        anatomy = dissect(pipe)
        trace = observe(pipe, one, keep=range(len(anatomy.blocks)))
        for block in range(len(anatomy.blocks)):
            largest = trace.tensors(block).abs().argmax(-1).flatten().cpu().numpy()
            found = np.bincount(largest, minlength=anatomy.channels)
            counts = counts + found if len(counts) else found
    channels = np.argsort(-counts, kind="stable")[:count]
    return {"fixed": {"channels": channels.tolist(), "share": float(counts[channels].sum() / counts.sum())}}


def training_history(model: str) -> pd.DataFrame:
    """Fig. 3(b): the largest channel over its block's median along training (columns step, block, ratio, dim).

    From the shipped model's own measurement; empty for a model whose training checkpoints nobody recorded here.
    """
    recorded = DATA / "models" / model / "quality.json"
    snapshots = json.loads(recorded.read_text(encoding="utf-8"))["massive"] if recorded.is_file() else []
    rows = [
        {"step": snapshot["step"], "block": block, "ratio": ratio, "dim": dim}
        for snapshot in snapshots
        for block, (ratio, dim) in enumerate(zip(snapshot["ratio"], snapshot["dim"], strict=True))
    ]
    return pd.DataFrame(rows, columns=["step", "block", "ratio", "dim"])


def token_maps(
    pipe: Any, run: Samples, block: int, dim: int, count: int = 6
) -> tuple[NDArray[np.float64], list[float]]:
    """|z| of one channel in each image token, at the first, the middle and the last step, for the first images.

    Returns:
        (3, count, h, w) on the token grid, and the three timesteps.

    Raises:
        DgkitError: the image tokens do not form a square.
    """
    trace = observe(pipe, run.first(count), keep=[block])
    steps = trace.timesteps()
    shown = [steps[0], steps[len(steps) // 2], steps[-1]]
    maps = np.stack([trace.tensors(block, timestep=t)[..., dim].abs().float().numpy() for t in shown])
    side = side_of_square(maps.shape[2])
    return maps.reshape(*maps.shape[:2], side, side), shown
