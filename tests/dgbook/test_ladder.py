"""What is said of the ladder of sizes, from measurements made up for the answer."""

import json
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from dgbook.chapters import ladder
from dgkit.errors import DgkitError


def write_ladder(folder: Path, ratios: dict[str, dict[int, list[float]]]) -> None:
    """Measurements of sizes of 10, 20, ... parameters with `ratios` of each block by step; dim = step + block.

    The second of the two trainings has half of the ratios and intervals.
    """
    (folder / "ladder").mkdir(exist_ok=True)
    for i, (name, by_step) in enumerate(ratios.items(), start=1):
        history = [
            {
                "step": step,
                "ratio": values,
                "low": [v - 1 for v in values],
                "high": [v + 2 for v in values],
                "dim": [step + block for block in range(len(values))],
            }
            for step, values in by_step.items()
        ]
        halved = [row | {key: [v / 2 for v in row[key]] for key in ("ratio", "low", "high")} for row in history]
        depth = len(history[0]["ratio"])
        took = {"parameters": 10 * i, "steps": history[-1]["step"]}
        last = history[-1] | {
            "low": [0.0] * depth, "high": [99.0] * depth, "loss": 0.5, "token_share": [0.25 * b for b in range(depth)],
            "rank_in_alpha": {"msa": [7] * depth, "mlp": [5 - b for b in range(depth)]},
        }  # fmt: skip
        config = {"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": depth}
        content = {
            "recipe": {"transformer": config},
            "trainings": [{"seed": 0, **took, "history": history}, {"seed": 1, **took, "history": halved}],
            "last": last, "samples": {"agreement": 0.5, "low": 0.4, "high": 0.6},
        }  # fmt: skip
        (folder / "ladder" / f"{name}.json").write_text(json.dumps(content))


