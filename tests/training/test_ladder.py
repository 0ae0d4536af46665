"""The ladder of sizes: recipes that differ in size alone, and what is measured of them."""

import csv
import dataclasses
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DiTPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import training
from dgbook.chapters.ladder import measurements
from dgbook.measures import datasets
from dgbook.measures.classifier import load_classifier
from dgkit.errors import DgkitError, LoadError
from dgkit.paths import DATA
from training import dit, ladder, quality

RECIPES = Path(training.__file__).parent


@pytest.fixture
def fake_data(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """120 random images in the place of Fashion-MNIST."""
    images = torch.randint(256, (120, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = torch.arange(120) % 10
    monkeypatch.setattr(datasets, "fashion_mnist", lambda split: (images, labels))
    return images, labels


@pytest.fixture
def random_pipe(fake_data: Any) -> DiTPipeline:
    """A transformer of two blocks whose weights are all random, with an untrained autoencoder."""
    recipe = dit.Recipe.read(RECIPES / "tiny-dit-s.toml")
    torch.manual_seed(0)
    model = dit.build_transformer(recipe.transformer | {"num_layers": 2, "num_attention_heads": 1})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(**recipe.autoencoder | {"block_out_channels": [8, 8]}).eval()
    return DiTPipeline(model.eval(), vae, DDIMScheduler(**recipe.scheduler))


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_a_rungs_recipe_is_tiny_dits_but_for_the_size_and_the_steps(name: str) -> None:
    rung, base = (dit.Recipe.read(RECIPES / f"{n}.toml") for n in (name, "tiny-dit"))
    size = {key: rung.transformer[key] for key in ("num_attention_heads", "attention_head_dim", "num_layers")}
    assert rung.transformer == base.transformer | size
    schedules = rung.transformer_schedule, base.transformer_schedule
    assert dataclasses.replace(schedules[0], steps=0, decay_steps=0) == dataclasses.replace(schedules[1], steps=0)
    # at each step the rung is trained for, its learning rate is tiny-dit's
    assert all(schedules[0].lr_at(step) == schedules[1].lr_at(step) for step in range(schedules[0].steps))
    assert rung.seeds[0] == base.transformer_schedule.seed and base.seeds == (0,)
    same = {"transformer": base.transformer, "transformer_schedule": base.transformer_schedule, "seeds": base.seeds}
    assert dataclasses.replace(rung, **same) == base
    assert rung.transformer_schedule.steps in rung.snapshots
    assert "steps" in tomllib.loads((RECIPES / f"{name}.toml").read_text())["transformer"]["schedule"]


def test_the_sizes_are_in_the_proportions_of_dits() -> None:
    dits = {"tiny-dit-s": (384, 12), "tiny-dit-b": (768, 12), "tiny-dit-l": (1024, 24), "tiny-dit-xl": (1152, 28)}
    for name, (width, depth) in dits.items():
        config = dit.Recipe.read(RECIPES / f"{name}.toml").transformer
        assert config["num_attention_heads"] * config["attention_head_dim"] * 8 == width
        assert config["num_layers"] == depth // 3


def test_a_recipe_may_change_its_base_anywhere(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text((RECIPES / "tiny-dit.toml").read_text())
    (tmp_path / "a.toml").write_text(
        'base = "base.toml"\n[autoencoder]\nkl_weight = 0.5\n'
        "[transformer]\nsnapshots = [3]\n[transformer.schedule]\nlr = 9.0\n"
    )
    changed, base = dit.Recipe.read(tmp_path / "a.toml"), dit.Recipe.read(tmp_path / "base.toml")
    schedule = dataclasses.replace(base.transformer_schedule, lr=9.0)
    assert changed == dataclasses.replace(base, kl_weight=0.5, snapshots=(3,), transformer_schedule=schedule)


# ----------------------------------------------------------------------------------------------------------- measuring


def test_the_loss_and_the_recorded_channels_are_those_of_a_naive_computation(random_pipe: DiTPipeline) -> None:
    images, labels = datasets.fashion_mnist("test")
    latents = dit.encode(random_pipe.vae, images[:100])
    noise = torch.randn(10, 100, 4, 14, 14, generator=torch.Generator().manual_seed(0))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
        for block in random_pipe.transformer.transformer_blocks
    ]
    losses = []
    for i, t in enumerate(range(50, 1000, 100)):
        noisy = alpha_bar[t] ** 0.5 * latents + (1 - alpha_bar[t]) ** 0.5 * noise[i]
        with torch.no_grad():
            predicted = random_pipe.transformer(noisy.float(), torch.full((100,), t), labels[:100]).sample[:, :4]
        losses.append(float((predicted - noise[i]).square().mean()))
    for hook in hooks:
        hook.remove()
    z = torch.stack(outputs).reshape(10, 2, 100, 49, 16)  # timestep, block, image, token, channel

    measured = ladder.measure_last(random_pipe)
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    mean = z.abs().double().mean((0, 2, 3)).numpy()
    assert measured["dim"] == mean.argmax(1).tolist()
    assert measured["ratio"] == pytest.approx(mean.max(1) / np.median(mean, 1), abs=6e-4)
    for block, dim in enumerate(measured["dim"]):
        threshold = 5 * np.median(z[:, block].abs().mean(2).numpy(), axis=-1)  # of each image at each timestep
        share = (z[:, block, :, :, dim].abs().numpy() > threshold[..., None]).mean()
        assert measured["token_share"][block] == pytest.approx(share, abs=1e-4)
    assert all(low <= r <= high for low, r, high in zip(*(measured[k] for k in ("low", "ratio", "high")), strict=True))


def test_the_rank_in_alpha_is_that_of_the_largest_channel(random_pipe: DiTPipeline) -> None:
    # whatever the conditioning, the gates are these: the third and the sixth part of adaLN's output
    alphas = torch.randperm(64, generator=torch.Generator().manual_seed(1)).reshape(2, 2, 16).float() / 64 + 0.1
    for block, (msa, mlp) in zip(random_pipe.transformer.transformer_blocks, alphas, strict=True):
        block.norm1.linear.weight.data.zero_()
        block.norm1.linear.bias.data[32:48], block.norm1.linear.bias.data[80:96] = msa, -mlp
    measured = ladder.measure_last(random_pipe)
    for branch, gates in zip(("msa", "mlp"), alphas.unbind(1), strict=True):
        expected = [
            1 + sorted(g.tolist(), reverse=True).index(g[d]) for g, d in zip(gates, measured["dim"], strict=True)
        ]
        assert measured["rank_in_alpha"][branch] == expected


def test_the_history_is_that_of_tiny_dit_with_intervals(
    random_pipe: DiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (100, 20):
        for parameter in random_pipe.transformer.parameters():
            nn.init.normal_(parameter, std=0.2)
        save_file(dict(random_pipe.transformer.named_parameters()), tmp_path / f"step-{step}.safetensors")
    rows = ladder.over_training(random_pipe, tmp_path)
    reference = quality.massive_over_training(random_pipe, tmp_path)
    assert [row["step"] for row in rows] == [20, 100]
    for row, expected in zip(rows, reference, strict=True):
        assert row["dim"] == expected["dim"]
        assert row["ratio"] == pytest.approx(expected["ratio"], abs=0.006)
        assert all(low < high for low, high in zip(row["low"], row["high"], strict=True))
    with pytest.raises(LoadError, match="no step-N"):
        ladder.over_training(random_pipe, tmp_path / "nothing")


def test_the_interval_of_a_ratio_is_that_of_resampled_images() -> None:
    rng = np.random.default_rng(1)
    values = rng.gamma(5, 1, (40, 7)) * np.arange(1, 8)
    interval = ladder.ratio_interval(values, 6)
    assert interval.value == pytest.approx(values[:, 6].mean() / np.sort(values.mean(0))[3])
    resampled = [values[rng.integers(40, size=40)].mean(0) for _ in range(4000)]
    expected = np.percentile([means[6] / np.sort(means)[3] for means in resampled], [2.5, 97.5])
    assert [interval.low, interval.high] == pytest.approx(expected, abs=0.1 * np.ptp(expected))
    equal = ladder.ratio_interval(np.tile([1.0, 2, 30], (5, 1)), 2)
    assert [equal.low, equal.value, equal.high] == pytest.approx([15] * 3)


def test_training_and_measuring_a_rung(fake_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, schedule = dit.Recipe.read, {"steps": 3, "batch": 4, "ema": 0.0}

    def read_short(path: Path) -> dit.Recipe:
        full = read(path)
        short = dataclasses.replace(full.transformer_schedule, **schedule)
        return dataclasses.replace(full, transformer_schedule=short, snapshots=(2, 3), seeds=(0, 5))

    monkeypatch.setattr(dit.Recipe, "read", read_short)
    monkeypatch.setattr(datasets, "fashion_mnist", lambda split: tuple(tensor[:20] for tensor in fake_data))
    monkeypatch.setattr(ladder, "RESAMPLES", 100)
    run = tmp_path / "tiny-dit-s"
    with pytest.raises(LoadError, match="no finished training"):
        ladder.measure_rung(run)
    training.train("tiny-dit-s", run)
    logs = {}
    for seed in (0, 5):
        with (run / f"transformer-{seed}" / "loss.csv").open() as file:
            logs[seed] = [row["loss"] for row in csv.DictReader(file)]
    assert len(logs[0]) == len(logs[5]) == 3 and not set(logs[0]) & set(logs[5])
    first, written = (
        load_file(file)
        for file in (
            run / "transformer-0" / "step-3.safetensors",
            run / "model" / "transformer" / "diffusion_pytorch_model.safetensors",
        )
    )
    assert all(torch.equal(tensor.bfloat16(), written[name]) for name, tensor in first.items())
    for file in ("tiny-dit-s.toml", "tiny-dit.toml"):  # the recipe says how it differs from its base
        assert (run / "model" / file).read_bytes() == (RECIPES / file).read_bytes()
    shipped = load_file(DATA / "models" / "tiny-dit" / "vae" / "diffusion_pytorch_model.safetensors")
    saved = load_file(run / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, shipped[name]) for name, tensor in saved.items()) and saved.keys() == shipped.keys()

    monkeypatch.setattr(ladder, "SAMPLES", 20)
    monkeypatch.setattr(ladder, "STEPS", 2)
    monkeypatch.setattr(ladder, "SHEET", 10)
    monkeypatch.setattr(ladder, "DATA", tmp_path / "data")
    (tmp_path / "data").mkdir()
    model = load_classifier()
    monkeypatch.setattr(ladder, "load_classifier", lambda: model)
    measured = ladder.measure_rung(run)
    file = tmp_path / "data" / "ladder" / "tiny-dit-s.json"
    assert json.loads(file.read_text()) == measured
    assert measured["recipe"]["transformer"]["num_attention_heads"] == 3
    count = sum(p.numel() for p in DiffusionPipeline.from_pretrained(run / "model").transformer.parameters())
    assert [trained["seed"] for trained in measured["trainings"]] == [0, 5]
    for trained in measured["trainings"]:
        assert measured["recipe"]["schedule"]["steps"] == trained["steps"] == 3
        assert trained["parameters"] == count
        assert [row["step"] for row in trained["history"]] == [2, 3]
    ratios = [trained["history"][-1]["ratio"] for trained in measured["trainings"]]
    assert ratios[0] == pytest.approx(measured["last"]["ratio"], rel=0.02) and ratios[0] != ratios[1]  # bfloat16
    assert set(measured["last"]["rank_in_alpha"]) == {"msa", "mlp"}
    assert {len(measured["last"][key]) for key in ("ratio", "low", "high", "dim", "token_share")} == {4}
    assert measured["samples"]["low"] <= measured["samples"]["agreement"] <= measured["samples"]["high"]
    assert Image.open(file.with_suffix(".webp")).mode == "RGB"  # WebP has no grey
    text = file.read_bytes()
    ladder.measure_rung(run)
    assert file.read_bytes() == text


def test_a_run_that_is_no_rung_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DgkitError, match="tiny-dit-s, tiny-dit-b, tiny-dit-l, tiny-dit-xl"):
        ladder.measure_rung(tmp_path / "tiny-dit")


def test_the_samples_are_judged_against_their_own_class(random_pipe: DiTPipeline, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}

    def generate(pipe: Any, conditions: list[int], seeds: range, **setting: Any) -> np.ndarray:
        seen.update(conditions=conditions, seeds=list(seeds), **setting)
        return np.zeros((200, 28, 28, 3), np.uint8)

    says_bag = SimpleNamespace(to=lambda device: lambda images: torch.eye(10)[[8] * len(images)])
    monkeypatch.setattr(ladder, "generate", generate)
    monkeypatch.setattr(ladder, "load_classifier", lambda: says_bag)
    _, samples = ladder.measure_samples(random_pipe)
    assert seen["conditions"] == [*range(10)] * 20 and seen["seeds"] == [*range(200)]
    assert (seen["guidance_scale"], seen["num_inference_steps"]) == (4.0, 20)
    assert samples["agreement"] == 0.1  # 20 of 200
    assert (samples["low"], samples["high"]) == (0.0657, 0.1494)  # Wilson 1927, z = 1.96


def test_the_shipped_measurements_are_small_and_of_the_recipes() -> None:
    assert tuple(measurements()) == ladder.RUNGS
    for name, measured in measurements().items():
        files = [DATA / "ladder" / f"{name}{suffix}" for suffix in (".json", ".webp")]
        assert all(file.stat().st_size < 60_000 for file in files)
        recipe = dit.Recipe.read(RECIPES / f"{name}.toml")
        assert measured["recipe"]["transformer"] == recipe.transformer
        schedule = {"beta2": 0.999} | measured["recipe"]["schedule"]  # AdamW's own, where the recipe had no other
        assert schedule == dataclasses.asdict(recipe.transformer_schedule)
        assert measured["recipe"]["label_dropout"] == recipe.label_dropout
        assert measured["recipe"]["scheduler"] == recipe.scheduler
        assert tuple(trained["seed"] for trained in measured["trainings"]) == recipe.seeds
        steps = recipe.transformer_schedule.steps
        for trained in measured["trainings"]:
            assert trained["steps"] == steps
            assert [row["step"] for row in trained["history"]] == [n for n in recipe.snapshots if n <= steps]
