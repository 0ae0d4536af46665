"""The text-to-image family: tiles and captions, autoencoder, tokenizers, rectified flow, saved pipelines."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import training
from dgbook.measures import datasets
from dgkit import zoo
from dgkit.errors import DataError
from dgkit.sampling import generate
from training import autoencoder, flow, loop, text, tiles
from training.loop import Schedule
from training.tiles import Caption, Tiles

FAMILIES = sorted(flow.FAMILIES)
WORDS = ["red dragon monster", "blue dragon monster", "gold ring item", "stone wall dungeon"]


class Killed(Exception):
    """Stands for the process being killed."""


def random_tiles(count: int, seed: int = 0) -> Tensor:
    """Blocky random RGB tiles, uint8 (count, 3, 32, 32)."""
    blocks = torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture
def fake_tiles(monkeypatch: pytest.MonkeyPatch) -> Tiles:
    """40 random tiles under four captions in the place of the dungeon tiles; the last four are held out."""
    captions = [Caption(*((word,) for word in caption.split())) for caption in WORDS] * 10
    made = Tiles(random_tiles(40), captions, [f"Nov-2015/{i}.png" for i in range(40)], torch.arange(40) >= 36)
    monkeypatch.setattr(Tiles, "load", lambda: made)
    return made


def recipe_of(name: str) -> flow.Recipe:
    """The shipped recipe with smaller and shorter networks."""
    full = flow.Recipe.read(Path(training.__file__).parent / f"{name}.toml")
    clip = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    clips = [clip | {"hidden_size": 8}, clip | {"hidden_size": 16}]
    t5 = {"d_model": 28, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}  # wider than the two CLIPs together
    size = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 28}
    if name == "tiny-sd3":
        size |= {"caption_projection_dim": 16, "pooled_projection_dim": 24}
    else:
        size |= {"pooled_projection_dim": 16, "num_single_layers": 2, "axes_dims_rope": [4, 2, 2]}
    return dataclasses.replace(
        full,
        transformer=full.transformer | size,
        text_encoders=(*clips[-1 if name == "tiny-flux" else 0 :], t5),
        schedule=Schedule(steps=6, batch=8, lr=1e-3, warmup=2, ema=0.9),
        snapshots=(5,),
    )


def small_vae() -> AutoencoderKL:
    torch.manual_seed(3)
    shipped = autoencoder.Recipe.read(Path(training.__file__).parent / "tile-autoencoder.toml")
    vae = AutoencoderKL(**shipped.config | {"block_out_channels": [8, 8]}).eval()
    autoencoder.set_latent_statistics(vae, random_tiles(40))
    return vae


def trained_like(name: str) -> flow.TextToImage:
    """A small model all of whose parameters matter: nothing is at its initial zero."""
    torch.manual_seed(1)
    model = flow.FAMILIES[name](recipe_of(name), WORDS).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------------ tiles, captions


def test_captions_are_the_visible_words_of_the_path_the_more_special_first() -> None:
    paths = [
        "Nov-2015/item/armour/robe_lightred_3.png",
        "Nov-2015/dngn/wall/brick_gray11.png",
        "Ancient/Oct-5-2010/dc-dngn/wall/brick_gray2.png",
        "Ancient/Oct-5-2010/dc-mon/animals/old_dragon_n.png",
        "Nov-2015/mon/dragon.png",
    ]
    repeated = [path for path in paths for _ in range(3)]  # so that no word is rare
    found = [str(caption) for caption in tiles.captions([*repeated, "Nov-2015/mon/animal/xyzzy.png"])[::3]]
    assert found == [
        "light red robe armour item",
        "grey brick wall dungeon",
        "grey brick wall dungeon",
        "dragon animal monster",
        "dragon monster",
        "animal monster",
    ]


def test_transparent_pixels_show_the_background() -> None:
    image = torch.tensor([[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]], dtype=torch.uint8)
    pixels = tiles.composite(image[:, :, None, None])[..., 0, 0]
    # a fifth of the colour and four fifths of 128: 142.4, 122.4, 102.4
    assert pixels.tolist() == [[128, 128, 128], [200, 100, 0], [142, 122, 102]]


def test_near_duplicates_and_variants_stay_on_one_side_of_the_split() -> None:
    count = 400
    pixels = random_tiles(count)
    near = (pixels.short() + torch.randint(-9, 10, pixels.shape)).clamp(0, 255).byte()  # 5.5 RMS, clamping aside
    names = ["".join(chr(97 + int(digit)) for digit in f"{i:04d}") for i in range(count)]
    paths = [f"Nov-2015/mon/{name}.png" for name in names]
    redrawn = [f"Ancient/Oct-5-2010/dc-mon/x{name}.png" for name in names]  # another name, nearly the same pixels
    variant = [f"Ancient/Oct-5-2010/dc-mon/{name}_7.png" for name in names]  # another picture, the same name
    every = torch.cat([pixels, near, random_tiles(count, seed=1)]), [*paths, *redrawn, *variant]
    held_out = tiles.held_out(*every)
    original, near_held, variant_held = held_out.split(count)
    assert torch.equal(original, near_held)
    assert torch.equal(original, variant_held)
    assert 8 <= original.sum() <= 45  # 400 coins of 1/16
    order = torch.randperm(3 * count)
    assert torch.equal(tiles.held_out(every[0][order], [every[1][i] for i in order]), held_out[order])


def test_unseen_combinations_are_of_common_words_and_new() -> None:
    draw = np.random.default_rng(0)
    colours, objects, categories = (
        ["red", "blue", "green", "gold"],
        [f"thing{i}" for i in range(20)],
        ["item", "monster"],
    )
    captions = [Caption(*((str(draw.choice(words)),) for words in (colours, objects, categories))) for _ in range(120)]
    captions += [Caption((), ("thing0", "thing1"), ("monster",))] * 20
    chosen = tiles.unseen_combinations(captions, count=4, common=5)
    assert len(chosen) == len({caption.objects for caption in chosen}) == 4
    assert chosen == tiles.unseen_combinations(captions[::-1], count=4, common=5)
    assert chosen == tiles.unseen_combinations(captions, count=3, common=5) + chosen[3:]
    for caption in chosen:
        (colour,), (thing,), (category,) = caption
        for word in (colour, thing, category):
            assert sum(word in str(c).split() for c in captions) >= 5
        assert [c for c in captions if (c.objects, c.categories) == ((thing,), (category,))]
        assert not [c for c in captions if colour in c.colours and thing in c.objects]


# ----------------------------------------------------------------------------------------------------------------- data


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_tiles_of_an_archive_are_chosen_by_release_size_kind_and_opacity() -> None:
    def tile(level: int, opaque: int = 1024, side: int = 32) -> np.ndarray:
        pixels = np.full((side, side, 4), level, np.uint8)
        pixels[..., 3] = (np.arange(side * side) < opaque).reshape(side, side) * 200
        return pixels

    members = {
        "releases/Ancient/Oct-5-2010/a.png": tile(1),
        "releases/Nov-2015/mon/z.png": tile(2),
        "releases/Nov-2015/mon/b.png": tile(3)[..., :3],  # no alpha channel: opaque
        "releases/Ancient/Oct-5-2010/copy.png": tile(2),
        "releases/Nov-2015/mon/barely.png": tile(4, opaque=154),
        "releases/Nov-2015/mon/hardly.png": tile(5, opaque=153),
        "releases/Nov-2015/mon/large.png": tile(6, side=48),
        "releases/Nov-2015/gui/button.png": tile(7),
        "releases/Nov-2015/misc/numbers/7.png": tile(8),
        "releases/Nov-2015/UNUSED/old.png": tile(9),
        "releases/Jan-2020/new.png": tile(10),
        "mon/work.png": tile(11),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiles-a6ea165/releases/Nov-2015/LICENSE.txt", "CC0")
        for name, pixels in members.items():
            archive.writestr(f"tiles-a6ea165/{name}", png(pixels))
    images, paths = datasets.tiles_in_archive(buffer)
    assert paths == ["Nov-2015/mon/b.png", "Nov-2015/mon/barely.png", "Nov-2015/mon/z.png", "Ancient/Oct-5-2010/a.png"]
    assert images[:, 0, 0].tolist() == [[3, 3, 3, 255], [4, 4, 4, 200], [2, 2, 2, 200], [1, 1, 1, 200]]


def test_altered_tiles_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGKIT_DATA_DIR", str(tmp_path))
    np.savez(
        tmp_path / datasets.DUNGEON_TILES_FILE, images=np.zeros((4007, 32, 32, 4), np.uint8), paths=np.array(["a"])
    )
    with pytest.raises(DataError, match="dungeon tiles of .* have SHA-256"):
        datasets.dungeon_tiles()


@pytest.mark.parametrize("content", [b"", b"PK but no zip file", None])
def test_a_broken_file_of_tiles_is_an_error(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGKIT_DATA_DIR", str(tmp_path))
    file = tmp_path / datasets.DUNGEON_TILES_FILE
    if content is None:
        np.savez(file, pixels=np.zeros(3))
    else:
        file.write_bytes(content)
    with pytest.raises(
        DataError, match="dcss_tiles_32.npz is not (a whole npz file of arrays|a file of images and paths)"
    ):
        datasets.dungeon_tiles()


@pytest.mark.parametrize("answer", [urllib.error.URLError("no route"), b"not a zip file"])
def test_no_network_is_one_sentence(answer: Exception | bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str) -> io.BytesIO:
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("DGKIT_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets.urllib.request, "urlopen", urlopen)
    with pytest.raises(DataError, match=r"could not be read \(.*\): connect to the network, or set DGKIT_DATA_DIR"):
        datasets.dungeon_tiles()


@pytest.mark.parametrize("intact", [True, False])
def test_a_downloaded_archive_is_checked_and_kept(
    intact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    tile = np.full((32, 32, 4), 9, np.uint8)
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiles-a6ea165/releases/Nov-2015/mon/newt.png", png(tile))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("DGKIT_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets.urllib.request, "urlopen", lambda url: io.BytesIO(buffer.getvalue()))
    if not intact:
        with pytest.raises(DataError, match=r"a6ea165\.zip have SHA-256"):
            datasets.dungeon_tiles()
        assert not list(tmp_path.iterdir())
        return
    digest = hashlib.sha256(tile.tobytes() + b"Nov-2015/mon/newt.png").hexdigest()
    monkeypatch.setattr(datasets, "DUNGEON_TILES_SHA256", digest)
    images, paths = datasets.dungeon_tiles()
    assert images.tolist() == np.full((1, 4, 32, 32), 9).tolist()
    assert paths == ["Nov-2015/mon/newt.png"]
    monkeypatch.delattr(datasets.urllib.request, "urlopen")
    assert torch.equal(datasets.dungeon_tiles()[0], images)  # from the cache


@pytest.fixture(scope="module")
def real_tiles() -> Tiles:
    """The real tiles where they are at hand; tests do not download them."""
    folders = [Path.home() / ".cache" / "dgkit", Path(os.environ.get("DGKIT_DATA_DIR", "."))]
    if not any((folder / datasets.DUNGEON_TILES_FILE).is_file() for folder in folders):
        pytest.skip(f"{datasets.DUNGEON_TILES_FILE} is neither in ~/.cache/dgkit nor in $DGKIT_DATA_DIR")
    return Tiles.load()


def test_the_real_tiles_are_captioned_and_split(real_tiles: Tiles) -> None:
    assert real_tiles.pixels.shape == (4007, 3, 32, 32)
    captions = dict(zip(real_tiles.paths, map(str, real_tiles.captions), strict=True))
    assert captions["Nov-2015/mon/unique/tiamat_grey.png"] == "grey tiamat unique monster"
    assert captions["Ancient/Oct-5-2010/item/potion/cyan.png"] == "cyan potion item"
    assert all(captions.values())
    assert len(set(captions.values())) >= 1000
    assert max(len(caption.split()) for caption in captions.values()) <= text.LENGTH - 2
    assert 150 <= real_tiles.held_out.sum() <= 350
    flat = real_tiles.pixels.flatten(1).float()
    across = torch.cdist(flat[real_tiles.held_out], flat[~real_tiles.held_out]).min()
    assert across >= tiles.NEAR * flat.shape[1] ** 0.5
    kept = [c for c, out in zip(real_tiles.captions, real_tiles.held_out, strict=True) if not out]
    assert len(tiles.unseen_combinations(kept)) == 64


# ---------------------------------------------------------------------------------------------------------- autoencoder


def test_latents_are_shifted_and_scaled_to_mean_0_and_variance_1() -> None:
    vae, pixels = small_vae(), random_tiles(40)
    latents = autoencoder.encode(vae, pixels)
    assert latents.shape == (40, 8, 16, 16)
    assert latents.mean().item() == pytest.approx(0, abs=1e-5)
    assert latents.std().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("offset", [1, 10, 40])
def test_psnr_of_a_known_error(offset: int) -> None:
    class Offset:
        device = torch.device("cpu")

        def encode(self, images: Tensor) -> Any:
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=images))

        def decode(self, latents: Tensor) -> Any:
            return SimpleNamespace(sample=latents + offset / 127.5)

    vae: Any = Offset()
    pixels = torch.full((300, 3, 32, 32), 100, dtype=torch.uint8)
    expected = -20 * np.log10(offset / 255)
    np.testing.assert_allclose(autoencoder.psnr(vae, pixels), np.full(300, expected), atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------- text


def test_every_known_word_is_one_token_in_any_combination() -> None:
    known = sorted({word for caption in WORDS for word in caption.split()})
    for tokenizer, framing in ((text.clip_tokenizer(WORDS), 2), (text.t5_tokenizer(WORDS), 1)):
        ids = {word: tokenizer(word).input_ids[framing - 1] for word in known}
        assert len(set(ids.values())) == len(known)
        mixed = tokenizer(" ".join(reversed(known))).input_ids
        assert mixed[framing - 1 : -1] == [ids[word] for word in reversed(known)]
        unknown = tokenizer("zebra, 7").input_ids
        assert tokenizer.unk_token_id not in unknown[framing - 1 : -1]  # falls apart into known pieces
        assert not set(unknown) & set(ids.values())


def test_merges_depend_on_the_captions_alone() -> None:
    """A resumed training, or a measurement in another process, has to make the same tokens."""
    assert text.merges_of(["cd ab", "ab"], "/") == [("a", "b/"), ("c", "d/")]
    assert text.merges_of(["ba ab"], "/") == [("a", "b/"), ("b", "a/")]  # a tie: by the alphabet
    assert text.merges_of(["aaaa"], "/") == [("a", "a"), ("a", "a/"), ("aa", "aa/")]
    rng = np.random.default_rng(0)
    expected = text.merges_of(WORDS, "</w>")
    for _ in range(5):
        assert text.merges_of(rng.permutation(WORDS).tolist(), "</w>") == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_training_embeds_text_as_the_pipeline_does(name: str) -> None:
    model = trained_like(name)
    pipe = model.pipeline(small_vae())
    captions = ["blue dragon item", "", "an unknown thing", "red " * 40]
    tokens, pooled = model.train().embed(model.tokenize(captions))
    model.eval()
    prompts = {"prompt": captions, "prompt_2": None, "max_sequence_length": 16}
    if name == "tiny-sd3":
        expected = pipe.encode_prompt(**prompts, prompt_3=None, do_classifier_free_guidance=False)
        assert tokens.shape == (4, 32, 28)
    else:
        expected = pipe.encode_prompt(**prompts)
        assert tokens.shape == (4, 16, 28)
    torch.testing.assert_close(tokens, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(pooled, expected[2 if name == "tiny-sd3" else 1], rtol=0, atol=0)
    assert (pooled[0] - pooled[1]).abs().max() > 0.01


# ----------------------------------------------------------------------------------------------------------------- flow


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_transformer_predicts_exactly_zero_and_its_gates_are_shut(name: str) -> None:
    model = flow.FAMILIES[name](recipe_of(name), WORDS)
    norms = [m for m in model.transformer.modules() if type(m).__name__.startswith("AdaLayerNormZero")]
    gates: list[Tensor] = []
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: gates.append(output[1]))
    output = model(torch.randn(2, 8, 16, 16), torch.tensor([0.1, 0.9]), model.tokenize(WORDS[:2]))
    assert output.shape == (2, 8, 16, 16)
    assert not output.any()
    # SD3's last block has no gates on its text side; Flux's single blocks have one norm for both
    assert len(gates) == {"tiny-sd3": 2 + 1, "tiny-flux": 2 * 2 + 2}[name]
    assert not torch.stack(gates).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pipeline_calls_the_transformer_as_training_does(name: str) -> None:
    model = trained_like(name)
    pipe, seen = quiet(model.pipeline(small_vae())), []

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs["hidden_states"], output[0]))

    handle = model.transformer.register_forward_hook(watch, with_kwargs=True)
    noise = torch.randn(2, 8, 16, 16)
    packed = flow.FluxPipeline._pack_latents(noise, 2, 8, 16, 16) if name == "tiny-flux" else noise
    pipe(WORDS[:2], latents=packed, guidance_scale=1.0, output_type="latent", num_inference_steps=3, **model.call)
    handle.remove()
    tokens = model.tokenize(WORDS[:2])
    for sigma, (noisy, velocity) in zip(pipe.scheduler.sigmas[:-1], seen, strict=True):
        if name == "tiny-flux":
            noisy, velocity = (flow.FluxPipeline._unpack_latents(z, 32, 32, 2) for z in (noisy, velocity))
        torch.testing.assert_close(model(noisy, sigma.expand(2), tokens), velocity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_with_the_exact_velocity_returns_the_training_image(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign and scale of the target, of time and of the latents: from pixels to training target to pixels again."""
    model, vae, pixels = trained_like(name), small_vae(), random_tiles(2, seed=5)
    latents = autoencoder.encode(vae, pixels)
    levels: list[float] = []

    def exact(hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
        if name == "tiny-flux":
            sigma, noisy = timestep, flow.FluxPipeline._unpack_latents(hidden_states, 32, 32, 2)
        else:
            sigma, noisy = timestep / 1000, hidden_states
        levels.append(sigma[0].item())
        level = sigma.view(-1, 1, 1, 1)
        noise = (noisy - (1 - level) * latents) / level
        mixed, velocity = flow.noised(latents, noise, sigma)
        torch.testing.assert_close(mixed, noisy, rtol=0, atol=1e-4)
        return (flow.FluxPipeline._pack_latents(velocity, 2, 8, 16, 16) if name == "tiny-flux" else velocity,)

    monkeypatch.setattr(model.transformer, "forward", exact)
    pipe = quiet(model.pipeline(vae))
    images = pipe(WORDS[:2], guidance_scale=1.0, output_type="pt", num_inference_steps=3, **model.call).images
    assert levels[0] == pytest.approx(1)
    assert levels == sorted(levels, reverse=True)
    with torch.no_grad():
        reconstruction = vae.decode(vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean).sample
    torch.testing.assert_close(images, (reconstruction / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_drops_captions_and_starts_at_the_variance_of_the_velocity(
    name: str, fake_tiles: Tiles, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(
        recipe_of(name), schedule=Schedule(steps=1, batch=2000, lr=1e-3), caption_dropout=0.3, snapshots=()
    )
    torch.manual_seed(0)
    model = flow.FAMILIES[name](recipe, WORDS)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    flow.train_model(recipe, model, small_vae(), fake_tiles, tmp_path)
    (_, sigma, tokens), *_ = seen
    empty = (tokens == model.tokenize([""])).all((1, 2)).float().mean()
    assert 0.26 < empty < 0.34
    logit = sigma.logit()
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((0, 1), abs=0.08)  # logit-normal
    with (tmp_path / "loss.csv").open() as file:
        first = float(next(csv.DictReader(file))["loss"])
    assert first == pytest.approx(2.0, abs=0.1)  # predicting 0 for noise - latents, both of variance 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_killed_training_goes_on_with_the_same_losses_and_weights(
    name: str, fake_tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "train", functools.partial(loop.train, save_every=2))
    recipe, vae = recipe_of(name), small_vae()

    def run(folder: Path, kill_at: int | None = None) -> tuple[list[list[str]], dict[str, Tensor], dict[str, Tensor]]:
        torch.manual_seed(0)
        model, calls = flow.FAMILIES[name](recipe, WORDS), iter(range(100))

        def die(*args: Any) -> None:
            if next(calls) == kill_at:
                raise Killed

        model.register_forward_pre_hook(die)
        flow.train_model(recipe, model, vae, fake_tiles, folder)
        with (folder / "loss.csv").open() as file:
            return [row[:2] for row in csv.reader(file)], model.state_dict(), load_file(folder / "step-5.safetensors")

    losses, weights, snapshot = run(tmp_path / "whole")
    assert [row[0] for row in losses] == ["step", *"123456"]
    for kill_at in (3, 2):  # in the fourth step, then in the fifth
        with pytest.raises(Killed):
            run(tmp_path / "killed", kill_at)
    losses_again, weights_again, snapshot_again = run(tmp_path / "killed")
    assert losses_again == losses
    torch.testing.assert_close(weights_again, weights, rtol=0, atol=0)
    torch.testing.assert_close(snapshot_again, snapshot, rtol=0, atol=0)
    assert any(key.startswith("text_encoders.0.") for key in snapshot)


# --------------------------------------------------------------------------------------------------------- whole recipe

PLAIN = """
import hashlib, json, sys
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
call = json.loads(sys.argv[2])
images = pipe(["blue ring monster"], generator=torch.Generator().manual_seed(7), output_type="np", **call).images
assert not [module for module in sys.modules if module.split(".")[0] == "dgkit"]
print(images.shape, hashlib.sha256(images.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_recipe_makes_a_pipeline_that_plain_diffusers_loads(
    name: str, fake_tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae_recipe = autoencoder.Recipe.read(Path(training.__file__).parent / "tile-autoencoder.toml")
    vae_recipe = dataclasses.replace(
        vae_recipe,
        config=vae_recipe.config | {"block_out_channels": [8, 8]},
        schedule=Schedule(steps=2, batch=4, lr=1e-3),
    )
    recipe = recipe_of(name)
    monkeypatch.setattr(autoencoder.Recipe, "read", lambda path: vae_recipe)
    monkeypatch.setattr(flow.Recipe, "read", lambda path: recipe)

    def die(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(flow, "save_pipeline", die)
        training.train(name, tmp_path / name)
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "train_autoencoder", die)  # finished before
        training.train(name, tmp_path / name)

    folder = tmp_path / name / "model"
    trained = json.loads((folder / "training.json").read_text())
    assert trained["data"] == datasets.DUNGEON_TILES
    assert {network: facts["steps"] for network, facts in trained["networks"].items()} == {
        "autoencoder": 2,
        "transformer": 6,
    }
    weights = [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in weights} == {torch.bfloat16}

    # no folder of this machine
    assert not [file for file in folder.rglob("*.json") if str(tmp_path) in file.read_text()]

    pipe = quiet(DiffusionPipeline.from_pretrained(folder))
    assert {component.dtype for component in pipe.components.values() if isinstance(component, nn.Module)} == {
        torch.float32
    }
    assert pipe.tokenizer.model_max_length == 16
    pixels = fake_tiles.pixels[:36]  # what is stored makes latents of variance 1
    assert autoencoder.encode(pipe.vae, pixels).std().item() == pytest.approx(1, abs=1e-3)

    guided = {"guidance_scale": 4.0} if name == "tiny-sd3" else {"true_cfg_scale": 4.0, "negative_prompt": [""]}
    call = flow.FAMILIES[name].call | {"num_inference_steps": 3} | guided
    images = pipe(["blue ring monster"], generator=torch.Generator().manual_seed(7), output_type="np", **call).images
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), json.dumps(call)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert plain.stdout.split("\n")[-2] == f"{images.shape} {hashlib.sha256(images.tobytes()).hexdigest()}"
    assert images.shape == (1, 32, 32, 3)


def test_generate_adds_what_the_models_calls_need(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = quiet(trained_like("tiny-flux").pipeline(small_vae()))
    once = functools.partial(generate, pipe, ["red"], [0], num_inference_steps=1)
    needed = flow.Flux.call
    preset = zoo.Preset(None, None, None, None, 4.0, 20, "test")
    row = zoo.Model(None, "FluxPipeline", "FluxTransformer2DModel", 4, 16, "none", 1.0, preset, call=needed)
    assert zoo.row_of(pipe) is None
    by_hand = once(**needed)
    monkeypatch.setitem(zoo.MODELS, "small", row)
    assert zoo.row_of(pipe) is row and zoo.row_of(pipe.transformer) is row
    assert np.array_equal(once(), by_hand)
    assert once(height=16).shape == (1, 16, 32, 3)  # what the caller says wins
