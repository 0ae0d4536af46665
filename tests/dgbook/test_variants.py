"""What the models page says of the longer and the wider training of `tiny-sd3`."""

import json
import re
from pathlib import Path

import pytest

from dgbook.pages import variants
from dgkit.errors import DgkitError
from dgkit.paths import DATA


def planted_variant(folder: Path, name: str, width: int, ratios: dict[int, list[float]]) -> None:
    history = [
        {"step": step, "ratio": row, "low": [r - 0.1 for r in row], "high": [r + 0.2 for r in row],
         "dim": [7 + block for block in range(len(row))], "loss": 0.5 + step, "training_loss": 0.25 * step}
        for step, row in ratios.items()
    ]  # fmt: skip
    facts = {"width": width, "history": history, "copies": {"share": 0.25, "low": 0.125, "high": 0.5}}
    facts["matching"] = {"share": 0.875, "low": 0.75, "high": 1.0}
    (folder / "ladder").mkdir(exist_ok=True)
    (folder / "ladder" / f"{name}.json").write_text(json.dumps(facts))


def test_the_variants_are_compared_at_equal_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "FOLDER", tmp_path / "ladder")
    monkeypatch.setattr(variants, "shipped_steps", lambda: 5000)
    assert variants.table_of_steps().empty
    planted_variant(tmp_path, "tiny-sd3-long", 96, {3000: [4.0, 8.5], 5000: [9.5, 9.0], 10000: [9.25, 9.75]})
    with pytest.raises(DgkitError, match="^not measured: tiny-sd3-wide"):
        variants.sentence()
    planted_variant(tmp_path, "tiny-sd3-wide", 128, {1000: [3.0, 2.0], 3000: [3.0, 12.0]})
    assert variants.table_of_steps().to_numpy().tolist() == [
        ["1,000", "", "3.0 [2.9, 3.2] (block 0, channel 7)"],
        ["3,000", "8.5 [8.4, 8.7] (block 1, channel 8)", "12.0 [11.9, 12.2] (block 1, channel 8)"],
        ["5,000", "9.5 [9.4, 9.7] (block 0, channel 7)", ""],
        ["10,000", "9.8 [9.7, 9.9] (block 1, channel 8)", ""],
    ]
    sentence = variants.sentence()
    assert "After 5,000 steps, which is the shipped model, the largest channel is 9.5 [9.4, 9.7]" in sentence
    assert "With 128 channels it is 12.0 [11.9, 12.2] after 3,000 steps, where the model of 96 channels has" in sentence
    assert "has 8.5 [8.4, 8.7]. From" in sentence
    assert "from 1250.000 to 2500.000 on training tiles and from 5000.500 to 10000.500 on held-out" in sentence
    card = (DATA / "models" / "tiny-sd3" / "README.md").read_text()
    shares = re.search(
        r"recognises (.*) of the unseen combinations instead of (.*), and (.*) instead of (.*) of the sa", sentence
    )
    assert shares and shares[1] == "87.5% [75.0%, 100.0%]" and shares[3] == "25.0% [12.5%, 50.0%]"
    assert f"64 samples, unseen combinations | 3 | {shares[2]} |" in card
    assert f"{shares[4]} of the samples are within 10 grey levels of a training tile" in card
