"""Detail only, or collapse? How much of a block's largest channels can be zeroed before the content goes.

The paper says that massive activations carry local detail and no content. A later one (arXiv 2605.13974) says that the
same channels carry the prompt, and that without them images collapse. The two disrupt different numbers of channels,
in different blocks and steps, so here all three are swept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from dgbook.chapters.intervention import contrast, image_effects, paired_measures, summarise
from dgbook.chapters.sampling import Samples
from dgbook.measures.judges import Judge
from dgkit import checks
from dgkit.disruption import disrupt
from dgkit.recording import Trace

STEPS = {"all steps": (0.0, 1.0), "first half": (0.0, 0.5), "second half": (0.5, 1.0)}
NOTHING, DETAIL, COLLAPSE, UNDECIDED = "almost nothing", "detail only", "content lost", "undecided"
ALMOST_NONE = 0.05  # relative error, and share of the images that lose what was asked for; our choice


def blocks_to_sweep(count: int, preset: int) -> list[int]:
    """The preset's block and, if they are others, the first, the middle and the last but one of `count` blocks.

    After the last block nothing is left but the output layer.
    """
    return sorted({0, count // 2, max(count - 2, 0), preset})


def sweep(
    pipe: Any,
    run: Samples,
    trace: Trace,
    *,
    blocks: Sequence[int],
    counts: Sequence[int],
    timed: int,
    seed: int,
    judge: Judge | None,
) -> pd.DataFrame:
    """Zero the k largest channels of one block, or k random others (one draw), and compare with the paired originals.

    Args:
        pipe: a pipeline.
        run: what to sample.
        trace: of the same model; the largest channels are those of its mean |z|.
        blocks: the blocks that are edited, one at a time.
        counts: the numbers k of channels.
        timed: the block that is edited in one half of the steps only, too.
        seed: of the random channels.
        judge: tells whether the content is still there; without one "content lost" cannot be found.

    Returns:
        One row per (channels, steps, block, k): low_error, high_error, sharpness_ratio and, with a judge,
        agreement_change (against the originals), each with its interval's ends as NAME.low and NAME.high; and
        regime (see `regime`).

    Raises:
        DgkitError: a count is not an integer from 1 to half of the channels, or as for `dgkit.disrupt`.
    """
    half = trace.anatomy.channels // 2
    checks.distinct("channel_counts", counts, 1, half, allowed=f"integers from 1 to {half}, half of the channels")
    original = run.images(pipe)
    places = [("all steps", block) for block in blocks]
    cases = [(channels, steps, block) for channels in ("largest", "random") for steps, block in places]
    cases += [("largest", steps, timed) for steps in STEPS if steps != "all steps"]
    rows = []
    for channels, steps, block in cases:
        ordered = trace.mean_abs()[block].argsort(descending=True).tolist()
        start, stop = STEPS[steps]
        for k in counts:
            kind = "zero" if channels == "largest" else "random"
            with disrupt(pipe, block=block, dims=ordered[:k], kind=kind, seed=seed, start=start, stop=stop):
                edited = run.images(pipe)
            effects = image_effects(paired_measures({"original": original, "edited": edited}, "original", judge))
            row = _measured(effects, judge is not None)
            rows.append({"channels": channels, "steps": steps, "block": block, "k": k} | row | {"regime": regime(row)})
    return pd.DataFrame(rows)


def _measured(effects: pd.DataFrame, judged: bool) -> dict[str, float]:
    edited = summarise(effects)["edited"]
    intervals = {name: edited[name] for name in ("low_error", "high_error", "sharpness_ratio")}
    if judged:
        intervals["agreement_change"] = contrast(effects, "edited", "original", "agreement")
    row: dict[str, float] = {}
    for name, interval in intervals.items():
        row |= {name: interval.value, f"{name}.low": interval.low, f"{name}.high": interval.high}
    return row


def regime(row: Mapping[str, float]) -> str:
    """What one edit did, by whole intervals.

    "content lost": the judge finds what was asked for in fewer images. Where fewer than 5 % of them lose it and the
    relative error at low spatial frequencies is below 0.05: "almost nothing" if so is the one at high frequencies,
    "detail only" if it is above. Else "undecided", as without a judge.
    """
    if "agreement_change" not in row:
        return UNDECIDED
    if row["agreement_change.high"] < 0:
        return COLLAPSE
    if row["agreement_change.low"] <= -ALMOST_NONE or row["low_error.high"] >= ALMOST_NONE:
        return UNDECIDED
    if row["high_error.high"] < ALMOST_NONE:
        return NOTHING
    return DETAIL if row["high_error.low"] > ALMOST_NONE else UNDECIDED


def values(table: pd.DataFrame) -> dict[str, Any]:
    """`sweep` as numbers for a result file.

    Under its channels and steps are the rows (block, k, then each measure with its low and high end). With a judge the
    channels' "detail only" and "content lost" count the settings over all steps that are in a regime, of all
    "settings", and "collapse_at" is the smallest k that loses the content in some block, 0 for none.
    """
    judged = "agreement_change" in table
    measures = ["low_error", "high_error", "sharpness_ratio"] + ["agreement_change"] * judged
    columns = ["block", "k", *(f"{measure}{end}" for measure in measures for end in ("", ".low", ".high"))]
    of_largest = table[(table["channels"] == "largest") & (table["steps"] == "all steps")]
    found: dict[str, Any] = {"settings": len(of_largest)}
    for (channels, steps), part in table.groupby(["channels", "steps"], sort=False):
        of_channels = found.setdefault(channels, {})
        of_channels[steps] = part[columns].to_numpy(float)
        if steps == "all steps" and judged:
            lost = part.loc[part["regime"] == COLLAPSE, "k"]
            of_channels["collapse_at"] = int(lost.min()) if len(lost) else 0
            of_channels |= {regime: int((part["regime"] == regime).sum()) for regime in (DETAIL, COLLAPSE)}
    return {"regimes": found}


def regime_table(table: pd.DataFrame) -> pd.DataFrame:
    """`sweep` for people: the regime of each setting, a row per (channels, steps, block), a column per k."""
    keys = ["channels", "steps", "block"]
    shown = table.pivot(index=keys, columns="k", values="regime").rename(columns=lambda k: f"k = {k}")
    order = table[keys].drop_duplicates()
    return shown.loc[list(order.itertuples(index=False, name=None))].reset_index().rename_axis(columns=None)
