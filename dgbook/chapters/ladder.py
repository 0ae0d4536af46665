"""Do massive activations grow with training and with size? What the ladder of `tiny-dit`s shows, Fig. 3(b) and (c).

Four sizes in the proportions of DiT-S, -B, -L and -XL (Peebles & Xie 2023), all trained for as many steps, the two
smallest from two seeds; L is as large as the shipped `tiny-dit`, but another training. The weights are not kept;
`training.ladder` says how to train and measure them again.
"""

import json
from collections.abc import Mapping, Sequence
from math import factorial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import permutation_test, spearmanr

from dgbook.measures.stats import Interval
from dgkit.errors import DgkitError
from dgkit.paths import DATA

RUNGS = ("tiny-dit-s", "tiny-dit-b", "tiny-dit-l", "tiny-dit-xl")
"""The sizes, smallest first."""


def measurements() -> dict[str, dict[str, Any]]:
    """What `measure_rung` wrote of each size, the smallest first; a size that nobody measured is left out."""
    files = {name: DATA / "ladder" / f"{name}.json" for name in RUNGS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


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
        raise DgkitError(
            "the ladder's sizes have no training step in common: measure them with `python -m training measure`"
        )
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

    "largest_spread" is the most that trainings of one size differ. "rank_correlation" is that between the sizes'
    parameters and their largest ratios, means over a size's trainings, which are no independent samples of size; "p"
    its two-sided p-value over all orders of the ratios, and "smallest_p" the smallest that so few sizes can have. Width
    and depth grow together and one recipe trained all, so it speaks of this ladder only.

    Raises:
        DgkitError: fewer than three sizes are measured, or they have no step in common.
    """
    table = sizes(history())
    means = table.groupby("size", sort=False)[["parameters", "ratio"]].mean()
    if len(means) < 3:
        raise DgkitError(f"the ladder has {len(means)} measured sizes in {DATA / 'ladder'}: at least 3 are needed")
    correlation, p = _rank_correlation(means["parameters"].to_numpy(), means["ratio"].to_numpy())
    return {
        "sizes": table["size"].tolist(),
        "seeds": table["seed"].tolist(),
        "step": int(table["step"].iloc[0]),
        "parameters": table["parameters"].tolist(),
        "largest_ratio": table["ratio"].tolist(),
        "largest_spread": float(table.groupby("size")["ratio"].agg(np.ptp).max()),
        "massive_blocks": table["massive_blocks"].tolist(),
        "rank_correlation": correlation,
        "p": p,
        "smallest_p": 2 / factorial(len(means)),
    }


def sentence(v: Mapping[str, Any]) -> str:
    """`values` in words."""
    correlation, count = v["rank_correlation"], len(v["sizes"])
    rises = "does not rise" if correlation <= 0 else "rises" if correlation > 1 - 1e-9 else "does not rise steadily"
    told = "" if v["p"] < 0.05 else ", which so few sizes cannot tell from chance"
    ratios = ratios_of_sizes(v["sizes"], v["largest_ratio"])
    millions = ", ".join(f"{n / 1e6:.1f}" for n in dict.fromkeys(v["parameters"]))
    massive = sum(share > 0 for share in v["massive_blocks"])
    return (
        f"After {v['step']:,} training steps, the largest channel is {ratios} times its block's median in "
        f"models of {millions} million parameters, and above five times in {massive} of the {count} trainings: in this "
        f"ladder the ratio {rises} with size{told} (rank correlation of the sizes' means {correlation:.2f}, "
        f"p = {v['p']:.2f}, and never less than {v['smallest_p']:.2f} with as many); "
        f"trainings of one size differ by up to {v['largest_spread']:.1f}."
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
    found = permutation_test(
        [x], lambda order: spearmanr(order, y).statistic, permutation_type="pairings", n_resamples=factorial(len(x))
    )
    return float(found.statistic), float(found.pvalue)
