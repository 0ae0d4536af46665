"""What holds of each chapter's claim, model by model."""

from collections.abc import Mapping

from dgbook.chapters import readings
from dgbook.claims import verdicts
from dgbook.claims.verdicts import Verdict
from dgbook.markdown import code, plain, table
from dgbook.pages.text import chapter_link
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS

NO_RUN = "No reference run of this chapter is stored."

CHAPTERS = {
    "01_layer_properties": "massive activations occur in all layers, in a few fixed dimensions, in all image tokens",
    "02_timestep_vs_text": "the residual gate alpha decides which dimensions, the timestep decides their magnitude, "
    "the text does neither",
    "03_intervention": "without massive activations, images lose local detail and keep their content",
    "04_detail_guidance": "guiding away from the model without them (Detail Guidance, DG) adds detail, with and "
    "without classifier-free guidance (CFG)",
    "05_ablations": "intermediate blocks are best for it, and it is stable over its scales",
    "06_imagenet": "DG improves FID, IS and precision on ImageNet",
}
"""What the paper claims, chapter by chapter."""


def chapters() -> str:
    """The paper's claims, a row per chapter, and the verdict on each shipped model."""
    shipped = [name for name, row in MODELS.items() if row.source is None]
    lines = []
    for chapter, claim in CHAPTERS.items():
        found = verdicts.of_references(chapter)
        cells = [str(found[model]) if model in found else _no_run(chapter, model) for model in shipped]
        lines.append((chapter_link(chapter, ""), claim, *cells))
    return table(("", "claim", *(f"on {code(model)}" for model in shipped)), lines)


def _no_run(chapter: str, model: str) -> str:
    needs_classes = chapter == "06_imagenet" and MODELS[model].pipeline != "DiTPipeline"
    return "needs classes" if needs_classes else "not run"


def across_models(chapter: str) -> str:
    """The parts of one chapter's claim in the reference run of each model: a row per part, a column per model.

    Raises:
        DgkitError: the chapter claims nothing.
    """
    if chapter not in verdicts.parts():
        raise DgkitError(f"chapter={chapter!r} claims nothing: use one of {', '.join(verdicts.parts())}")
    found = verdicts.of_references(chapter)
    return table(("", *map(code, found)), side_by_side(found)) if found else NO_RUN


def side_by_side(found: Mapping[str, Verdict]) -> list[tuple[str, ...]]:
    """The parts of a claim with what each verdict says of them: rows of a table."""
    rows = zip(*(verdict.answers for verdict in found.values()), strict=True)
    return [(plain(row[0].part.text), *map(plain, row)) for row in rows]


def readings_across_models() -> str:
    """How far each reading of the paper is from this book's, in the reference run of each model."""
    shown = readings.across_models("07_ambiguities")
    if shown.empty:
        return NO_RUN
    lines = [(plain(reading), *(plain(cell) for cell in cells)) for reading, *cells in shown.itertuples()]
    return table(("", *map(code, shown.columns)), lines)
