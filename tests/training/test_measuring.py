"""Measuring the shipped models and writing their cards: what all share, the text-to-image models, the matcher."""

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageFont
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from torch import Tensor, nn

import training
from dgbook.measures import datasets
from dgbook.measures.matcher import TileMatcher
from dgbook.measures.spectrum import sharpness
from dgbook.pages.trainings import FOLDER, SHIPPED, TRAININGS, measurements
from dgkit import zoo
from dgkit.errors import DgkitError, LoadError
from dgkit.paths import DATA
from dgkit.sampling import generate
from tests.training.test_flow import WORDS, random_tiles, recipe_of, small_vae, trained_like
from training import cards, flow, ladder, measuring, text_quality, tiles, trainings
from training.__main__ import MEASURES, main
from training.tiles import Caption, Tiles

FAMILIES = sorted(flow.FAMILIES)


def tiles_of(count: int, held_out: int) -> Tiles:
    """Random tiles under four captions in turn, the last `held_out` of them held out."""
    captions = [Caption(*((word,) for word in WORDS[i % 4].split())) for i in range(count)]
    paths = [f"Nov-2015/{i}.png" for i in range(count)]
    return Tiles(random_tiles(count), captions, paths, torch.arange(count) >= count - held_out)


class ExactAutoencoder(nn.Module):
    """Latents are the pixels; decoding brightens them by `offset` grey levels."""

    device = torch.device("cpu")

    def __init__(self, offset: int = 0) -> None:
        super().__init__()
        self.offset = offset

    def encode(self, pixels: Tensor) -> Any:
        return type("Encoded", (), {"latent_dist": type("Posterior", (), {"mean": pixels})})

    def decode(self, latents: Tensor) -> Any:
        return type("Decoded", (), {"sample": latents + self.offset / 127.5})


