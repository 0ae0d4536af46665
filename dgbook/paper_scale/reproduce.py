"""A table of the paper by one command: its rows' images, their scores, and the paper's numbers beside ours.

Images lie in run folders of `generate`, named by what decides them, so a killed run goes on, and rows that tables
share are made once. Scores of networks are kept beside the images. The result file is `<output>/<model>/<table>.json`,
with what took the model's place instead of it. The file's name also has the dims and the scale where the paper does not
state them, and the number of images where it is not the paper's: `table6-dims-7-scale-0.5-1000.json`.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from dgbook.claims import provenance, results
from dgbook.downloads import local
from dgbook.measures import stats
from dgbook.measures.judges import JUDGES, FashionJudge, judge_set_scores
from dgbook.measures.stats import Interval
from dgbook.paper_scale import prompts, protocol, scores
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.run import Report, own_device, run, share
from dgbook.paper_scale.generate.store import Store, load_images
from dgbook.paper_scale.protocol import Row
from dgbook.paper_scale.scores.sets import Features, Inception, Reference, imagenet_reference, set_scores
from dgbook.paper_scale.scores.weights import WEIGHTS
from dgbook.paths import build_dir, safe_name
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS

Array = NDArray[np.float64]

COMPARABLE = 0.1
"""A win probability within 1/2 +- this counts as the paper's "similar", which it says of 0.462 and of 0.512."""

_NULL_CLASS = 1000  # DiT's
_BLOCK_SIZES = {"imagenet": 50, "fashion-mnist": 35}  # small images; divisors of the sets
_INCEPTION = ("fid", "is", "precision", "recall")
_JUDGE = {
    "judge-agreement": "agreement",
    "judge-frechet": "Frechet distance",
    "judge-is": "exp(KL) of classes",
    "judge-precision": "precision",
    "judge-recall": "recall",
}


class OthersAtWork(DgkitError):
    """This process has made its share of the images, and other processes have not yet made theirs."""


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


@dataclass(frozen=True)
class Line:
    """One line of the table: one number of the paper beside ours.

    Attributes:
        row: of the paper's table.
        quantity: a score, or its comparison with another row.
        key: of the value in the result file.
        paper: as printed; None where the paper prints nothing.
        ours: with its 95 % interval; None if it could not be measured.
        difference: ours less the paper's; None where they cannot be compared.
        verdict: what `ours` says of the paper's number or claim, or why there is none.
    """

    row: str
    quantity: str
    key: str
    paper: float | None
    ours: Interval | None
    difference: float | None
    verdict: str

    def cells(self) -> tuple[str, ...]:
        """As text: row, score, paper, ours, difference, interval, verdict."""
        return (
            self.row,
            self.quantity,
            "-" if self.paper is None else f"{self.paper:g}",
            "-" if self.ours is None else f"{self.ours.value:.4g}",
            "-" if self.difference is None else f"{self.difference:+.3g}",
            "-" if self.ours is None else f"[{self.ours.low:.4g}, {self.ours.high:.4g}]",
            self.verdict,
        )