RATIOS = {
    "tiny-dit-s": {5: [2.0, 1.5], 9: [2.5, 3.0], 12: [4.0, 8.0]},
    "tiny-dit-b": {5: [2.0, 2.5], 9: [6.0, 3.5]},
    "tiny-dit-xl": {5: [4.0, 3.0, 2.0], 9: [3.0, 5.5, 7.0]},
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_ladder(tmp_path, RATIOS)
    monkeypatch.setattr(ladder, "DATA", tmp_path)
    return tmp_path


def test_the_history_has_a_row_per_size_training_step_and_block(planted: Path) -> None:
    table = ladder.history()
    expected = [
        (name.removeprefix("tiny-dit-").upper(), 10 * i, 48, len(values), seed, step, b, *ratio, step + b)
        for i, (name, by_step) in enumerate(RATIOS.items(), start=1)
        for seed in (0, 1)
        for step, values in by_step.items()
        for b, v in enumerate(values)
        for ratio in [(v / (seed + 1), (v - 1) / (seed + 1), (v + 2) / (seed + 1))]
    ]
    assert list(table.itertuples(index=False, name=None)) == expected
    assert list(table.columns) == [
        "size", "parameters", "width", "depth", "seed", "step", "block", "ratio", "low", "high", "dim",
    ]  # fmt: skip


def test_sizes_are_compared_at_the_largest_common_step(planted: Path) -> None:
    table = ladder.sizes(ladder.history())
    assert table[["size", "seed", "step", "block", "dim", "ratio", "low", "high"]].to_numpy().tolist() == [
        ["S", 0, 9, 1, 10, 3.0, 2.0, 5.0], ["S", 1, 9, 1, 10, 1.5, 1.0, 2.5],
        ["B", 0, 9, 0, 9, 6.0, 5.0, 8.0], ["B", 1, 9, 0, 9, 3.0, 2.5, 4.0],
        ["XL", 0, 9, 2, 11, 7.0, 6.0, 9.0], ["XL", 1, 9, 2, 11, 3.5, 3.0, 4.5],
    ]  # fmt: skip
    assert table["massive_blocks"].tolist() == pytest.approx([0, 0, 1 / 2, 0, 2 / 3, 0])


def test_rungs_say_how_good_each_size_is(planted: Path) -> None:
    table = ladder.rungs()
    assert table["size"].tolist() == ["S", "B", "XL"] and table["steps"].tolist() == [12, 9, 9]
    assert table["ratio"].map(lambda interval: interval.value).tolist() == [8, 6, 7]
    assert table[["block", "dim", "token_share", "rank_in_alpha", "loss"]].to_numpy().tolist() == [
        [1, 13, 0.25, 4, 0.5], [0, 9, 0.0, 5, 0.5], [2, 11, 0.5, 3, 0.5],
    ]  # fmt: skip
    assert str(table["agreement"][0]) == "0.500 [0.400, 0.600]"


def test_values_and_sentence(planted: Path) -> None:
    values = ladder.values()
    assert values["sizes"] == ["S", "S", "B", "B", "XL", "XL"] and values["seeds"] == [0, 1] * 3
    assert values["step"] == 9
    assert values["rank_correlation"] == pytest.approx(1)  # of 2.25, 4.5 and 5.25
    assert values["p"] == values["smallest_p"] == pytest.approx(2 / 6)  # the order and its reverse, of 6
    sentence = ladder.sentence(values)
    assert "3.0 and 1.5 (S), 6.0 and 3.0 (B), 7.0 and 3.5 (XL) times" in sentence
    assert "above five times in 2 of the 6 trainings" in sentence
    assert "the ratio rises with size, which so few sizes cannot tell from chance" in sentence
    assert "1.00, p = 0.33, and never less than 0.33 with as many)" in sentence
    assert "trainings of one size differ by up to 3.5" in sentence  # 7.0 and 3.5


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([3.0, 4, 5, 6], "rises with size"),  # 3.0 and 1.5, 4.0 and 2.0, ...: the means grow
        ([6.0, 5, 4, 3], "does not rise with size"),
        ([3.0, 5, 4, 6], "does not rise steadily with size"),
    ],
)
def test_the_sentence_follows_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratios: list[float], words: str
) -> None:
    write_ladder(tmp_path, {name: {5: [r]} for name, r in zip(ladder.RUNGS, ratios, strict=True)})
    monkeypatch.setattr(ladder, "DATA", tmp_path)
    assert f"the ratio {words}" in ladder.sentence(ladder.values())


@pytest.mark.parametrize("y", [*product([1.0, 2.0, 2.5], repeat=4)][1:40:6])
def test_the_p_value_is_exact(y: tuple[float, ...]) -> None:
    x = np.array([1.0, 2, 5, 6])
    correlation, p = ladder._rank_correlation(x, np.array(y))
    ranks = rankdata(x), rankdata(y)
    assert correlation == pytest.approx(np.corrcoef(*ranks)[0, 1])
    orders = [np.corrcoef(ranks[0], order)[0, 1] for order in permutations(ranks[1])]
    assert p == pytest.approx(np.mean(np.abs(orders) >= abs(correlation) - 1e-9))


def test_equal_ratios_do_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ladder(tmp_path, {name: {5: [6.0]} for name in ladder.RUNGS})
    monkeypatch.setattr(ladder, "DATA", tmp_path)
    assert "the ratio does not rise with size" in ladder.sentence(ladder.values())
    assert ladder.values()["p"] == 1


def test_an_unmeasured_ladder_is_empty_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "DATA", tmp_path)
    assert ladder.history().empty and ladder.rungs().empty
    with pytest.raises(DgkitError, match="no training step in common"):
        ladder.values()
    write_ladder(tmp_path, {"tiny-dit-s": {5: [1.0]}, "tiny-dit-b": {5: [2.0]}})
    with pytest.raises(DgkitError, match="2 measured sizes"):
        ladder.values()
    write_ladder(tmp_path, {"tiny-dit-s": {5: [1.0]}, "tiny-dit-b": {6: [2.0]}})
    with pytest.raises(DgkitError, match="no training step in common"):
        ladder.sizes(ladder.history())
