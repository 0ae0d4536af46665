"""What a table costs, before anything starts: images, work, GPU hours, memory, downloads, disk and licences.

    dgkit plan table1 --model sd3.5-large

GPU hours are measured ones where `benchmarks/` holds the JSON of `benchmarks.full_size` for the model; else they are
FLOPs of the real architecture at a stated share of a stated GPU's speed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dgbook.downloads import Published, local
from dgbook.paper_scale import protocol
from dgbook.paper_scale.row import Row, block_evaluations
from dgbook.paper_scale.scores import METRICS
from dgbook.paper_scale.scores.weights import WEIGHTS
from dgkit import loading
from dgkit.memory import WORKING_GB, placement
from dgkit.paths import CHECKOUT
from dgkit.zoo import MODELS, Model

GPU, PEAK_TFLOPS = "NVIDIA H100 SXM", 989.0  # dense bfloat16, by NVIDIA's data sheet
EFFICIENCY = 0.4
"""Assumed share of the peak."""

GPUS_GB = {"24 GB": 25.2, "48 GB": 50.4, "80 GB": 84.3}
"""Free bytes / 1e9 of an empty RTX 4090, A6000 and A100, the driver's half a GiB taken off."""

_WAYS = {"whole": "as a whole", "parts": "part by part", "blocks": "block by block"}


@dataclass(frozen=True)
class Timing:
    """Measured times of one model's sampling steps, one image at a time.

    Attributes:
        device: where.
        file: name of the JSON.
        milliseconds: of one step, by the name of the run: "plain", "CFG", "DG replay", "CFG+DG replay".
    """

    device: str
    file: str
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Work:
    """What one row of a table takes.

    Attributes:
        row: the row.
        images: of all its seeds.
        block_evaluations: of one block for one image.
        gpu_hours: see `Plan.basis`.
    """

    row: Row
    images: int
    block_evaluations: int
    gpu_hours: float


@dataclass(frozen=True)
class Item:
    """Something that has to be downloaded and whose licence holds.

    Attributes:
        name: for people.
        gigabytes: size.
        licence: its name, with the page where it is accepted if it is gated.
        here: whether it is on this machine.
        converted: whether a pickle, of which a second copy is kept as safetensors.
    """

    name: str
    gigabytes: float
    licence: str
    here: bool
    converted: bool = False


@dataclass(frozen=True)
class Plan:
    """The costs of the rows of a table.

    Attributes:
        work: by row.
        basis: by model, where the GPU hours come from.
        items: models, scorers' weights and reference images.
        images_gb: of all images on disk.
    """

    work: tuple[Work, ...]
    basis: dict[str, str]
    items: tuple[Item, ...]
    images_gb: float

    @property
    def distinct(self) -> tuple[Work, ...]:
        """One row for each set of images: rows that share theirs sample them once."""
        return tuple({work.row.sampled: work for work in self.work}.values())

    @property
    def gpu_hours(self) -> float:
        """Of all images."""
        return sum(work.gpu_hours for work in self.distinct)

    @property
    def download_gb(self) -> float:
        """Of what is not here."""
        return sum(item.gigabytes for item in self.items if not item.here)

    @property
    def disk_gb(self) -> float:
        """Of downloads, what is converted of them, and images."""
        converted = sum(item.gigabytes for item in self.items if not item.here and item.converted)
        return self.download_gb + converted + self.images_gb

    def __str__(self) -> str:
        lines = [_line("", "images", "steps", "s", "block evaluations", "GPU hours")]
        for work in self.work:
            row = work.row
            lines.append(
                _line(
                    row.label,
                    f"{work.images:,}",
                    str(row.steps),
                    f"{row.guidance_scale:g}",
                    f"{work.block_evaluations:,}",
                    f"{work.gpu_hours:,.1f}",
                )
            )
        images = sum(work.images for work in self.distinct)
        evaluations = sum(work.block_evaluations for work in self.distinct)
        shared = len(self.work) > len(self.distinct)
        label = "all, shared rows once" if shared else "all"
        lines += [_line(label, f"{images:,}", "", "", f"{evaluations:,}", f"{self.gpu_hours:,.1f}"), ""]
        lines += [f"GPU hours  {model}: {basis}" for model, basis in self.basis.items()]
        lines += [f"memory     {name}: {memory(MODELS[name])}" for name in self.basis]
        lines += [
            f"download   {item.gigabytes:5.1f} GB  {item.name}{' (here)' if item.here else ''}" for item in self.items
        ]
        lines.append(f"disk       {self.disk_gb:5.1f} GB, {self.images_gb:.1f} GB of it images")
        lines += [f"licence    {text}" for text in dict.fromkeys(item.licence for item in self.items)]
        lacking = dict.fromkeys(name for work in self.work for name in work.row.lacking)
        if lacking:
            options = " and ".join(f"--{name}" for name in lacking)
            lines.append(f"not stated by the paper, to be given to `dgkit reproduce`: {options}")
        assumed = dict.fromkeys(text for work in self.work for text in work.row.assumed)
        return "\n".join([*lines, *(f"assumed    {text}" for text in assumed)])


