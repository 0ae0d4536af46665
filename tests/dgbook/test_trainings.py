"""What the models page says of the trainings of `tiny-sd3`."""

import json
from pathlib import Path

import pytest

from dgbook.pages import trainings
from dgkit.errors import DgkitError


def planted(
    folder: Path, name: str, width: int, schedule: dict[str, float], ratios: dict[int, list[float]], **recipe: float
) -> None:
    history = [
        {"step": step, "ratio": row, "low": [r - 0.1 for r in row], "high": [r + 0.2 for r in row],
         "dim": [7 + block for block in range(len(row))], "loss": 0.5 + step, "training_loss": 0.25 * step}
        for step, row in ratios.items()
    ]  # fmt: skip
    facts = {"width": width, "history": history, "copies": {"share": 0.25, "low": 0.125, "high": 0.5}}
    facts |= {"matching": {"share": 0.875, "low": 0.75, "high": 1.0}, "recipe": {"schedule": schedule} | recipe}
    (folder / f"{name}.json").write_text(json.dumps(facts))


def test_trainings_are_compared_at_equal_numbers_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "FOLDER", tmp_path)
    small, large = {"steps": 40, "batch": 32, "lr": 6e-3}, {"steps": 20, "batch": 64, "lr": 1e-3}
    planted(tmp_path, "tiny-sd3", 96, small, {20: [4.0, 9.5]}, text_rate=1 / 6)
    planted(tmp_path, "tiny-sd3-first", 96, large, {20: [3.0, 2.0]})
    planted(tmp_path, "tiny-sd3-long", 96, large, {20: [3.0, 2.0], 40: [3.5, 2.0]})
    planted(tmp_path, "tiny-sd3-wide", 128, large, {10: [3.0, 12.0]})
    with pytest.raises(DgkitError, match="^not measured: tiny-sd3-fast"):
        trainings.trainings()
    planted(tmp_path, "tiny-sd3-fast", 96, small, {20: [4.0, 8.5], 40: [9.5, 9.0]})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in trainings.growth().splitlines()]
    assert lines[0] == ["images", "`tiny-sd3`", "`tiny-sd3-long`", "`tiny-sd3-wide`", "`tiny-sd3-fast`"]
    assert lines[2:] == [
        ["640", "9.5 [9.4, 9.7]", "", "12.0 [11.9, 12.2]", "8.5 [8.4, 8.7]"],
        ["1,280", "", "3.0 [2.9, 3.2]", "", "9.5 [9.4, 9.7]"],
        ["2,560", "", "3.5 [3.4, 3.7]", "", ""],
    ]
    assert "| 0.006, text 0.001 |" in trainings.trainings().splitlines()[2]
    last = trainings.trainings().splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        "`tiny-sd3-fast`", "96", "40 of 32", "0.006", "40.500", "10.000", "9.5 [9.4, 9.7] (block 0, channel 7)",
        "87.5% [75.0%, 100.0%]", "25.0% [12.5%, 50.0%]",
    ]  # fmt: skip
