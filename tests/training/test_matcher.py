"""The tile matcher: its loss, augmentation and score against naive computations; its recipe; the shipped weights."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn

import training
from dgbook.measures import datasets
from dgbook.measures.judges import tile_captions
from dgbook.measures.matcher import FEATURES, TileMatcher, load_matcher, matching_score
from dgkit.errors import DgkitError, LoadError
from dgkit.paths import DATA
from training import matcher, reference
from training.loop import Schedule
from training.matcher import Recipe
from training.tiles import BACKGROUND, Caption, Tiles

VOCABULARY = ["blue", "dragon", "monster", "red", "ring"]
RECIPE = Recipe(shift=2, noise=0.0, word_dropout=0.0, schedule=Schedule(steps=6, batch=8, lr=1e-2, warmup=2))


def random_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def model() -> TileMatcher:
    torch.manual_seed(0)
    return TileMatcher(VOCABULARY).requires_grad_(False).eval()


class Planted:
    """A matcher whose similarities are given by a function of the image's first value and the caption."""

    def __init__(self, similarity: Any) -> None:
        self.planted = similarity

    def similarity(self, images: np.ndarray, captions: list[str]) -> Tensor:
        return torch.tensor([[float(self.planted(int(image[0, 0, 0]), c)) for c in captions] for image in images])


# ------------------------------------------------------------------------------------------------------ network, loss


def test_captions_are_sets_of_known_words(model: TileMatcher) -> None:
    bags = model.bags(["red dragon monster", "Monster RED dragon dragon", "red unheard-of ring"])
    assert bags.tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 1, 1]]
    with pytest.raises(DgkitError, match="caption 'green cat' is not allowed: the tile matcher knows none of its"):
        model.bags(["red ring", "green cat"])


def test_similarity_is_the_cosine_of_the_two_vectors(model: TileMatcher) -> None:
    images, captions = random_images(3), ["red dragon", "blue ring monster"]
    pictures = model.features(images).double() @ model.head.weight.double().T
    texts = [model.words[[3, 1]].double().mean(0), model.words[[0, 4, 2]].double().mean(0)]
    expected = [[float(p @ t / p.norm() / t.norm()) for t in texts] for p in pictures]
    torch.testing.assert_close(
        model.similarity(images, captions).double(), torch.tensor(expected).double(), rtol=0, atol=1e-5
    )


def test_features_have_bounded_memory_and_the_same_values(model: TileMatcher) -> None:
    images = random_images(501)
    features = model.features(images)
    assert features.shape == (501, FEATURES)
    torch.testing.assert_close(model.features(images[500:]), features[500:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(2, 32, 32, 3),
        torch.zeros(32, 32, 3, dtype=torch.uint8),
        torch.zeros(2, 28, 28, 3, dtype=torch.uint8),
    ],
)
def test_images_of_another_shape_or_type_are_an_error(images: Tensor, model: TileMatcher) -> None:
    with pytest.raises(DgkitError, match=r"use torch.uint8 \(N, 32, 32, 3\)"):
        model.similarity(images, ["red"])


def test_a_text_is_true_of_every_image_whose_caption_has_all_its_words(model: TileMatcher) -> None:
    captions = ["red dragon monster", "blue dragon monster", "dragon monster", "red ring", "red dragon monster"]
    texts = ["dragon monster", "blue dragon monster", "monster", "red", "red dragon monster"]
    expected = [[set(t.split()) <= set(c.split()) for t in texts] for c in captions]
    assert matcher.describes(model.bags(texts), model.bags(captions)).tolist() == expected


def test_the_loss_counts_other_true_pairs_neither_way() -> None:
    """Against the definition, pair by pair: row and column softmax over own pair and false pairs."""
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    true = torch.eye(5, dtype=torch.bool)
    true[0, 3] = true[3, 0] = true[4, 1] = True  # one of them one way only

    def direction(table: np.ndarray, fits: np.ndarray) -> float:
        terms = []
        for i in range(5):
            others = [table[i, j] for j in range(5) if j == i or not fits[i, j]]
            terms.append(np.log(np.exp(others).sum()) - table[i, i])
        return float(np.mean(terms))

    expected = (direction(logits.numpy(), true.numpy()) + direction(logits.numpy().T, true.numpy().T)) / 2
    assert float(matcher.contrastive_loss(logits, true)) == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------- augmentation


