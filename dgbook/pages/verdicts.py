"""The paper's claims, one by one, with what the reference runs say of each."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from dgbook.chapters import ladder, readings
from dgbook.chapters.layers import training_history
from dgbook.claims import findings, paper, results
from dgbook.pages.beside import SCORES
from dgbook.pages.text import chapter_link, code, command_of, on_models, plain, table
from dgbook.paper_scale import plan, protocol
from dgkit.errors import DgkitError
from dgkit.massive import detect_massive
from dgkit.zoo import MODELS

RATIO = inspect.signature(detect_massive).parameters["ratio"].default
"""From how many times its block's median on a channel counts as large."""

EARLY = 0.1
"""Massive activations that are there after this share of the training count as emerging early."""

ZOO = protocol.NAMES | {"DiT-XL": "dit-xl-2"}
"""The paper's names of its models, and ours."""

NOT_TESTED = {
    "4.2d": "Small models draw nothing that HPSv2.1 or LAION-Aesthetics could judge.",
    "4.2e": "An interpretation; what it rests on is {ref}`4.1i <claim-4-1i>` and {ref}`4.2c <claim-4-2c>`.",
    "4.3c": "True by construction for SD3, Flux and DiT: no weight is changed ({doc}`/book/pipelines`).",
    "5.2g": "Small models draw nothing that these scores could judge; {ref}`5.2h <claim-5-2h>` compares at equal cost.",
    "5.3d": "Small models draw nothing that this score could judge; {ref}`5.2f <claim-5-2f>` is the nearest test.",
    "Ea": "Needs the weights of Flux; {ref}`5.2b <claim-5-2b>` has the small model of its class.",
    "Eb": "Needs the weights of Flux; {ref}`5.2f <claim-5-2f>` has the small model of its class.",
    "F": "Needs the weights and such a GPU.",
    "I": "Needs annotators.",
}
"""Why a claim is not tested on our models."""

NOT_REPEATABLE = {
    "4.1b": "the checkpoints along DiT-XL's training, which are not public",
    "4.1c": "the weights of the smaller DiTs, which are not public",
    "F": "the GPU; `dgkit plan table1 --model sd3.5-large` prints memory and time",
    "I": "annotators; `dgkit study make` makes the pages for them",
}
"""What it would take where no command runs the claim on the paper's models."""

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


@dataclass(frozen=True)
class Evidence:
    """What one measurement says of a claim, or of a part of it.

    Attributes:
        part: what was tested.
        notebook: the chapter that shows it.
        model: what it was measured on.
        word: "holds", "undecided" or "does not hold".
        numbers: what was measured, with its interval where it has one.
    """

    part: str
    notebook: str
    model: str
    word: str
    numbers: str


def evidence(claim: str) -> list[Evidence]:
    """Everything measured about one claim on our models (id as in `dgbook.claims.paper.claims`)."""
    found = [
        Evidence(part.text, name, model, part.word(values), part.numbers(values))
        for name, parts in findings.CLAIMS.items()
        for part in parts
        if claim in part.claims
        for model, record in results.references(name).items()
        for values in [record.decoded()]
        if part.key in values
    ]
    return found + [*_EXTRA.get(claim, lambda: iter(()))()]


def _early() -> Iterator[Evidence]:
    """Since which step of its training a shipped model has a massive channel."""
    for model in (name for name, row in MODELS.items() if row.source is None):
        history = training_history(model)
        if history.empty:
            continue
        steps, largest = history["step"].max(), history.groupby("step")["ratio"].max()
        massive = largest[largest > RATIO]
        numbers = (
            f"from step {massive.index[0]:,} of {steps:,} on"
            if len(massive)
            else f"not within {steps:,} steps: {largest.max():.1f} times the median at most"
        )
        yield Evidence(
            f"the largest channel exceeds {RATIO:g} times its block's median within {EARLY:.0%} of the training",
            "01_layer_properties",
            model,
            _word(bool(len(massive)) and massive.index[0] <= EARLY * steps),
            numbers,
        )


def _sizes() -> Iterator[Evidence]:
    """Whether all sizes of the ladder have a massive channel at equal steps, in each training."""
    if len(ladder.measurements()) < 3:
        return
    sizes = ladder.sizes(ladder.history())
    massive = int((sizes["massive_blocks"] > 0).sum())
    ratios = ladder.ratios_of_sizes(sizes["size"], sizes["ratio"])
    yield Evidence(
        f"the largest channel exceeds {RATIO:g} times its block's median in every size",
        "01_layer_properties",
        "sizes of tiny-dit",
        _word(massive == len(sizes)),
        f"in {massive} of {len(sizes)} trainings after {sizes['step'].iloc[0]:,} steps: ratios {ratios}",
    )


