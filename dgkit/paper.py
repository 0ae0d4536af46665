"""The paper's own numbers: Tables 1 to 6 of arXiv 2510.11538, digits as printed."""

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
