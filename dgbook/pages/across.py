"""What holds of each chapter's claim, model by model."""

from collections.abc import Mapping

from dgbook.chapters import readings
from dgbook.claims import paper, results, verdicts
from dgbook.claims.verdicts import FAILS, HOLDS, NOT_MEASURED, UNDECIDED, Answer, Verdict
from dgbook.markdown import code, plain, table
from dgbook.pages.text import chapter_link, claim_target
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS

NO_RUN = "No reference run of this chapter is stored."

CHAPTERS = {
    "01_layer_properties": "Massive activations: in all layers, at a few channels, in all image tokens?",
    "02_timestep_vs_text": "Does the timestep set their size, and not the text?",
    "03_intervention": "Without them, do images lose detail, and only detail?",
    "04_detail_guidance": "Does Detail Guidance (DG) add detail, alone and beside classifier-free guidance (CFG)?",
    "05_ablations": "Is it best in intermediate blocks, and stable over its scales?",
    "06_imagenet": "Does it improve FID, IS and precision, as on ImageNet?",
}
"""What each chapter asks of the paper's claims."""

BADGES = {HOLDS: ("success", "✓"), FAILS: ("danger", "✗"), UNDECIDED: ("warning", "?"), NOT_MEASURED: ("light", "–")}
"""The colour and the sign of each word."""


def chapters() -> str:
    """What each chapter asks, a row each, and a badge for every test on each shipped model, linked to its claim."""
    shipped = [name for name, row in MODELS.items() if row.source is None]
    lines = []
    for chapter, question in CHAPTERS.items():
        found = verdicts.of_references(chapter)
        cells = [" ".join(map(_badge, found[m].answers)) if m in found else _no_run(chapter, m) for m in shipped]
        lines.append((chapter_link(chapter, ""), question, *cells))
    legend = ", ".join(f"{{bdg-{colour}}}`{sign}` {word}" for word, (colour, sign) in BADGES.items())
    shown = table(("", "question", *map(code, shipped)), lines)
    return f"{shown}\n\nA badge for each test: {legend}. Each leads to its claim."


def _badge(answer: Answer) -> str:
    colour, sign = BADGES[answer.word]
    if not answer.part.claims:
        return f"{{bdg-{colour}}}`{sign}`"
    return f"{{bdg-ref-{colour}}}`{sign} <{claim_target(answer.part.claims[0])}>`"


def help_of_guidance() -> str:
    """Whether DG brings images closer to real ones, a row per shipped model: the change of the Frechet distance."""
    lines = []
    for model, found in verdicts.of_references("04_detail_guidance").items():
        answers = {answer.part.id: answer for answer in found.answers}
        lines.append((code(model), *(plain(answers[part]) for part in ("4e", "4f"))))
    return table(("", "DG alone", "DG beside CFG"), lines) if lines else NO_RUN


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


def sizes() -> str:
    """How massive the activations are, a row per training, and what the paper prints of its own.

    Of the largest channel of any block: its mean |z| over the median channel's, its share of the image tokens' energy,
    its largest |z|, the share of image tokens in which it is massive; whether any channel meets the thresholds of Sun
    et al. 2024; and how many blocks have a channel above so many times their median.
    """
    rows: list[tuple[str, ...]] = []
    thresholds: tuple[str, ...] = ()
    for model, record in results.references("01_layer_properties").items():
        values = record.decoded()
        largest, over = values["largest"], values["over"]
        thresholds = tuple(f"> {t:g}" for t in over[:, 0])
        shown = [f"{largest['ratio']:.1f}", f"{largest['energy']:.0%}", f"{largest['max_abs']:.0f}"]
        met = "yes" if len(values["sun_dims"]) else "no"
        counts = [f"{int(count)} of {values['blocks']}" for count in over[:, 1]]
        rows.append((code(model), *shown, f"{largest['token_share']:.0%}", met, *counts))
    if not rows:
        return NO_RUN
    printed = paper.claims().set_index("id").at["4.1g", "numbers"]
    rows.append(("SD3, in the paper", "", "", plain(printed), "all", *[""] * (1 + len(thresholds))))
    heads = ("", "over the median", "of the energy", "largest size", "of the tokens", "Sun et al.", *thresholds)
    return table(heads, rows)


def readings_across_models() -> str:
    """How far each reading of the paper is from this book's, in the reference run of each model."""
    shown = readings.across_models("07_ambiguities")
    if shown.empty:
        return NO_RUN
    lines = [(plain(reading), *(plain(cell) for cell in cells)) for reading, *cells in shown.itertuples()]
    return table(("", *map(code, shown.columns)), lines)
