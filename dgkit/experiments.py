"""What the notebooks measure: one function per experiment of the paper, from a pipeline to plain numbers."""

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb, isqrt
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from dgkit import paper, stats
from dgkit.anatomy import Anatomy, dissect
from dgkit.errors import DgkitError
from dgkit.gates import gate_agreement
from dgkit.generate import generate, own_conditions
from dgkit.guidance import METHODS, Method
from dgkit.guidance import guide as guided_by
from dgkit.hooks import Trace, disrupt, make_edit, record
from dgkit.massive import Massive, channel_ratio, detect_massive
from dgkit.metrics.features import efficientnet_features
from dgkit.metrics.frechet import frechet_distance
from dgkit.metrics.judges import FashionJudge, Judge, judge_set_scores
from dgkit.metrics.spectrum import band_error, high_frequency_energy, sharpness
from dgkit.paths import DATA
from dgkit.stats import Interval
from dgkit.tiny.data import as_samples, fashion_mnist
from dgkit.zoo import preset_of

Images = NDArray[np.uint8]

# -------------------------------------------------------------------------------------------------- what to generate


@dataclass(frozen=True)
class Samples:
    """What one run samples: as many conditions as seeds, and how.

    Attributes:
        conditions: class ids or prompts.
        seeds: one per condition.
        steps: sampling steps.
        guidance_scale: s of u + s (c - u); 1 for no CFG.
        batch_size: images per call of the pipeline.
    """

    conditions: list[Any]
    seeds: list[int]
    steps: int
    guidance_scale: float = 1.0
    batch_size: int = 64

    def images(self, pipe: Any, guidance_scale: float | None = None) -> Images:
        """Generate them, (N, H, W, 3); `guidance_scale` overrides the run's own."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return generate(
            pipe,
            self.conditions,
            self.seeds,
            num_inference_steps=self.steps,
            guidance_scale=scale,
            batch_size=self.batch_size,
        )

    def first(self, count: int) -> "Samples":
        """The same run with its first `count` images only."""
        return replace(self, conditions=self.conditions[:count], seeds=self.seeds[:count])


def samples(
    pipe: Any,
    count: int,
    seed: int,
    steps: int,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
    each: int = 1,
) -> Samples:
    """The first `count / each` of the model's own conditions (see `own_conditions`), as a whole `each` times over.

    Raises:
        DgkitError: `count` or `each` is not a positive integer, or `each` does not divide `count`.
    """
    for name, number in (("num_samples", count), ("images_per_condition", each)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise DgkitError(f"{name}={number!r} is not allowed: give an integer, 1 or above")
    if count % each:
        raise DgkitError(f"images_per_condition={each} is not allowed: give a divisor of num_samples={count}")
    conditions = own_conditions(pipe, count // each) * each
    return Samples(conditions, [seed * 1_000_000 + i for i in range(count)], steps, guidance_scale, batch_size)


def condition_names(pipe: Any, conditions: Sequence[Any]) -> list[str]:
    """A short name for each condition."""
    by_id = {number: name for name, number in reversed(getattr(pipe, "labels", {}).items())}
    return [str(by_id.get(c, c)) for c in conditions]


def subject(trace: Trace, block: int | None, dims: Sequence[int] | None) -> tuple[int, list[int]]:
    """The block and dims to study: as given, else the model's preset, else what the trace shows.

    Without a preset, the block is a quarter of the way in (SD3's 6 of 24), and the dims are those massive in that
    block, or its largest channel when none is.
    """
    preset = preset_of(trace.anatomy)
    if block is None:
        block = preset.block if preset and preset.block is not None else len(trace.anatomy.blocks) // 4
    if dims is None:
        found = detect_massive(trace).in_block(block) or detect_massive(trace, "top_k").in_block(block)
        dims = preset.dims if preset and preset.dims else found
    return trace.anatomy.block(block).index, trace.anatomy.dims(list(dims))


def observe(
    pipe: Any, run: Samples, *, ratio: float = 5.0, track: Sequence[int] = (), keep: Sequence[int] = ()
) -> Trace:
    """Sample `run` and return what `dgkit.record` saw; `ratio` is that of massive tokens."""
    with record(pipe, ratio=ratio, track=track, keep=keep) as trace:
        run.images(pipe)
    return trace


# ---------------------------------------------------------------------------------------- section 4.1: where they are


def layer_values(trace: Trace, massive: Massive, threshold: float) -> dict[str, Any]:
    """What Fig. 2 and 3(a) show, as numbers: how many blocks have massive channels, which, on how many tokens."""
    ratios = channel_ratio(trace.mean_abs())
    block, dim = divmod(int(ratios.argmax()), trace.anatomy.channels)
    return {
        "blocks": len(ratios),
        "threshold": threshold,
        "blocks_with_massive": int(massive.rows["block"].nunique()),
        "massive_dims": massive.dims,
        "fixed_dims": massive.fixed_dims,
        "largest.block": block,
        "largest.dim": dim,
        "largest.ratio": float(ratios[block, dim]),
        "largest.token_share": float(trace.token_share()[block, dim]),
        "largest_ratio_by_block": ratios.amax(1),
        "mean_abs": trace.mean_abs(),
    }


def training_history(model: str) -> pd.DataFrame:
    """Fig. 3(b): the largest channel over its block's median along training (columns step, block, ratio, dim).

    From the shipped model's own measurement; empty for a model whose training checkpoints nobody recorded here.
    """
    recorded = DATA / "models" / model / "quality.json"
    snapshots = json.loads(recorded.read_text())["massive"] if recorded.is_file() else []
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
    side = _side_of_square(maps.shape[2])
    return maps.reshape(*maps.shape[:2], side, side), shown


# ------------------------------------------------------------------------------- section 4.1: timestep against text


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

    The condition's share is "share.condition" where conditions have several images; else there is only
    "share.condition_and_noise", of both together. "trend" is mean |z| at the last step (least noise) over that at the
    first, over images.
    """
    shares = timestep_shares(trace, conditions, block)[trace.track[0]]
    tracked = trace.tracked()[:, :, block, 0].numpy()
    gates = gate_agreement(trace)
    return {
        "dim": trace.track[0],
        "share.timestep": shares["timestep"],
        **(
            {"share.condition": shares["condition"]}
            if "condition" in shares
            else {"share.condition_and_noise": shares["condition and noise"]}
        ),
        "trend": stats.bootstrap(tracked[-1] / tracked[0]),
        "gates.count": len(gates),
        "gates.same_largest": int(gates["same_largest"].sum()),
        "gates.rank_correlation": float(gates["rank_correlation"].median()),
        "timesteps": trace.timesteps(),
        "magnitude_by_timestep": tracked.mean(1),
    }


# ----------------------------------------------------------------------------------------- section 4.2: intervention


def left_half(pipe: Any, run: Samples) -> list[int]:
    """The image tokens in the left half of the image, counted row by row.

    Raises:
        DgkitError: the image tokens do not form a square.
    """
    side = _token_grid(pipe, run)
    return [row * side + column for row in range(side) for column in range(side // 2)]


def _token_grid(pipe: Any, run: Samples) -> int:
    """How many image tokens there are along each side of the image."""
    return _side_of_square(observe(pipe, replace(run.first(1), steps=1), keep=[0]).tensors(0).shape[1])


def _side_of_square(tokens: int) -> int:
    side = isqrt(tokens)
    if side * side != tokens:
        raise DgkitError(f"{tokens} image tokens do not form a square: sample square images")
    return side


def intervene(
    pipe: Any, run: Samples, *, block: int, dims: Sequence[int], matched: Sequence[int], draws: int, seed: int
) -> dict[str, Images]:
    """Images of the original model and of models disrupted at `block` (appendix D and its controls).

    Settings: "original"; "massive" (dims zeroed); "left half" (zeroed in those tokens alone, see `left_half`); "norm
    kept" (zeroed, but the later LayerNorms keep their statistics; only for classes whose LayerNorms dgkit knows);
    "mean" (dims set to their token mean); "matched" (non-massive channels of as much magnitude zeroed); "random 1" ..
    "random `draws`" (as many other channels zeroed, the paper's control; each draw another set).

    Raises:
        DgkitError: `draws` is not a positive integer, or as for `dgkit.disrupt`.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise DgkitError(f"random_draws={draws!r} is not allowed: give an integer, 1 or above")
    edits: dict[str, dict[str, Any]] = {
        "massive": {"dims": dims},
        "left half": {"dims": dims, "tokens": left_half(pipe, run)},
        "norm kept": {"dims": dims, "keep_norm": True},
        "mean": {"dims": dims, "kind": "mean"},
        "matched": {"dims": matched},
    }
    if not dissect(pipe).row.last_norm:
        del edits["norm kept"]
    for draw, own_seed in enumerate(_distinct_draws(dissect(pipe), dims, draws, seed)):
        edits[f"random {draw + 1}"] = {"dims": dims, "kind": "random", "seed": own_seed}
    images = {"original": run.images(pipe)}
    for name, edit in edits.items():
        with disrupt(pipe, block=block, **edit):
            images[name] = run.images(pipe)
    return images


def _distinct_draws(anatomy: Anatomy, dims: Sequence[int], draws: int, seed: int) -> list[int]:
    """Seeds of `draws` different sets of random channels, from `seed` * 1000 on."""
    possible = comb(anatomy.channels - len(dims), len(dims))
    if draws > possible:
        raise DgkitError(f"random_draws={draws!r} is not allowed: there are {possible} sets of other channels")
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
    Settings named "random 1", "random 2", ... are averaged per image into one setting "random".
    """
    reference = images[baseline]
    sharp = sharpness(reference)
    rows = []
    for name, batch in images.items():
        low, high = band_error(batch, reference)
        columns = {
            "setting": name.split()[0] if name.startswith("random ") else name,
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


def summarise(effects: pd.DataFrame) -> dict[str, Interval]:
    """Mean over images with its interval (Wilson's for proportions), as {"setting.column": Interval}."""
    columns = [c for c in effects.columns if c not in ("setting", "image")]

    def interval(values: NDArray[np.float64], column: str) -> Interval:
        # a bootstrap of a proportion has no width at 0 and 1; the averaged draws of "random" are no proportion
        if column == "agreement" and np.isin(values, (0, 1)).all():
            return stats.wilson(values.sum(), len(values))
        return stats.bootstrap(values)

    return {
        f"{setting}.{column}": interval(group[column].to_numpy(), column)
        for setting, group in effects.groupby("setting", sort=False)
        for column in columns
    }


def contrast(effects: pd.DataFrame, a: str, b: str, column: str) -> Interval:
    """Mean of the paired difference a - b of one column, with its interval."""
    table = effects.pivot(index="image", columns="setting", values=column)
    return stats.paired_bootstrap(table[a].to_numpy(), table[b].to_numpy())


def intervention_values(effects: pd.DataFrame, matched: Sequence[int]) -> dict[str, Any]:
    """What Fig. 5 shows, as numbers: every effect's mean, and the massive channels against each control.

    Agreement is compared with the originals too.
    """
    controls = [name for name in effects["setting"].unique() if name not in ("original", "massive", "left half")]
    columns = ("low_error", "high_error", "sharpness_ratio")
    values: dict[str, Any] = summarise(effects)
    values |= {
        f"contrast.{c}.{column}": contrast(effects, "massive", c, column) for c in controls for column in columns
    }
    if "agreement" in effects:
        values |= {
            f"contrast.{c}.agreement": contrast(effects, "massive", c, "agreement") for c in ("original", *controls)
        }
    return values | {"matched_dims": list(matched)}


def half_values(pipe: Any, run: Samples, images: Mapping[str, Images]) -> dict[str, Any]:
    """What editing the tokens of `left_half` alone does to the pixels under them and to the others.

    "half.edited.high_error" and "half.other.high_error" (see `image_effects`) are those of the original with one part
    of its pixels replaced by the edited image's, "half.contrast" is their paired difference. The other pixels need not
    stay as they are: attention mixes the tokens in all later blocks.

    Args:
        pipe, run: what made the images.
        images: with "original" and "left half" of `intervene`, (N, H, W, 3) each.
    """
    original, edited = images["original"], images["left half"]
    side = _token_grid(pipe, run)
    edge = original.shape[2] * (side // 2) // side
    left = band_error(np.concatenate([edited[:, :, :edge], original[:, :, edge:]], 2), original)[1]
    right = band_error(np.concatenate([original[:, :, :edge], edited[:, :, edge:]], 2), original)[1]
    return {
        "half.edited.high_error": stats.bootstrap(left),
        "half.other.high_error": stats.bootstrap(right),
        "half.contrast": stats.paired_bootstrap(left, right),
    }


def draw_values(images: Mapping[str, Images]) -> dict[str, Any]:
    """The massive channels against each random draw by itself.

    "draws.high_error": mean high-frequency error of each draw (see `image_effects`); "draws.below": how many of them
    have a smaller one than the massive channels.
    """
    original = images["original"]
    errors = {
        name: float(band_error(batch, original)[1].mean()) for name, batch in images.items() if name != "original"
    }
    draws = np.array([error for name, error in errors.items() if name.startswith("random ")])
    return {"draws.high_error": draws, "draws.below": int((draws < errors["massive"]).sum())}


# ------------------------------------------------------------------------- section 4.3 and 5.3: Detail Guidance


@dataclass
class GuidedRun:
    """Images of one guidance setting and what they cost."""

    images: Images
    cost_ratio: float = 1.0
    block_evaluations: int = 0


@dataclass(frozen=True)
class Setting:
    """One guidance setting: s of CFG (1 for none), w of DG (0 for none) and where DG edits, or another method."""

    guidance_scale: float = 1.0
    w: float = 0.0
    block: int = 0
    dims: Sequence[int] = field(default_factory=list)
    method: Method | None = None


def guide(pipe: Any, run: Samples, setting: Setting) -> GuidedRun:
    """Sample `run` under one guidance setting; the cost is relative to full passes for every branch."""
    evaluations = len(dissect(pipe).blocks) * run.steps * len(run.seeds) * (2 if setting.guidance_scale > 1 else 1)
    method = setting.method
    if method is None and setting.w == 0:
        return GuidedRun(run.images(pipe, setting.guidance_scale), 1.0, evaluations)
    if method is None:
        method = METHODS["dg"](scale=setting.w, block=setting.block, dims=setting.dims)  # type: ignore[call-arg]
    with guided_by(pipe, method) as guided:
        images = run.images(pipe, setting.guidance_scale)
    return GuidedRun(images, guided.cost.ratio, guided.cost.block_evaluations)


def dg_scales(pipe: Any, scale: float | None) -> tuple[float, float]:
    """w without and beside CFG: as given for both, else the model's preset, else 1."""
    preset = preset_of(pipe)
    if scale is not None:
        return scale, scale
    if preset is None or preset.scale is None or preset.scale_with_cfg is None:
        return 1.0, 1.0
    return preset.scale, preset.scale_with_cfg


def cfg_scale(pipe: Any, guidance_scale: float | None) -> float:
    """s of CFG: as given, else the model's preset, else 4, the paper's for SD3."""
    preset = preset_of(pipe)
    if guidance_scale is not None:
        return guidance_scale
    return preset.guidance_scale if preset else 4.0


def guide_all(pipe: Any, run: Samples, settings: Mapping[Any, Setting]) -> dict[Any, GuidedRun]:
    """Sample `run` under each setting, from the same noise."""
    return {name: guide(pipe, run, setting) for name, setting in settings.items()}


def guidance_settings(
    w: float, w_cfg: float, guidance_scale: float, block: int, dims: Sequence[int]
) -> dict[str, Setting]:
    """The four settings of Table 1 and Fig. 6, 7: no guidance, DG (Eq. 4), CFG (Eq. 1), CFG + DG (Eq. 5)."""
    return {
        "none": Setting(),
        "DG": Setting(w=w, block=block, dims=dims),
        "CFG": Setting(guidance_scale),
        "CFG+DG": Setting(guidance_scale, w_cfg, block, dims),
    }


LARGEST_COPY = 1_000_000_000  # parameters


def worse_copy(pipe: Any, seed: int) -> nn.Module | None:
    """The worse model of autoguidance, in place of an earlier checkpoint; None for models too large to copy.

    Every weight matrix has Gaussian noise of a tenth of its standard deviation.
    """
    if sum(parameter.numel() for parameter in pipe.transformer.parameters()) > LARGEST_COPY:
        return None
    return noisy_copy(pipe.transformer, seed)


def noisy_copy(model: nn.Module, seed: int, relative: float = 0.1) -> nn.Module:
    """A worse version of `model`: every weight matrix with Gaussian noise of `relative` its standard deviation."""
    worse, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in worse.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(relative * parameter.std() * noise)
    return worse


def control_settings(pipe: Any, w: float, seed: int) -> dict[str, Setting]:
    """Other worse models in the place of DG's, at the same w, without CFG.

    "blurred": the attention of the middle block with blurred queries (SEG); "autoguidance": see `worse_copy`.
    """
    settings = {"blurred": Setting(method=METHODS["seg"](scale=w))}
    worse = worse_copy(pipe, seed)
    if worse is not None:
        settings["autoguidance"] = Setting(method=METHODS["autoguidance"](scale=w, bad=worse))  # type: ignore[call-arg]
    return settings


def guidance_values(runs: Mapping[str, GuidedRun], judge: Judge | None) -> dict[str, Any]:
    """What Fig. 6 and 7 show, as numbers: effects against no guidance, DG's own (alone, beside CFG), and costs.

    "contrast.NAME" is DG alone minus no guidance ("none") or minus a control, and CFG + DG minus CFG ("cfg").
    """
    effects = image_effects({name: run.images for name, run in runs.items()}, "none", judge)
    values: dict[str, Any] = summarise(effects)
    values |= {f"{name}.cost": run.cost_ratio for name, run in runs.items()}
    measures = [column for column in effects.columns if column not in ("setting", "image")]
    controls = [name for name in ("blurred", "autoguidance") if name in runs]
    pairs = [("none", "DG", "none"), ("cfg", "CFG+DG", "CFG"), *((name, "DG", name) for name in controls)]
    for name, a, b in pairs:
        values |= {f"contrast.{name}.{m}": contrast(effects, a, b, m) for m in measures}
    if judge is not None:
        features = {name: judge.features(run.images) for name, run in runs.items()}
        values |= {f"{name}.frechet": judge.frechet(f) for name, f in features.items()}
        values |= {f"contrast.{name}.frechet": frechet_change(judge, features[a], features[b]) for name, a, b in pairs}
    return values


def frechet_change(judge: Judge, a: NDArray[np.float64], b: NDArray[np.float64], resamples: int = 500) -> Interval:
    """The judge's Frechet distance to real images of features `a` minus that of the paired features `b`, (N, F) each.

    The interval is a percentile bootstrap over the pairs; both distances carry the same upward bias of N images.
    """
    generator = np.random.default_rng(0)
    draws = [generator.integers(len(a), size=len(a)) for _ in range(resamples)]
    changes = [judge.frechet(a[rows]) - judge.frechet(b[rows]) for rows in draws]
    low, high = np.quantile(changes, [0.025, 0.975])
    return Interval(judge.frechet(a) - judge.frechet(b), float(low), float(high))


def ablation_settings(
    pipe: Any,
    scales: tuple[float, float],
    block: int,
    dims: Sequence[int],
    w_values: Sequence[float],
    lambda_values: Sequence[float],
) -> dict[str, dict[float, Setting]]:
    """The three sweeps of Fig. 8, by the quantity on the x axis; CFG's s is lambda + 1.

    `scales` are w of the depth sweep (DG alone) and of the lambda sweep (beside CFG).
    """
    return {
        "block": {b: Setting(w=scales[0], block=b, dims=dims) for b in range(len(dissect(pipe).blocks))},
        "w": {value: Setting(w=value, block=block, dims=dims) for value in w_values},
        "lambda": {value: Setting(value + 1, scales[1], block, dims) for value in lambda_values},
    }


def cost_table(runs: Mapping[str, GuidedRun]) -> pd.DataFrame:
    """What each run cost in block evaluations, and relative to full passes for every branch."""
    columns = {"block evaluations": "block_evaluations", "of full passes": "cost_ratio"}
    return pd.DataFrame({c: {name: getattr(run, a) for name, run in runs.items()} for c, a in columns.items()})


def total_cost(runs: Mapping[str, Mapping[Any, GuidedRun]]) -> int:
    """Block evaluations of all runs of all sweeps."""
    return sum(run.block_evaluations for group in runs.values() for run in group.values())


def sweep(runs: Mapping[Any, GuidedRun], baseline: Images, judge: Judge | None) -> pd.DataFrame:
    """Fig. 8: effects of each run of a sweep against the paired `baseline`.

    One row per (key, measure): key is the run's key, then value, low, high.
    """
    rows = []
    for key, guided in runs.items():
        effects = image_effects({"baseline": baseline, "guided": guided.images}, "baseline", judge)
        measured = summarise(effects[effects["setting"] == "guided"])
        if judge is not None:
            measured["guided.agreement_change"] = contrast(effects, "guided", "baseline", "agreement")
        for name, interval in measured.items():
            rows.append({"key": key, "measure": name.removeprefix("guided.")} | asdict(interval))
    return pd.DataFrame(rows)


def sweep_values(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Every sweep as arrays (key, value, low, high), and what it does to sharpness.

    "NAME.rank_correlation" is Spearman's over the sweep's points; "block.strongest" is the block where the edit moves
    sharpness most, by its ratio to no guidance, and "block.last_ratio" that ratio at the last block.
    """
    values: dict[str, Any] = {}
    for name, table in tables.items():
        for measure, part in table.groupby("measure", sort=False):
            values[f"{name}.{measure}"] = part[["key", "value", "low", "high"]].to_numpy(float)
    sharp = {name: values[f"{name}.sharpness_ratio"] for name in tables}
    for name in ("w", "lambda"):
        values[f"{name}.rank_correlation"] = float(spearmanr(sharp[name][:, 0], sharp[name][:, 1]).statistic)
    strongest = int(np.abs(np.log(sharp["block"][:, 1])).argmax())
    return values | {
        "blocks": len(sharp["block"]),
        "block.strongest": strongest,
        "block.strongest_ratio": float(sharp["block"][strongest, 1]),
        "block.last_ratio": float(sharp["block"][-1, 1]),
    }


# ------------------------------------------------------------------------------------------- appendix H: Table 6


def table_6_settings(w: float, block: int, dims: Sequence[int]) -> dict[str, tuple[Setting, bool]]:
    """The rows of Table 6: name to (guidance setting, conditional?). The paper uses no CFG here."""
    plain, guided = Setting(), Setting(w=w, block=block, dims=dims)
    return {"uncond": (plain, False), "uncond+DG": (guided, False), "cond": (plain, True), "cond+DG": (guided, True)}


def table_6_runs(
    pipe: Any,
    settings: Mapping[str, tuple[Setting, bool]],
    count: int,
    seeds: Sequence[int],
    steps: int,
    batch: int = 64,
) -> dict[tuple[str, int], GuidedRun]:
    """Images of every (setting, seed block) of Table 6, and what they cost.

    Args:
        pipe: a class-conditional pipeline.
        settings: name to (guidance setting, conditional?); unconditional sampling uses DiT's null class.
        count: images per seed block.
        seeds: one per seed block.
        steps: sampling steps.
        batch: images per call of the pipeline.

    Raises:
        DgkitError: no seed block, or as for `samples`.
    """
    if not seeds:
        raise DgkitError("seed_blocks=0 is not allowed: give an integer, 1 or above")
    runs = {}
    for name, (setting, conditional) in settings.items():
        for seed in seeds:
            run = samples(pipe, count, seed, steps, batch_size=batch)
            if not conditional:
                run = replace(run, conditions=[1000] * count)
            runs[name, seed] = guide(pipe, run, setting)
    return runs


def table_6(runs: Mapping[tuple[str, int], GuidedRun]) -> pd.DataFrame:
    """Table 6 in small, on Fashion-MNIST: one row per (setting, seed block).

    Columns: frechet (distance of the shipped classifier's 64 features to those of the training set), is (inception
    score with the classifier's probabilities), precision, recall (Kynkaanniemi et al. 2019, k = 3, against the shipped
    sample of real features).
    """
    judge, rows = FashionJudge(()), []  # only its features count here, not what was asked for
    for (name, seed), run in runs.items():
        rows.append({"setting": name, "seed": seed} | judge_set_scores(judge, run.images))
    return pd.DataFrame(rows)


def efficientnet_values(runs: Mapping[tuple[str, int], GuidedRun]) -> dict[str, float]:
    """Frechet distance of EfficientNet-Lite0's 1280 features, "SETTING.frechet_efficientnet", over all seed blocks.

    Against as many real test images, which need the data set. With fewer images than features the covariance is not
    of full rank and the distance mostly bias, so use 2,000 or more.
    """
    union: dict[str, list[Images]] = {}
    for (name, _), run in runs.items():
        union.setdefault(name, []).append(run.images)
    count = sum(len(batch) for batch in next(iter(union.values())))
    real = efficientnet_features(as_samples(fashion_mnist("test")[0][:count]))
    distances = {
        f"{name}.frechet_efficientnet": frechet_distance(real, efficientnet_features(np.concatenate(batches)))
        for name, batches in union.items()
    }
    return {"efficientnet_count": count} | distances


def table_6_values(table: pd.DataFrame) -> dict[str, Any]:
    """Mean over seed blocks with the smallest and largest block, and the change of the Frechet distance by DG."""
    measures = [column for column in table.columns if column not in ("setting", "seed")]
    values: dict[str, Any] = {}
    for setting, group in table.groupby("setting", sort=False):
        for m in measures:
            values[f"{setting}.{m}"] = Interval(group[m].mean(), group[m].min(), group[m].max())
    pivot = table.pivot(index="seed", columns="setting", values="frechet")
    for kind in ("uncond", "cond"):
        change = pivot[f"{kind}+DG"] - pivot[kind]
        values[f"{kind}.frechet_change"] = Interval(change.mean(), change.min(), change.max())
    return values


def table_6_beside_paper(values: Mapping[str, Any]) -> pd.DataFrame:
    """The paper's Table 6 (ImageNet, DiT-XL/2) beside ours: same settings and measures; model, data and network differ.

    Columns: measure, setting, ours, paper.
    """
    measures = {"frechet": "fid", "is": "is", "precision": "precision", "recall": "recall"}
    rows = []
    for ours, theirs in measures.items():
        for _, line in paper.table(6).iterrows():
            kind = line["type"].lower() + ("+DG" if line["dg"] == "yes" else "")
            measure = ours if ours == theirs else f"{ours} (paper: {theirs})"
            rows.append((measure, kind, f"{values[f'{kind}.{ours}']:.3g}", line[theirs]))
    return pd.DataFrame(rows, columns=["measure", "setting", "ours", "paper"])