def _word(holds: bool) -> str:
    return "holds" if holds else "does not hold"


_EXTRA: dict[str, Callable[[], Iterator[Evidence]]] = {"4.1b": _early, "4.1c": _sizes}


def tally(found: Sequence[Evidence]) -> Counter[str]:
    """On how many models all parts of a claim hold, on how many one does not, and on how many that is undecided."""
    words: dict[str, set[str]] = {}
    for e in found:
        words.setdefault(e.model, set()).add(e.word)
    return Counter(
        next(word for word in ("does not hold", "undecided", "holds") if word in said) for said in words.values()
    )


def verdict(found: Sequence[Evidence]) -> str:
    """`tally` in words."""
    counts = tally(found)
    tested, held, undecided = counts.total(), counts["holds"], counts["undecided"]
    if tested == 0:
        return "not tested"
    if tested == 1:
        return f"{next(iter(counts))} on the one tested"
    share = {0: "none of ", tested: "all "}.get(held, f"{held} of ")
    return f"holds on {share}{tested} tested" + (f", undecided on {undecided}" if undecided else "")


# The paper's own tables -----------------------------------------------------------------------------------------------

ALIGNMENT, DETAIL = ("clipscore", "blipscore"), ("hpsv2.1", "aesthetic")
_LOWER_IS_BETTER = {"fid"}
_COMPARED: dict[str, tuple[tuple[str, str], tuple[str, str], tuple[str, ...]]] = {
    "5.2a": (("Cond", "yes"), ("Cond", "no"), ALIGNMENT),
    "5.2b": (("Cond", "yes"), ("Cond", "no"), DETAIL),
    "5.2d": (("Cond", "yes"), ("CFG", "no"), DETAIL),
    "5.2e": (("CFG", "no"), ("Cond", "yes"), ALIGNMENT),
    "5.2f": (("CFG", "yes"), ("CFG", "no"), DETAIL),
    "Ea": (("Cond", "yes"), ("Cond", "no"), ALIGNMENT + DETAIL),
    "Eb": (("CFG", "yes"), ("CFG", "no"), ALIGNMENT + DETAIL),
    "Ha": (("Uncond", "yes"), ("Uncond", "no"), ("fid", "is", "precision", "recall")),
    "Hb": (("Cond", "yes"), ("Cond", "no"), ("fid", "is", "precision", "recall")),
}
"""Claims about a table: the rows (type, DG) that should be better, those that should be worse, and in which scores."""


def recomputed(claim: str) -> str:
    """What the paper's own tables say of a claim about them: in how many scores it is so, and in which not."""
    if claim in ("5.2g", "5.2h"):
        return _ranks("DG" if claim == "5.2g" else "CFG+DG")
    if claim not in _COMPARED:
        return ""
    better, worse, scores = _COMPARED[claim]
    row = paper.claims().set_index("id").loc[claim]
    total, against = 0, []
    for number in (int(exhibit[6:]) for exhibit in row["exhibits"].split("; ") if exhibit.startswith("Table ")):
        rows = paper.table(number)
        for model, group in rows.groupby(rows.get("model", lambda _: ""), sort=False):
            lines = group.set_index(["type", "dg"])
            for score in scores:
                a, b = float(lines.loc[better, score]), float(lines.loc[worse, score])
                total += 1
                if not (a < b if score in _LOWER_IS_BETTER else a > b):
                    against.append(f"{f'{model} '.lstrip()}{SCORES[score]} ({a:g} against {b:g})")
    exceptions = f", not in {', '.join(against)}" if against else ""
    return f"so in {total - len(against)} of {total} scores{exceptions}"


def _ranks(method: str) -> str:
    rows = paper.table(2).set_index("method")
    ranks = rows[["average", "aesthetic"]].rank(ascending=False, method="min").astype(int).loc[method]
    return f"rank {ranks['aesthetic']} of {len(rows)} by Aesthetic, {ranks['average']} of {len(rows)} by HPSv2.1"


# The paper's scale ----------------------------------------------------------------------------------------------------


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
    notebooks = [name for name, parts in findings.CLAIMS.items() if any(claim["id"] in part.claims for part in parts)]
    return {f"dgkit run {command_of(name)}": models for name in notebooks}


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


# Pages ----------------------------------------------------------------------------------------------------------------


def chapters() -> str:
    """The paper's claims, a row per chapter, and the verdict on each shipped model."""
    shipped = [name for name, row in MODELS.items() if row.source is None]
    lines = []
    for name, claim in CHAPTERS.items():
        found = results.references(name)
        needs_classes = name == "06_imagenet"
        cells = [
            findings.verdict(name, found[model].decoded())[0]
            if model in found
            else "needs classes"
            if needs_classes and MODELS[model].pipeline != "DiTPipeline"
            else "not run"
            for model in shipped
        ]
        lines.append((chapter_link(name, ""), claim, *cells))
    return table(("", "claim", *(f"on {code(model)}" for model in shipped)), lines)


