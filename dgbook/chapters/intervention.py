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
from dgkit.massive import matched_dims
from dgkit.recording import Trace


def open_study(*, random_draws: int, drawn_samples: int, **sampled: Any) -> study.Study:
    """Chapter 3: a run with CFG, its first `drawn_samples` images for each random draw; see `study.open_study`."""
    opened = study.open_study(cfg=True, **sampled)
    return opened.begin(
        "03_intervention",
        block=opened.block,
        guidance_scale=opened.guidance_scale,
        dims=opened.dims,
        random_draws=random_draws,
        drawn_samples=drawn_samples,
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


def equal_counts(trace: Trace, block: int, dims: Sequence[int]) -> list[int]:
    """As many other channels of `block` as there are `dims`, the largest by mean |z|."""
    order = trace.mean_abs()[block].argsort(descending=True).tolist()
    return [dim for dim in order if dim not in dims][: len(dims)]


def equal_energy(trace: Trace, block: int, dims: Sequence[int]) -> list[int]:
    """The other channels that carry as much magnitude as `dims` (see `dgkit.massive.matched_dims`).

    None where that takes more than a quarter of all channels: zeroing so many is another edit, not a control.
    """
    found = matched_dims(trace, block, list(dims))
    return found if len(found) <= trace.anatomy.channels // 4 else []


def intervene(study: study.Study, *, draws: int, drawn_samples: int) -> dict[str, Images]:
    """Images of the original model and of models disrupted at the study's block (appendix D and its controls).

    Settings: "original"; "massive" (dims zeroed); "left half" (zeroed in those tokens alone, see `left_half`); "norm
    kept" (zeroed, but the later LayerNorms keep their statistics; only for classes whose LayerNorms dgkit knows);
    "mean" (dims set to their token mean); "next" (as many of the largest other channels zeroed); "matched" (as much
    magnitude of other channels zeroed, where few enough have it, see `equal_energy`); "random" (as many other channels
    zeroed, the paper's control; `draws` times another set, the first `drawn_samples` images).

    Returns:
        (N, H, W, 3) by setting, "random" (`draws`, `drawn_samples`, H, W, 3).

    Raises:
        DgkitError: `draws` is not a positive integer, `drawn_samples` not from 1 to N, or as for `dgkit.disrupt`.
    """
    checks.integer("random_draws", draws, 1)
    checks.integer("drawn_samples", drawn_samples, 1, len(study.run.seeds))
    pipe, run, block, dims = study.pipe, study.run, study.block, study.dims
    edits: dict[str, dict[str, Any]] = {
        "massive": {"dims": dims},
        "left half": {"dims": dims, "tokens": left_half(pipe, run)},
        "norm kept": {"dims": dims, "keep_norm": True},
        "mean": {"dims": dims, "kind": "mean"},
        "next": {"dims": equal_counts(study.trace, block, dims)},
        "matched": {"dims": equal_energy(study.trace, block, dims)},
    }
    if not dissect(pipe).row.last_norm:
        del edits["norm kept"]
    if not edits["matched"]["dims"]:
        del edits["matched"]
    seeds = _distinct_draws(dissect(pipe), dims, draws, study.sampled["seed"])

    def edited(run: Samples, **edit: Any) -> Images:
        with disrupt(pipe, block=block, **edit):
            return run.images(pipe)

    few = run.first(drawn_samples)
    return {
        "original": run.images(pipe),
        **{name: edited(run, **edit) for name, edit in edits.items()},
        "random": np.stack([edited(few, dims=dims, kind="random", seed=own_seed) for own_seed in seeds]),
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


def image_measures(
    images: Mapping[str, Images], baseline: str, judge: Judge | None = None
) -> dict[str, NDArray[np.float64]]:
    """`paired_measures`, and with a judge what each image adds to its setting's distances from real images.

    detail_distance (`Judge.detail_distance`) and frechet (`Judge.frechet_contributions`); draws have none.
    """
    found = paired_measures(images, baseline, judge)
    for name, batch in images.items():
        if judge is not None and batch.ndim == 4:
            found[f"{name}.detail_distance"] = judge.detail_distance(batch)
            found[f"{name}.frechet"] = judge.frechet_contributions(judge.features(batch))
    return found


def paired_measures(
    images: Mapping[str, Images], baseline: str, judge: Judge | None = None
) -> dict[str, NDArray[np.float64]]:
    """Per image and setting, what differs from the paired image of `baseline`: arrays (N,) under "SETTING.MEASURE".

    low_error, high_error: relative squared error below and above 1/8 cycles/pixel. sharpness_ratio: of the variance of
    the Laplacian; scaled so that the mean over images is the ratio of the means, which unlike the mean of ratios does
    not favour sharper. high_frequency_change: difference of the energy share above 1/4 cycles/pixel. With a judge also
    agreement: 1 where it finds what was asked for.

    A setting of several draws, (draws, n, H, W, 3), of the first n images has arrays (draws, n).
    """
    found: dict[str, NDArray[np.float64]] = {}
    for name, batch in images.items():
        draws = [_pair_measures(draw, images[baseline][: len(draw)], judge) for draw in _draws(batch)]
        for measure in draws[0]:
            stacked = np.stack([draw[measure] for draw in draws])
            found[f"{name}.{measure}"] = stacked if batch.ndim == 5 else stacked[0]
    return found


def _pair_measures(batch: Images, reference: Images, judge: Judge | None) -> dict[str, NDArray[np.float64]]:
    low, high = band_error(batch, reference)
    sharp = sharpness(reference)
    columns = {
        "low_error": low,
        "high_error": high,
        "sharpness_ratio": 1 + (sharpness(batch) - sharp) / sharp.mean(),
        "high_frequency_change": high_frequency_energy(batch) - high_frequency_energy(reference),
    }
    if judge is not None:
        columns["agreement"] = judge.first(len(batch)).agreement(batch).astype(float)
    return columns


def image_effects(measured: Mapping[str, NDArray[np.float64]]) -> pd.DataFrame:
    """`image_measures` as a table: setting, image, then a column per measure. Draws are averaged, per image."""
    tables: dict[str, dict[str, NDArray[np.float64]]] = {}
    for key, values in measured.items():
        setting, _, measure = key.rpartition(".")
        tables.setdefault(setting, {})[measure] = values.mean(0) if values.ndim == 2 else values
    frames = [
        pd.DataFrame({"setting": setting, "image": np.arange(len(next(iter(columns.values())))), **columns})
        for setting, columns in tables.items()
    ]
    return pd.concat(frames, ignore_index=True)


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
            if group[column].notna().all()  # draws have no distances
        }
        for setting, group in effects.groupby("setting", sort=False)
    }


