"""The residual gates alpha of Eq. 2 (adaLN-zero), and how well they predict which channels are massive."""

from dataclasses import dataclass

import pandas as pd
from scipy.stats import spearmanr
from torch import Tensor

from dgkit.anatomy import DEGRADED
from dgkit.errors import ModelError
from dgkit.recording import Trace


@dataclass(frozen=True)
class Gates:
    """Residual gates averaged over images (and timesteps).

    Attributes:
        rows: (block, branch) of each of the G rows; branch is "msa", "mlp", "msa2" (dual attention), "cross" or
            "msa+mlp".
        mean_abs: mean |alpha|, (G, C).
        mean: mean alpha with its sign, (G, C).
    """

    rows: list[tuple[int, str]]
    mean_abs: Tensor
    mean: Tensor

    def of(self, block: int, branch: str) -> Tensor:
        """Mean |alpha| of one gate, (C,)."""
        return self.mean_abs[self.rows.index((block, branch))]

    def branches(self, block: int) -> dict[str, Tensor]:
        """Mean |alpha| (C,) of each gate of one block, by branch."""
        return {branch: self.of(b, branch) for b, branch in self.rows if b == block}

    def table(self) -> pd.DataFrame:
        """One row per (block, branch, channel)."""
        channels = self.mean_abs.shape[1]
        index = pd.MultiIndex.from_tuples([(*row, c) for row in self.rows for c in range(channels)])
        index.names = ["block", "branch", "channel"]
        columns = {"mean_abs": self.mean_abs, "mean": self.mean}
        return pd.DataFrame({k: v.flatten().cpu().numpy() for k, v in columns.items()}, index).reset_index()


def residual_gates(trace: Trace, *, label: str | None = None, timestep: float | None = None) -> Gates:
    """The gates that `dgkit.record` saw.

    Raises:
        ModelError: the transformer has no residual gate, or its blocks are compiled so that hooks do not see them; or
            an infinity or NaN was recorded.
        DgkitError: empty trace, unknown label or timestep.
    """
    if not trace.gate_rows:
        raise ModelError(f"{type(trace.anatomy.model).__name__} has no residual gate")
    if trace.num_gates_seen(label, timestep) < len(trace.gate_rows) and label != DEGRADED:
        raise ModelError(
            "some residual gates were not seen: blocks that were compiled before `record` run past hooks on their "
            "parts, so record before compiling"
        )
    return Gates(
        trace.gate_rows,
        trace.gates(label, timestep),
        trace.gates(label, timestep, absolute=False),
    )


def gate_agreement(trace: Trace, *, label: str | None = None) -> pd.DataFrame:
    """Does alpha's pattern over channels predict that of z? (Fig. 4a: "the scaling factor governs the pattern".)

    Per (block, branch): Spearman's rank correlation between mean |alpha| and mean |z| of the same block's output,
    whether the largest channel is the same, and the rank (1 = largest) that z's largest channel has in |alpha|.

    Raises:
        DgkitError: as for `residual_gates`.
    """
    gates = residual_gates(trace, label=label)
    magnitude = trace.mean_abs(label)
    rows = []
    for (block, branch), alpha in zip(gates.rows, gates.mean_abs, strict=True):
        largest = int(magnitude[block].argmax())
        rows.append(
            {
                "block": block,
                "branch": branch,
                "rank_correlation": float(spearmanr(alpha.cpu(), magnitude[block].cpu()).statistic),
                "same_largest": int(alpha.argmax()) == largest,
                "rank_of_largest": int((alpha > alpha[largest]).sum()) + 1,
            }
        )
    return pd.DataFrame(rows)
