"""Section 4.1, Figure 4: timestep against text."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbook.chapters import study
from dgbook.measures import stats
from dgbook.measures.stats import Interval
from dgkit.gates import gate_agreement, residual_gates
from dgkit.recording import Trace

PERMUTATIONS = 999


def open_study(*, images_per_condition: int, **sampled: Any) -> study.Study:
    """Chapter 2: a run with CFG; see `study.open_study`."""
    opened = study.open_study(cfg=True, observed=4, images_per_condition=images_per_condition, **sampled)
    return opened.begin(
        "02_timestep_vs_text",
        block=opened.block,
        guidance_scale=opened.guidance_scale,
        dims=opened.dims,
        images_per_condition=images_per_condition,
    )


def timestep_shares(trace: Trace, conditions: Sequence[Any], block: int) -> dict[int, dict[str, Interval]]:
    """For each tracked dim, the shares of the variance of its mean |z| that timestep, condition and noise explain.

    "residual" is what moves differently along time from image to image. Where some condition has one image, or all
    images have the same condition, condition and noise cannot be told apart and are one share, "condition and noise".
    """
    values = trace.tracked()[:, :, block].numpy()  # (timesteps, images, dims)
    images_of = Counter(conditions)
    labels = conditions if len(images_of) > 1 and min(images_of.values()) > 1 else None
    sampled = isinstance(conditions[0], str)  # prompts are a sample of all prompts; classes are all there are
    names = {"image": "condition and noise"} if labels is None else {"class": "condition", "image": "noise"}
    return {
        dim: {
            names.get(part, part): share
            for part, share in stats.variance_explained(values[:, :, i].T, labels, sampled_labels=sampled).items()
        }
        for i, dim in enumerate(trace.track)
    }


def timestep_values(trace: Trace, conditions: Sequence[Any], block: int) -> dict[str, Any]:
    """What Fig. 4 shows, as numbers, for the first tracked dim: shares of variance, trend over time, gate agreement.

    Conditions with several images have a share "condition"; else there is only "condition_and_noise", of both together.
    "trend" is mean |z| at the last step (least noise) over that at the first, over images.
    """
    shares = timestep_shares(trace, conditions, block)[trace.track[0]]
    tracked = trace.tracked()[:, :, block, 0].numpy()
    gates = gate_agreement(trace)
    return {
        "dim": trace.track[0],
        "share": {
            part.replace(" ", "_"): shares[part]
            for part in ("timestep", "condition", "condition and noise")
            if part in shares
        },
        "trend": stats.bootstrap(tracked[-1] / tracked[0]),
        "gates": {
            "count": len(gates),
            "same_largest": int(gates["same_largest"].sum()),
            "rank_correlation": float(gates["rank_correlation"].median()),
        },
        "timesteps": trace.timesteps(),
        "magnitude_by_timestep": tracked.mean(1),
    }


def timestep_arrays(trace: Trace, conditions: Sequence[Any], block: int) -> dict[str, NDArray[Any]]:
    """What the tests of the chapter rest on, for a result's `arrays`.

    "magnitude.by_timestep": mean |z| of the first tracked dim, (timesteps, images), and "magnitude.condition", a number
    for each image's condition: of both `variance_explained` can be computed again. "magnitude.trend": of each image,
    the last step's magnitude over the first's, or with classes over that of the middle step (the paper claims it of
    DiT-XL from T/2 on). "gates.percentile": for each residual gate, the share of channels that z's largest channel
    exceeds in |alpha| of the same block; "gates.permuted": its mean over gates under `PERMUTATIONS` of the channels.
    """
    tracked = trace.tracked()[:, :, block, 0].numpy()
    gates = residual_gates(trace)
    order = gates.mean_abs.argsort(1).argsort(1).numpy() / (gates.mean_abs.shape[1] - 1)
    largest = [int(trace.mean_abs()[row].argmax()) for row, _ in gates.rows]
    first = 0 if isinstance(conditions[0], str) else len(tracked) // 2
    rng, each = np.random.default_rng(0), np.arange(len(largest))
    permuted = [order[each, rng.permutation(order.shape[1])[largest]].mean() for _ in range(PERMUTATIONS)]
    return {
        "magnitude.by_timestep": tracked,
        "magnitude.condition": np.unique([str(c) for c in conditions], return_inverse=True)[1],
        "magnitude.trend": tracked[-1] / tracked[first],
        "gates.percentile": order[each, largest],
        "gates.permuted": np.array(permuted),
    }