def plan(table: str, model: str | None = None) -> Plan:
    """The costs of a table, or of its rows of one model.

    Args:
        table: a key of `protocol.TABLES`.
        model: a name of the zoo.

    Raises:
        DgkitError: unknown table, or the table has no row of `model`.
    """
    rows = protocol.rows(table, model)
    models = list(dict.fromkeys(row.model for row in rows))
    timings = {name: timing(name) for name in models}
    return Plan(
        work=tuple(
            Work(row, row.count * row.seed_blocks, block_evaluations(row), gpu_hours(row, timings[row.model]))
            for row in rows
        ),
        basis={name: _basis(name, timings[name]) for name in models},
        items=(*_models(models), *_scorers(rows)),
        images_gb=sum(
            row.count * row.seed_blocks * 3 * MODELS[row.model].side ** 2
            for row in {row.sampled: row for row in rows}.values()
        )
        / 1e9,
    )


# ----------------------------------------------------------------------------------------------------------------- time


def block_flops(model: Model) -> float:
    """FLOPs of one block for one image, with n tokens of width d, whatever the block's kind: 24 d^2 n + 4 d n^2.

    Each token passes 12 d^2 weights (4 of attention, 8 of an MLP four times as wide), each pair of tokens one product
    of queries and keys and one with values, d each; a product and its sum are two. Embeddings, modulation and the
    output layer are left out: below 1 %.
    """
    n, d = model.tokens, model.channels
    return 24.0 * d**2 * n + 4.0 * d * n**2


def timing(name: str) -> Timing | None:
    """The measured times of a model of the zoo, by the newest JSON in `benchmarks/` that has them uncompiled."""
    files = [] if CHECKOUT is None else (CHECKOUT / "benchmarks").glob("*.json")
    found: list[tuple[str, Timing]] = []
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "rows" not in content or content["toy"]:
            continue
        times = {row["run"]: row["ms"] for row in content["rows"] if row["model"] == name and not row["compiled"]}
        if times:
            found.append((content["date"], Timing(content["device"], path.name, times)))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def gpu_hours(row: Row, measured: Timing | None) -> float:
    """GPU hours of one row.

    Args:
        row: of a table.
        measured: times of its model; FLOPs are counted without.
    """
    evaluations = block_evaluations(row)
    if measured is None:
        return evaluations * block_flops(MODELS[row.model]) / (EFFICIENCY * PEAK_TFLOPS * 1e12) / 3600
    cfg, dg = row.guidance_scale > 1, row.methods.get("dg")
    share = 1.0
    if dg is not None:  # measured at the preset's depth
        at_preset = replace(row, methods={"dg": {**dg, "block": MODELS[row.model].preset.block}})
        share = evaluations / block_evaluations(at_preset)
    run = ("CFG+DG replay" if cfg else "DG replay") if dg is not None else ("CFG" if cfg else "plain")
    return share * row.count * row.seed_blocks * row.steps * measured.milliseconds[run] / 1000 / 3600


def _basis(name: str, measured: Timing | None) -> str:
    if measured is not None:
        where = f"measured on {measured.device}, one image at a time (benchmarks/{measured.file})"
        return f"{where}; larger batches are faster"
    return (
        f"{MODELS[name].blocks * block_flops(MODELS[name]) / 1e12:.3g} TFLOP per image and pass, at an assumed "
        f"{EFFICIENCY:.0%} of {PEAK_TFLOPS:g} TFLOP/s ({GPU}, bfloat16); encoding, decoding and scoring add up to 6 %"
    )


# --------------------------------------------------------------------------------------------------------------- memory


def memory(model: Model) -> str:
    """Peak memory of one image on three sizes of GPU, and how `dgkit.load` moves the model there."""
    peaks = {"whole": model.weights_gb, "parts": model.largest_gb, "blocks": 0.0}
    told = []
    for gpu, free in GPUS_GB.items():
        way = placement(model.weights_gb, model.largest_gb, free)
        assert way is not None, "no model is too large for these GPUs"
        told.append(f"{peaks[way] + WORKING_GB:.0f} of {gpu} {_WAYS[way]}")
    return f"{model.weights_gb:.1f} GB of weights; one image takes about {', '.join(told)}"


# ---------------------------------------------------------------------------------------------- downloads and licences


def _models(names: Sequence[str]) -> list[Item]:
    items = []
    for name in names:
        model = MODELS[name]
        if model.source is None:
            continue
        page = f"https://huggingface.co/{model.source}"
        licence = f"{name}: " + model.licence.replace("(gated)", f"(accept it at {page}, then `hf auth login`)")
        items.append(
            Item(f"{name} ({model.source})", model.download_gb, licence, loading.cached(model.source, model.revision))
        )
    return items


def _scorers(rows: Sequence[Row]) -> list[Item]:
    scores = dict.fromkeys(score.partition("/")[0] for row in rows for score in row.scores)
    names = [name for score in scores if score in METRICS for name in METRICS[score].weights]
    if {"fid", "precision", "recall"} & scores.keys():
        names.append("imagenet-256-reference")
    return [_published(name, WEIGHTS[name]) for name in dict.fromkeys(names)]


def _published(name: str, item: Published) -> Item:
    source, pickle = item.hub or item.files[0], item.files[0].endswith((".pt", ".pth"))
    return Item(f"{name} ({source})", item.gigabytes, f"{name}: {item.licence}", local(item) is not None, pickle)


def _line(label: str, *cells: str) -> str:
    widths = (8, 6, 5, 18, 10)
    return f"{label:24}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
