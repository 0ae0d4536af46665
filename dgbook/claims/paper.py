"""The paper's own numbers and claims: Tables 1 to 6 of arXiv 2510.11538, digits as printed, and what it says."""

import pandas as pd

from dgkit.errors import DgkitError
from dgkit.paths import DATA

NUMBER_OF_TABLES = 6

SCORES = {
    "clipscore": "CLIPScore", "blipscore": "BLIPScore", "hpsv2.1": "HPSv2.1", "aesthetic": "Aesthetic",
    "fid": "FID", "is": "IS", "precision": "precision", "recall": "recall",
}  # fmt: skip
"""The paper's scores by their columns in `data/paper`."""

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


def table(number: int) -> pd.DataFrame:
    """One table of the paper, a row per printed row; `data/paper/README.md` describes columns and contradictions.

    Args:
        number: the table's number in the paper, 1 to 6.

    Raises:
        DgkitError: the paper has no table of this number.
    """
    if number not in range(1, NUMBER_OF_TABLES + 1):
        raise DgkitError(f"number={number!r} is not a table of the paper: use 1 to {NUMBER_OF_TABLES}")
    return pd.read_csv(DATA / "paper" / f"table{number}.csv", dtype={"dims": str})


def claims() -> pd.DataFrame:
    """What the paper claims in sections 4.1 to 5.3 and appendices B to I, a row per claim.

    Columns, all text: id, section, claim, exhibits (figures and tables, separated by "; "), models (separated by "; "),
    numbers (as printed in the text; may be empty).
    """
    return _words("claims")


def parts() -> pd.DataFrame:
    """How this book tests the claims: the parts of each chapter's claim, a row per part, one comparison each.

    Columns, all text: id, chapter (name of the notebook), claims (ids of `claims`, separated by "; "; none for what the
    paper does not claim), text, value (where the result stores it, or "derived.FUNCTION" of `dgbook.claims.derived`),
    relation ("<", ">" or ">="), bound (a number or another value), shown (the numbers for a page: values in braces).
    """
    return _words("parts")


def exhibits() -> pd.DataFrame:
    """The paper's 23 figures and 6 tables. Columns, all text: exhibit, section, shows, models (separated by "; ")."""
    return _words("figures")


def earlier_words() -> pd.DataFrame:
    """What the parts said under the rules before those of `data/paper/plan.md`, a row per part and training.

    Columns, all text: part (its id then), chapter, text, training, word, numbers.
    """
    return _words("earlier_words")


def _words(name: str) -> pd.DataFrame:
    return pd.read_csv(DATA / "paper" / f"{name}.csv", dtype=str, keep_default_na=False)


def ambiguities() -> pd.DataFrame:
    """What the paper leaves open or contradicts, a row per point, and what this book does about it.

    Columns, all text: id, where (in the paper), issue, taken_as, matters (how its weight is shown here).
    """
    return _words("ambiguities")


def recomputed(claim: str) -> str:
    """What the paper's own tables say of a claim about them: in how many scores it is so, and in which not."""
    if claim in ("5.2g", "5.2h"):
        return _ranks("DG" if claim == "5.2g" else "CFG+DG")
    if claim not in _COMPARED:
        return ""
    better, worse, scores = _COMPARED[claim]
    row = claims().set_index("id").loc[claim]
    total, against = 0, []
    for number in (int(exhibit[6:]) for exhibit in row["exhibits"].split("; ") if exhibit.startswith("Table ")):
        rows = table(number)
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
    rows = table(2).set_index("method")
    ranks = rows[["average", "aesthetic"]].rank(ascending=False, method="min").astype(int).loc[method]
    return f"rank {ranks['aesthetic']} of {len(rows)} by Aesthetic, {ranks['average']} of {len(rows)} by HPSv2.1"