class Oracle(TileMatcher):
    """A matcher that reads which caption an image shows from its first pixel, as `sign` writes it there."""

    def __init__(self, captions: list[str]) -> None:
        super().__init__(sorted({word for caption in captions for word in caption.split()}))
        self.captions = captions

    def sign(self, caption: str) -> int:
        return 10 * self.captions.index(caption)

    def similarity(self, images: Any, captions: Any) -> Tensor:
        found = [self.captions[int(image[0, 0, 0]) // 10] for image in np.asarray(images)]
        return torch.tensor([[float(shown == caption) for caption in captions] for shown in found])


# ----------------------------------------------------------------------------------------------------- losses and runs


def write_log(path: Path, losses: np.ndarray) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss", "seconds"), *((i + 1, x, i / 2) for i, x in enumerate(losses))])


@pytest.mark.parametrize(("steps", "points"), [(1, 8), (5, 8), (1000, 8), (5000, 150)])
def test_mean_losses_are_of_spans_that_grow_and_cover_every_step(steps: int, points: int, tmp_path: Path) -> None:
    losses = np.random.default_rng(0).random(steps)
    write_log(tmp_path / "loss.csv", losses)
    rows = measuring.mean_losses(tmp_path / "loss.csv", points)
    assert len(rows) <= points and rows[-1]["step"] == steps
    start, lengths = 0, []
    for row in rows:
        end = int(row["step"])
        assert row["loss"] == pytest.approx(losses[start:end].mean())
        assert row["seconds"] == (end - 1) / 2
        lengths.append(end - start)
        start = end
    assert sum(lengths) == steps and min(lengths) >= 1
    if steps > 900:
        ratio = steps ** (1 / (points - 1))
        ends = np.array([row["step"] for row in rows])[-3:]
        assert ends[1:] / ends[:-1] == pytest.approx(ratio, rel=0.02)


def test_the_written_losses_are_small_and_read_back(tmp_path: Path) -> None:
    write_log(tmp_path / "log.csv", np.linspace(2, 0.1, 5000))
    rows = measuring.mean_losses(tmp_path / "log.csv", 150)
    measuring.write_losses(rows, tmp_path / "loss.csv")
    with (tmp_path / "loss.csv").open() as file:
        read = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert [row["step"] for row in read] == [row["step"] for row in rows]
    assert [row["loss"] for row in read] == pytest.approx([row["loss"] for row in rows], abs=1e-5)
    assert (tmp_path / "loss.csv").stat().st_size < 10_000


@pytest.mark.parametrize("name", MEASURES)
def test_an_unfinished_training_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no finished training"):
        MEASURES[name](tmp_path / name)


def test_every_training_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(training.MODELS) - set(MEASURES) == {"tile-autoencoder"}  # measured with the models that it serves
    assert main(["measure", "sd3"]) == 2
    assert capsys.readouterr().err.startswith("training: name='sd3' is not allowed: use one of tiny-dit, ")


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (3, 64), (64, 64)])
def test_shares_have_wilsons_interval(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    found = text_quality.share([True] * hits + [False] * (n - hits))
    assert found == pytest.approx({"share": hits / n, "low": expected.low, "high": expected.high, "n": n})


def test_colours_are_judged_against_the_same_caption_in_every_other_known_colour() -> None:
    objects = ["dragon", "monster"]
    oracle = Oracle([" ".join([colour, *objects]) for colour in ("red", "blue", "green")] + ["dragon monster"])

    def image(caption: str) -> np.ndarray:
        return np.full((32, 32, 3), oracle.sign(caption), np.uint8)

    asked = [("red",), ("blue",), (), ("light", "blue"), ("pink",), ("green",)]
    shown = ["red", "green", "red", "blue", "red", "green"]
    captions = [Caption(colours, ("dragon",), ("monster",)) for colours in asked]
    images = np.stack([image(" ".join([colour, *objects])) for colour in shown])
    # neither without a colour, nor with two words of colour, nor in one that the matcher does not know
    assert text_quality.colour_score(oracle, images, captions).tolist() == [True, False, True]
    assert text_quality.colours_of(oracle) == ["blue", "green", "red"]


def test_the_nearest_tile_against_a_loop() -> None:
    images, known = random_tiles(5, seed=1), random_tiles(9, seed=2)
    images[3] = known[7]
    images[4] = known[2].clamp(max=250) + 5
    distance, index = text_quality.nearest_tiles(images, known)
    for i, image in enumerate(images.numpy().astype(float)):
        errors = [np.sqrt(((image - tile) ** 2).mean()) for tile in known.numpy().astype(float)]
        assert index[i] == np.argmin(errors)
        assert distance[i] == pytest.approx(min(errors), abs=1e-4)
    assert index[3:].tolist() == [7, 2] and distance[3] < 1e-3


@pytest.mark.parametrize("offset", [0, 12])
def test_copies_of_training_tiles_are_found_as_the_autoencoder_decodes_them(offset: int) -> None:
    made = tiles_of(40, held_out=8)
    pixels = made.pixels.clamp(20, 200)
    pixels[39] = pixels[1] + 3  # a held-out near-duplicate
    made = dataclasses.replace(made, pixels=pixels)
    copied = measuring.as_images(pixels[[4, 5, 6]] + offset)
    samples = np.concatenate([copied, measuring.as_images(random_tiles(5, seed=9))])
    captions = [WORDS[0], WORDS[1], WORDS[3], *[WORDS[0]] * 5]  # the third sample copies a tile of another caption
    facts, sheet = text_quality.search_for_copies(ExactAutoencoder(offset), made, samples, captions)  # type: ignore[arg-type]
    assert (facts["samples"]["near"]["share"], facts["samples"]["near"]["n"]) == (3 / 8, 8)
    assert (facts["held_out"]["near"]["share"], facts["held_out"]["near"]["n"]) == (1 / 8, 8)
    assert facts["samples"]["histogram"][0] == 3 and sum(facts["samples"]["histogram"]) == 8
    known = pixels[:32].float() + offset

    def distances(images: Tensor) -> list[float]:
        return [min((image - tile).square().mean().sqrt().item() for tile in known) for image in images.float()]

    fresh = distances(pixels[32:] + offset)
    assert facts["held_out"]["median"]["value"] == pytest.approx(np.median(fresh), abs=1e-3)
    nearest = [int(np.argmin([(s - t).square().mean() for t in known])) for s in torch.tensor(samples).movedim(-1, 1)]
    agreeing = [WORDS[n % 4] == caption for n, caption in zip(nearest, captions, strict=True)]
    assert agreeing[:3] == [True, True, False]
    assert facts["nearest_has_the_caption"]["share"] == np.mean(agreeing)
    first = np.asarray(sheet)[3 : 3 + 65 * 3, 3 : 3 + 96]  # an exact copy above itself
    assert facts["shown"] == 8 and (first[:96] == first[99:]).all() and first[:96].std() > 1


# ------------------------------------------------------------------------------------------------------------- sheets


def test_lines_of_a_caption_fit_and_keep_its_words() -> None:
    font = ImageFont.load_default(10)
    caption = "magenta air artefact amulet item of an incomprehensiblylongwordindeed kind"
    lines = measuring.wrapped(caption, 96, font)
    assert " ".join(lines) == caption
    assert all(font.getlength(line) <= 96 for line in lines if " " in line)
    for line, following in zip(lines, lines[1:], strict=False):  # no line could have taken one word more
        assert font.getlength(f"{line} {following.split()[0]}") > 96


def test_the_captioned_sheet_repeats_pixels_and_writes_under_each_tile() -> None:
    images = np.full((5, 32, 32, 3), 128, np.uint8)
    images[3, 2, 5] = (10, 20, 30)
    captions = ["red", "blue dragon", "a long caption that needs two lines or three", "gold ring item", "last"]
    sheet = np.asarray(measuring.captioned_sheet(images, captions, columns=2, zoom=3, gap=6))
    height = sheet.shape[0] // 3
    assert sheet.shape[1] == 2 * 102 and sheet.shape[0] % 3 == 0
    assert ((sheet == (10, 20, 30)).all(-1)).sum() == 9  # nothing else in the colour, nothing drawn over it
    top, left = height + 3 + 2 * 3, 102 + 3 + 5 * 3
    assert (sheet[top : top + 3, left : left + 3] == (10, 20, 30)).all()
    assert ((sheet == 128).all(-1)).sum() == 5 * 96 * 96 - 9
    dark = (sheet < 60).all(-1)
    for index in range(6):
        row, column = divmod(index, 2)
        label = dark[row * height + 99 : (row + 1) * height, column * 102 : (column + 1) * 102]
        assert label.any() == (index < 5)


# ------------------------------------------------------------------------------------------- massive, over training


@pytest.mark.parametrize("name", FAMILIES)
def test_massive_ratios_of_planted_snapshots(name: str, tmp_path: Path) -> None:
    # gates shut and no input: the output of every block for the image tokens is the embedding of nothing
    torch.manual_seed(0)
    made, recipe, vae = tiles_of(40, held_out=8), recipe_of(name), small_vae()
    network = flow.FAMILIES[name](recipe, WORDS)
    embedding = "transformer.pos_embed.proj" if name == "tiny-sd3" else "transformer.x_embedder"
    weights = {key: parameter.detach().clone() for key, parameter in network.named_parameters()}
    weights[f"{embedding}.weight"].zero_()
    biases = {9: torch.linspace(-1, 2, 16), 100: torch.linspace(-1, 2, 16)}
    biases[100][4] = -30.0
    for step, bias in biases.items():
        save_file(
            {key: tensor.clone() for key, tensor in (weights | {f"{embedding}.bias": bias}).items()},
            tmp_path / f"step-{step}.safetensors",
        )
    places = torch.zeros(1, 16)
    if name == "tiny-sd3":  # which adds positions: the 8 x 8 that are cut from the middle of its table
        places = network.transformer.pos_embed.pos_embed.reshape(8, 8, 16).flatten(0, 1)
    rows = text_quality.massive_over_training(recipe, made, vae, tmp_path)
    assert [row["step"] for row in rows] == [9, 100]
    for row in rows:
        magnitude = (biases[row["step"]] + places).abs().mean(0).numpy()
        assert row["dim"] == [magnitude.argmax()] * len(row["dim"])
        assert row["ratio"] == pytest.approx([magnitude.max() / np.median(magnitude)] * len(row["dim"]), abs=0.006)
        energy = (biases[row["step"]] + places).square().sum(0).numpy()
        assert row["energy"] == pytest.approx([energy[magnitude.argmax()] / energy.sum()] * len(row["dim"]), abs=6e-4)
    assert rows[1]["dim"][0] == 4

    with pytest.raises(LoadError, match="no step-N"):
        text_quality.massive_over_training(recipe, made, vae, tmp_path / "elsewhere")
    del weights[next(key for key in weights if key.startswith("text_encoders.1."))]
    save_file({key: tensor.clone() for key, tensor in weights.items()}, tmp_path / "step-200.safetensors")
    with pytest.raises(LoadError, match="step-200"):
        text_quality.massive_over_training(recipe, made, vae, tmp_path)


def test_snapshots_are_seen_at_ten_noise_levels_under_their_own_captions_and_encoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, recipe, vae = tiles_of(40, held_out=6), recipe_of("tiny-flux"), small_vae()
    network = trained_like("tiny-flux")
    save_file({key: p.detach().clone() for key, p in network.named_parameters()}, tmp_path / "step-5.safetensors")
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    embedded: list[Tensor] = []
    forward, embed = flow.Flux.forward, flow.Flux.embed

    def watch(self: Any, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        calls.append((noisy, sigma, tokens))
        embedded.append(embed(self, tokens)[0])
        return forward(self, noisy, sigma, tokens)

    monkeypatch.setattr(flow.Flux, "forward", watch)
    text_quality.massive_over_training(recipe, made, vae, tmp_path)
    assert [sigma.unique().tolist() for _, sigma, _ in calls] == [
        pytest.approx([level]) for level in np.arange(0.05, 1, 0.1)
    ]
    captions = [WORDS[i % 4] for i in range(34, 40)]
    own = network.tokenize(captions)
    assert all(torch.equal(tokens, own) for _, _, tokens in calls)
    torch.testing.assert_close(embedded[0], network.embed(own)[0])  # by the snapshot's encoders, not by fresh ones
    latents = flow.encode(vae, made.pixels[34:])
    noise = [(noisy - (1 - sigma[0]) * latents) / sigma[0] for noisy, sigma, _ in calls]
    assert all(0.9 < n.std() < 1.1 for n in noise[1:]) and not torch.allclose(noise[1], noise[2], atol=0.1)


# ---------------------------------------------------------------------------------------------------------- whole runs


class StubJudge:
    """Keeps the images that it is shown; agrees with the first of them."""

    sharpness_of_real = 0.01

    def __init__(self, seen: list[np.ndarray]) -> None:
        self.seen = seen

    def agreement(self, images: np.ndarray) -> np.ndarray:
        self.seen.append(images)
        return np.arange(len(images)) == 0

    def features(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1)[:, :2].astype(float)

    def frechet(self, features: np.ndarray) -> float:
        return float(features[0, 0])


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a small random model of the family `request.param`, in a world with few tiles and short schedules."""
    name = request.param
    made, model, recipe = tiles_of(60, held_out=12), trained_like(name), recipe_of(name)
    monkeypatch.setattr(Tiles, "load", lambda: made)
    monkeypatch.setattr(flow.Recipe, "read", lambda path: recipe)
    for constant, value in (
        ("CHOICES", 3), ("PROMPTS", 6), ("COPIES", 5), ("CALIBRATION_SAMPLES", 3), ("NOISED", 4),
        ("OTHER_SCALES", (1.0, 2.0)), ("CALIBRATION_GRID", (0.5, 0.0)), ("NEIGHBOURS", 4),
    ):  # fmt: skip
        monkeypatch.setattr(text_quality, constant, value)
    unseen = [Caption(("gold",), ("dragon",), ("monster",)), Caption(("red",), ("ring",), ("item",))]
    unseen += [Caption(("blue",), ("wall",), ("dungeon",))]
    monkeypatch.setattr(text_quality, "unseen_combinations", lambda known: unseen)
    preset = dataclasses.replace(zoo.MODELS[name].preset, guidance_scale=3.0, steps=2)
    monkeypatch.setitem(zoo.MODELS, name, dataclasses.replace(zoo.MODELS[name], preset=preset))
    torch.manual_seed(4)
    words = sorted({word for caption in WORDS for word in caption.split()})
    monkeypatch.setattr(text_quality, "load_matcher", lambda: TileMatcher(words).eval().requires_grad_(False))

    folder = tmp_path / name
    (folder / "transformer").mkdir(parents=True)
    for step in (1, 5):
        snapshot = {key: p.detach().clone() for key, p in model.named_parameters()}
        save_file(snapshot, folder / "transformer" / f"step-{step}.safetensors")
    write_log(folder / "transformer" / "loss.csv", np.linspace(2, 1, 5))
    flow.save_pipeline(model, small_vae(), folder / "model")
    network = {"parameters": 5, "steps": 5, "batch": 8, "seconds": 60, "mean_loss_of_last_100_steps": 1.5}
    network |= {"device": "CPU", "threads": 1, "torch": torch.__version__}
    training = {"model": name, "data": datasets.DUNGEON_TILES, "networks": {"transformer": network}}
    (folder / "model" / "training.json").write_text(json.dumps(training))
    return folder


@pytest.mark.parametrize("run", FAMILIES, indirect=True)
def test_a_text_to_image_run_is_measured_and_described(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(measuring, "judge_of", lambda pipe, conditions: StubJudge(seen))
    measured = text_quality.measure(run)
    model = run / "model"
    assert measured == json.loads((model / "quality.json").read_text())
    assert (measured["training_tiles"], measured["held_out_tiles"]) == (48, 12)
    assert [row["step"] for row in measured["massive"]] == [1, 5]
    assert measured["massive"][0]["ratio"] == measured["massive"][1]["ratio"]  # of equal snapshots

    scores = measured["matching"]
    assert [(row["guidance_scale"], row["n"]) for row in scores["held_out_captions"]] == [(1, 6), (3, 6)]
    for key in ("unseen_combinations", "unseen_colours"):
        assert [(row["guidance_scale"], row["n"]) for row in scores[key]] == [(1, 3), (2, 3), (3, 3)]
    assert (scores["held_out"]["n"], scores["held_out_colours"]["n"]) == (12, 9)  # "stone" is no colour
    assert (scores["training"]["n"], scores["training_colours"]["n"]) == (48, 36)

    rows = measured["guidance"]
    assert [(row["guidance_scale"], row["w"]) for row in rows] == [(1, 0.5), (1, 0), (3, 0.5), (3, 0)]
    for row, images in zip(rows, seen, strict=True):
        assert row["agreement"] == pytest.approx(1 / 3, abs=1e-3)
        assert row["frechet"] == images[0, 0, 0, 0]
        assert row["sharpness_of_real"] == pytest.approx(sharpness(images).mean() / 0.01, abs=1e-3)
    assert (seen[0] != seen[1]).any() and (seen[2] != seen[3]).any() and (seen[1] != seen[3]).any()
    chosen = np.random.default_rng(0).choice(48, 5, replace=False)[:3]
    plain = generate(
        DiffusionPipeline.from_pretrained(model), [WORDS[row % 4] for row in chosen], range(900_000_000, 900_000_003),
        num_inference_steps=2, guidance_scale=3.0, **flow.FAMILIES[run.name].call,
    )  # fmt: skip
    assert np.array_equal(seen[3], plain)
    assert measured["guidance_block"] in ((0, 1) if run.name == "tiny-sd3" else (1, 2, 3))  # a quarter in or later

    card = (model / "README.md").read_text()
    assert f"{measured['psnr_db']:.2f} dB | 30 dB | **not met**" in card
    assert "does it memorise" in card.lower() and "CC0" in card and "MIT" in card
    with (model / "loss.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == pytest.approx(np.linspace(2, 1, 5))

    # the sheet shows what the card's own code makes of that caption and seed
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace(f"data/models/{run.name}", str(model)).replace("red dragon monster", "red ring item")
    code = code.replace("manual_seed(0)", "manual_seed(1)")
    scope: dict[str, Any] = {}
    exec(code, scope)
    expected = np.asarray(scope["image"]).astype(int)
    sheet = np.asarray(Image.open(model / "samples.webp"))[3 : 3 + 96, 105 : 105 + 96].astype(int)
    assert np.abs(sheet[::3, ::3] - expected).max() <= 1  # batched or alone
    assert expected.std() > 1


def test_a_model_without_a_judge_cannot_be_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "judge_of", lambda pipe, conditions: None)
    with pytest.raises(DgkitError, match="no judge"):
        measuring.calibrate_guidance(object(), ["a"], (0.0,), guidance_scale=4.0, steps=2)


def test_the_matcher_is_measured_on_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiles_of(40, held_out=12)
    colours = ["red dragon monster", "blue dragon monster", "red ring item", "blue ring item"]
    made = dataclasses.replace(
        made, captions=[Caption(*((word,) for word in colours[i % 4].split())) for i in range(len(made.paths))]
    )
    oracle = Oracle(colours)
    for pixels, caption in zip(made.pixels, made.captions, strict=True):
        pixels[:, 0, 0] = oracle.sign(str(caption))
    made.pixels[0, :, 0, 0] = oracle.sign("blue dragon monster")  # right but for the colour
    made.pixels[28, :, 0, 0] = oracle.sign("red ring item")  # held out, the wrong kind
    made.pixels[29, :, 0, 0] = oracle.sign("red ring item")
    monkeypatch.setattr(Tiles, "load", lambda: made)
    monkeypatch.setattr(text_quality, "load_matcher", lambda folder: oracle)
    monkeypatch.setattr(text_quality, "CHOICES", 4)
    model = tmp_path / "model"
    model.mkdir()
    (model / "training.json").write_text(
        json.dumps({"model": "tile-matcher", "data": datasets.DUNGEON_TILES, "networks": {}})
    )
    measured = text_quality.measure_matcher(tmp_path)
    assert measured == json.loads((model / "quality.json").read_text())
    assert measured["training"]["share"] == pytest.approx(27 / 28)
    assert measured["training_colours"]["share"] == pytest.approx(27 / 28)
    assert measured["held_out"]["share"] == pytest.approx(10 / 12)
    card = (model / "README.md").read_text()
    low, high = binomtest(10, 12).proportion_ci(method="wilson")
    assert f"| held out | {10 / 12:.1%} [{low:.1%}, {high:.1%}] |" in card
    assert "| chance | 25.0% | 50.0% |" in card


# --------------------------------------------------------------------------------------------------------------- cards


def of(share: float, low: float, high: float) -> dict[str, float]:
    return {"share": share, "low": low, "high": high, "n": 200}


def median(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


@pytest.mark.parametrize(
    ("near", "fresh", "medians", "says", "says_not"),
    [
        (of(0.3, 0.2, 0.4), of(0, 0, 0.02), (8, 30), ["**It memorises.** 30.0%", "nearer"], ["No copies"]),
        (of(0.03, 0.01, 0.05), of(0.01, 0, 0.03), (30, 30.5), ["3.0%", "as far"], ["It memorises", "No copies"]),
        (of(0, 0, 0.019), of(0, 0, 0.02), (40, 30), ["No copies", "at most 1.9%", "farther"], ["It memorises"]),
        (of(0, 0, 0.019), of(0.1, 0.05, 0.2), (20, 30), ["No copies", "typically nearer"], ["It memorises"]),
    ],
)
def test_memorisation_is_said_plainly(near: Any, fresh: Any, medians: Any, says: Any, says_not: Any) -> None:
    copies = {
        "threshold": tiles.NEAR,
        "samples": {"near": near, "median": median(medians[0])},
        "held_out": {"near": fresh, "median": median(medians[1])},
    }
    text = cards.memorisation_in_words(copies, 4.0)
    assert all(words in text for words in says) and not any(words in text for words in says_not)


def test_the_histogram_is_in_shares_and_leaves_out_empty_spans() -> None:
    facts = [{"near": {"n": n}, "histogram": counts} for n, counts in ((4, [1, 0, 3, 0]), (2, [0, 0, 1, 1]))]
    copies = {"edges": [0, 5, 10, 15, 256], "samples": facts[0], "held_out": facts[1]}
    assert cards.memorisation_rows(copies)[1:] == [
        ("0 to 5", "25.0%", "0.0%"),
        ("10 to 15", "75.0%", "50.0%"),
        ("15 and more", "0.0%", "50.0%"),
    ]


def facts(real: Any, guided: Any, unguided: Any, unseen: Any, sharp: tuple[float, float]) -> dict[str, Any]:
    return {
        "guidance_scale": 4.0,
        "matching": {
            "held_out": real,
            "held_out_colours": real,
            "held_out_captions": [{"guidance_scale": 1.0} | unguided, {"guidance_scale": 4.0} | guided],
            "unseen_colours": [{"guidance_scale": 4.0} | unseen],
        },
        "guidance": [
            {"guidance_scale": s, "w": 0.0, "sharpness_of_real": x} for s, x in zip((1.0, 4.0), sharp, strict=True)
        ],
    }


def test_the_limits_name_the_failures_that_the_numbers_show() -> None:
    good, bad = of(0.8, 0.7, 0.9), of(0.4, 0.3, 0.5)
    text = cards.limits(facts(real=good, guided=bad, unguided=of(0.1, 0.05, 0.2), unseen=bad, sharp=(0.5, 1.3)))
    assert "less often than real tiles do (40% against 80%" in text
    assert "Without classifier-free guidance the text counts for less: 10% instead of 40%" in text
    assert "New colours of known objects often fail: 40%" in text
    assert "softer than real tiles without guidance: 0.50" in text
    assert "sharper than real tiles at guidance scale 4: 1.30" in text
    text = cards.limits(facts(real=bad, guided=good, unguided=good, unseen=bad, sharp=(1.0, 1.0)))
    assert "more often than real tiles" in text
    fine = cards.limits(facts(real=good, guided=good, unguided=good, unseen=good, sharp=(1.0, 0.95)))
    assert not re.search("less|more often|often fail|softer|sharper", fine)
    assert fine.count("\n") == 4  # what holds for any such model


def test_w_is_the_positive_one_of_the_lowest_distance() -> None:
    rows = [
        {"guidance_scale": s, "w": w, "frechet": x}
        for s, w, x in (
            (1.0, 0.0, 0.5),
            (1.0, 0.1, 0.7),
            (1.0, 0.2, 1.3),
            (4.0, 0.0, 1.0),
            (4.0, 0.1, 0.9),
            (4.0, 0.2, 0.8),
        )
    ]
    assert cards.best_w(rows, 1.0) == 0.1 and cards.best_w(rows, 4.0) == 0.2
    words = cards.w_in_words(rows, 4.0)
    assert (
        "w = 0.1 without classifier-free guidance, where w = 0 has a lower one; w = 0.2 at guidance scale 4." in words
    )


# ------------------------------------------------------------------------------------------------ trainings of tiny-sd3


def test_the_other_trainings_differ_in_what_their_names_say() -> None:
    folder = Path(flow.__file__).parent
    shipped, first, long, wide, fast = (flow.Recipe.read(folder / f"{name}.toml") for name in TRAININGS)
    assert dataclasses.replace(fast, text_rate=shipped.text_rate) == shipped
    assert shipped.schedule.lr * shipped.text_rate == pytest.approx(first.schedule.lr, rel=1e-3)
    assert shipped.schedule.steps * shipped.schedule.batch == first.schedule.steps * first.schedule.batch
    assert dataclasses.replace(long, schedule=first.schedule, snapshots=first.snapshots) == first
    width = {"num_attention_heads": 3, "caption_projection_dim": 96}
    assert dataclasses.replace(wide, schedule=first.schedule, transformer=wide.transformer | width) == first
    for other in (long, wide):
        same = {"steps": first.schedule.steps, "decay_steps": 0}
        assert dataclasses.replace(other.schedule, **same) == first.schedule
        for step in range(min(other.schedule.steps, first.schedule.steps)):
            assert other.schedule.lr_at(step) == first.schedule.lr_at(step)
    assert set(first.snapshots) < set(long.snapshots) and long.snapshots[-1] == long.schedule.steps
    assert wide.schedule.steps in first.snapshots


@pytest.mark.parametrize("run", ["tiny-sd3"], indirect=True)
def test_a_training_is_measured(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "FOLDER", tmp_path / "ladder")
    monkeypatch.setattr(trainings, "unseen_combinations", text_quality.unseen_combinations)
    monkeypatch.setattr(trainings, "load_matcher", text_quality.load_matcher)
    monkeypatch.setattr(ladder, "RESAMPLES", 50)
    with pytest.raises(DgkitError, match="a training's folder is called tiny-sd3 or tiny-sd3-first or"):
        trainings.measure_training(run.rename(tmp_path / "another"))
    run = (tmp_path / "another").rename(tmp_path / "tiny-sd3-long")
    measured = trainings.measure_training(run)
    file = tmp_path / "ladder" / "tiny-sd3-long.json"
    assert json.loads(json.dumps(measured)) == json.loads(file.read_text()) and file.with_suffix(".webp").is_file()
    assert (measured["width"], measured["training"]["steps"]) == (16, 5)
    assert (measured["matching"]["n"], measured["copies"]["n"]) == (3, 5)
    first, last = measured["history"]
    assert (first["step"], last["step"]) == (1, 5) and first | {"step": 5} == last  # of equal snapshots
    assert np.all(np.diff([first[key] for key in ("low", "ratio", "high")], axis=0) >= 0)
    network = flow.build_model(flow.Recipe.read(run), Tiles.load()).eval()
    network.load_state_dict(load_file(run / "transformer" / "step-5.safetensors"), strict=False)
    vae = DiffusionPipeline.from_pretrained(run / "model").vae
    for key, rows in (("loss", range(48, 52)), ("training_loss", np.random.default_rng(0).permutation(48)[:4])):
        assert first[key] == pytest.approx(naive_loss(network, vae, Tiles.load(), [*rows]), rel=1e-3)


def naive_loss(network: flow.TextToImage, vae: Any, made: Tiles, rows: list[int]) -> float:
    """The mean squared error of the velocity for these tiles, tile by tile, in float64 but for the networks."""
    noise = torch.randn(10, len(rows), 8, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for i, sigma in enumerate(np.arange(0.05, 1, 0.1)):
        for j, row in enumerate(rows):
            with torch.no_grad():
                mean = vae.encode(made.pixels[row : row + 1].float() / 127.5 - 1).latent_dist.mean
                latents = ((mean - vae.config.shift_factor) * vae.config.scaling_factor).double()
                noisy = (1 - sigma) * latents + sigma * noise[i, j]
                tokens = network.tokenize([str(made.captions[row])])
                velocity = network(noisy.float(), torch.tensor([float(sigma)]), tokens)
            errors.append(float((velocity - (noise[i, j] - latents)).square().mean()))
    return float(np.mean(errors))


@pytest.mark.parametrize("held_out", [True, False])
def test_the_loss_on_tiles_is_that_of_a_naive_loop(held_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_quality, "NOISED", 12)
    made, network, vae = tiles_of(240, held_out=120), trained_like("tiny-sd3"), small_vae()
    rows = [*range(120, 132)] if held_out else np.random.default_rng(0).permutation(120)[:12].tolist()
    loss = text_quality.loss_on_tiles(network, vae, made, held_out=held_out)
    assert loss == pytest.approx(naive_loss(network, vae, made, rows), rel=1e-4)


def test_what_is_kept_of_the_trainings_is_of_their_recipes() -> None:
    assert tuple(measurements()) == TRAININGS
    for name, measured in measurements().items():
        recipe = flow.Recipe.read(Path(flow.__file__).parent / f"{name}.toml")
        measured["recipe"]["schedule"].setdefault("beta2", 0.999)  # AdamW's own, where the recipe had no other
        measured["recipe"].setdefault("text_rate", 1.0)
        assert measured["recipe"] == json.loads(json.dumps(dataclasses.asdict(recipe)))
        assert measured["training"]["steps"] == recipe.schedule.steps
        steps = [step for step in recipe.snapshots if step <= recipe.schedule.steps]
        assert [row["step"] for row in measured["history"]] == steps
        kept = [FOLDER / f"{name}{end}" for end in (".json", ".webp") if name != SHIPPED or end == ".json"]
        assert all(file.stat().st_size < 200_000 for file in kept)
    assert [measured["width"] for measured in measurements().values()] == [96, 96, 96, 128, 96]


def test_the_first_tiny_sd3_is_the_first_half_of_the_longer_training() -> None:
    found = measurements()
    assert found["tiny-sd3-first"]["history"] == [
        row for row in found["tiny-sd3-long"]["history"] if row["step"] <= 5000
    ]


def test_the_card_of_the_shipped_tiny_sd3_agrees_with_its_row() -> None:
    card = json.loads((DATA / "models" / "tiny-sd3" / "quality.json").read_text())["massive"]
    assert [(row["step"], row["dim"]) for row in card] == [
        (row["step"], row["dim"]) for row in measurements()[SHIPPED]["history"]
    ]
