"""Section 4.2, Figure 5: what breaks when massive activations are disrupted."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import comb
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dgbook.chapters import study
from dgbook.chapters.sampling import Images, Samples, observe, side_of_square
from dgbook.measures import stats
from dgbook.measures.judges import Judge
from dgbook.measures.spectrum import band_error, high_frequency_energy, radial_power_spectrum, sharpness
from dgbook.measures.stats import Interval
from dgkit import checks
from dgkit.anatomy import Anatomy, dissect
from dgkit.disruption import disrupt, make_edit


def open_study(*, random_draws: int, **sampled: Any) -> study.Study:
    """Chapter 3: a run with CFG; see `study.open_study`."""
    opened = study.open_study(cfg=True, **sampled)
    return opened.begin(
        "03_intervention",
        block=opened.block,
        guidance_scale=opened.guidance_scale,
        dims=opened.dims,
        random_draws=random_draws,
    )


def left_half(pipe: Any, run: Samples) -> list[int]:
    """The image tokens in the left half of the image, counted row by row.

    Raises:
        DgkitError: the image tokens do not form a square.
    """
    side = _token_grid(pipe, run)
    return [row * side + column for row in range(side) for column in range(side // 2)]


def _token_grid(pipe: Any, run: Samples) -> int:
    """How many image tokens there are along each side of the image."""
    return side_of_square(observe(pipe, replace(run.first(1), steps=1), keep=[0]).tensors(0).shape[1])


def intervene(
    pipe: Any, run: Samples, *, block: int, dims: Sequence[int], matched: Sequence[int], draws: int, seed: int
) -> dict[str, Images]:
    """Images of the original model and of models disrupted at `block` (appendix D and its controls).

    Settings: "original"; "massive" (dims zeroed); "left half" (zeroed in those tokens alone, see `left_half`); "norm
    kept" (zeroed, but the later LayerNorms keep their statistics; only for classes whose LayerNorms dgkit knows);
    "mean" (dims set to their token mean); "matched" (non-massive channels of as much magnitude zeroed); "random" (as
    many other channels zeroed, the paper's control; `draws` times another set).

    Returns:
        (N, H, W, 3) by setting, "random" (`draws`, N, H, W, 3).

    Raises:
        DgkitError: `draws` is not a positive integer, or as for `dgkit.disrupt`.
    """
    checks.integer("random_draws", draws, 1)
    edits: dict[str, dict[str, Any]] = {
        "massive": {"dims": dims},
        "left half": {"dims": dims, "tokens": left_half(pipe, run)},
        "norm kept": {"dims": dims, "keep_norm": True},
        "mean": {"dims": dims, "kind": "mean"},
        "matched": {"dims": matched},
    }
    if not dissect(pipe).row.last_norm:
        del edits["norm kept"]
    seeds = _distinct_draws(dissect(pipe), dims, draws, seed)

    def edited(**edit: Any) -> Images:
        with disrupt(pipe, block=block, **edit):
            return run.images(pipe)

    return {
        "original": run.images(pipe),
        **{name: edited(**edit) for name, edit in edits.items()},
        "random": np.stack([edited(dims=dims, kind="random", seed=own_seed) for own_seed in seeds]),
    }


def _distinct_draws(anatomy: Anatomy, dims: Sequence[int], draws: int, seed: int) -> list[int]:
    """Seeds of `draws` different sets of random channels, from `seed` * 1000 on."""
    possible = comb(anatomy.channels - len(dims), len(dims))
    if draws > possible:
        checks.refuse("random_draws", draws, f"there are {possible} sets of other channels")
    seeds: dict[tuple[int, ...], int] = {}
    own_seed = seed * 1000
    while len(seeds) < draws:
        seeds.setdefault(tuple(make_edit(anatomy, dims, "random", own_seed).dims), own_seed)
        own_seed += 1
    return list(seeds.values())


def image_effects(images: Mapping[str, Images], baseline: str, judge: Judge | None = None) -> pd.DataFrame:
    """Per image and setting, what differs from the paired image of `baseline`.

    Columns: low_error, high_error (relative squared error below and above 1/8 cycles/pixel), sharpness_ratio (of the
    variance of the Laplacian; scaled so that the mean over images is the ratio of the means, which unlike the mean of
    ratios does not favour sharper), high_frequency_change (difference of the energy share above 1/4
    cycles/pixel), and with a judge agreement (1 where it finds what was asked for).
    A setting of several draws, (draws, N, H, W, 3), is averaged over them, per image.
    """
    reference = images[baseline]
    sharp = sharpness(reference)
    rows = []
    for name, batch in ((name, one) for name, found in images.items() for one in _draws(found)):
        low, high = band_error(batch, reference)
        columns = {
            "setting": name,
            "image": np.arange(len(batch)),
            "low_error": low,
            "high_error": high,
            "sharpness_ratio": 1 + (sharpness(batch) - sharp) / sharp.mean(),
            "high_frequency_change": high_frequency_energy(batch) - high_frequency_energy(reference),
        }
        if judge is not None:
            columns["agreement"] = judge.agreement(batch).astype(float)
        rows.append(pd.DataFrame(columns))
    return pd.concat(rows).groupby(["setting", "image"], sort=False).mean().reset_index()


def _draws(images: Images) -> Iterable[Images]:
    """The draws of a setting: one, unless the images have five axes."""
    return images if images.ndim == 5 else [images]


def spectra(images: Mapping[str, Images]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """The spatial frequencies and, per setting, the power at each, mean over its images (`radial_power_spectrum`)."""
    found = {name: radial_power_spectrum(batch) for name, batch in images.items()}
    frequencies = next(iter(found.values()))[1]
    return frequencies, {name: power.mean(0) for name, (power, _) in found.items()}


def measures(effects: pd.DataFrame) -> list[str]:
    """The columns of `image_effects` that measure something."""
    return [column for column in effects.columns if column not in ("setting", "image")]


def summarise(effects: pd.DataFrame) -> dict[str, dict[str, Interval]]:
    """Mean over images with its interval (Wilson's for shares), by setting and column."""
    return {
        str(setting): {
            # only agreement can be a share; errors that are all 0, as the original's, are not
            column: (stats.mean if column == "agreement" else stats.bootstrap)(group[column].to_numpy())
            for column in measures(effects)
        }
        for setting, group in effects.groupby("setting", sort=False)
    }


def contrast(effects: pd.DataFrame, a: str, b: str, column: str) -> Interval:
    """Mean of the paired difference a - b of one column, with its interval."""
    table = effects.pivot(index="image", columns="setting", values=column)
    return stats.paired_bootstrap(table[a].to_numpy(), table[b].to_numpy())


def contrasts(
    effects: pd.DataFrame, pairs: Iterable[tuple[str, str]], columns: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    """`contrast` of each pair in each column; that of (a, b) is under "a - b"."""
    return {f"{a} - {b}": {column: contrast(effects, a, b, column) for column in columns} for a, b in pairs}


def intervention_values(effects: pd.DataFrame, matched: Sequence[int]) -> dict[str, Any]:
    """What Fig. 5 shows, as numbers: "settings" has every effect's mean, "contrast" massive channels minus controls.

    Agreement is compared with the originals too.
    """
    controls = [name for name in effects["setting"].unique() if name not in ("original", "massive", "left half")]
    columns = [column for column in measures(effects) if column != "high_frequency_change"]
    found = contrasts(effects, (("massive", control) for control in controls), columns)
    if "agreement" in effects:
        found |= contrasts(effects, [("massive", "original")], ["agreement"])
    return {"settings": summarise(effects), "contrast": found, "matched_dims": list(matched)}


def half_values(pipe: Any, run: Samples, images: Mapping[str, Images]) -> dict[str, Any]:
    """What editing the tokens of `left_half` alone does to the pixels under them and to the others.

    "edited" and "other" (see `image_effects`) are the errors of the original with one part of its pixels replaced by
    the edited image's, "contrast" is their paired difference. The other pixels need not stay as they are: attention
    mixes the tokens in all later blocks.

    Args:
        pipe, run: what made the images.
        images: with "original" and "left half" of `intervene`, (N, H, W, 3) each.
    """
    original, edited = images["original"], images["left half"]
    side = _token_grid(pipe, run)
    edge = original.shape[2] * (side // 2) // side
    left = band_error(np.concatenate([edited[:, :, :edge], original[:, :, edge:]], 2), original)[1]
    right = band_error(np.concatenate([original[:, :, :edge], edited[:, :, edge:]], 2), original)[1]
    half = {
        "edited": {"high_error": stats.bootstrap(left)},
        "other": {"high_error": stats.bootstrap(right)},
        "contrast": stats.paired_bootstrap(left, right),
    }
    return {"half": half}


def draw_values(images: Mapping[str, Images]) -> dict[str, Any]:
    """The massive channels against each random draw by itself.

    "high_error": mean high-frequency error of each draw (see `image_effects`); "below": how many of them have a smaller
    one than the massive channels.
    """
    massive, *drawn = (band_error(b, images["original"])[1].mean() for b in (images["massive"], *images["random"]))
    return {"draws": {"high_error": np.array(drawn), "below": int((drawn < massive).sum())}}
