"""The scores of the rows of a table: from folders of images to a value per image, or per seed block.

A score that this machine cannot compute says why instead. Scores of networks are kept beside the images.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dgbook.claims import provenance
from dgbook.files import write_whole
from dgbook.measures.judges import JUDGES, FashionJudge, judge_set_scores
from dgbook.paper_scale import prompts, scores
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.pipeline import own_device
from dgbook.paper_scale.generate.store import Store, load_images
from dgbook.paper_scale.row import Row
from dgbook.paper_scale.scores.sets import Features, Inception, Reference, imagenet_reference, set_scores
from dgkit.errors import DgkitError
from dgkit.files import read_json

Array = NDArray[np.float64]

_INCEPTION = ("fid", "is", "precision", "recall")
_JUDGE = {
    "judge-agreement": "agreement",
    "judge-frechet": "Frechet distance",
    "judge-is": "exp(KL) of classes",
    "judge-precision": "precision",
    "judge-recall": "recall",
}


@dataclass(frozen=True)
class Measured:
    """What one score says of one row.

    Attributes:
        name: for the table; with the number of images where a score depends on it.
        values: per image, or per seed block; None if it cannot be computed, for the `reason`.
        id: what was computed.
    """

    name: str
    values: Array | None = None
    id: str = ""
    reason: str = ""


Folders = Mapping[str, Sequence[Path]]
Table = dict[tuple[str, str], Measured]


def measure(rows: Sequence[Row], folders: Folders) -> Table:
    """Every score of every row, by (label, score); a score that this machine cannot compute says why."""
    measured: Table = {}
    names = list(dict.fromkeys(score for row in rows for score in row.scores))
    for metric in dict.fromkeys(name.partition("/")[0] for name in names if name not in (*_INCEPTION, *_JUDGE)):
        wanted = [name for name in names if name.partition("/")[0] == metric]
        measured |= _image_scores(metric, wanted, rows, folders)
    if set(names) & set(_INCEPTION):
        measured |= _inception_scores(rows, folders)
    if judged := [name for name in names if name in _JUDGE]:
        measured |= _judge_scores(judged, rows, folders)
    return measured


def _image_scores(metric: str, names: Sequence[str], rows: Sequence[Row], folders: Folders) -> Table:
    """One metric per image or pair of images, under its name and those of its parts, "metric/style"."""
    entry = scores.METRICS[metric]
    try:
        scorer = scores.scorer(metric, own_device())
    except DgkitError as error:
        return {(row.label, name): Measured(_label(name), reason=str(error)) for row in rows for name in names}
    measured: Table = {}
    for row in rows:
        (folder,) = folders[row.label]
        if entry.kind == "pair" and not row.baseline:
            continue
        try:
            if entry.kind == "pair":
                values = scorer(load_images(folder), load_images(folders[row.baseline][0]))
            else:
                values = _kept(folder, metric, str(scorer.id), partial(_scores, scorer, folder))
        except DgkitError as error:
            measured |= {(row.label, name): Measured(_label(name), reason=str(error)) for name in names}
            continue
        for name in names:
            part = _part(row, np.asarray(values, np.float64), name.partition("/")[2])
            reason = "" if len(part) > 1 else f"too few of these {row.count} prompts are of this style"
            label = f"{_label(name)}, to {row.baseline}" if entry.kind == "pair" else _label(name)
            measured[row.label, name] = Measured(label, None if reason else part, str(scorer.id), reason)
    return measured


def _scores(scorer: Any, folder: Path) -> list[float]:
    """Of each image of a run, a block at a time."""
    store = Store(folder)
    return [score for batch, indices in _batches(store) for score in scorer(batch, _conditions(store.job, indices))]


def _batches(store: Store) -> Iterator[tuple[NDArray[np.uint8], list[int]]]:
    for shard in store.shards():
        indices = sorted(shard.images)
        yield np.stack([shard.images[i] for i in indices]), indices


def _conditions(job: Job, indices: Sequence[int]) -> list[str]:
    return [str(job.condition(i)) for i in indices]


def _part(row: Row, values: Array, category: str) -> Array:
    if not category:
        return values
    categories = [prompt.category for prompt in prompts.load(row.prompts)]
    return values[[categories[i % len(categories)] == category for i in range(len(values))]]


def _inception_scores(rows: Sequence[Row], folders: Folders) -> Table:
    """FID, IS, precision and recall of each seed block, named by the number of images."""
    try:
        inception: Inception = scores.scorer("fid", own_device())
    except DgkitError as error:
        return {
            (row.label, n): Measured(scores.METRICS[n].label, reason=str(error)) for row in rows for n in _INCEPTION
        }
    reference: Reference | None = None
    without = ""
    try:
        reference = imagenet_reference(inception)
    except DgkitError as error:
        without = str(error)
    identity = f"{inception.id}+{reference.name if reference else 'none'}"

    def compute(folder: Path) -> dict[str, Any]:
        features = Features.joined([inception.features(batch) for batch, _ in _batches(Store(folder))])
        found = set_scores(inception, features, reference)
        return {name: asdict(score) | {"id": str(score.id)} for name, score in found.items()}

    measured: Table = {}
    for row in rows:
        blocks = [_kept(f, "inception", identity, partial(compute, f)) for f in folders[row.label]]
        for name in _INCEPTION:
            first = blocks[0][name]
            values = [found[name]["value"] for found in blocks]
            if None in values:
                reason = without if without and name != "is" else first["reason"]
                measured[row.label, name] = Measured(first["name"], reason=reason)
            else:
                measured[row.label, name] = Measured(first["name"], np.array(values, np.float64), first["id"])
    return measured


def _judge_scores(names: Sequence[str], rows: Sequence[Row], folders: Folders) -> Table:
    """Scores by the network of an embedded model's data: agreement per image, the others per seed block."""
    kind = next(judge for judge in JUDGES if judge.data == rows[0].prompts)
    identity = f"{kind.name}@{provenance.weights_sha256(kind(()).network)[:12]}"
    width = kind(()).real_features.shape[1]
    measured: Table = {}
    for row in rows:
        runs = [(Store(folder).job, load_images(folder)) for folder in folders[row.label]]
        reasons: dict[str, str] = {}
        found: dict[str, Array] = {}
        try:
            if "judge-agreement" in names:
                ((job, images),) = runs
                judge = kind([job.condition(i) for i in range(job.count)])
                found["judge-agreement"] = judge.agreement(images).astype(np.float64)
            else:
                blocks = [judge_set_scores(FashionJudge(()), images) for _, images in runs]
                found = {f"judge-{score}": np.array([block[score] for block in blocks]) for score in blocks[0]}
        except DgkitError as error:
            reasons = dict.fromkeys(names, str(error))
        if row.count <= width:
            reasons["judge-frechet"] = f"{row.count} images are too few for a Frechet distance on {width} features"
        for name in names:
            label = f"{_JUDGE[name]} ({kind.name})"
            measured[row.label, name] = (
                Measured(label, reason=reasons[name])
                if name in reasons
                else Measured(label, found[name], f"{name}|{identity}")
            )
    return measured


def _kept(folder: Path, name: str, identity: str, compute: Callable[[], Any]) -> Any:
    """What `compute` returns (as JSON has it), kept in the run's folder for as long as `identity` is the same."""
    path = folder / "scores" / f"{name}.json"
    if path.is_file():
        kept = read_json(path)
        if kept.get("id") == identity:
            return kept["values"]
    values = compute()
    write_whole(path, json.dumps({"id": identity, "values": values}))
    return values


def _label(name: str) -> str:
    metric, _, style = name.partition("/")
    return scores.METRICS[metric].label + (f", {style}" if style else "")
