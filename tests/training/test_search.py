"""The search for a recipe: what it tries, in which order, and that nothing is tried twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from dgbook.pages import search as page
from training import search

LOSSES = {1e-3: 0.9, 2e-3: 0.7, 3e-3: 0.8, 6e-3: 0.95}


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[search.Trial]:
    """The trials that were run, each with a planted loss, and a ratio that would choose otherwise."""
    seen: list[search.Trial] = []

    def run(trial: search.Trial, folder: Path) -> dict[str, Any]:
        seen.append(trial)
        return {"loss": LOSSES[trial.lr] - 0.1 * (trial.beta2 < 0.99), "seconds": 1, "ratio": 1e3 * trial.lr,
                "block": 2, "dim": 5}  # fmt: skip

    monkeypatch.setattr(search, "FILE", tmp_path / "search.json")
    monkeypatch.setattr(search, "_dit", run)
    monkeypatch.setattr(search, "_text_to_image", run)
    return seen


def test_the_loss_chooses_the_rate_at_which_the_rest_is_tried(tried: list[search.Trial], tmp_path: Path) -> None:
    search.search("tiny-sd3", tmp_path)
    assert [trial.lr for trial in tried] == [1e-3, 2e-3, 3e-3, 6e-3, 2e-3, 2e-3, 2e-3, 2e-3]
    wide, half, beta, text = tried[4:]
    assert (wide.width, wide.batch, wide.beta2, wide.steps) == (128, 64, 0.999, 600)
    assert (half.width, half.batch, half.beta2, half.steps) == (96, 32, 0.999, 1200)
    assert (beta.width, beta.batch, beta.beta2, beta.steps) == (96, 64, 0.95, 600)
    assert (text.width, text.batch, text.steps, text.text_lr) == (96, 32, 1200, 1e-3)


def test_a_trial_is_run_once(tried: list[search.Trial], tmp_path: Path) -> None:
    search.search("tiny-dit", tmp_path)
    rows = json.loads(search.FILE.read_text())
    assert len(tried) == len(rows) == 6 and all(row["width"] == 128 for row in rows)
    search.FILE.write_text(json.dumps(rows[:3]))  # a run that was killed
    again = search.search("tiny-dit", tmp_path)
    assert len(tried) == 9 and again == rows


def test_the_page_shows_every_trial_and_marks_the_lowest_loss(
    tried: list[search.Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.search("tiny-dit", tmp_path)
    monkeypatch.setattr(page, "FILE", search.FILE)
    lines = page.trials().splitlines()[2:]
    assert len(lines) == 6
    assert "| **0.6000** | 2.0 (block 2) |" in lines[5] and sum("**" in line for line in lines) == 1
    assert lines[0] == "| `tiny-dit` | 0.001 | 128 | 64 | 0.999 | 600 | 0.9000 | 1.0 (block 2) |"
