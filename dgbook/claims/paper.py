"""The paper's own numbers and claims: Tables 1 to 6 of arXiv 2510.11538, digits as printed, and what it says."""

import pandas as pd

from dgkit.errors import DgkitError
from dgkit.paths import DATA

NUMBER_OF_TABLES = 6


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


def _words(name: str) -> pd.DataFrame:
    return pd.read_csv(DATA / "paper" / f"{name}.csv", dtype=str, keep_default_na=False)


def ambiguities() -> pd.DataFrame:
    """What the paper leaves open or contradicts, a row per point, and what this book does about it.

    Columns, all text: id, where (in the paper), issue, taken_as, matters (how its weight is shown here).
    """
    return _words("ambiguities")
