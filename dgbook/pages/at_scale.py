"""What it takes to test the claims on the paper's models: commands, images, GPU hours, downloads."""

import pandas as pd

from dgbook.claims import verdicts
from dgbook.markdown import code, plain, table
from dgbook.pages.text import ZOO, command_of, on_models
from dgbook.paper_scale import plan, protocol
from dgbook.paper_scale.row import evaluations
from dgkit.zoo import MODELS

NOT_REPEATABLE = {
    "4.1b": "the checkpoints along DiT-XL's training, which are not public",
    "4.1c": "the weights of the smaller DiTs, which are not public",
    "F": "the GPU; `dgkit plan table1 --model sd3.5-large` prints memory and time",
    "I": "annotators; `dgkit study make` makes the pages for them",
}
"""What it would take where no command runs the claim on the paper's models."""


def commands(claim: pd.Series) -> dict[str, list[str]]:
    """The commands that test a claim, each with those of the paper's models (names of the zoo) that it takes."""
    if claim["id"] in NOT_REPEATABLE:
        return {}
    models = [ZOO[name] for name in claim["models"].split("; ")]
    needed = {
        f"dgkit reproduce {name}": [model for model in models if model in {row.model for row in protocol.rows(name)}]
        for name in dict.fromkeys(map(_reproduced, claim["exhibits"].split("; ")))
        if name
    }
    if needed:
        return needed
    testing = [c for c, parts in verdicts.parts().items() if any(claim["id"] in part.claims for part in parts)]
    return {f"dgkit run {command_of(chapter)}": models for chapter in testing}


def _reproduced(exhibit: str) -> str:
    """The name of a figure or table of numbers for `dgkit reproduce`; "" for what it cannot make."""
    name = exhibit.replace("Table ", "table").replace("Fig. 5(b)", "fig5b")
    name = "fig8" if name.startswith("Fig. 8") else name
    return name if name in protocol.TABLES else ""


def paper_scale() -> str:
    """What the paper's tables cost at its scale, a row per table and model, and where the GPU hours come from."""
    lines: list[tuple[str, ...]] = []
    basis: dict[str, str] = {}
    for name in protocol.TABLES:
        for model in dict.fromkeys(row.model for row in protocol.rows(name)):
            found = plan.plan(name, model)
            basis |= found.basis
            lines.append(
                (
                    on_models(f"dgkit reproduce {name}", [model]),
                    f"{sum(work.images for work in found.distinct):,}",
                    f"{sum(work.block_evaluations for work in found.distinct):,}",
                    _hours(found.gpu_hours),
                    f"{sum(item.gigabytes for item in found.items):.0f} GB",
                    plain(MODELS[model].licence),
                )
            )
    header = ("command", "images", "block evaluations", "GPU hours", "downloads", "licence of the weights")
    return "\n".join([table(header, lines), "", *(f"* {code(model)}: {plain(text)}" for model, text in basis.items())])


def _hours(hours: float) -> str:
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"


def costs() -> str:
    """What Detail Guidance costs with the presets of the large models: block evaluations over full passes and CFG."""
    lines = []
    for name, model in MODELS.items():
        if model.source is None or model.preset.block is None:
            continue
        n, block = model.blocks, model.preset.block
        alone, beside_cfg = (evaluations(n, cfg, block) for cfg in (False, True))
        ratios = (alone / (2 * n), beside_cfg / (3 * n), beside_cfg / evaluations(n, True))
        lines.append((code(name), str(n), str(block + 1), *(f"{ratio:.2f}" for ratio in ratios)))
    header = ("", "N", "m", "DG: (2N - m) / 2N", "CFG + DG: (3N - m) / 3N", "CFG + DG over CFG: (3N - m) / 2N")
    return table(header, lines)
