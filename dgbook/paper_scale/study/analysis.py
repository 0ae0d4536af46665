"""Win rates from the answers of a study, with intervals for other annotators and other images.

The answers form a table of annotators by pairs, and both are samples: an annotator's answers share a taste, a pair's
share the images. The variance of the mean is therefore the two-way cluster-robust one, V_annotators + V_pairs -
V_answers, with small-sample factors (Cameron, Gelbach and Miller 2011); as the difference can come out too small, it is
the largest of that and its parts (after the max-se of MacKinnon, Nielsen and Webb 2024). It enters Wilson's interval as
an effective number of answers, as is advised for shares in clustered surveys (Franco, Little, Louis and Slud 2019),
with Student's t for the normal quantile and Satterthwaite's (1946) degrees of freedom.

Resampling annotators and pairs (Owen's pigeonhole bootstrap, 2007) estimates V_annotators + V_pairs + V_answers and has
no correction for few clusters: in simulations it covers too much where annotators agree, and much too little with two
to five annotators who do not. `tests/test_study_analysis.py` runs both. The interval here covers a little less than it
claims with two annotators, and where annotators differ much about a share near 0 or 1.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from dgbook.files import write_whole
from dgbook.measures.stats import LEVEL, Interval, wilson
from dgbook.paper_scale.study.page import QUESTIONS, Key
from dgbook.readers import read_table
from dgkit import checks
from dgkit.errors import DgkitError
from dgkit.files import read_text

COLUMNS = ("study", "annotator", "pair", "question", "left", "right", "chosen")


@dataclass(frozen=True)
class Analysis:
    """What a study found.

    Attributes:
        key: of the study.
        answers: number of answers by annotator; a finished study has pairs x questions of each.
        wins: share of answers for `a` by question, of those who answered it.
        left: share of answers for the image on the left by question; 0.5 but for chance, whatever the images are.
        counts: number of answers by question.
        files: names of the answer files by their SHA-256.
    """

    key: Key
    answers: Mapping[str, int]
    wins: Mapping[str, Interval]
    left: Mapping[str, float]
    counts: Mapping[str, int]
    files: Mapping[str, str]

    @property
    def expected(self) -> int:
        """Answers of an annotator who finished."""
        return len(self.key.pairs) * len(self.key.questions)

    def table(self) -> pd.DataFrame:
        """One row per question: number of answers, win rates of `a` and `b` with intervals, share of the left image."""
        rows = [
            {
                "question": QUESTIONS[question][0],
                "answers": self.counts[question],
                "A wins": str(win),
                "B wins": str(Interval(1 - win.value, 1 - win.high, 1 - win.low)),
                "left": f"{self.left[question]:.3f}",
            }
            for question, win in self.wins.items()
        ]
        return pd.DataFrame(rows).set_index("question")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "study": self.key.study,
            "a": self.key.a,
            "b": self.key.b,
            "pairs": len(self.key.pairs),
            "level": LEVEL,
            "annotators": dict(self.answers),
            "expected_per_annotator": self.expected,
            "questions": {
                question: {
                    "answers": self.counts[question],
                    "a_wins": {"value": win.value, "low": win.low, "high": win.high},
                    "left": self.left[question],
                }
                for question, win in self.wins.items()
            },
            "files": dict(self.files),
        }

    def __str__(self) -> str:
        lines = [
            f"A: {self.key.a}",
            f"B: {self.key.b}",
            f"{len(self.answers)} annotators, {len(self.key.pairs)} pairs; 95 % intervals over annotators and pairs",
            "",
            self.table().reset_index().to_string(index=False),
        ]
        if len(self.answers) == 1:
            lines += ["", "One annotator: the intervals are over pairs, and say nothing of other annotators."]
        for annotator, count in self.answers.items():
            if count < self.expected:
                lines += ["", f"{annotator}: {count} of {self.expected} answers"]
        return "\n".join(lines)


def analyse(answers: Sequence[Path], key: Path | None = None) -> Analysis:
    """Win rates of the answers in CSV files, one or more per annotator; the same answer twice counts once.

    Args:
        answers: what the page saved.
        key: what `make` wrote; by default the one `*.key.json` in the folder of the first file.

    Raises:
        DgkitError: a file cannot be read, is malformed or of another study, someone answered a question twice in two
            ways, or the key is not to be found.
    """
    paths = [Path(path) for path in answers]
    if not paths:
        raise DgkitError("answers=[] is not allowed: give at least one CSV file")
    found = Key.read(find_key(paths[0]) if key is None else Path(key))
    rows: dict[tuple[str, str, str], tuple[str, str]] = {}
    seen: dict[tuple[str, str, str], str] = {}
    digests = {}
    for path in paths:
        digests[hashlib.sha256(read_text(path).encode()).hexdigest()] = path.name
        for where, row in read_table(path, COLUMNS):
            _check(where, row, found)
            cell = (row["question"], row["annotator"], row["pair"])
            answer = (row["left"], row["chosen"])
            if rows.setdefault(cell, answer) != answer:
                raise DgkitError(
                    f"{where}: annotator {cell[1]!r} answered {cell[0]} of pair {cell[2]} otherwise in {seen[cell]}; "
                    "give one file per annotator, the last"
                )
            seen.setdefault(cell, where)
    wins, left, counts = {}, {}, {}
    for question in found.questions:
        cells = [(who, pair, *answer) for (asked, who, pair), answer in rows.items() if asked == question]
        if not cells:
            raise DgkitError(f"the answers hold none to {question}: let someone finish at least one pair")
        who, pairs, lefts, chosen = zip(*cells, strict=True)
        wins[question] = two_way_share(
            [c == found.pairs[p]["a"] for c, p in zip(chosen, pairs, strict=True)], who, pairs
        )
        left[question] = float(np.mean([c == side for c, side in zip(chosen, lefts, strict=True)]))
        counts[question] = len(cells)
    return Analysis(found, dict(sorted(Counter(who for _, who, _ in rows).items())), wins, left, counts, digests)


def two_way_share(values: ArrayLike, rows: Sequence[str], columns: Sequence[str]) -> Interval:
    """Mean of 0/1 `values` (n,) with an interval for other rows and other columns; see the module.

    If all values agree they tell nothing of their variance: the interval is Wilson's for as many trials as there are
    rows, or columns if those are fewer. With a single row the interval is over columns alone, and the reverse.

    Args:
        values: one per cell of a table that may lack cells.
        rows, columns: names (n,) of the row and column of each.

    Raises:
        DgkitError: no values, others than 0 and 1, or names of another length.
    """
    sample = np.asarray(values, dtype=np.float64)
    if not np.isin(sample, (0, 1)).all():
        checks.refuse("values", sample.tolist(), "give 0 or 1 for each")
    if sample.ndim != 1 or not len(sample) or not len(sample) == len(rows) == len(columns):
        raise DgkitError(
            f"{sample.size} values, {len(rows)} rows, {len(columns)} columns: give as many of each, at least 1"
        )
    n, share = len(sample), float(sample.mean())
    variances, sizes = [], []
    for names in (rows, columns):
        _, groups = np.unique(np.asarray(names), return_inverse=True)
        size = int(groups.max()) + 1
        if size > 1:
            sums = np.bincount(groups, weights=sample - share)
            variances.append(size / (size - 1) * float(sums @ sums) / n**2)
            sizes.append(size)
    if share in (0, 1):
        return wilson(share * min(sizes, default=1), min(sizes, default=1))
    independent = share * (1 - share) / n
    both = sum(variances) - independent if len(variances) == 2 else 0.0
    variance = max(both, *variances, independent)
    parts = sum(part**2 / (size - 1) for part, size in zip(variances, sizes, strict=True))
    freedom = max(variance**2 / parts if parts else np.inf, min(sizes) - 1)
    t = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
    effective = share * (1 - share) / variance
    centre = (share + t**2 / (2 * effective)) / (1 + t**2 / effective)
    half = t / (1 + t**2 / effective) * np.sqrt(variance + t**2 / (4 * effective**2))
    return Interval(share, float(centre - half), float(centre + half))


def find_key(answers: Path) -> Path:
    """The one key file in the folder of an answer file.

    Raises:
        DgkitError: there is none, or more than one.
    """
    there = sorted(Path(answers).parent.glob("*.key.json"))
    if len(there) != 1:
        raise DgkitError(f"{Path(answers).parent} has {len(there)} key files (*.key.json): name the study's with --key")
    return there[0]


def results_path(key: Path) -> Path:
    """Where the numbers of a study go: beside study.key.json, study.results.json."""
    return key.with_name(key.name.removesuffix(".json").removesuffix(".key") + ".results.json")


def write_json(analysis: Analysis, path: Path) -> Path:
    """Write the numbers of an analysis, and return `path`.

    Raises:
        DgkitError: it cannot be written.
    """
    write_whole(path, json.dumps(analysis.as_dict(), indent=1, ensure_ascii=False) + "\n")
    return path


def _check(where: str, row: Mapping[str, str], key: Key) -> None:
    if row["study"] != key.study:
        raise DgkitError(f"{where} is of study {row['study']!r}, the key of {key.study!r}")
    if row["question"] not in key.questions:
        raise DgkitError(f"{where}: question {row['question']!r} is not one of {', '.join(key.questions)}")
    if row["pair"] not in key.pairs:
        raise DgkitError(f"{where}: pair {row['pair']!r} is not in the study")
    pair = key.pairs[row["pair"]]
    if {row["left"], row["right"]} != {pair["a"], pair["b"]} or row["chosen"] not in (row["left"], row["right"]):
        raise DgkitError(f"{where}: left, right and chosen are not the images of pair {row['pair']}")
