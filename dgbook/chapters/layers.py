"""Section 4.1, Figures 2 and 3: where massive activations are."""

import json
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dgbook.chapters import study
from dgbook.chapters.sampling import Samples, observe, side_of_square
from dgkit.massive import Massive, channel_ratio
from dgkit.paths import DATA
from dgkit.recording import Trace


def open_study(*, threshold: float, **sampled: Any) -> study.Study:
    """Chapter 1: every image of a run with CFG is recorded; see `study.open_study`."""
    opened = study.open_study(cfg=True, observed=None, ratio=threshold, **sampled)
    return opened.begin("01_layer_properties", threshold=threshold, guidance_scale=opened.guidance_scale)


def layer_values(trace: Trace, massive: Massive, threshold: float) -> dict[str, Any]:
    """What Fig. 2 and 3(a) show, as numbers: how many blocks have massive channels, which, on how many tokens.

    "largest" is the channel with the largest ratio to its block's median.
    """
    ratios = channel_ratio(trace.mean_abs())
    block, dim = divmod(int(ratios.argmax()), trace.anatomy.channels)
    return {
        "blocks": len(ratios),
        "threshold": threshold,
        "blocks_with_massive": int(massive.rows["block"].nunique()),
        "massive_dims": massive.dims,
        "fixed_dims": massive.fixed_dims,
        "largest": {
            "block": block,
            "dim": dim,
            "ratio": float(ratios[block, dim]),
            "token_share": float(trace.token_share()[block, dim]),
        },
        "largest_ratio_by_block": ratios.amax(1),
        "mean_abs": trace.mean_abs(),
    }


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
