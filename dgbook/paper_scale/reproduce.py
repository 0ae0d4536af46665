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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dgbook.claims import provenance, results
from dgbook.downloads import local
from dgbook.paper_scale import prompts, protocol, scores
from dgbook.paper_scale.comparing import COMPARABLE, Line, lines_of
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.run import Report, run, share
from dgbook.paper_scale.generate.store import Store
from dgbook.paper_scale.row import SMALL, Row, block_evaluations, filled, in_small
from dgbook.paper_scale.scores.weights import WEIGHTS
from dgbook.paper_scale.scoring import Folders, Table, measure
from dgbook.paths import build_dir, safe_name
from dgkit import checks
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS

_NULL_CLASS = 1000  # DiT's
_BLOCK_SIZES = {"imagenet": 50, "fashion-mnist": 35}  # small images; divisors of the sets


class OthersAtWork(DgkitError):
    """This process has made its share of the images, and other processes have not yet made theirs."""


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
        standing = {(name, SMALL[of]): (name, of) for name, of in reversed(pairs)}
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
        checks.integer("count", count, 2)
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
    measured = measure(rows, folders)
    lines = tuple(lines_of(rows, measured, stated))
    parameters = {
        "model": rows[0].model, "table": table, "weights": weights, "dims": dims, "scale": scale, "small": small,
        "count": rows[0].count, "steps": rows[0].steps, "prompts": rows[0].prompts,
        "seeds": list(range(rows[0].seed_blocks)),
    }  # fmt: skip
    provenance = _provenance(parameters, jobs, folders, measured)
    if weights is None:
        distinct = {row.sampled: row for row in rows}.values()
        provenance["block_evaluations"] = sum(map(block_evaluations, distinct))
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
        rows = list({row.label: row for row in map(in_small, rows)}.values())
    elif model in protocol.UNNAMED and weights is None:
        raise DgkitError(
            f"{table} was measured on a variant of {model} that the paper does not name: give --weights "
            f"{protocol.UNNAMED[model]}, or another name, pipeline folder or hub id"
        )
    return [filled(row, dims=None if dims is None else list(dims), scale=scale) for row in rows]


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
    identity = json.loads((first / "model.json").read_text(encoding="utf-8"))
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
