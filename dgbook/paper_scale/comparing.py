"""What the scores of the rows of a table say of the paper's numbers and claims: a line with a verdict each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from dgbook.measures import stats
from dgbook.measures.arrays import numbers
from dgbook.measures.stats import Interval
from dgbook.paper_scale.row import Row
from dgbook.paper_scale.scoring import Array, Measured, Table

COMPARABLE = 0.1
"""A win probability within 1/2 +- this counts as the paper's "similar", which it says of 0.462 and of 0.512."""


@dataclass(frozen=True)
class Line:
    """One line of the table: one number of the paper beside ours.

    Attributes:
        row: of the paper's table.
        quantity: a score, or its comparison with another row.
        key: of the value in the result file.
        paper: as printed; None where the paper prints nothing.
        ours: with its 95 % interval; None if it could not be measured.
        difference: ours less the paper's; None where they cannot be compared.
        verdict: what `ours` says of the paper's number or claim, or why there is none.
    """

    row: str
    quantity: str
    key: str
    paper: float | None
    ours: Interval | None
    difference: float | None
    verdict: str

    def cells(self) -> tuple[str, ...]:
        """As text: row, score, paper, ours, difference, interval, verdict."""
        return (
            self.row,
            self.quantity,
            "-" if self.paper is None else f"{self.paper:g}",
            "-" if self.ours is None else f"{self.ours.value:.4g}",
            "-" if self.difference is None else f"{self.difference:+.3g}",
            "-" if self.ours is None else f"[{self.ours.low:.4g}, {self.ours.high:.4g}]",
            self.verdict,
        )


def lines_of(rows: Sequence[Row], measured: Table, stated: int) -> Iterator[Line]:
    """Of all rows; `stated` is how many images the paper's numbers are of."""
    by_label = {row.label: row for row in rows}
    for row in rows:
        for score in row.scores:
            if (row.label, score) not in measured:  # a score of pairs, in a row that is compared with none
                continue
            found = measured[row.label, score]
            yield level(row, score, found, stated)
            if row.baseline and (row.baseline, score) in measured:
                yield comparison(row, by_label[row.baseline], score, found, measured[row.baseline, score])


def level(row: Row, score: str, found: Measured, stated: int) -> Line:
    """A score of a row as such."""
    paper, key = None if row.wins else row.paper.get(score), f"{row.label}.{score}"
    if found.values is None:
        return Line(row.label, found.name, key, paper, None, None, f"not available: {found.reason}")
    # of one value per image, or per seed block where there are several
    ours = over_blocks(found.values) if row.seed_blocks > 1 else stats.mean(found.values)
    if paper is None:
        return Line(row.label, found.name, key, None, ours, None, "-")
    if row.count != stated:
        reason = f"not comparable: the paper's is of {stated:,} images"
        return Line(row.label, found.name, key, paper, ours, None, reason)
    low, high = ours.low - row.rounding[score], ours.high + row.rounding[score]
    verdict = "higher than printed" if low > paper else "lower than printed" if high < paper else "within our interval"
    return Line(row.label, found.name, key, paper, ours, ours.value - paper, verdict)


def comparison(row: Row, baseline: Row, score: str, found: Measured, other: Measured) -> Line:
    """A score of a row against that of its baseline, image by image or seed block by seed block."""
    if row.wins:
        quantity, key = f"P({found.name} above {baseline.label})", f"{row.label}.{score}.win_probability"
        paper, neutral = row.paper.get(score), 0.5
    else:
        quantity, key = f"{found.name} less {baseline.label}", f"{row.label}.{score}.change"
        printed = score in row.paper and score in baseline.paper
        paper, neutral = round(row.paper[score] - baseline.paper[score], 6) if printed else None, 0.0
    if found.values is None or other.values is None:
        return Line(row.label, quantity, key, paper, None, None, "not available")
    if row.wins:
        ours, claim = stats.win_probability(found.values, other.values), row.claims.get(score)
    else:
        change = over_blocks if row.seed_blocks > 1 else stats.paired_bootstrap
        ours = change(found.values - other.values)
        claim = row.claims.get(score)
        if paper is not None:  # a difference that rounding may have made claims nothing
            reach = row.rounding[score] + baseline.rounding[score]
            claim = int(np.sign(paper)) if abs(paper) > reach else None
    difference = None if paper is None else ours.value - paper
    return Line(row.label, quantity, key, paper, ours, difference, verdict(ours, neutral, claim))


def verdict(ours: Interval, neutral: float, claim: int | None) -> str:
    """What a comparison says of the paper's claim.

    Args:
        ours: a difference or a win probability with its interval.
        neutral: where neither row is ahead, 0 or 1/2.
        claim: 1 for above, -1 for below, None if the paper claims nothing; of win probabilities 0 for comparable.

    Returns:
        "reproduced" if the whole interval lies where the paper says, "not reproduced" if all of it lies elsewhere, else
        "undecided"; without a claim "higher", "lower" or "no difference seen".
    """
    above, below = ours.low > neutral, ours.high < neutral
    if claim is None:
        return "higher" if above else "lower" if below else "no difference seen"
    if claim == 0:
        assert neutral == 0.5, "scores have no common unit in which to be comparable"
        inside = neutral - COMPARABLE <= ours.low and ours.high <= neutral + COMPARABLE
        outside = ours.low > neutral + COMPARABLE or ours.high < neutral - COMPARABLE
        return "reproduced" if inside else "not reproduced" if outside else "undecided"
    if not above and not below:
        return "undecided"
    return "reproduced" if above == (claim > 0) else "not reproduced"


def over_blocks(values: Array) -> Interval:
    """Mean of one value per seed block (n,), with Student's 95 % interval of n - 1 degrees of freedom.

    Raises:
        DgkitError: a single block, or values that are not finite.
    """
    values = numbers("values", values, 1, 2)
    mean, error = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    reach = float(student.ppf((1 + stats.LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)
