"""What the reference runs say of the paper's claims: a word for each part of a chapter's claim, and the verdict.

The parts are data (`data/paper/parts.csv`), and so are the rules (`data/paper/plan.md`): a word can be found again from
the arrays of a result without this module.
"""

import operator
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from IPython.display import Markdown
from numpy.typing import NDArray

from dgbook.claims import paper, results
from dgbook.claims.derived import value_at
from dgbook.claims.results import Record, Result
from dgbook.markdown import plain, table
from dgbook.measures import stats
from dgbook.measures.stats import Interval
from dgkit.checks import one_of

HOLDS, UNDECIDED, FAILS, NOT_MEASURED = "holds", "undecided", "does not hold", "not measured"

KINDS = ("mean", "rank", "number", "interval")
RELATIONS = ("<", ">", ">=")
LEVEL = 0.05

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Part:
    """One part of a chapter's claim, that is one test; `paper.parts` describes the columns."""

    id: str
    chapter: str
    text: str
    claims: tuple[str, ...]
    kind: str
    value: str
    relation: str
    bound: float | str
    shown: str

    def answer(self, record: Record) -> "Answer":
        """What one run says of it, as if it were the only test (see `holm`)."""
        try:
            word, p = _TESTS[self.kind](self, record)
            numbers = re.sub(r"\{([^:}]+):?([^}]*)\}", lambda m: format(_shown(record, m[1]), m[2]), self.shown)
        except KeyError:
            return Answer(self, NOT_MEASURED, "")
        if self.kind == "rank":
            numbers += f", p = {p:.2g}"
        return Answer(self, word, numbers, p)


@dataclass(frozen=True)
class Answer:
    """What one run says of one part of a claim.

    Attributes:
        part: the part.
        word: "holds", "undecided", "does not hold" or "not measured".
        numbers: the numbers that the word rests on, with their intervals; empty if not measured.
        p: of a test with one: that of the bound being the truth.
    """

    part: Part
    word: str
    numbers: str
    p: float | None = None

    def __str__(self) -> str:
        return f"{self.word}: {self.numbers}" if self.numbers else self.word


@dataclass(frozen=True)
class Verdict:
    """What one training's run says of a chapter's claim, part by part."""

    answers: tuple[Answer, ...]

    def __str__(self) -> str:
        """ "reproduced" where every measured part holds, "not reproduced" where none does, else how many of them do."""
        words = Counter(answer.word for answer in self.answers)
        measured, held = words.total() - words[NOT_MEASURED], words[HOLDS]
        if not measured:
            return NOT_MEASURED
        if not held:
            return "not reproduced"
        return "reproduced" if held == measured else f"{held} of {measured} parts reproduced"


# the tests ------------------------------------------------------------------------------------------------------------


def per_image(arrays: Arrays, expression: str) -> NDArray[np.float64]:
    """What an expression of `parts.csv` stands for, (N,).

    "SETTING.MEASURE"; "A.MEASURE - B.MEASURE", the paired difference; "lost A of B", 1 for an image that shows what was
    asked for under B and no longer under A. Draws are averaged.

    Raises:
        KeyError: it was not measured.
    """
    if lost := re.fullmatch(r"lost (.+) of (.+)", expression):
        before, after = (per_image(arrays, f"{lost[i]}.agreement") for i in (2, 1))
        return before * (1 - after)
    first, *others = (_averaged(arrays[term]) for term in expression.split(" - "))
    if not others:
        return first
    shared = min(len(first), len(others[0]))  # draws are made of the first images only
    return np.asarray(first[:shared] - others[0][:shared])


def _is_share(expression: str) -> bool:
    """Whether each image's value is 0 or 1."""
    return expression.startswith("lost ") or (expression.endswith(".agreement") and " - " not in expression)


