"""The paper's claims, one by one, with what the reference runs say of each."""

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from dgbook.chapters import ladder
from dgbook.chapters.layers import training_history
from dgbook.claims import paper
from dgbook.claims.verdicts import FAILS, HOLDS, NOT_MEASURED, UNDECIDED, of_references, of_training, parts
from dgbook.markdown import code, plain, table
from dgbook.pages.at_scale import NOT_REPEATABLE, commands
from dgbook.pages.text import chapter_link, claim_target, on_models
from dgkit.errors import DgkitError
from dgkit.massive import detect_massive
from dgkit.zoo import MODELS

RATIO = inspect.signature(detect_massive).parameters["ratio"].default
"""From how many times its block's median on a channel counts as large."""

EARLY = 0.1
"""Massive activations that are there after this share of the training count as emerging early."""

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


def evidence() -> dict[str, list[Evidence]]:
    """Everything measured about each claim on our models, by the claim's id."""
    found: dict[str, list[Evidence]] = {claim: [] for claim in paper.claims()["id"]}
    for chapter in parts():
        judged = of_references(chapter)
        for row in zip(*(verdict.answers for verdict in judged.values()), strict=True):
            for model, outcome in zip(judged, row, strict=True):
                for claim in outcome.part.claims if outcome.word != NOT_MEASURED else ():
                    found[claim].append(Evidence(outcome.part.text, chapter, model, outcome.word, outcome.numbers))
    found["4.1b"] += _early()
    found["4.1c"] += _sizes()
    return found


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
    return HOLDS if holds else FAILS


def tally(found: Sequence[Evidence]) -> Counter[str]:
    """On how many models all parts of a claim hold, on how many one does not, and on how many that is undecided."""
    words: dict[str, set[str]] = {}
    for e in found:
        words.setdefault(e.model, set()).add(e.word)
    return Counter(next(word for word in (FAILS, UNDECIDED, HOLDS) if word in said) for said in words.values())


def summary(found: Sequence[Evidence]) -> str:
    """`tally` in words."""
    counts = tally(found)
    tested, held, undecided = counts.total(), counts[HOLDS], counts[UNDECIDED]
    if tested == 0:
        return "not tested"
    if tested == 1:
        return f"{next(iter(counts))} on the one tested"
    share = {0: "none of ", tested: "all "}.get(held, f"{held} of ")
    return f"holds on {share}{tested} tested" + (f", undecided on {undecided}" if undecided else "")


def counts() -> str:
    """How many claims hold on how many of the models they were tested on, by section."""
    claims = paper.claims()
    columns = list(_COLUMNS.values())
    found = claims["id"].map(evidence()).map(_colour).map(_COLUMNS)
    lines = []
    for number, group in claims.groupby("section", sort=False):
        of_section = found[group.index].value_counts()
        lines.append(
            (
                f"{{ref}}`{number} <{claim_target(group['id'].iloc[0])}>`",
                str(len(group)),
                *(str(of_section.get(c, "")) for c in columns),
            )
        )
    total = found.value_counts()
    lines.append(("**all**", f"**{len(claims)}**", *(f"**{total.get(column, 0)}**" for column in columns)))
    return table(("section", "claims", *columns), lines)


def test_counts() -> str:
    """What the tests say of each training, each test counted once, however many claims it is about."""
    trainings = {name for chapter in parts() for name in of_references(chapter)}
    rows = []
    for name in sorted(trainings, key=lambda name: [*MODELS, name].index(name)):
        words = Counter(a.word for verdict in of_training(name).values() for a in verdict.answers)
        rows.append((code(name), *(str(words[word]) for word in (HOLDS, UNDECIDED, FAILS))))
    return table(("", HOLDS, UNDECIDED, FAILS), rows)


def section(number: str) -> str:
    """The claims of one section or appendix of the paper, each with its evidence.

    Raises:
        DgkitError: no claim is of this section.
    """
    claims = paper.claims()
    found = claims[claims["section"] == number]
    if found.empty:
        raise DgkitError(f"section={number!r} is not allowed: use one of {', '.join(dict.fromkeys(claims['section']))}")
    measured = evidence()
    return "\n\n".join(_card(claim, measured[claim["id"]]) for _, claim in found.iterrows())


def earlier_words() -> str:
    """What the parts said under the former rules, a row per part, a column per training; see `data/paper/plan.md`."""
    words = paper.earlier_words()
    shown = words.pivot(index=["part", "text"], columns="training", values="word").fillna("")
    shown = shown.loc[list(dict.fromkeys(zip(words["part"], words["text"], strict=True)))]
    rows = [(part, plain(text), *cells) for (part, text), cells in zip(shown.index, shown.to_numpy(), strict=True)]
    return table(("", "part", *map(code, shown.columns)), rows)


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
    return "success" if counts[HOLDS] == counts.total() else "warning" if counts[HOLDS] else "danger"


def _card(claim: pd.Series, found: Sequence[Evidence]) -> str:
    """One claim, what was measured about it, and what would test it on the paper's models."""
    name = claim["id"]
    said = [claim["exhibits"].replace("; ", ", "), claim["models"].replace("; ", ", "), plain(claim["numbers"])]
    lines = [
        f"({claim_target(name)})=",
        "::::{card}",
        f"**{name} {plain(claim['claim'])}** {{bdg-{_colour(found)}}}`{summary(found)}`",
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
    own = paper.recomputed(name)
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