def test_augmented_tiles_are_shifts_and_mirrors_over_the_background() -> None:
    pixels = torch.from_numpy(random_images(200)).movedim(-1, 1)
    inputs = matcher.augment(pixels, RECIPE, torch.Generator().manual_seed(0))
    seen = set()
    for tile, result in zip(pixels.numpy(), ((inputs + 1) * 127.5).round().byte().numpy(), strict=True):
        canvas = np.full((3, 36, 36), BACKGROUND, np.uint8)
        canvas[:, 2:34, 2:34] = tile
        ways = {
            (y, x, step): canvas[:, y : y + 32, x : x + 32][:, :, ::step]
            for y in range(5) for x in range(5) for step in (1, -1)
        }  # fmt: skip
        matching = [way for way, image in ways.items() if np.array_equal(image, result)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) > 45  # of 50


def test_augmentation_adds_the_noise_stated() -> None:
    pixels = torch.full((50, 3, 32, 32), BACKGROUND, dtype=torch.uint8)
    noisy = dataclasses.replace(RECIPE, noise=12.0)
    added = matcher.augment(pixels, noisy, torch.Generator().manual_seed(0)) - (BACKGROUND / 127.5 - 1)
    assert float(added.std() * 127.5) == pytest.approx(12.0, rel=0.02) and abs(float(added.mean())) < 1e-3


