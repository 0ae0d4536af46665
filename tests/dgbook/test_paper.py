"""The paper's tables, against statements of the paper that are not in the tables."""

import pytest

from dgbook.claims.paper import table
from dgkit.errors import DgkitError

STYLES = ["anime", "concept", "painting", "photo"]


@pytest.mark.parametrize(
    ("number", "rows", "columns"), [(1, 8, 8), (2, 6, 8), (3, 4, 7), (4, 3, 5), (5, 9, 5), (6, 4, 6)]
)
def test_every_table_is_complete(number: int, rows: int, columns: int) -> None:
    assert table(number).shape == (rows, columns)
    empty = table(number).isna().sum()
    assert {name: count for name, count in empty.items() if count} == ({"lambda": 3, "w": 3} if number == 5 else {})


@pytest.mark.parametrize("number", [0, 7, -1, 2.5, "1", None])
def test_an_unknown_table_is_one_clear_error(number: object) -> None:
    with pytest.raises(DgkitError, match="number=.*use 1 to 6"):
        table(number)  # type: ignore[arg-type]


def test_style_averages_of_table_2_except_the_documented_row() -> None:
    scores = table(2).set_index("method")
    error = (scores[STYLES].mean(axis="columns") - scores["average"]).abs()
    assert list(error.index[error > 0.01]) == ["DG"]
    assert scores.loc["DG", STYLES].mean() == pytest.approx(30.015)


def test_table_1_agrees_with_section_5_2() -> None:
    """ "Aesthetic 6.01 vs. 5.80 for SD3" (DG against CFG); "Blipscore from 70.09 to 83.66" on SD3.5."""
    rows = table(1).set_index(["model", "type", "dg"])
    assert rows.index.is_unique
    assert rows.loc[("SD3", "Cond", "yes"), "aesthetic"] == 6.01
    assert rows.loc[("SD3", "CFG", "no"), "aesthetic"] == 5.80
    assert rows.loc[("SD3.5", "Cond", "no"), "blipscore"] == 70.09
    assert rows.loc[("SD3.5", "Cond", "yes"), "blipscore"] == 83.66


def test_the_only_relabelled_rows_of_table_1_are_the_cfg_rows_of_sd3() -> None:
    rows = table(1)
    relabelled = rows[rows["model"] != rows["model_printed"]]
    assert list(zip(relabelled["model"], relabelled["type"], strict=True)) == [("SD3", "CFG")] * 2


@pytest.mark.parametrize(("number", "improved"), [(1, 13), (3, 7)])
def test_dg_improves_as_many_scores_as_the_paper_prints_in_bold(number: int, improved: int) -> None:
    """Bold marks the better score of each pair of rows; the counts are those of the bold scores in the rows with DG."""
    scores = table(number).set_index(["model", "type", "dg"])[["clipscore", "blipscore", "hpsv2.1", "aesthetic"]]
    better = scores.xs("yes", level="dg") > scores.xs("no", level="dg")
    assert int(better.to_numpy().sum()) == improved


@pytest.mark.parametrize(
    ("model", "blocks", "heads", "head_size"),
    [("SD3", 24, 24, 64), ("SD3.5", 38, 38, 64), ("Flux", 19 + 38, 24, 128)],
)
def test_table_4_agrees_with_the_released_architectures(model: str, blocks: int, heads: int, head_size: int) -> None:
    row = table(4).set_index("model").loc[model]
    assert (row["blocks"], row["hidden_size"]) == (blocks, heads * head_size)
    assert all(0 <= int(dim) < row["hidden_size"] for dim in row["dims"].split())
    assert 1 <= row["depth"] <= row["blocks"]


def test_table_5_has_a_scale_exactly_where_the_method_uses_it() -> None:
    rows = table(5)
    assert (rows["lambda"].notna() == rows["type"].str.contains("CFG")).all()
    assert (rows["w"].notna() == rows["type"].str.contains("DG")).all()
    assert set(rows["model"]) == set(table(4)["model"])


def test_table_6_is_better_with_dg_except_in_recall() -> None:
    scores = table(6).set_index(["type", "dg"])
    change = scores.xs("yes", level="dg") - scores.xs("no", level="dg")
    assert (change["fid"] < 0).all() and (change[["is", "precision"]] > 0).all(axis=None)
    assert (change["recall"] < 0).all()