def _averaged(values: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    return exact.mean(0) if exact.ndim == 2 else exact


def _mean_test(part: Part, record: Record) -> tuple[str, float | None]:
    """Whether the mean over images is on the claimed side of the bound: by its p-value, see `stats.p_value`."""
    values, bound = per_image(record.arrays, part.value), float(part.bound)
    p = _p_value(values.tobytes(), bound, _is_share(part.value))
    return _side(part, values.mean(), p), p


@cache
def _p_value(values: bytes, bound: float, share: bool) -> float:
    return stats.p_value(np.frombuffer(values), bound, share=share)


def _side(part: Part, mean: float, p: float) -> str:
    if mean == part.bound:
        return FAILS  # no image differs
    claimed = mean < float(part.bound) if part.relation == "<" else mean > float(part.bound)
    return UNDECIDED if p >= LEVEL else HOLDS if claimed else FAILS


def _rank_test(part: Part, record: Record) -> tuple[str, float | None]:
    """Whether the mean over images exceeds that of nearly all draws; it does not hold at or below their median."""
    drawn, values = record.arrays[str(part.bound)].astype(np.float64), per_image(record.arrays, part.value)
    if drawn.ndim == 2:  # of each image that the draws have, too
        drawn, values = drawn.mean(1), values[: drawn.shape[1]]
    p = stats.rank_p_value(values.mean(), drawn)
    if p <= LEVEL:
        return HOLDS, p
    return FAILS if values.mean() <= np.median(drawn) else UNDECIDED, p


def _number_test(part: Part, record: Record) -> tuple[str, float | None]:
    """Numbers that no sample of images stands behind: on the claimed side or not."""
    values = record.decoded()
    bound = value_at(values, part.bound) if isinstance(part.bound, str) else part.bound
    return compare(value_at(values, part.value), part.relation, bound), None


_TESTS = {"mean": _mean_test, "rank": _rank_test, "number": _number_test, "interval": _number_test}


def _shown(record: Record, expression: str) -> Any:
    """What `shown` puts in the place of an expression: an interval of a mean over images, or a stored value."""
    try:
        values = per_image(record.arrays, expression)
    except KeyError:
        return value_at(record.decoded(), expression)
    return _interval_of(values.tobytes(), _is_share(expression))


@cache
def _interval_of(values: bytes, share: bool) -> Interval:
    return (stats.mean if share else stats.bootstrap)(np.frombuffer(values))


def compare(value: float | Interval, relation: str, bound: float | Interval) -> str:
    """Whether `value` is above (or below) `bound`, whatever their intervals leave open; a number is its own interval.

    Args:
        value, bound: numbers or intervals.
        relation: one of `RELATIONS`.

    Returns:
        "holds" where the intervals lie apart on the claimed side, "does not hold" where they lie apart on the other,
        else "undecided".
    """
    larger, smaller = _interval(value), _interval(bound)
    if relation == "<":
        larger, smaller = smaller, larger
    exceeds = operator.ge if relation == ">=" else operator.gt
    if exceeds(larger.low, smaller.high):
        return HOLDS
    return UNDECIDED if exceeds(larger.high, smaller.low) else FAILS


def _interval(number: float | Interval) -> Interval:
    return number if isinstance(number, Interval) else Interval(number, number, number)


# the verdicts ---------------------------------------------------------------------------------------------------------


@cache
def parts() -> dict[str, tuple[Part, ...]]:
    """The parts of each chapter's claim, by chapter; a chapter that claims nothing is left out.

    Raises:
        DgkitError: a relation or a kind of test that is not known.
    """
    found: dict[str, tuple[Part, ...]] = {}
    for row in paper.parts().itertuples():
        claims = tuple(filter(None, row.claims.split("; ")))
        bound = float(row.bound) if re.fullmatch(r"-?[\d.]+", row.bound) else row.bound
        relation, kind = one_of("relation", row.relation, RELATIONS), one_of("kind", row.kind, KINDS)
        part = Part(row.id, row.chapter, row.text, claims, kind, row.value, relation, bound, row.shown)
        found[row.chapter] = (*found.get(row.chapter, ()), part)
    return found


def judge(records: Mapping[str, Record]) -> dict[str, Verdict]:
    """The verdicts of one training, by chapter: all of its tests of a mean are one family (see `stats.holm`).

    Args:
        records: the training's runs by chapter; chapters that claim nothing are left out.
    """
    answers = [part.answer(records[chapter]) for chapter in parts() if chapter in records for part in parts()[chapter]]
    family = {i: a.p for i, a in enumerate(answers) if a.part.kind == "mean" and a.p is not None}
    for i, p in zip(family, stats.holm([*family.values()]), strict=True):
        word = answers[i].word if p < LEVEL or family[i] == 1 else UNDECIDED
        answers[i] = replace(answers[i], word=word, p=float(p))
    chapters = dict.fromkeys(answer.part.chapter for answer in answers)
    return {chapter: Verdict(tuple(a for a in answers if a.part.chapter == chapter)) for chapter in chapters}


def of_training(name: str) -> dict[str, Verdict]:
    """The verdicts of a training's stored reference runs, by chapter."""
    stored = {chapter: results.reference_of(chapter, name) for chapter in parts()}
    return judge({chapter: record for chapter, record in stored.items() if record is not None})


def of_references(chapter: str) -> dict[str, Verdict]:
    """The verdict of each stored reference run of a chapter, by training."""
    return {name: of_training(name)[chapter] for name in results.references(chapter)}


def conclusion(result: Result) -> Markdown:
    """How a chapter ends: the verdict of the reference run of its model, the parts of the claim, and what was run.

    A chapter that claims nothing ends with what was run.
    """
    reference = results.reference_of(result.name, result.parameters["model"])
    if reference is None:
        return Markdown("No reference run of this chapter on this model is stored.")
    paragraphs = []
    if result.name in parts():
        found = of_training(result.parameters["model"])[result.name]
        rows = [(plain(a.part.text), f"**{a.word}**", plain(a.numbers)) for a in found.answers]
        paragraphs = [
            f"**Verdict on this model: {found}.** The paper's claim, part by part, by the reference run:",
            table(("part", "verdict", "numbers"), rows),
        ]
    return Markdown("\n\n".join([*paragraphs, _provenance(reference)]))


def _provenance(reference: Record) -> str:
    facts = reference.provenance
    commit = (facts["commit"] or "unknown")[:10] + (" with uncommitted changes" if facts["dirty"] else "")
    return (
        f"Reference run: `{facts['command']}` at commit {commit}, {facts['wall_seconds']:.0f} s on {facts['device']}."
    )
