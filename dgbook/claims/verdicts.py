"""What a result says of the paper's claims: a word for each part of a chapter's claim, and the verdict.

The parts are data, one comparison each (`dgbook.claims.paper.parts`).
"""

import operator
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

from IPython.display import Markdown

from dgbook.claims import paper
from dgbook.claims.derived import Values, value_at
from dgbook.claims.results import Record, Result, reference_of, references
from dgbook.markdown import plain, table
from dgbook.measures.stats import Interval
from dgkit.checks import one_of

HOLDS, UNDECIDED, FAILS, NOT_MEASURED = "holds", "undecided", "does not hold", "not measured"

RELATIONS = ("<", ">", ">=")


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


@dataclass(frozen=True)
class Part:
    """One part of a chapter's claim; `paper.parts` describes the columns."""

    text: str
    claims: tuple[str, ...]
    value: str
    relation: str
    bound: float | str
    shown: str

    def answer(self, values: Values) -> "Answer":
        """What a result's values say of it."""
        try:
            bound = value_at(values, self.bound) if isinstance(self.bound, str) else self.bound
            word = compare(value_at(values, self.value), self.relation, bound)
        except KeyError:
            return Answer(self, NOT_MEASURED, "")
        numbers = re.sub(r"\{([^:}]+):?([^}]*)\}", lambda m: format(value_at(values, m[1]), m[2]), self.shown)
        return Answer(self, word, numbers)


@dataclass(frozen=True)
class Answer:
    """What one result says of one part of a claim.

    Attributes:
        part: the part.
        word: "holds", "undecided", "does not hold" or "not measured".
        numbers: the numbers that the word rests on, with their intervals; empty if not measured.
    """

    part: Part
    word: str
    numbers: str

    def __str__(self) -> str:
        return f"{self.word}: {self.numbers}" if self.numbers else self.word


@dataclass(frozen=True)
class Verdict:
    """What one result says of a chapter's claim, part by part."""

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


@cache
def parts() -> dict[str, tuple[Part, ...]]:
    """The parts of each chapter's claim, by chapter; a chapter that claims nothing is left out.

    Raises:
        DgkitError: a relation that `compare` does not know.
    """
    found: dict[str, tuple[Part, ...]] = {}
    for row in paper.parts().itertuples():
        claims = tuple(filter(None, row.claims.split("; ")))
        bound = float(row.bound) if re.fullmatch(r"-?[\d.]+", row.bound) else row.bound
        relation = one_of("relation", row.relation, RELATIONS)
        part = Part(row.text, claims, row.value, relation, bound, row.shown)
        found[row.chapter] = (*found.get(row.chapter, ()), part)
    return found


def verdict(chapter: str, values: Values) -> Verdict:
    """What a result's values say of a chapter's claim.

    Raises:
        KeyError: the chapter claims nothing.
    """
    return Verdict(tuple(part.answer(values) for part in parts()[chapter]))


def of_references(chapter: str) -> dict[str, Verdict]:
    """The verdict of each stored reference run of a chapter, by model."""
    return {model: verdict(chapter, record.decoded()) for model, record in references(chapter).items()}


def conclusion(result: Result) -> Markdown:
    """How a chapter ends: the verdict of the reference run of its model, the parts of the claim, and what was run.

    A chapter that claims nothing ends with what was run.
    """
    reference = reference_of(result.name, result.parameters["model"])
    if reference is None:
        return Markdown("No reference run of this chapter on this model is stored.")
    paragraphs = []
    if result.name in parts():
        found = verdict(result.name, reference.decoded())
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
