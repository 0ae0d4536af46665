"""What the notebooks measure: one function per experiment of the paper, from a pipeline to plain numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from safetensors.numpy import load_file

from dgkit import stats
from dgkit.anatomy import dissect, pipeline_row
from dgkit.errors import DgkitError
from dgkit.generate import generate
from dgkit.guidance import detail_guidance
from dgkit.hooks import Trace, disrupt, record
from dgkit.massive import detect_massive
from dgkit.metrics.classifier import agreement, fashion_classifier, inception_score
from dgkit.metrics.frechet import frechet_distance
from dgkit.metrics.precision_recall import precision_recall
from dgkit.metrics.spectrum import band_error, high_frequency_energy, sharpness
from dgkit.paths import DATA
from dgkit.stats import Interval
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
    """

    conditions: list[Any]
    seeds: list[int]
    steps: int
    guidance_scale: float = 1.0

    def images(self, pipe: Any, guidance_scale: float | None = None) -> Images:
        """Generate them, (N, H, W, 3); `guidance_scale` overrides the run's own."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return generate(pipe, self.conditions, self.seeds, num_inference_steps=self.steps, guidance_scale=scale)


def samples(pipe: Any, count: int, seed: int, steps: int, guidance_scale: float = 1.0) -> Samples:
    """The first `count` of the model's own conditions, again from the start when they run out.

    Class-conditional pipelines go through their classes, text pipelines through `data/prompts/offline.txt`.

    Raises:
        DgkitError: `count` is not a positive integer.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DgkitError(f"num_samples={count!r} is not allowed: give an integer, 1 or above")
    known: list[Any]
    if pipeline_row(pipe).condition == "class_labels":
        known = sorted(set(pipe.labels.values())) or list(range(pipe.transformer.config.num_embeds_ada_norm))
    else:
        known = (DATA / "prompts" / "offline.txt").read_text().splitlines()
    conditions = [known[i % len(known)] for i in range(count)]
    return Samples(conditions, [seed * 1_000_000 + i for i in range(count)], steps, guidance_scale)


def condition_names(pipe: Any, conditions: Sequence[Any]) -> list[str]:
    """A short name for each condition."""
    by_id = {number: name for name, number in reversed(getattr(pipe, "labels", {}).items())}
    return [str(by_id.get(c, c)) for c in conditions]


def subject(trace: Trace, block: int | None, dims: Sequence[int] | None) -> tuple[int, list[int]]:
    """The block and dims to study: as given, else the model's preset, else what the trace shows.

    Without a preset, the block is a quarter of the way in (SD3's 6 of 24), and the dims are those massive in that block,
    or its largest channel when none is.
    """
    preset = preset_of(trace.anatomy)
    if block is None:
        block = preset.block if preset and preset.block is not None else len(trace.anatomy.blocks) // 4
    if dims is None:
        found = detect_massive(trace).in_block(block) or detect_massive(trace, "top_k").in_block(block)
        dims = preset.dims if preset and preset.dims else found
    return trace.anatomy.block(block).index, trace.anatomy.dims(list(dims))


def observe(pipe: Any, run: Samples, *, track: Sequence[int] = (), keep: Sequence[int] = ()) -> Trace:
    """Sample `run` and return what `dgkit.record` saw."""
    with record(pipe, track=track, keep=keep) as trace:
        run.images(pipe)
    return trace


# ------------------------------------------------------------------------------- section 4.1: timestep against text


def timestep_shares(trace: Trace, conditions: Sequence[Any], block: int) -> dict[int, dict[str, Interval]]:
    """For each tracked dim, the shares of the variance of its mean |z| that timestep, condition and image explain."""
    values = trace.tracked()[:, :, block].numpy()  # (timesteps, images, dims)
    several = len(set(conditions)) > 1 and min(conditions.count(c) for c in set(conditions)) > 1
    labels = conditions if several else None
    return {dim: stats.variance_explained(values[:, :, i].T, labels) for i, dim in enumerate(trace.track)}


def time_trend(trace: Trace, block: int) -> dict[int, Interval]:
    """For each tracked dim, mean |z| at the last step (least noise) over that at the first, over images."""
    values = trace.tracked()[:, :, block].numpy()
    return {dim: stats.bootstrap(values[-1, :, i] / values[0, :, i]) for i, dim in enumerate(trace.track)}


# ----------------------------------------------------------------------------------------- section 4.2: intervention


def intervene(
    pipe: Any, run: Samples, *, block: int, dims: Sequence[int], matched: Sequence[int], draws: int, seed: int
) -> dict[str, Images]:
    """Images of the original model and of models disrupted at `block` (appendix D and its controls).

    Settings: "original"; "massive" (dims zeroed); "mean" (dims set to their token mean); "matched" (non-massive channels
    of as much magnitude zeroed); "random 1" .. "random `draws`" (as many non-massive channels zeroed, the paper's control).
    """
    edits: dict[str, dict[str, Any]] = {
        "massive": {"dims": dims},
        "mean": {"dims": dims, "kind": "mean"},
        "matched": {"dims": matched},
    }
    for draw in range(draws):
        edits[f"random {draw + 1}"] = {"dims": dims, "kind": "random", "seed": seed * 1000 + draw}
    images = {"original": run.images(pipe)}
    for name, edit in edits.items():
        with disrupt(pipe, block=block, **edit):
            images[name] = run.images(pipe)
    return images