def test_dropped_words_leave_no_caption_empty() -> None:
    bags = (torch.rand(400, 6, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    bags[:, 0] = 1
    kept = matcher.drop_words(bags, 0.3, torch.Generator().manual_seed(0))
    assert bool((kept <= bags).all()) and bool((kept.sum(1) > 0).all())
    long = bags.sum(1) >= 4  # which practically never lose all words
    assert 1 - float(kept[long].sum() / bags[long].sum()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(matcher.drop_words(bags, 0.0, torch.Generator()), bags)
    assert torch.equal(matcher.drop_words(bags, 1.0, torch.Generator()), bags)


# -------------------------------------------------------------------------------------------------------------- score

CAPTIONS = [f"caption {i}" for i in range(40)]


def numbered(count: int) -> np.ndarray:
    """Images whose first value is their index."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 32, 32, 3))


def test_the_score_of_one_who_knows_and_of_one_who_has_it_backwards() -> None:
    knows: Any = Planted(lambda i, caption: caption == f"caption {i}")
    assert matching_score(knows, numbered(40), CAPTIONS).all()
    backwards: Any = Planted(lambda i, caption: caption != f"caption {i}")
    assert not matching_score(backwards, numbered(40), CAPTIONS).any()
    indifferent: Any = Planted(lambda i, caption: 0.5)
    assert not matching_score(indifferent, numbered(40), CAPTIONS).any()


@pytest.mark.parametrize("choices", [2, 16])
def test_the_score_by_chance(choices: int) -> None:
    guesses = np.random.default_rng(0).random((100, 500))
    guesser: Any = Planted(lambda i, caption: guesses[i, int(caption.split()[1])])
    many = [f"caption {i % 100}" for i in range(100)]
    hits = np.mean([matching_score(guesser, numbered(100), many, choices, seed) for seed in range(20)])
    assert hits == pytest.approx(1 / choices, abs=4 * (1 / choices / 2000) ** 0.5 + 0.02)


def test_the_other_captions_are_distinct_others_of_the_pool() -> None:
    """With as many choices as captions all others are drawn: right where none in the whole pool is nearer."""
    values = np.random.default_rng(1).random((12, 12))
    judge: Any = Planted(lambda i, caption: values[i, int(caption.split()[1])])
    captions = CAPTIONS[:12]
    right = matching_score(judge, numbered(12), captions, choices=12)
    assert right.tolist() == [int(values[i].argmax()) == i for i in range(12)]
    again = matching_score(judge, numbered(12), captions, choices=12, pool=captions * 2)  # each drawn once all the same
    assert again.tolist() == right.tolist()
    with pytest.raises(DgkitError, match="choices=3 is not allowed: 2 to 2"):
        matching_score(judge, numbered(1), CAPTIONS[:1], 3, pool=["caption 3", "caption 3", "caption 4"])


def test_the_draw_depends_on_position_caption_and_seed_alone() -> None:
    guesses = np.random.default_rng(0).random((40, 40))
    judge: Any = Planted(lambda i, caption: guesses[i, int(caption.split()[1])])
    pool, images = CAPTIONS, numbered(40)
    all_of_them = matching_score(judge, images, CAPTIONS, 3, pool=pool)
    assert np.array_equal(matching_score(judge, images[:25], CAPTIONS[:25], 3, pool=pool), all_of_them[:25])
    assert np.array_equal(matching_score(judge, images, CAPTIONS, 3, pool=pool[::-1]), all_of_them)
    assert not np.array_equal(matching_score(judge, images, CAPTIONS, 3, seed=1, pool=pool), all_of_them)


@pytest.mark.parametrize(
    ("captions", "choices", "message"),
    [
        (CAPTIONS[:3], 2, "3 captions are given: one for each of 4 images"),
        (CAPTIONS[:4], 1, "choices=1 is not allowed: 2 to 4"),
        (CAPTIONS[:4], 5, "choices=5 is not allowed: 2 to 4"),
        (["a", "a", "b", "b"], 3, "choices=3 is not allowed: 2 to 2"),
    ],
)
def test_bad_arguments_of_the_score(captions: list[str], choices: int, message: str) -> None:
    judge: Any = Planted(lambda i, caption: 0)
    with pytest.raises(DgkitError, match=message):
        matching_score(judge, numbered(4), captions, choices)


# ----------------------------------------------------------------------------------------------------- recipe, folder


@pytest.fixture
def fake_tiles(monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """Two kinds of tiles, red and blue, of which the last two are held out and have a word of their own."""
    pixels = torch.from_numpy(random_images(24)).movedim(-1, 1) // 4
    pixels[::2, 0] += 150
    pixels[1::2, 2] += 150
    captions = [Caption((("red", "blue")[i % 2],), ("ring",), ()) for i in range(22)]
    captions += [Caption(("blue",), ("dragon",), ())] * 2
    made = Tiles(pixels, captions, [f"Nov-2015/{i}.png" for i in range(24)], torch.arange(24) >= 22)
    monkeypatch.setattr(Tiles, "load", lambda: made)
    monkeypatch.setattr(Recipe, "read", lambda path: RECIPE)
    return made


def test_a_killed_training_resumes_to_the_same_weights(
    fake_tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = matcher.train_matcher(RECIPE, fake_tiles, tmp_path / "whole")
    assert list(whole.vocabulary) == ["blue", "red", "ring"]  # not the held-out tiles'
    recipe = dataclasses.replace(RECIPE, schedule=dataclasses.replace(RECIPE.schedule, steps=4, decay_steps=6))
    matcher.train_matcher(recipe, fake_tiles, tmp_path / "killed")  # leaves a checkpoint of step 4
    resumed = matcher.train_matcher(RECIPE, fake_tiles, tmp_path / "killed")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_whole_recipe_learns_and_is_read_back(
    fake_tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = dataclasses.replace(RECIPE, schedule=dataclasses.replace(RECIPE.schedule, steps=30, batch=16))
    monkeypatch.setattr(Recipe, "read", lambda path: longer)
    training.train("tile-matcher", tmp_path)
    folder = tmp_path / "model"
    assert json.loads((folder / "training.json").read_text())["networks"]["matcher"]["steps"] == 30
    assert (folder / "tile-matcher.toml").read_bytes() == (
        Path(training.__file__).parent / "tile-matcher.toml"
    ).read_bytes()
    judge = load_matcher(folder)
    images = fake_tiles.pixels[:22].movedim(1, -1).numpy()
    captions = [str(caption) for caption in fake_tiles.captions[:22]]
    assert matching_score(judge, images, captions, choices=2).mean() > 0.9
    assert matching_score(judge, images, captions[::-1], choices=2).mean() < 0.1


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        (None, None),
        (None, {"vocabulary": "red ring"}),
        ({"head.weight": torch.zeros(2, 2)}, None),
        ({"head.weight": torch.zeros(2, 2)}, {"vocabulary": "red ring"}),
        (b"not safetensors at all", {"vocabulary": "red ring"}),
        ({}, {"words": "red ring"}),
        ({}, b"no JSON"),
    ],
)
def test_a_folder_without_the_matchers_weights_is_an_error(weights: Any, config: Any, tmp_path: Path) -> None:
    for name, content in (("model.safetensors", weights), ("config.json", config)):
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content is not None and name == "config.json":
            (tmp_path / name).write_text(json.dumps(content))
        elif content is not None:
            save_file(content, tmp_path / name)
    with pytest.raises(LoadError, match="TileMatcher"):
        load_matcher(tmp_path)


# -------------------------------------------------------------------------------------------------- what is shipped


def test_the_shipped_matcher_is_small_and_of_the_shipped_recipe() -> None:
    folder, recipe = DATA / "models" / "tile-matcher", Path(training.__file__).parent / "tile-matcher.toml"
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 100_000
    assert (folder / recipe.name).read_bytes() == recipe.read_bytes()
    trained = json.loads((folder / "training.json").read_text())["networks"]["matcher"]
    schedule = Recipe.read(recipe).schedule
    assert (trained["steps"], trained["batch"]) == (schedule.steps, schedule.batch)
    assert trained["parameters"] == sum(p.numel() for p in load_matcher().parameters())


@pytest.fixture(scope="module")
def real_tiles() -> Tiles:
    """The real tiles where they are; tests do not download them."""
    folders = [Path.home() / ".cache" / "dgkit", *map(Path, filter(None, [os.environ.get("DGKIT_DATA_DIR")]))]
    if not any((folder / datasets.DUNGEON_TILES_FILE).is_file() for folder in folders):
        pytest.skip("the dungeon tiles are not installed")
    return Tiles.load()


def test_the_shipped_matcher_tells_captions_of_tiles_it_has_not_seen(real_tiles: Tiles) -> None:
    judge, held_out = load_matcher(), real_tiles.held_out
    images = real_tiles.pixels[held_out].movedim(1, -1)
    captions = [str(real_tiles.captions[i]) for i in held_out.nonzero()[:, 0].tolist()]
    assert matching_score(judge, images, captions, pool=tile_captions()).mean() > 0.55
    # other captions are not found, but by chance (1 / 16)
    others = captions[len(captions) // 2 :] + captions[: len(captions) // 2]
    assert matching_score(judge, images, others, pool=tile_captions()).mean() < 0.2
    # colours count: without them, fewer captions that name one are found
    coloured = [i for i, caption in enumerate(real_tiles.captions) if caption.colours and not held_out[i]][::10]
    tiles = real_tiles.pixels[coloured].movedim(1, -1)
    words = [str(real_tiles.captions[i]) for i in coloured]
    grey = tiles.float().mean(-1, keepdim=True).round().byte().expand(-1, -1, -1, 3)
    in_colour, in_grey = (matching_score(judge, t, words, pool=tile_captions()).mean() for t in (tiles, grey))
    assert in_grey < in_colour - 0.1


def test_the_shipped_statistics_are_those_of_the_real_tiles(real_tiles: Tiles) -> None:
    shipped = load_file(DATA / "reference" / "dungeon-tiles.safetensors")
    again = reference.dungeon_tiles_reference(real_tiles)
    assert shipped.keys() == again.keys() == {"mean", "covariance", "sample", "sharpness"}
    for name, array in shipped.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-2, atol=1e-3, err_msg=name)
    assert (DATA / "prompts" / "dungeon-tiles.txt").read_text().splitlines() == reference.tile_prompts(real_tiles)


# --------------------------------------------------------------------------------------------- statistics and prompts


def test_statistics_by_hand() -> None:
    images = torch.from_numpy(random_images(7))

    class Mean(nn.Module):
        def features(self, images: Tensor) -> Tensor:
            return images.float().mean((1, 2))

    found = reference.statistics(Mean(), images, images[:3])
    means = images.numpy().astype(float).mean((1, 2))
    np.testing.assert_allclose(found["mean"], means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["covariance"], (means - means.mean(0)).T @ (means - means.mean(0)) / 6, rtol=1e-4)
    np.testing.assert_allclose(found["sample"], means[:3], rtol=1e-3)
    luma = images.numpy() @ np.array([0.299, 0.587, 0.114]) / 255
    padded = np.pad(luma, [(0, 0), (1, 1), (1, 1)], mode="edge")
    laplacian = (
        padded[:, 2:, 1:-1] + padded[:, :-2, 1:-1] + padded[:, 1:-1, 2:] + padded[:, 1:-1, :-2] - 4 * luma
    )  # fmt: skip
    assert float(found["sharpness"]) == pytest.approx(laplacian.var(axis=(1, 2)).mean(), rel=1e-3)


def test_prompts_are_distinct_captions_of_training_tiles_with_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [
        Caption(("red",), ("ring",), ("item",)),
        Caption(("red",), ("ring",), ("item",)),
        Caption((), ("sword",), ()),
        Caption(("blue",), (), ("item",)),
        Caption((), ("sword",), ("item",)),
        Caption(("gold",), ("ring",), ()),
    ]
    tiles = Tiles(torch.zeros(6, 3, 32, 32), captions, [""] * 6, torch.tensor([False] * 5 + [True]))
    assert sorted(reference.tile_prompts(tiles)) == ["red ring item", "sword item"]
    # by sha256sum, "red ring item" has 2e30... and "sword item" 4e3f...
    assert reference.tile_prompts(tiles)[0] == "red ring item"
    monkeypatch.setattr(reference, "PROMPTS", 1)
    assert reference.tile_prompts(tiles) == ["red ring item"]


def test_training_is_not_told_of_the_held_out_tiles(fake_tiles: Tiles, tmp_path: Path) -> None:
    changed = dataclasses.replace(fake_tiles, pixels=fake_tiles.pixels.clone())
    changed.pixels[changed.held_out] = 0
    a = matcher.train_matcher(RECIPE, fake_tiles, tmp_path / "a")
    b = matcher.train_matcher(RECIPE, changed, tmp_path / "b")
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