def across_models(notebook: str) -> str:
    """What holds of one chapter's claim in the reference run of each model: a row per part, a column per model.

    Args:
        notebook: a key of `findings.CLAIMS`.

    Raises:
        DgkitError: another notebook.
    """
    if notebook not in findings.CLAIMS:
        raise DgkitError(f"notebook={notebook!r} claims nothing: use one of {', '.join(findings.CLAIMS)}")
    shown = findings.outcomes(notebook)
    if shown.empty:
        return NO_RUN
    lines = [(plain(part), *map(plain, cells)) for part, *cells in shown.itertuples()]
    return table(("", *map(code, shown.columns)), lines)


def readings_across_models() -> str:
    """How far each reading of the paper is from this book's, in the reference run of each model."""
    shown = readings.across_models("07_ambiguities")
    if shown.empty:
        return NO_RUN
    lines = [(plain(reading), *(plain(cell) for cell in cells)) for reading, *cells in shown.itertuples()]
    return table(("", *map(code, shown.columns)), lines)


def counts() -> str:
    """How many claims hold on how many of the models they were tested on, by section."""
    claims = paper.claims()
    columns = list(_COLUMNS.values())
    found = pd.Series([_COLUMNS[_colour(evidence(claim))] for claim in claims["id"]])
    lines = []
    for number, group in claims.groupby("section", sort=False):
        of_section = found[group.index].value_counts()
        lines.append(
            (
                f"{{ref}}`{number} <{_target(group['id'].iloc[0])}>`",
                str(len(group)),
                *(str(of_section.get(c, "")) for c in columns),
            )
        )
    total = found.value_counts()
    lines.append(("**all**", f"**{len(claims)}**", *(f"**{total.get(column, 0)}**" for column in columns)))
    return table(("section", "claims", *columns), lines)


def section(number: str) -> str:
    """The claims of one section or appendix of the paper, each with its evidence.

    Raises:
        DgkitError: no claim is of this section.
    """
    claims = paper.claims()
    found = claims[claims["section"] == number]
    if found.empty:
        raise DgkitError(f"section={number!r} is not allowed: use one of {', '.join(dict.fromkeys(claims['section']))}")
    return "\n\n".join(_card(claim) for _, claim in found.iterrows())


def _target(claim: str) -> str:
    """The label of a claim for references."""
    return f"claim-{claim.lower().replace('.', '-')}"


_COLUMNS = {
    "success": "hold on all models tested",
    "warning": "on some",
    "danger": "on none",
    "secondary": "not tested",
}
"""What the colours of the badges mean."""


def _colour(found: Sequence[Evidence]) -> str:
    counts = tally(found)
    if not counts:
        return "secondary"
    return "success" if counts["holds"] == counts.total() else "warning" if counts["holds"] else "danger"


def _card(claim: pd.Series) -> str:
    """One claim, what was measured about it, and what would test it on the paper's models."""
    name, found = claim["id"], evidence(claim["id"])
    said = [claim["exhibits"].replace("; ", ", "), claim["models"].replace("; ", ", "), plain(claim["numbers"])]
    lines = [
        f"({_target(name)})=",
        "::::{card}",
        f"**{name} {plain(claim['claim'])}** {{bdg-{_colour(found)}}}`{verdict(found)}`",
        "",
        f"The paper: {'; '.join(part for part in said if part)}.",
        "",
    ]
    for part in dict.fromkeys((e.part, e.notebook) for e in found):
        lines.append(f"* {plain(part[0])} ({chapter_link(part[1])})")
        lines += [
            f"  * {code(e.model) if e.model in MODELS else plain(e.model)}: **{e.word}**, {plain(e.numbers)}"
            for e in found
            if (e.part, e.notebook) == part
        ]
    if not found:
        lines.append(NOT_TESTED.get(name, "No reference run that measures it is stored."))
    own = recomputed(name)
    if own:
        lines += ["", f"In the paper's own table{'s' * (claim['exhibits'].count('Table') > 1)}: {plain(own)}."]
    needed = commands(claim)
    if needed:
        lines += [
            "",
            "On the paper's models: "
            + ", ".join(on_models(*pair) for pair in needed.items())
            + "; {ref}`what it costs <paper-scale>`.",
        ]
    elif name in NOT_REPEATABLE:
        lines += ["", f"On the paper's models: needs {NOT_REPEATABLE[name]}."]
    return "\n".join([*lines, "::::"])