def image_effects(images: Mapping[str, Images], baseline: str, conditions: Sequence[Any] | None = None) -> pd.DataFrame:
    """Per image and setting, what differs from the paired image of `baseline`.

    Columns: low_error, high_error (relative squared error below and above 1/8 cycles/pixel), sharpness_ratio (variance of
    the Laplacian over the baseline's), high_frequency_change (difference of the energy share above 1/4 cycles/pixel), and
    with `conditions` (Fashion-MNIST classes) class_agreement (1 where the classifier sees the class asked for).
    Settings named "random 1", "random 2", ... are averaged per image into one setting "random".
    """
    reference = images[baseline]
    rows = []
    for name, batch in images.items():
        low, high = band_error(batch, reference)
        columns = {
            "setting": name.split()[0] if name.startswith("random ") else name,
            "image": np.arange(len(batch)),
            "low_error": low,
            "high_error": high,
            "sharpness_ratio": sharpness(batch) / sharpness(reference),
            "high_frequency_change": high_frequency_energy(batch) - high_frequency_energy(reference),
        }
        if conditions is not None:
            columns["class_agreement"] = agreement(fashion_classifier()(batch), conditions).astype(float)
        rows.append(pd.DataFrame(columns))
    return pd.concat(rows).groupby(["setting", "image"], sort=False).mean().reset_index()


def fashion_conditions(pipe: Any, run: Samples) -> list[Any] | None:
    """The classes of `run` when the shipped Fashion-MNIST classifier can judge them, else None."""
    from dgkit.tiny.data import FASHION_MNIST_CLASSES

    return run.conditions if tuple(condition_names(pipe, range(10))) == FASHION_MNIST_CLASSES else None


def summarise(effects: pd.DataFrame) -> dict[str, Interval]:
    """Mean over images with its interval, as {"setting.column": Interval}."""
    columns = [c for c in effects.columns if c not in ("setting", "image")]
    return {
        f"{setting}.{column}": stats.bootstrap(group[column].to_numpy())
        for setting, group in effects.groupby("setting", sort=False)
        for column in columns
    }


def contrast(effects: pd.DataFrame, a: str, b: str, column: str) -> Interval:
    """Mean of the paired difference a - b of one column, with its interval."""
    table = effects.pivot(index="image", columns="setting", values=column)
    return stats.paired_bootstrap(table[a].to_numpy(), table[b].to_numpy())


# ------------------------------------------------------------------------- section 4.3 and 5.3: Detail Guidance


@dataclass
class GuidedRun:
    """Images of one guidance setting and what they cost."""

    images: Images
    cost_ratio: float = 1.0
    block_evaluations: int = 0


@dataclass(frozen=True)
class Setting:
    """One guidance setting: s of CFG (1 for none), w of DG (0 for none), and where DG edits."""

    guidance_scale: float = 1.0
    w: float = 0.0
    block: int = 0
    dims: Sequence[int] = field(default_factory=list)


def guide(pipe: Any, run: Samples, setting: Setting) -> GuidedRun:
    """Sample `run` under one guidance setting; the cost is relative to full passes for every branch."""
    evaluations = len(dissect(pipe).blocks) * run.steps * len(run.seeds) * (2 if setting.guidance_scale > 1 else 1)
    if setting.w == 0:
        return GuidedRun(run.images(pipe, setting.guidance_scale), 1.0, evaluations)
    with detail_guidance(pipe, scale=setting.w, block=setting.block, dims=setting.dims) as guidance:
        images = run.images(pipe, setting.guidance_scale)
    return GuidedRun(images, guidance.cost.ratio, guidance.cost.block_evaluations)


def sweep(
    pipe: Any, run: Samples, settings: Mapping[Any, Setting], baseline: Images, conditions: Sequence[Any] | None
) -> pd.DataFrame:
    """Fig. 8: effects of each setting against the paired `baseline`, one row per (setting's key, column) with interval."""
    rows = []
    for key, setting in settings.items():
        images = {"baseline": baseline, "guided": guide(pipe, run, setting).images}
        for name, interval in summarise(image_effects(images, "baseline", conditions)).items():
            which, column = name.split(".")
            if which == "guided":
                rows.append(
                    {"key": key, "measure": column, "value": interval.value, "low": interval.low, "high": interval.high}
                )
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------- appendix H: Table 6


def table_6(
    pipe: Any, settings: Mapping[str, tuple[Setting, bool]], *, count: int, seeds: Sequence[int], steps: int
) -> pd.DataFrame:
    """Table 6 in small, on Fashion-MNIST: one row per (setting, seed block).

    Columns: frechet (distance of the classifier's 64 features to the training set's), is (inception score with the
    classifier's probabilities), precision, recall (Kynkaanniemi et al. 2019, k = 3, against the shipped reference sample).

    Args:
        settings: name to (guidance setting, conditional?); unconditional sampling uses DiT's null class.
        count: images per seed block.
        seeds: one per seed block.
        steps: sampling steps.
    """
    classifier = fashion_classifier()
    reference = load_file(DATA / "reference" / "fashion-mnist.safetensors")
    rows = []
    for name, (setting, conditional) in settings.items():
        for seed in seeds:
            run = samples(pipe, count, seed, steps)
            if not conditional:
                run = Samples([1000] * count, run.seeds, steps)
            images = guide(pipe, run, setting).images
            features = classifier.features(images)
            score = precision_recall(reference["features"], features)
            rows.append(
                {
                    "setting": name,
                    "seed": seed,
                    "frechet": frechet_distance(reference["features"], features),
                    "is": inception_score(classifier(images)),
                    "precision": score.precision,
                    "recall": score.recall,
                }
            )
    return pd.DataFrame(rows)
