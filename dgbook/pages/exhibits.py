"""Which of our figures answers to which of the paper's 23 figures and 6 tables."""

from dataclasses import dataclass

from dgbook.claims import paper
from dgbook.claims.results import Record
from dgbook.markdown import code, plain, table
from dgbook.pages import runs
from dgbook.pages.text import ZOO, chapter_link, command_of, on_models
from dgbook.paper_scale import protocol
from dgkit.errors import DgkitError


@dataclass(frozen=True)
class Ours:
    """What this book has for one figure or table of the paper.

    Attributes:
        notebook: the chapter; none for what is not in a chapter.
        figures: names of its figures.
        note: what differs, or why there is none.
    """

    notebook: str = ""
    figures: tuple[str, ...] = ()
    note: str = ""


_LAYERS = Ours("01_layer_properties", ("fig-layers",), "drawn for one small model, in numbers for all")
_TIME = Ours("02_timestep_vs_text", ("fig-gates", "fig-time"), "drawn for one small model, in numbers for all")
_IMAGES = Ours("04_detail_guidance", ("fig-dg",), "images of a small model")

OURS = {
    "Figure 1": _IMAGES,
    "Figure 2": Ours("01_layer_properties", ("fig-channels",)),
    "Figure 3": Ours(
        "01_layer_properties", ("fig-layers", "fig-training", "fig-ladder"), "sizes and checkpoints of small models"
    ),
    "Figure 4": Ours("02_timestep_vs_text", ("fig-gates", "fig-time", "fig-shares")),
    "Figure 5": Ours(
        "03_intervention", ("fig-intervention", "fig-effects"), "effects on frequencies in place of win probabilities"
    ),
    "Figure 6": _IMAGES,
    "Figure 7": _IMAGES,
    "Figure 8": Ours(
        "05_ablations", ("fig-sweeps", "fig-depth"), "sharpness and agreement in place of Aesthetic and CLIPScore"
    ),
    "Figure 9": Ours(note="a drawing; {doc}`/book/method` has its equations"),
    "Figure 10": _LAYERS,
    "Figure 11": _LAYERS,
    "Figure 12": _LAYERS,
    "Figure 13": _TIME,
    "Figure 14": _TIME,
    "Figure 15": _TIME,
    "Figure 16": Ours("03_intervention", ("fig-intervention",)),
    "Figure 17": Ours(note="needs annotators; `dgkit study make` makes the pages for them"),
    **{f"Figure {number}": _IMAGES for number in range(18, 24)},
    "Table 1": Ours("04_detail_guidance", ("fig-dg-effects",), "other measures; see {ref}`below <beside-table-1>`"),
    "Table 2": Ours(
        "05_ablations",
        ("fig-methods", "fig-methods-images"),
        "all methods at equal cost; see {ref}`below <beside-table-2>`",
    ),
    "Table 3": Ours("04_detail_guidance", ("fig-dg-effects",), "other measures; see {ref}`below <beside-table-3>`"),
    "Table 4": Ours(note="the presets of `dgkit.zoo`, in `data/paper`; tested against the released architectures"),
    "Table 5": Ours(note="the presets of `dgkit.zoo`, in `data/paper`"),
    "Table 6": Ours(
        "06_imagenet", ("fig-table6",), "Fashion-MNIST in place of ImageNet; see {ref}`below <beside-table-6>`"
    ),
}
"""Every figure and table of the paper, in its order."""


def exhibits() -> str:
    """The map: a row per figure or table of the paper.

    Raises:
        DgkitError: one of them has no entry in `OURS`.
    """
    shown = runs.pages()
    lines = []
    for row in paper.exhibits().to_dict("records"):
        name = row["exhibit"]
        if name not in OURS:
            raise DgkitError(f"{name} of the paper has no entry in dgbook.pages.exhibits.OURS")
        ours = OURS[name]
        figures = ", ".join(f"{{numref}}`{figure}`" for figure in ours.figures)
        here = f"{chapter_link(ours.notebook)}: {figures}" if ours.notebook else "none"
        models = f" ({plain(row['models'].replace('; ', ', '))})" if row["models"] else ""
        larger = _at_scale(name, row["models"], ours.notebook)
        made = [_made(shown.get(ours.notebook)), f"on the paper's models: {larger}" if larger else ""]
        lines.append(
            (
                f"**{name}**: {plain(row['shows'])}{models}",
                f"{here}; {ours.note}" if ours.note else here,
                "; ".join(filter(None, made)),
            )
        )
    return table(("paper", "here", "command"), lines)


def _made(record: Record | None) -> str:
    """What made the figure on the page, in a line."""
    if record is None:
        return ""
    facts = record.provenance
    return (
        f"{code(facts['command'])} on {code(facts['model'])}, seed {facts['seed']}, {plain(facts['device'])}, "
        f"{facts['wall_seconds']:.0f} s, commit {runs.commit(facts)}"
    )


def _at_scale(name: str, models: str, notebook: str) -> str:
    """The commands that make it on the paper's models."""
    reproduced = {"Figure 5": "fig5b", "Figure 8": "fig8"}.get(name, name.lower().replace(" ", ""))
    known = [ZOO[model] for model in models.split("; ") if model]
    commands = []
    if reproduced in protocol.TABLES:
        available = {row.model for row in protocol.rows(reproduced)}
        commands.append((f"dgkit reproduce {reproduced}", [model for model in known if model in available]))
    if notebook and known and not name.startswith("Table"):
        commands.append((f"dgkit run {command_of(notebook)}", known))
    return ", ".join(on_models(command, models) for command, models in commands)
