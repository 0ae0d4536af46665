"""The models in `data/models` as they are shipped: they load without dgkit, and their cards say what was measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dgkit
from dgkit.paths import DATA
from dgkit.sampling import generate
from dgkit.zoo import MODELS
from training import cards, flow

PIPELINES = [name for name, model in MODELS.items() if model.source is None]
FOLDERS = sorted(folder.name for folder in (DATA / "models").iterdir())

CONDITIONS = {"tiny-dit": 7, "tiny-sd3": "red dragon monster", "tiny-flux": "red dragon monster"}


def test_the_cards_code_needs_only_diffusers(tmp_path: Path) -> None:
    parts = ["import sys"]
    for name in PIPELINES:
        parts += re.findall(r"```python\n(.*?)```", (DATA / "models" / name / "README.md").read_text(), re.DOTALL)
        parts.append(f"image.save({str(tmp_path / name)!r} + '.png')")
    parts.append("assert 'dgkit' not in sys.modules")
    assert len(parts) == 2 * len(PIPELINES) + 2
    # `-P`: not even the checkout is on the path
    command = [sys.executable, "-P", "-c", "\n".join(parts)]
    subprocess.run(command, cwd=DATA.parent, check=True, capture_output=True, timeout=300)
    for name in PIPELINES:
        pipe, preset = dgkit.load(name), MODELS[name].preset
        (expected,) = generate(
            pipe, [CONDITIONS[name]], [0], num_inference_steps=preset.steps, guidance_scale=preset.guidance_scale
        )
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"{name}.png")), expected)
        assert expected.std() > 10


@pytest.mark.parametrize("name", FOLDERS)
def test_the_card_is_made_from_the_measured_numbers(name: str, tmp_path: Path) -> None:
    folder = DATA / "models" / name
    training, quality = (json.loads((folder / f"{kind}.json").read_text()) for kind in ("training", "quality"))
    facts = (
        {"caption_dropout": flow.Recipe.read(folder / f"{name}.toml").caption_dropout} if name in flow.FAMILIES else {}
    )
    cards.write(tmp_path, training, quality, **facts)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()


def test_all_weights_together_take_at_most_20_mb_and_are_safetensors() -> None:
    files = [path for path in (DATA / "models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 20e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_shipped_weights_are_finite_and_not_those_of_an_untrained_model(name: str) -> None:
    state = dgkit.load(name).transformer.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    outputs = [tensor for key, tensor in state.items() if key.startswith("proj_out") and key.endswith("weight")]
    assert outputs and all(tensor.abs().max() > 0 for tensor in outputs)  # zero at the start of training


@pytest.mark.parametrize("name", PIPELINES)
def test_loading_writes_nothing_to_a_log(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    dgkit.load(name)
    assert tuple(capfd.readouterr()) == ("", "")  # anything on a page's stderr fails the book


def test_no_shipped_file_names_a_folder_of_the_machine_it_was_made_on() -> None:
    texts = [p for p in (DATA / "models").rglob("*") if p.suffix in (".json", ".toml", ".md", ".csv")]
    assert texts and not [p for p in texts if "_name_or_path" in p.read_text() or str(DATA.parent) in p.read_text()]
