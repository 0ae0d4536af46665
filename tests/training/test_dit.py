"""The recipes of the shipped models: resuming, DiT's own training facts, data, saving, measuring."""

import csv
import dataclasses
import gzip
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import training
from dgbook.measures import classifier, datasets
from dgbook.measures.judges import FashionJudge
from dgkit.errors import DataError, DgkitError, LoadError
from dgkit.paths import DATA
from training import dit, loop, measuring, quality
from training.loop import Schedule

SCHEDULE = Schedule(steps=10, batch=4, lr=1e-2, warmup=3, ema=0.9, seed=1)


class Killed(Exception):
    """Stands for the process being killed."""


def train_linear(folder: Path, kill_at: int | None = None, schedule: Schedule = SCHEDULE) -> nn.Module:
    """Train a linear model with a checkpoint every 3 steps; optionally die at the `kill_at`-th step of this call."""
    torch.manual_seed(schedule.seed)
    model, calls = nn.Linear(3, 2), iter(range(1_000))

    def loss(generator: torch.Generator) -> Tensor:
        if next(calls) == kill_at:
            raise Killed
        x = torch.randn(schedule.batch, 3, generator=generator)
        return (model(x) - x[:, :2].sin()).square().mean()

    return loop.train(model, loss, schedule, folder, save_every=3, snapshots=(4,))


