"""One row of a table as a setting: what it samples, what that costs, and the same in small on an embedded model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dgbook.paper_scale.generate.job import canonical
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS, Preset

NAMES = {"SD3": "sd3", "SD3.5": "sd3.5-large", "Flux": "flux-dev"}
"""The models of Tables 1 to 5 by their names there."""

SMALL = {"sd3": "tiny-sd3", "sd3.5-large": "tiny-sd3", "flux-dev": "tiny-flux", "dit-xl-2": "tiny-dit"}
"""The embedded model that stands in for a large one when the whole path is tried in small."""

SMALL_COUNT, SMALL_STEPS = 24, 8
SMALL_SET, SMALL_SET_STEPS = 70, 4  # more images than the judge has features

SMALL_SCORES = ("judge-agreement", "sharpness", "high-frequency-energy", "structure-similarity")
SMALL_SET_SCORES = ("judge-frechet", "judge-is", "judge-precision", "judge-recall")
"""What stands in for the paper's scores on images of 28 or 32 pixels, which its networks were not made for."""


@dataclass(frozen=True)
class Row:
    """One row of one table.

    Attributes:
        table: "table1", ...
        label: the row as the table names it.
        model: a name of the zoo.
        prompts: a set of `dgbook.paper_scale.prompts`.
        count, steps: images and sampling steps.
        guidance_scale: s of u + s (c - u); 1 for none.
        methods: guidance methods by name, with their parameters, as in `dgbook.paper_scale.generate.job.Job`.
        paper: the scores as printed, by the name of the metric; "hpsv2.1/anime" for one style. With `wins`, the
            printed probabilities of winning against `baseline`.
        rounding: by the same names, half a unit of the last digit that is printed.
        scores: what is to be measured: names of metrics, those in `paper` among them.
        baseline: label of the row that this one is compared with, image by image; "" for none.
        wins: whether it is compared by the probability to score higher, ties counted half; else by the difference.
        claims: where nothing is printed, what the paper says of the comparison in words: 1 for higher than the
            baseline, -1 for lower; with `wins` also 0 for comparable.
        disruption: arguments of `dgkit.disrupt`; none if empty.
        seed_blocks: how many sets of `count` images, each of a seed of its own.
        conditional: False for unconditional sampling (the null class).
        assumed: what the paper does not state and is assumed here.
        lacking: what the paper does not state and nothing can be assumed for: "dims" or "scale".
    """

    table: str
    label: str
    model: str
    prompts: str
    count: int
    steps: int
    guidance_scale: float
    methods: Mapping[str, Mapping[str, Any]]
    paper: Mapping[str, float]
    scores: tuple[str, ...]
    rounding: Mapping[str, float] = field(default_factory=dict)
    baseline: str = ""
    wins: bool = False
    claims: Mapping[str, int] = field(default_factory=dict)
    disruption: Mapping[str, Any] = field(default_factory=dict)
    seed_blocks: int = 1
    conditional: bool = True
    assumed: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    @property
    def sampled(self) -> str:
        """Everything that decides its images, as text: rows that have it in common are sampled once."""
        names = ("model", "prompts", "count", "steps", "guidance_scale", "methods", "disruption", "seed_blocks")
        return canonical({name: getattr(self, name) for name in (*names, "conditional")})


def in_small(row: Row) -> Row:
    """The same row on an embedded model and its own conditions, a few images of it; without the paper's scores.

    Fig. 8's depths move to the same part of the small model's, where some coincide; its w and lambda stay.
    """
    big, tiny = MODELS[row.model], MODELS[SMALL[row.model]]
    preset = tiny.preset
    methods: dict[str, dict[str, Any]] = {}
    label = row.label
    for name, parameters in row.methods.items():
        if name != "dg":
            methods[name] = {"scale": preset.guidance_scale} if "scale" in parameters else {}
            continue
        methods[name] = detail_guidance(preset, row.guidance_scale)
        if row.label == depth_label(parameters["block"]):
            block = parameters["block"] * tiny.blocks // big.blocks
            methods[name]["block"], label = block, depth_label(block)
        w = parameters.get("scale")
        if "w = " in row.label or w != detail_guidance(big.preset, row.guidance_scale).get("scale"):
            methods[name]["scale"] = w

    def renamed(text: str) -> str:
        printed, _, rest = text.partition(" ")
        return f"{SMALL[row.model]} {rest}" if printed in NAMES else text

    sets = row.seed_blocks > 1
    s = preset.guidance_scale if row.table != "fig8" else row.guidance_scale  # where it is what is varied
    return replace(
        row,
        label=renamed(label),
        baseline=renamed(row.baseline),
        model=SMALL[row.model],
        prompts=tiny.data,
        count=SMALL_SET if sets else SMALL_COUNT,
        steps=SMALL_SET_STEPS if sets else SMALL_STEPS,
        guidance_scale=s if row.guidance_scale > 1 else 1.0,
        methods=methods,
        disruption=disruption(preset, row.disruption["kind"]) if row.disruption else {},
        paper={},
        rounding={},
        scores=SMALL_SET_SCORES if sets else SMALL_SCORES,
        claims={},
        assumed=(),
        lacking=(),
    )


def filled(row: Row, **values: Any) -> Row:
    """The row with Detail Guidance's `dims` or `scale` set where the paper is silent.

    Raises:
        DgkitError: something is still lacking.
    """
    given = {key: value for key, value in values.items() if value is not None}
    lacking = tuple(name for name in row.lacking if name not in given)
    if lacking:
        raise DgkitError(
            f"{row.table}, {row.label}: the paper does not state {' and '.join(lacking)} for {row.model}: give "
            f"{' and '.join('--' + name for name in lacking)}"
        )
    if "dg" not in row.methods:
        return row
    own = {key: value for key, value in given.items() if key in row.lacking}
    return replace(row, methods=dict(row.methods) | {"dg": dict(row.methods["dg"]) | own}, lacking=())


def evaluations(blocks: int, cfg: bool, block: int | None = None) -> int:
    """Evaluations of one transformer block in one step of one image.

    DG computes the blocks up to the edited one once for both passes.

    Args:
        blocks: of the model.
        cfg: whether there is an unconditional pass.
        block: that DG edits, zero-based; None without DG.
    """
    return blocks * (2 if cfg else 1) + (0 if block is None else blocks - (block + 1))


def block_evaluations(row: Row) -> int:
    """What a row costs: `evaluations` of all its images."""
    of_step = evaluations(MODELS[row.model].blocks, row.guidance_scale > 1, row.methods.get("dg", {}).get("block"))
    return row.count * row.seed_blocks * row.steps * of_step


def detail_guidance(preset: Preset, guidance_scale: float) -> dict[str, Any]:
    """Detail Guidance's parameters by Tables 4 and 5, without what they do not state."""
    scale = preset.scale if guidance_scale == 1 else preset.scale_with_cfg
    stated = {"block": preset.block, "dims": preset.dims and list(preset.dims), "scale": scale}
    return {name: value for name, value in stated.items() if value is not None}


def disruption(preset: Preset, kind: str) -> dict[str, Any]:
    """Arguments of `dgkit.disrupt` by Table 4."""
    return {"block": preset.block, "dims": list(preset.dims or ()), "kind": kind}


def depth_label(block: int) -> str:
    """The label of one of Fig. 8's depths."""
    return f"DG, m = {block + 1}"
