"""Which channels are massive: three criteria over recorded statistics."""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from dgkit.checks import integer, number, one_of
from dgkit.recording import Trace

CRITERIA = ("ratio", "sun", "top_k")


@dataclass(frozen=True)
class Massive:
    """The massive channels found in one trace.

    Attributes:
        criterion: the criterion and its thresholds, in words.
        blocks: number of blocks looked at.
        rows: one row per (block, dim): mean_abs, max_abs, ratio (mean |z| over the block's median channel),
            token_share; the largest mean first within a block.
    """

    criterion: str
    blocks: int
    rows: pd.DataFrame

    def table(self) -> pd.DataFrame:
        """A copy of `rows`."""
        return self.rows.copy()

    def in_block(self, block: int) -> list[int]:
        """The massive dims of one block, the largest first."""
        return self.rows.loc[self.rows["block"] == block, "dim"].tolist()

    @property
    def dims(self) -> list[int]:
        """Dims massive in at least one block: first those massive in most blocks, then by their largest ratio."""
        if self.rows.empty:
            return []
        per_dim = self.rows.groupby("dim")["ratio"].agg(["size", "max"])
        return per_dim.sort_values(["size", "max"], ascending=False).index.tolist()

    @property
    def fixed_dims(self) -> list[int]:
        """Dims massive in more than half of the blocks: the paper's "fixed feature dimensions" (section 4.1)."""
        return [d for d in self.dims if 2 * (self.rows["dim"] == d).sum() > self.blocks]


def detect_massive(
    trace: Trace,
    criterion: str = "ratio",
    *,
    ratio: float = 5.0,
    share: float = 0.5,
    magnitude: float = 100.0,
    relative: float = 1000.0,
    k: int = 1,
    label: str | None = None,
    timestep: float | None = None,
) -> Massive:
    """Find the massive channels of every block.

    Criteria:
        "ratio": mean |z| of the channel exceeds `ratio` times the median over the block's channels, and at least
            `share` of the image tokens are massive in it (with the trace's own token ratio). The paper's claim is about
            channels that are massive in *all* tokens, and gives no threshold.
        "sun": the thresholds of Sun et al. 2024 for single activations, max |z| > `magnitude` and > `relative` times
            the median; the median here is the one over channels of mean |z|.
        "top_k": the `k` channels of largest mean |z|, massive or not.

    Args:
        trace: what `dgkit.record` yielded.
        criterion, ratio, share, magnitude, relative, k: see above.
        label: branch; conditional by default.
        timestep: one recorded timestep; all together by default.

    Raises:
        DgkitError: unknown criterion, threshold out of range, or an empty trace.
        ModelError: an infinity or NaN was recorded.
    """
    one_of("criterion", criterion, CRITERIA)
    number("ratio", ratio, above=1)
    number("magnitude", magnitude, above=0)
    number("relative", relative, above=1)
    number("share", share, 0, 1)
    integer("k", k, 1, trace.anatomy.channels)

    mean, largest = trace.mean_abs(label, timestep), trace.max_abs(label, timestep)
    token_share = trace.token_share(label, timestep)
    ratios = channel_ratio(mean)
    if criterion == "ratio":
        found = (ratios > ratio) & (token_share >= share)
        words = f"mean |z| > {ratio:g} x block median in >= {share:.0%} of tokens"
    elif criterion == "sun":
        found = (largest > magnitude) & (largest > relative * mean.quantile(0.5, dim=1, keepdim=True))
        words = f"max |z| > {magnitude:g} and > {relative:g} x block median"
    else:
        found = torch.zeros_like(mean, dtype=torch.bool).scatter_(1, mean.topk(k, dim=1).indices, True)
        words = f"the {k} largest channels of each block"

    blocks, dims = found.nonzero(as_tuple=True)
    columns = {"mean_abs": mean, "max_abs": largest, "ratio": ratios, "token_share": token_share}
    rows = pd.DataFrame(
        {"block": blocks.tolist(), "dim": dims.tolist()}
        | {name: tensor[blocks, dims].tolist() for name, tensor in columns.items()}
    )
    rows = rows.sort_values(["block", "mean_abs"], ascending=[True, False], ignore_index=True)
    return Massive(words, len(mean), rows)


def channel_ratio(mean_abs: Tensor) -> Tensor:
    """Mean |z| of each channel over its block's median channel, (L, C)."""
    return mean_abs / mean_abs.quantile(0.5, dim=1, keepdim=True)


def matched_dims(trace: Trace, block: int, dims: list[int], *, label: str | None = None) -> list[int]:
    """Other channels that together carry as much magnitude at `block` as `dims` do.

    The paper's control zeroes as *many* random channels; this one zeroes as much *magnitude*: the largest channels
    outside `dims` (massive ones too, if `dims` leaves some out), in order, until their summed squared mean |z| reaches
    that of `dims` (or channels run out).

    Raises:
        DgkitError: a bad block or dim, or an empty trace.
        ModelError: an infinity or NaN was recorded.
    """
    energy = trace.mean_abs(label)[trace.anatomy.block(block).index].square()
    wanted = energy[trace.anatomy.dims(dims)].sum()
    chosen: list[int] = []
    for dim in energy.argsort(descending=True).tolist():
        if dim not in dims:
            chosen.append(dim)
            if energy[chosen].sum() >= wanted:
                break
    return chosen