@dataclass(frozen=True)
class Reproduction:
    """A table of the paper, reproduced.

    Attributes:
        title: which table, on which model.
        lines: of the table.
        notes: what has to be known to read it.
        path: of the result file.
    """

    title: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    path: Path

    def __str__(self) -> str:
        header = ("row", "score", "paper", "ours", "difference", "interval", "verdict")
        table = [header, *(line.cells() for line in self.lines)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([self.title, "", *rows, "", *self.notes, f"result: {self.path}"])


def wanted(table: str | None, model: str | None, *, small: bool = False, **given: Any) -> list[tuple[str, str]]:
    """The (table, model) pairs that a command asks for.

    Args:
        table: a key of `protocol.TABLES`; None for all.
        model: only this one; None for every model of a table, or with `small` one for each embedded model, which stands
            in for several.
        small: see `reproduce`.
        given: `reproduce`'s `dims`, `scale` and `weights`; None for what is not.

    Raises:
        DgkitError: unknown table or model, something given that none of them lacks, or `weights` for several models.
    """
    rows = [row for name in ([table] if table else protocol.TABLES) for row in protocol.rows(name)]
    known = dict.fromkeys(row.model for row in rows)
    if model is not None and model not in known:
        raise DgkitError(f"model={model!r} is not in {table or 'any table'}: use one of {', '.join(known)}")
    rows = [row for row in rows if model in (None, row.model)]
    pairs = dict.fromkeys((row.table, row.model) for row in rows)
    if small:
        standing = {(name, protocol.SMALL[of]): (name, of) for name, of in reversed(pairs)}
        pairs = {pair: None for pair in pairs if pair in standing.values()}
    lacking = {name for row in rows for name in row.lacking}
    for name in ("dims", "scale"):
        if given.get(name) is not None and name not in lacking:
            raise DgkitError(f"--{name} is not needed here: the paper states it for every row")
    if given.get("weights") is not None and len({of for _, of in pairs}) > 1:
        raise DgkitError("--weights takes the place of one model: say which with --model")
    return list(pairs)


def reproduce(
    table: str,
    model: str,
    *,
    small: bool = False,
    count: int | None = None,
    dims: Sequence[int] | None = None,
    scale: float | None = None,
    weights: str | None = None,
    engine: str = "local",
    workers: int | None = None,
    output: Path | None = None,
) -> Reproduction:
    """Generate what is missing of a table's rows, score them, and compare them with the paper and with one another.

    Args:
        table: a key of `protocol.TABLES`.
        model: one of its models, by its name in the zoo.
        small: the whole path on the embedded model that stands in for it, with few images and other scores.
        count: images per row (and seed block); by default the paper's.
        dims, scale: of Detail Guidance, where the paper does not state them; elsewhere they change nothing.
        weights: another name, pipeline folder or hub id to use in the model's place.
        engine, workers: see `dgbook.paper_scale.generate.run.run`.
        output: folder of images and result; `_build/reproduce` by default.

    Raises:
        OthersAtWork: this process's share of the images is made, and other processes' is not.
        DgkitError: unknown table, model or count, something that the paper does not state is not given, images could
            not be made, or as for `dgbook.paper_scale.generate.run.run`.
    """
    rows = _rows(table, model, small, dims, scale, weights)
    stated = rows[0].count  # of all rows
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 2:
            raise DgkitError(f"count={count!r} is not allowed: give an integer, 2 or above")
        rows = [replace(row, count=count) for row in rows]
    output = build_dir() / "reproduce" if output is None else Path(output)
    lacking = dict.fromkeys(key for row in protocol.rows(table, model) for key in row.lacking)
    chosen = {"dims": dims or [], "scale": [] if scale is None else [scale]}
    name = "-".join([table, *(_in_a_name(key, chosen[key]) for key in lacking if chosen[key])])
    name += "" if rows[0].count == stated else f"-{count}"
    path = output / safe_name(str(weights or rows[0].model)) / f"{name}.json"
    started = time.monotonic()
    if not small:
        _announce_missing(rows)
    jobs = {row.label: [job_of(row, seed, weights) for seed in range(row.seed_blocks)] for row in rows}
    folders = _generate(jobs, output / "images", engine, workers)
    measured = _measure(rows, folders)
    lines = tuple(_lines(rows, measured, stated))
    parameters = {
        "model": rows[0].model, "table": table, "weights": weights, "dims": dims, "scale": scale, "small": small,
        "count": rows[0].count, "steps": rows[0].steps, "prompts": rows[0].prompts,
        "seeds": list(range(rows[0].seed_blocks)),
    }  # fmt: skip
    provenance = _provenance(parameters, jobs, folders, measured)
    if weights is None:
        distinct = {row.sampled: row for row in rows}.values()
        provenance["block_evaluations"] = sum(map(protocol.block_evaluations, distinct))
    provenance["wall_seconds"] = round(time.monotonic() - started, 1)
    _save(table, parameters, provenance, lines, path)
    return Reproduction(
        f"{table} on {weights or rows[0].model}", lines, tuple(_notes(rows, small, model, weights)), path
    )


# ----------------------------------------------------------------------------------------------------------- what to do


def _rows(
    table: str,
    model: str,
    small: bool,
    dims: Sequence[int] | None,
    scale: float | None,
    weights: str | None,
) -> list[Row]:
    rows = protocol.rows(table, model)
    if small:
        given = {"dims": dims, "scale": scale, "weights": weights}
        if names := [f"--{name}" for name, value in given.items() if value is not None]:
            raise DgkitError(f"{', '.join(names)} not allowed with --small: the embedded model has its own")
        rows = list({row.label: row for row in map(protocol.small, rows)}.values())
    elif model in protocol.UNNAMED and weights is None:
        raise DgkitError(
            f"{table} was measured on a variant of {model} that the paper does not name: give --weights "
            f"{protocol.UNNAMED[model]}, or another name, pipeline folder or hub id"
        )
    return [protocol.filled(row, dims=None if dims is None else list(dims), scale=scale) for row in rows]


def _in_a_name(key: str, values: Sequence[float]) -> str:
    """A setting for the name of a result file: "dims-3-7", "scale-0.5"."""
    return "-".join([key, *(f"{value:.12g}" for value in values)])


def _announce_missing(rows: Sequence[Row]) -> None:
    """Before hours of sampling: which scores need something that is not here yet."""
    names = dict.fromkeys(score.partition("/")[0] for row in rows for score in row.scores)
    missing = {scores.METRICS[name].label: scores.available(name) for name in names}
    reference = WEIGHTS["imagenet-256-reference"]
    if "fid" in names and local(reference) is None:
        missing["FID's reference"] = f"{reference.files[0]} ({reference.gigabytes:g} GB) is not on this machine"
    for label, reason in missing.items():
        if reason:
            print(f"{label}: {reason}", file=sys.stderr)


def job_of(row: Row, seed: int, weights: str | None = None) -> Job:
    """What generates one seed block of a row.

    Args:
        row: with nothing lacking.
        seed: of the set.
        weights: a pipeline folder or hub id in place of the row's model.

    Raises:
        DataError: its prompts are neither here nor to be downloaded.
        DgkitError: as for `Job`.
    """
    if not row.conditional:
        conditions: list[Any] = [_NULL_CLASS]
    elif row.prompts == "fashion-mnist":
        conditions = list(range(10))
    else:
        conditions = [prompt.condition for prompt in prompts.load(row.prompts)]
    return Job(
        model=weights or row.model,
        conditions=tuple(conditions),
        count=row.count,
        seed=seed,
        steps=row.steps,
        guidance_scale=row.guidance_scale,
        methods=row.methods,
        disruption=row.disruption,
        dtype="bfloat16" if MODELS[row.model].source else "float32",
        block_size=_BLOCK_SIZES.get(row.prompts, 8),
        prompt_set=row.prompts if row.conditional else "null class",
    )


def _generate(
    jobs: Mapping[str, Sequence[Job]], images: Path, engine: str, workers: int | None
) -> dict[str, list[Path]]:
    folders: dict[str, list[Path]] = {}
    reports: dict[Path, Report] = {}
    for number, (label, sets) in enumerate(jobs.items(), 1):
        print(f"row {number} of {len(jobs)}: {label}", file=sys.stderr, flush=True)
        folders[label] = [images / job.name for job in sets]
        for job, folder in zip(sets, folders[label], strict=True):
            reports[folder] = run(job, folder, engine=engine, workers=workers)
            if torch.cuda.is_available():  # the pipeline, before the next one looks for memory
                gc.collect()
                torch.cuda.empty_cache()
    # counted now, not after each job: of those who share the work, whoever is last has to find everything
    there, expected = sum(Store(folder).count() for folder in reports), sum(r.expected for r in reports.values())
    if there == expected:
        return folders
    rank, world = share(os.environ) if engine == "local" else (0, 1)
    failed = [(folder, i, why) for folder, report in reports.items() for i, why in report.failures.items()]
    if world > 1 and all(i // Store(folder).job.block_size % world != rank for folder, i, _ in failed):
        raise OthersAtWork(
            f"worker {rank + 1} of {world} has made its share: {there} of {expected} images are there, and the worker "
            "that finishes last scores them"
        )
    reason = ""
    if failed:
        folder, index, why = failed[0]
        reason = f"; {len(failed)} could not be made, first image {index} of {folder.name}: {why}"
    raise DgkitError(
        f"{there} of {expected} images are there{reason}. When no other worker is at it, the same command makes the "
        "rest, then scores them"
    )


# -------------------------------------------------------------------------------------------------------------- scoring

Folders = Mapping[str, Sequence[Path]]
Table = dict[tuple[str, str], Measured]


def _measure(rows: Sequence[Row], folders: Folders) -> Table:
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
        kept = json.loads(path.read_text())
        if kept["id"] == identity:
            return kept["values"]
    values = compute()
    path.parent.mkdir(exist_ok=True)
    results.write_whole(path, json.dumps({"id": identity, "values": values}))
    return values


def _label(name: str) -> str:
    metric, _, style = name.partition("/")
    return scores.METRICS[metric].label + (f", {style}" if style else "")


# ------------------------------------------------------------------------------------------------------------ comparing


def _lines(rows: Sequence[Row], measured: Table, stated: int) -> Iterator[Line]:
    """Of all rows; `stated` is how many images the paper's numbers are of."""
    by_label = {row.label: row for row in rows}
    for row in rows:
        for score in row.scores:
            if (row.label, score) not in measured:  # a score of pairs, in a row that is compared with none
                continue
            found = measured[row.label, score]
            yield _level(row, score, found, stated)
            if row.baseline and (row.baseline, score) in measured:
                yield _comparison(row, by_label[row.baseline], score, found, measured[row.baseline, score])


def _level(row: Row, score: str, found: Measured, stated: int) -> Line:
    """A score of a row as such."""
    paper, key = None if row.wins else row.paper.get(score), f"{row.label}.{score}"
    if found.values is None:
        return Line(row.label, found.name, key, paper, None, None, f"not available: {found.reason}")
    # of one value per image, or per seed block where there are several
    ours = over_blocks(found.values) if row.seed_blocks > 1 else stats.mean(found.values)
    if paper is None:
        return Line(row.label, found.name, key, None, ours, None, "-")
    if row.count != stated:
        reason = f"not comparable: the paper's is of {stated:,} images"
        return Line(row.label, found.name, key, paper, ours, None, reason)
    low, high = ours.low - row.rounding[score], ours.high + row.rounding[score]
    verdict = "higher than printed" if low > paper else "lower than printed" if high < paper else "within our interval"
    return Line(row.label, found.name, key, paper, ours, ours.value - paper, verdict)


def _comparison(row: Row, baseline: Row, score: str, found: Measured, other: Measured) -> Line:
    """A score of a row against that of its baseline, image by image or seed block by seed block."""
    if row.wins:
        quantity, key = f"P({found.name} above {baseline.label})", f"{row.label}.{score}.win_probability"
        paper, neutral = row.paper.get(score), 0.5
    else:
        quantity, key = f"{found.name} less {baseline.label}", f"{row.label}.{score}.change"
        printed = score in row.paper and score in baseline.paper
        paper, neutral = round(row.paper[score] - baseline.paper[score], 6) if printed else None, 0.0
    if found.values is None or other.values is None:
        return Line(row.label, quantity, key, paper, None, None, "not available")
    if row.wins:
        ours, claim = stats.win_probability(found.values, other.values), row.claims.get(score)
    else:
        change = over_blocks if row.seed_blocks > 1 else stats.paired_bootstrap
        ours = change(found.values - other.values)
        claim = row.claims.get(score)
        if paper is not None:  # a difference that rounding may have made claims nothing
            reach = row.rounding[score] + baseline.rounding[score]
            claim = int(np.sign(paper)) if abs(paper) > reach else None
    difference = None if paper is None else ours.value - paper
    return Line(row.label, quantity, key, paper, ours, difference, verdict(ours, neutral, claim))


def verdict(ours: Interval, neutral: float, claim: int | None) -> str:
    """What a comparison says of the paper's claim.

    Args:
        ours: a difference or a win probability with its interval.
        neutral: where neither row is ahead, 0 or 1/2.
        claim: 1 for above, -1 for below, None if the paper claims nothing; of win probabilities 0 for comparable.

    Returns:
        "reproduced" if the whole interval lies where the paper says, "not reproduced" if all of it lies elsewhere, else
        "undecided"; without a claim "higher", "lower" or "no difference seen".
    """
    above, below = ours.low > neutral, ours.high < neutral
    if claim is None:
        return "higher" if above else "lower" if below else "no difference seen"
    if claim == 0:
        assert neutral == 0.5, "scores have no common unit in which to be comparable"
        inside = neutral - COMPARABLE <= ours.low and ours.high <= neutral + COMPARABLE
        outside = ours.low > neutral + COMPARABLE or ours.high < neutral - COMPARABLE
        return "reproduced" if inside else "not reproduced" if outside else "undecided"
    if not above and not below:
        return "undecided"
    return "reproduced" if above == (claim > 0) else "not reproduced"


def over_blocks(values: Array) -> Interval:
    """Mean of one value per seed block (n,), with Student's 95 % interval of n - 1 degrees of freedom."""
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    reach = float(student.ppf((1 + stats.LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


# ------------------------------------------------------------------------------------------------------- what to report


def _notes(rows: Sequence[Row], small: bool, model: str, weights: str | None) -> Iterator[str]:
    """What has to be known to read the table."""
    row = rows[0]
    if small:
        yield (
            f"{row.model} stands in for {model}: this tries the whole path. The paper's scores do not apply to its "
            "small images, so others stand in for them, and verdicts only say what differs. With so few images a "
            "Frechet distance is mostly bias; only its differences mean something."
        )
    if weights is not None:
        yield f"{weights} takes the place of {model}."
    if row.seed_blocks > 1:
        yield (
            f"ours: mean over {row.seed_blocks} seed blocks of {row.count} images; interval: 95 %, Student's t over "
            "the blocks."
        )
    else:
        yield (
            f"ours: mean over {row.count} images; interval: 95 %, bootstrap over images (Wilson's for shares), paired "
            "for comparisons."
        )
    yield '"-": the paper prints no number, or claims nothing.' if not small else '"-": the paper has no such number.'
    if any(row.wins for row in rows) and not small:
        yield f'A win probability is "comparable" within {0.5 - COMPARABLE:g} to {0.5 + COMPARABLE:g}.'
    for text in dict.fromkeys(text for row in rows for text in row.assumed):
        yield f"assumed: {text}"


def _provenance(
    parameters: Mapping[str, Any],
    jobs: Mapping[str, Sequence[Job]],
    folders: Folders,
    measured: Table,
) -> dict[str, Any]:
    """As of other results, from the run folders: images may be older than this process."""
    distinct = dict.fromkeys(path for paths in folders.values() for path in paths)  # rows may share their images
    made = [entry for path in distinct for entry in Store(path).provenance()]
    first = folders[next(iter(folders))][0]
    identity = json.loads((first / "model.json").read_text())
    return provenance.provenance(parameters) | {
        "seed": parameters["seeds"],
        "weights_sha256": identity["weights_sha256"].get("transformer"),
        "device": ", ".join(sorted({entry["device"] for entry in made})),
        "dtype": next(iter(jobs.values()))[0].dtype,
        "generation_seconds": round(sum(map(_seconds, made)), 1),
        "generation_commits": sorted({str(entry["commit"]) for entry in made}),
        "jobs": {label: [job.sha256 for job in sets] for label, sets in jobs.items()},
        "metrics": {score: found.id for (_, score), found in measured.items() if found.id},
    }


def _seconds(shard: Mapping[str, Any]) -> float:
    """That one shard took, with what was made of it before."""
    return shard["seconds"] + (_seconds(shard["earlier"]) if "earlier" in shard else 0.0)


def _save(
    table: str, parameters: Mapping[str, Any], provenance: Mapping[str, Any], lines: Sequence[Line], path: Path
) -> None:
    """Write the result file: "ROW.SCORE" is ours, with ".paper" and ".verdict" beside it."""
    values: dict[str, Any] = {}
    for line in lines:
        parts = {line.key: line.ours, f"{line.key}.paper": line.paper, f"{line.key}.verdict": line.verdict}
        values |= {key: value for key, value in parts.items() if value is not None}
    record = results.Record(
        table,
        {key: results.encoded(value, key) for key, value in parameters.items()},
        dict(provenance),
        {key: results.encoded(value, key) for key, value in values.items()},
    )
    record.write(path)