def contrast(effects: pd.DataFrame, a: str, b: str, column: str) -> Interval:
    """Mean of the paired difference a - b of one column, with its interval, over the images that both have."""
    table = effects.pivot(index="image", columns="setting", values=column)[[a, b]].dropna()
    return stats.paired_bootstrap(table[a].to_numpy(), table[b].to_numpy())


def contrasts(
    effects: pd.DataFrame, pairs: Iterable[tuple[str, str]], columns: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    """`contrast` of each pair in each column; that of (a, b) is under "a - b"."""
    return {
        f"{a} - {b}": {column: contrast(effects, a, b, column) for column in columns if _have(effects, (a, b), column)}
        for a, b in pairs
    }


def _have(effects: pd.DataFrame, settings: tuple[str, str], column: str) -> bool:
    """Whether all of the `settings` have the measure."""
    return all(effects.loc[effects["setting"] == setting, column].notna().any() for setting in settings)


def intervention_values(effects: pd.DataFrame) -> dict[str, Any]:
    """What Fig. 5 shows, as numbers: "settings" has every effect's mean, "contrast" massive channels minus controls.

    Agreement and the distances from real images are compared with the originals' too.
    """
    controls = [name for name in effects["setting"].unique() if name not in ("original", "massive", "left half")]
    columns = [column for column in measures(effects) if column != "high_frequency_change"]
    found = contrasts(effects, (("massive", control) for control in controls), columns)
    judged = [column for column in ("agreement", "detail_distance", "frechet") if column in effects]
    if judged:
        found |= contrasts(effects, [("massive", "original")], judged)
    return {"settings": summarise(effects), "contrast": found}


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


def draw_values(measured: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """The massive channels against each random draw by itself, over the images that both have.

    "high_error": mean high-frequency error of each draw (see `image_measures`); "massive": that of the massive
    channels; "below": how many draws have a smaller one.
    """
    drawn = measured["random.high_error"]
    massive, means = measured["massive.high_error"][: drawn.shape[1]].mean(), drawn.mean(1)
    return {"draws": {"high_error": means, "massive": massive, "below": int((means < massive).sum())}}