def outcome(folder: Path, model: nn.Module) -> tuple[list[list[float]], list[list[str]], dict[str, Any]]:
    """All that a finished run leaves, but for the times."""
    with (folder / "loss.csv").open() as file:
        log = [row[:2] for row in csv.reader(file)]
    snapshot = load_file(folder / "step-4.safetensors")
    return [p.tolist() for p in model.parameters()], log, {name: t.tolist() for name, t in snapshot.items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = outcome(folder, train_linear(folder))
    assert [row[0] for row in result[1]] == ["step", *map(str, range(1, 11))]
    return result


def test_a_part_of_the_model_has_a_rate_of_its_own(tmp_path: Path) -> None:
    """Adam's first step moves every weight by the learning rate, whatever the gradient's size."""
    model = nn.ModuleDict({"text": nn.Linear(3, 2), "rest": nn.Linear(3, 2), "text_too": nn.Linear(3, 2)})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    schedule = loop.Schedule(steps=1, batch=1, lr=0.25, warmup=1)

    def loss(generator: torch.Generator) -> Tensor:
        return sum(part(torch.ones(1, 3)).sum() for part in model.values())  # type: ignore[return-value]

    loop.train(model, loss, schedule, tmp_path, rates={"text": 0.5})
    for name, parameter in model.named_parameters():
        rate = 0.125 if name.startswith("text.") else 0.25
        assert torch.allclose(before[name] - parameter, torch.full_like(parameter, rate), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(kills=st.lists(st.integers(0, 9), max_size=4), torn=st.sampled_from(["", "1", "12,0.1", "2,0.123456,0.1\n"]))
def test_a_killed_training_resumes_to_the_same_weights_and_losses(
    uninterrupted: Any, kills: list[int], torn: str
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for kill_at in kills:
            try:
                train_linear(folder, kill_at)
            except Killed:
                with (folder / "loss.csv").open("a") as file:
                    file.write(torn)  # died while it wrote the log
        assert outcome(folder, train_linear(folder)) == uninterrupted


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 4])
def test_a_training_killed_between_log_and_checkpoint_resumes_to_the_same(
    uninterrupted: Any, checkpoint: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saves = loop._save_atomically, []

    def die(tensors: dict[str, Tensor], path: Path) -> None:
        saves.append(path.name)
        if saves.count("checkpoint.safetensors") == checkpoint:
            path.with_suffix(".partial").write_bytes(b"half a checkpoint")
            raise Killed
        save(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "_save_atomically", die)
        train_linear(tmp_path)
    rows = len((tmp_path / "loss.csv").read_text().splitlines()) - 1
    assert rows == min(3 * checkpoint, 10)  # the log is ahead of the checkpoint
    assert outcome(tmp_path, train_linear(tmp_path)) == uninterrupted


def test_the_average_follows_its_formula(tmp_path: Path) -> None:
    torch.manual_seed(SCHEDULE.seed)
    model, weights = nn.Linear(3, 2), []

    def loss(generator: torch.Generator) -> Tensor:
        weights.append(model.weight.detach().double().clone())
        return model(torch.randn(4, 3, generator=generator)).square().mean()

    loop.train(model, loss, SCHEDULE, tmp_path)
    weights.append(load_file(tmp_path / "checkpoint.safetensors")["model.weight"].double())
    average = weights[0]
    for step, weight in enumerate(weights[1:]):
        decay = min(0.9, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model.weight.detach().double(), average, rtol=0, atol=1e-6)


def test_the_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    schedule = Schedule(steps=1000, batch=1, lr=2.0, warmup=10)
    assert schedule.lr_at(0) == pytest.approx(0.2, rel=1e-3)
    assert schedule.lr_at(9) == pytest.approx(2.0, rel=1e-3)
    assert schedule.lr_at(500) == pytest.approx(1.1)  # halfway down the cosine from 2.0 to 0.2
    assert schedule.lr_at(999) == pytest.approx(0.2, rel=1e-4)


def test_a_training_longer_than_the_decay_starts_the_schedule_again() -> None:
    once, twice = Schedule(50, 1, 2.0, warmup=10), Schedule(100, 1, 2.0, warmup=10, decay_steps=50)
    assert [twice.lr_at(step) for step in range(100)] == 2 * [once.lr_at(step) for step in range(50)]


def test_the_record_of_a_training_states_what_it_took(tmp_path: Path) -> None:
    train_linear(tmp_path)
    record = json.loads((tmp_path / "training.json").read_text())
    with (tmp_path / "loss.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert (record["steps"], record["batch"], record["parameters"]) == (10, 4, 8)
    assert record["mean_loss_of_last_100_steps"] == pytest.approx(np.mean(losses), abs=1e-6)
    assert record["threads"] == torch.get_num_threads()


# ------------------------------------------------------------------------------------------------------------- tiny-dit


@pytest.fixture
def recipe() -> dit.Recipe:
    """The shipped recipe with smaller and shorter networks."""
    full = dit.Recipe.read(Path(training.__file__).parent / "tiny-dit.toml")
    return dataclasses.replace(
        full,
        autoencoder=full.autoencoder | {"block_out_channels": [8, 8]},
        autoencoder_schedule=Schedule(steps=2, batch=4, lr=1e-3),
        transformer=full.transformer | {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8},
        transformer_schedule=Schedule(steps=2, batch=400, lr=1e-3),
        snapshots=(1, 2),
    )


@pytest.fixture
def fake_data(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """200 blocky random images in the place of Fashion-MNIST."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (200, 1, 7, 7), generator=generator, dtype=torch.uint8)
    images = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.arange(200) % 10
    monkeypatch.setattr(datasets, "fashion_mnist", lambda split: (images, labels))
    return images, labels


@torch.no_grad()
def test_normalised_latents_have_mean_0_and_std_1_and_the_same_reconstructions(
    recipe: dit.Recipe, fake_data: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(**recipe.autoencoder).double().eval()
    vae.quant_conv.bias += torch.linspace(-2, 2, 8)  # far from normalised
    pixels = dit.to_rgb(fake_data[0][:50]).double()

    def reconstruct() -> tuple[Tensor, Tensor, Tensor]:
        posterior = vae.encode(pixels).latent_dist
        sample = posterior.sample(torch.Generator().manual_seed(3))
        return posterior.mean, vae.decode(posterior.mean).sample, vae.decode(sample).sample

    before, from_mean, from_sample = reconstruct()
    assert before.mean((0, 2, 3)).abs().max() > 1
    dit.normalise_latents(vae, before)
    after, from_mean_after, from_sample_after = reconstruct()
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(4).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(from_mean_after, from_mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(from_sample_after, from_sample, rtol=0, atol=1e-9)


def test_a_fresh_transformer_predicts_exactly_zero_and_its_gates_are_shut(recipe: dit.Recipe) -> None:
    model = dit.build_transformer(recipe.transformer)
    gates: list[Tensor] = []
    for block in model.transformer_blocks:
        block.norm1.register_forward_hook(lambda module, args, output: gates.extend((output[1], output[4])))
    output = model(torch.randn(3, 4, 14, 14), torch.tensor([10, 500, 990]), torch.tensor([0, 9, 1000])).sample
    assert output.shape == (3, 8, 14, 14)
    assert not output.any()
    assert len(gates) == 6
    assert not torch.cat(gates).any()


def test_the_transformer_drops_no_labels_of_its_own(recipe: dit.Recipe) -> None:
    def differs_between_calls(model: DiTTransformer2DModel) -> bool:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        noisy, timestep, label = torch.randn(64, 4, 14, 14), torch.full((64,), 500), torch.arange(64) % 10
        first, second = (model.train()(noisy, timestep, label).sample for _ in range(2))
        return not torch.equal(first, second)

    torch.manual_seed(0)
    assert differs_between_calls(DiTTransformer2DModel(**recipe.transformer))  # what build_transformer is for
    model = dit.build_transformer(recipe.transformer)
    assert [block.norm1.emb.class_embedder.dropout_prob for block in model.transformer_blocks] == [0, 0, 0]
    assert not differs_between_calls(model)


def test_training_drops_labels_per_sample_in_all_blocks_and_leaves_sigma_at_zero(
    recipe: dit.Recipe, fake_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, seen = dit.build_transformer, []

    def build_watched(config: dict[str, Any]) -> DiTTransformer2DModel:
        model = build(config)
        for block in model.transformer_blocks:
            embedder = block.norm1.emb.class_embedder

            def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                null = (output == module.embedding_table.weight[dit.NULL_CLASS]).all(1)
                seen.append((args[0], null))

            embedder.register_forward_hook(watch)
        return model

    monkeypatch.setattr(dit, "build_transformer", build_watched)
    vae = AutoencoderKL(**recipe.autoencoder).eval()
    model = dit.train_transformer(recipe, vae, tmp_path)
    assert len(seen) == 2 * (3 + 1)  # two steps; three blocks and the final norm, which borrows the first block's table
    for labels, null in seen:
        assert torch.equal(labels == dit.NULL_CLASS, null)
        assert 0.05 < null.float().mean() < 0.15  # 400 coins of 0.1
    for labels, _ in seen[1:4]:
        assert torch.equal(labels, seen[0][0])
    with (tmp_path / "loss.csv").open() as file:
        first = float(next(csv.DictReader(file))["loss"])
    assert first == pytest.approx(1.0, abs=0.02)  # predicting 0 for unit noise
    sample = model(torch.randn(2, 4, 14, 14), torch.tensor([500, 5]), torch.tensor([1, 2])).sample
    assert sample[:, :4].any()
    assert not sample[:, 4:].any()


@torch.no_grad()
def test_the_saved_pipeline_loads_plainly_and_samples(recipe: dit.Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, transformer = AutoencoderKL(**recipe.autoencoder).eval(), dit.build_transformer(recipe.transformer).eval()
    weight = transformer.transformer_blocks[0].attn1.to_q.weight.detach().clone()
    dit.save_pipeline(vae, transformer, recipe.scheduler, tmp_path)

    files = sorted(tmp_path.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["transformer", "vae"]
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.bfloat16}

    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.get_label_ids(["T-shirt", "sneaker", "ankle boot"]) == [0, 7, 9]
    loaded = pipe.transformer.transformer_blocks[0].attn1.to_q.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, weight.bfloat16().float())

    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    images = pipe([0, 9], guidance_scale=4.0, num_inference_steps=2, generator=generators, output_type="np").images
    # a fresh transformer predicts no noise, so DDIM from t = 500 returns x / sqrt(alpha_bar_500)
    noise = torch.cat([torch.randn(1, 4, 14, 14, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    alpha_bar = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:501])
    decoded = pipe.vae.decode(noise / alpha_bar**0.5).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert images.shape == (2, 28, 28, 3)
    np.testing.assert_allclose(images, expected, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- whole recipes


def test_the_whole_recipe_of_tiny_dit_resumes_at_each_stage_and_is_measured(
    recipe: dit.Recipe, fake_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dit.Recipe, "read", lambda path: recipe)

    def die(*args: Any) -> None:
        raise Killed

    for function in ("train_transformer", "save_pipeline"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(dit, function, die)
            training.train("tiny-dit", tmp_path)
        assert not (tmp_path / "model").exists()
        assert (tmp_path / "vae").exists()
    with monkeypatch.context() as patch:
        patch.setattr(dit, "train_autoencoder", die)  # finished before
        training.train("tiny-dit", tmp_path)
        patch.setattr(dit, "train_transformer", die)
        training.train("tiny-dit", tmp_path)

    model = tmp_path / "model"
    trained = json.loads((model / "training.json").read_text())
    assert list(trained["networks"]) == ["autoencoder", "transformer"]
    assert trained["networks"]["transformer"]["steps"] == 2
    assert (model / "tiny-dit.toml").read_bytes() == (Path(training.__file__).parent / "tiny-dit.toml").read_bytes()

    monkeypatch.setattr(quality, "SAMPLES", 20)
    monkeypatch.setattr(quality, "load_classifier", lambda: classifier.FashionClassifier().eval())
    monkeypatch.setattr(measuring, "judge_of", lambda pipe, labels: FashionJudge(labels))
    monkeypatch.setattr(quality, "CALIBRATION_SAMPLES", 10)
    monkeypatch.setattr(quality, "CALIBRATION_GRID", (0.0, 0.5))
    measured = quality.measure(tmp_path, guidance_scale=2.0, steps=2)
    assert [(row["guidance_scale"], row["w"]) for row in measured["guidance"]] == [(1, 0), (1, 0.5), (2, 0), (2, 0.5)]
    assert [row["step"] for row in measured["massive"]] == [1, 2]
    assert measured == json.loads((model / "quality.json").read_text())
    assert np.mean(list(measured["agreement_of_class"].values())) == pytest.approx(measured["agreement"])
    card = (model / "README.md").read_text()
    assert f"{measured['psnr_db']:.2f} dB | 28 dB | **not met**" in card
    assert (model / "samples.webp").exists()


def test_the_whole_recipe_of_the_classifier_refuses_another_recipe(
    fake_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "Schedule", lambda **shipped: Schedule(**shipped | {"steps": 2, "batch": 4}))
    training.train("fashion-classifier", tmp_path)
    measured = quality.measure_classifier(tmp_path)
    assert f"{measured['accuracy']:.2%}" in (tmp_path / "model" / "README.md").read_text()
    (tmp_path / "fashion-classifier.toml").write_text("[schedule]\nsteps = 9\n")
    with pytest.raises(DgkitError, match="another recipe"):
        training.train("fashion-classifier", tmp_path)


def test_a_run_of_another_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny-dit.toml").write_text("label_dropout = 0.5\n")
    with pytest.raises(DgkitError, match=r"another recipe than .*tiny-dit\.toml$"):
        training.train("tiny-dit-s", tmp_path)


@pytest.mark.parametrize("name", ["tiny-dot", "", "tiny-dit.toml"])
def test_an_unknown_recipe_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DgkitError, match="'tiny-dit', 'fashion-classifier'"):
        training.train(name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ measuring


class OffsetAutoencoder:
    """Reconstructs every image with an error of `offset` in each pixel of [-1, 1]."""

    device = torch.device("cpu")

    def __init__(self, offset: float) -> None:
        self.offset = offset

    def encode(self, pixels: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels))

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents + self.offset)


@pytest.mark.parametrize("offset", [0.01, 0.1, 0.5])
def test_psnr_of_a_known_error(offset: float) -> None:
    pipe: Any = SimpleNamespace(vae=OffsetAutoencoder(offset))
    images = torch.full((300, 1, 28, 28), 100, dtype=torch.uint8)
    root_mse = offset / 2  # on the scale from 0 to 1
    assert quality.autoencoder_psnr(pipe, images) == pytest.approx(-20 * np.log10(root_mse), abs=1e-3)


def test_massive_ratios_of_planted_snapshots(recipe: dit.Recipe, fake_data: Any, tmp_path: Path) -> None:
    # gates shut, no position, no input: the output of every block is the bias of the patch embedding
    vae, transformer = AutoencoderKL(**recipe.autoencoder).eval(), dit.build_transformer(recipe.transformer).eval()
    transformer.pos_embed.pos_embed.zero_()
    dit.save_pipeline(vae, transformer, recipe.scheduler, tmp_path / "model")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.transformer.pos_embed.pos_embed.zero_()
    weights = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    weights["pos_embed.proj.weight"].zero_()
    biases = {9: torch.linspace(-1, 2, 16), 100: torch.linspace(-1, 2, 16)}
    biases[100][4] = -30.0
    for step, bias in biases.items():
        save_file(weights | {"pos_embed.proj.bias": bias}, tmp_path / f"step-{step}.safetensors")
    rows = quality.massive_over_training(pipe, tmp_path)
    assert [row["step"] for row in rows] == [9, 100]
    for row, dim in zip(rows, (15, 4), strict=True):
        magnitude = biases[row["step"]].abs().numpy()
        assert row["dim"] == [dim] * 3
        assert row["ratio"] == pytest.approx([magnitude.max() / np.median(magnitude)] * 3, abs=0.006)
        assert row["energy"] == pytest.approx([magnitude[dim] ** 2 / (magnitude**2).sum()] * 3, abs=6e-4)

    save_file({"nonsense": torch.zeros(1)}, tmp_path / "step-200.safetensors")
    with pytest.raises(LoadError, match="step-200"):
        quality.massive_over_training(pipe, tmp_path)
    with pytest.raises(LoadError, match="no step-N"):
        quality.massive_over_training(pipe, tmp_path / "model")


def test_the_contact_sheet_puts_classes_in_rows_and_repeats_pixels() -> None:
    images = np.zeros((20, 28, 28, 3), np.uint8)
    images[13, 2, 5] = (10, 20, 30)  # the second sample of class 3
    sheet = np.asarray(quality.contact_sheet(images, zoom=3, gap=2, margin=50))
    assert sheet.shape == (860, 50 + 2 * 86, 3)
    top, left = 3 * 86 + 2 * 3, 50 + 1 * 86 + 5 * 3
    assert (sheet[top : top + 3, left : left + 3] == (10, 20, 30)).all()
    assert ((sheet == (10, 20, 30)).all(-1)).sum() == 9


# ----------------------------------------------------------------------------------------------------------------- data


def write_idx(path: Path, header: int, values: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(bytes(header) + values.tobytes(), compresslevel=1))


@pytest.mark.parametrize("split", ["val", "TEST", "", "t10k"])
def test_an_unknown_split_is_an_error(split: str) -> None:
    with pytest.raises(DataError, match='use "train" or "test"'):
        datasets.fashion_mnist(split)


def test_altered_images_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGKIT_DATA_DIR", str(tmp_path))
    folder = tmp_path / "fashion-mnist"
    write_idx(folder / "t10k-images-idx3-ubyte.gz", 16, np.zeros(10_000 * 784, np.uint8))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz is missing"):
        datasets.fashion_mnist("test")
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", 8, np.zeros(10_000, np.uint8))
    with pytest.raises(DataError, match="test images have SHA-256"):
        datasets.fashion_mnist("test")


@pytest.fixture(scope="module")
def real_test_set() -> tuple[Tensor, Tensor]:
    """The real test set where it is installed; tests do not download it."""
    if not datasets.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("Fashion-MNIST is not installed (Debian package dataset-fashion-mnist)")
    return datasets.fashion_mnist("test")


def test_the_real_test_set_is_as_published(real_test_set: tuple[Tensor, Tensor]) -> None:
    images, labels = real_test_set
    assert (images.shape, images.dtype) == ((10_000, 1, 28, 28), torch.uint8)
    assert labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert labels.bincount().tolist() == [1000] * 10


def test_one_altered_label_is_an_error(
    real_test_set: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = real_test_set
    altered = labels.numpy().astype(np.uint8)
    altered[123] = (altered[123] + 1) % 10
    write_idx(tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte.gz", 16, images.numpy())
    write_idx(tmp_path / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz", 8, altered)
    monkeypatch.setenv("DGKIT_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="test labels have SHA-256"):
        datasets.fashion_mnist("test")


# ----------------------------------------------------------------------------------------------------------- classifier


def test_the_shipped_classifier_recognises_real_images(real_test_set: tuple[Tensor, Tensor]) -> None:
    images, labels = real_test_set
    model = classifier.load_classifier()
    samples = datasets.as_samples(images[:1000])
    assert samples.shape == (1000, 28, 28, 3)
    right = model(samples).argmax(1).numpy() == labels[:1000].numpy()
    assert right.mean() >= 0.9
    assert classifier.accuracy(model, samples.numpy(), labels[:1000].numpy()) == pytest.approx(right.mean())


def test_the_shipped_classifier_is_small_and_its_logits_are_linear_in_its_features() -> None:
    folder = DATA / "models" / "fashion-classifier"
    assert (folder / "model.safetensors").stat().st_size <= 400_000
    model = classifier.load_classifier()
    images = np.random.default_rng(0).integers(0, 256, (501, 28, 28, 3), dtype=np.uint8)
    features = model.features(images)
    assert features.shape == (501, 64)
    expected = features.double() @ model.head.weight.double().T + model.head.bias.double()
    torch.testing.assert_close(model(images).double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.features(images[500:]), features[500:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 28, 28, 3),
        torch.zeros(28, 28, 3, dtype=torch.uint8),
        torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
    ],
)
def test_images_of_another_shape_or_type_are_an_error(images: Tensor) -> None:
    with pytest.raises(DgkitError, match=r"use torch.uint8 \(N, 28, 28, 3\)"):
        classifier.FashionClassifier()(images)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", {"head.weight": torch.zeros(10, 64)}])
def test_a_folder_without_the_classifiers_weights_is_an_error(content: Any, tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "model.safetensors").write_bytes(content)
    elif content is not None:
        save_file(content, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="FashionClassifier"):
        classifier.load_classifier(tmp_path)
