"""Per-image scores with random weights of the real classes, against plain calls of the libraries and NumPy."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dgbook.downloads import Published, fetch
from dgbook.measures import base, detail
from dgbook.measures.base import Scorer
from dgbook.measures.spectrum import luminance
from dgbook.paper_scale.scores import clip, scorer
from dgbook.paper_scale.scores.blip import squared
from dgbook.paper_scale.scores.weights import WEIGHTS
from dgkit.errors import DataError, DgkitError
from tests.hub_layout import folder_of, isolate, pickled, put

PROMPTS = ["a red fox in the snow", "two cats", "an old map of the world on a wooden table, a lamp, a compass"]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def pictures(height: int, width: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pin(patch: pytest.MonkeyPatch, name: str, content: bytes) -> Published:
    """The row of `WEIGHTS`, with the hash of the test's own weights."""
    patch.setitem(WEIGHTS, name, replace(WEIGHTS[name], sha256=sha256(content)))
    return WEIGHTS[name]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A machine on which all weights lie, each of the real class, small, random."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        isolate(patch, home)
        clip._tower.cache_clear()
        _clip(patch, home)
        _blip(home)
        _hps(patch, home)
        head = torch.nn.Sequential(
            torch.nn.Linear(768, 1024), torch.nn.Dropout(), torch.nn.Linear(1024, 128), torch.nn.Dropout(),
            torch.nn.Linear(128, 64), torch.nn.Dropout(), torch.nn.Linear(64, 16), torch.nn.Linear(16, 1),
        )  # fmt: skip
        content = pickled({f"layers.{name}": value for name, value in head.state_dict().items()})
        item = pin(patch, "laion-aesthetics", content)
        (home / ".cache" / "dgkit").mkdir(parents=True, exist_ok=True)
        (home / ".cache" / "dgkit" / item.files[0]).write_bytes(content)
        yield home
    clip._tower.cache_clear()


def _letters(end: str) -> list[str]:
    return [letter + mark for letter in "abcdefghijklmnopqrstuvwxyz,." for mark in ("", end)]


def _clip(patch: pytest.MonkeyPatch, home: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = folder_of(WEIGHTS["clip-vit-large-patch14"], home)
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *_letters("</w>")])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = small | {"image_size": 224, "patch_size": 32}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=768))
    for projection in (model.visual_projection, model.text_projection):  # for cosines that are not all near 0
        torch.nn.init.normal_(projection.weight)
    model.save_pretrained(folder)
    pin(patch, "clip-vit-large-patch14", (folder / "model.safetensors").read_bytes())


def _blip(home: Path) -> None:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

    folder = folder_of(WEIGHTS["blip-itm-large-coco"], home)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_letters(""), *("##" + x for x in _letters(""))]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    text = {"vocab_size": len(vocabulary), "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 96, "patch_size": 16}  # fmt: skip
    model = BlipForImageTextRetrieval(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16))
    for layer in model.modules():  # so that the image matters
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.xavier_normal_(layer.weight)
    model.save_pretrained(folder)


def _hps(patch: pytest.MonkeyPatch, home: Path) -> None:
    import open_clip

    config = {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (home / "hps-of-the-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(home / "hps-of-the-test.json")
    patch.setattr(clip, "HPS_ARCHITECTURE", "hps-of-the-test")
    network = open_clip.create_model("hps-of-the-test", load_weights=False)
    state = {name: value.half() for name, value in network.state_dict().items()}  # published in half precision
    content = pickled({"epoch": 1, "state_dict": state})
    put(pin(patch, "hpsv2.1", content), {WEIGHTS["hpsv2.1"].files[0]: content}, home)


# Against the libraries ------------------------------------------------------------------------------------------------


def by_hand(image: np.ndarray, size: tuple[int, int], crop: int | None = None) -> torch.Tensor:
    """PIL's bicubic to (height, width), a centre crop, normalised: (1, 3, H, W)."""
    resized = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC))
    if crop:
        top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
        resized = resized[top : top + crop, left : left + crop]
    return torch.from_numpy((resized / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()


def clip_by_hand(home: Path, images: np.ndarray, size: tuple[int, int]) -> tuple[Any, torch.Tensor]:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder_of(WEIGHTS["clip-vit-large-patch14"], home)).eval()
    return model, torch.cat([by_hand(image, size, crop=224) for image in images])


@pytest.mark.parametrize(("height", "width", "resized"), [(256, 256, (224, 224)), (300, 500, (224, 373))])
def test_clipscore(home: Path, height: int, width: int, resized: tuple[int, int]) -> None:
    from transformers import CLIPTokenizer

    images = pictures(height, width)
    model, pixels = clip_by_hand(home, images, resized)
    tokenizer = CLIPTokenizer.from_pretrained(folder_of(WEIGHTS["clip-vit-large-patch14"], home))
    prompts = [*PROMPTS[:2], PROMPTS[2] * 3]  # the last is longer than CLIP can read
    expected = []
    for i, prompt in enumerate(prompts):  # one at a time: no padding
        ids = tokenizer(prompt).input_ids
        ids = ids if len(ids) <= 77 else [*ids[:76], ids[-1]]
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), pixel_values=pixels[i : i + 1])
        expected.append(100 * max(0.0, (output.logits_per_image / model.logit_scale.exp()).item()))
    scores = clip.CLIPScore()(images, prompts)
    assert scores.dtype == np.float64 and max(expected) > 1
    assert scores == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_clipscore_is_never_negative(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = clip.CLIPScore()
    image = metric.tower.image(pictures(224, 224))
    monkeypatch.setattr(metric.tower, "text", lambda prompts: torch.stack([image[0], -image[1], image[2] * 7]))
    assert metric(pictures(224, 224), PROMPTS) == pytest.approx([100, 0, 100])


def test_aesthetic(home: Path) -> None:
    images = pictures(256, 256)
    model, pixels = clip_by_hand(home, images, (224, 224))
    with torch.no_grad():
        embedding = model.get_image_features(pixel_values=pixels).pooler_output.double().numpy()
    value = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    state = torch.load(home / ".cache/dgkit/sac+logos+ava1-l14-linearMSE.pth", weights_only=True)
    for layer in (0, 2, 4, 6, 7):
        value = value @ state[f"layers.{layer}.weight"].double().numpy().T + state[f"layers.{layer}.bias"].numpy()
    assert clip.Aesthetic()(images, PROMPTS) == pytest.approx(value[:, 0], rel=1e-6, abs=1e-7)


def test_blipscore(home: Path) -> None:
    from transformers import BertTokenizer, BlipForImageTextRetrieval

    folder = folder_of(WEIGHTS["blip-itm-large-coco"], home)
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    images, expected = pictures(128, 160), []
    for image, prompt in zip(images, PROMPTS, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(prompt).input_ids])
            no, yes = model(input_ids=ids, pixel_values=by_hand(image, (96, 96))).itm_score[0].tolist()
        expected.append(100 / (1 + np.exp(no - yes)))
    metric = scorer("blipscore")
    assert metric(images, PROMPTS) == pytest.approx(expected, rel=1e-6)
    assert np.ptp(metric(images, PROMPTS[:1] * 3)) > 0.1 and metric.id.weights.endswith("(first-use)")


def test_blip_is_read_from_a_pickle_where_there_is_nothing_better(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    item = WEIGHTS["blip-itm-large-coco"]
    folder, expected = folder_of(item, home), scorer("blipscore")(pictures(64, 64), PROMPTS)
    old = replace(item, revision="d" * 40)
    monkeypatch.setitem(WEIGHTS, "blip-itm-large-coco", old)
    state = load_file(folder / "model.safetensors") | {"text_encoder.embeddings.position_ids": torch.arange(512)[None]}
    put(old, {name: (folder / name).read_bytes() for name in item.companions}, home)
    put(old, {"pytorch_model.bin": pickled(state)}, home)
    np.testing.assert_array_equal(scorer("blipscore")(pictures(64, 64), PROMPTS), expected)


def hps_by_hand(images: np.ndarray) -> torch.Tensor:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    height, width = pixels.shape[2:]
    new = [round(side * 224 / max(height, width)) for side in (height, width)]
    if new != [height, width]:
        pixels = torch.nn.functional.interpolate(pixels, new, mode="bicubic", antialias=True)
    canvas = torch.zeros(len(images), 3, 224, 224)
    top, left = (224 - new[0]) // 2, (224 - new[1]) // 2
    canvas[:, :, top : top + new[0], left : left + new[1]] = pixels
    return ((canvas - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).float()


@pytest.mark.parametrize("size", [(256, 256), (300, 500), (224, 224), (130, 224)])
def test_hps(home: Path, size: tuple[int, int]) -> None:
    import open_clip

    network = open_clip.create_model("hps-of-the-test", load_weights=False, output_dict=True)
    item = WEIGHTS["hpsv2.1"]
    network.load_state_dict(torch.load(fetch(item).path, weights_only=True)["state_dict"])
    images = pictures(*size)
    text = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    with torch.no_grad():
        output = network.eval()(hps_by_hand(images), text)
    expected = 100 * (output["image_features"] * output["text_features"]).sum(dim=1).numpy()
    assert clip.HPSv2()(images, PROMPTS) == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_clips_input_is_that_of_transformers() -> None:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    for size in ((256, 256), (300, 500), (512, 224), (64, 64)):
        images = pictures(*size)
        expected = CLIPImageProcessorPil()(list(images), return_tensors="pt").pixel_values
        assert torch.allclose(clip.cropped(images), expected, atol=1e-6)
        expected = BlipImageProcessorPil()(list(images), return_tensors="pt").pixel_values
        assert torch.allclose(squared(images, 384), expected, atol=1e-6)


# What all scorers promise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clipscore", "blipscore", "hpsv2.1", "aesthetic", "sharpness"])
def test_scores_do_not_depend_on_the_company(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, images = scorer(name), pictures(64, 64)
    together = metric(images, PROMPTS)
    monkeypatch.setattr("dgbook.measures.base._BATCH", 1)
    assert metric(images, PROMPTS) == pytest.approx(together, rel=1e-5, abs=1e-5)
    assert metric(images[::-1], PROMPTS[::-1]) == pytest.approx(together[::-1], rel=1e-5, abs=1e-5)


def test_ids(home: Path) -> None:
    names = ["clipscore", "blipscore", "hpsv2.1", "aesthetic"]
    ids = [scorer(name).id for name in names]
    assert [identity.name for identity in ids] == names and len(set(map(str, ids))) == 4
    head, tower = WEIGHTS["laion-aesthetics"].sha256, WEIGHTS["clip-vit-large-patch14"].sha256
    assert head and tower and head[:12] in ids[3].weights and tower[:12] in ids[3].weights
    assert str(ids[0]).endswith("|pil-bicubic-shortest-224-centre-crop-clip-norm|antialias|float32|100*max(cos,0)")
    assert scorer("aesthetic").tower is scorer("clipscore").tower  # loaded once


class Constant(Scorer):
    id = detail.sharpness_score().id

    def __init__(self, value: float) -> None:
        self.value = value

    def _score(self, images: Any, prompts: list[str]) -> Any:
        assert not torch.backends.cudnn.allow_tf32  # which is allowed by default
        return np.full(len(images), self.value)


def test_float32_is_not_tensor_float32() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = True
        with pytest.raises(RuntimeError, match="inside"), base.full_float32():
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (False, False)
            raise RuntimeError("inside")
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, True)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (pictures(8, 8) / 255, PROMPTS, "uint8"),
        (pictures(8, 8)[0], PROMPTS, "N, H, W, 3"),
        (pictures(8, 8)[:0], [], "N, H, W, 3"),
        (pictures(8, 8), PROMPTS[:2], "one prompt per image"),
        (pictures(8, 8), "abc", "one prompt per image"),
    ],
)
def test_bad_input_is_refused(images: Any, prompts: Any, message: str) -> None:
    with pytest.raises(DgkitError, match=message):
        Constant(1.0)(images, prompts)


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(DgkitError, match="image 0 is not finite"):
        Constant(np.nan)(pictures(8, 8), PROMPTS)


def test_weights_that_do_not_fit_are_refused(home: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig, CLIPModel

    found = fetch(WEIGHTS["clip-vit-large-patch14"])
    config = CLIPConfig.from_pretrained(found.path.parent)
    state = load_file(found.path)
    kept = {name: value for name, value in state.items() if name != "visual_projection.weight"}
    save_file(kept, home / "lacking.safetensors")
    with pytest.raises(DataError, match="lacks visual_projection.weight"):
        clip.from_tensors(CLIPModel, config, replace(found, path=home / "lacking.safetensors"))
    save_file(kept | {"visual_projection.weight": torch.zeros(3, 32)}, home / "misshapen.safetensors")
    with pytest.raises(DataError, match="does not fit CLIPModel"):
        clip.from_tensors(CLIPModel, config, replace(found, path=home / "misshapen.safetensors"))
    with pytest.raises(DataError, match="does not fit Linear"):
        clip._load(torch.nn.Linear(2, 2), {"weight": torch.zeros(3, 2)}, found)


# Structure without a network ------------------------------------------------------------------------------------------


def low_pass_by_hand(luma: np.ndarray) -> np.ndarray:
    """Through the cosine matrices of the DCT-II."""

    def cosines(n: int) -> np.ndarray:
        matrix = np.sqrt(2 / n) * np.cos(np.pi * np.arange(n)[:, None] * (2 * np.arange(n) + 1) / (2 * n))
        matrix[0] /= np.sqrt(2)
        return matrix

    down, across = cosines(luma.shape[0]), cosines(luma.shape[1])
    coefficients = down @ luma @ across.T
    for i in range(luma.shape[0]):
        for j in range(luma.shape[1]):
            if (i / (2 * luma.shape[0])) ** 2 + (j / (2 * luma.shape[1])) ** 2 > 0.125**2:
                coefficients[i, j] = 0
    return down.T @ coefficients @ across


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(5, a.shape[0] - 5):
        for j in range(5, a.shape[1] - 5):
            x, y = a[i - 5 : i + 6, j - 5 : j + 6], b[i - 5 : i + 6, j - 5 : j + 6]
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    return float(np.mean(values))


def test_structure_similarity_by_hand() -> None:
    a, b = pictures(20, 24), pictures(20, 24)[::-1]
    expected = [
        ssim_by_hand(low_pass_by_hand(x), low_pass_by_hand(y)) for x, y in zip(luminance(a), luminance(b), strict=True)
    ]
    assert scorer("structure-similarity")(a, b) == pytest.approx(expected, rel=1e-9)
    assert detail.structure_similarity(a, a) == pytest.approx(1)


def test_structure_ignores_detail_and_sees_layout() -> None:
    x = np.linspace(0, 4 * np.pi, 64)
    coarse = 0.5 + 0.2 * np.sin(x)[:, None] * np.cos(x / 2)
    grating = 0.03 * np.cos(np.pi * 52 * (np.arange(64) + 0.5) / 64)
    plain, detailed, mirrored = (np.repeat(y[None, :, :, None], 3, -1) for y in (coarse, coarse + grating, coarse.T))
    assert detail.structure_similarity(detailed, plain)[0] > 0.9
    assert detail.structure_similarity(mirrored, plain)[0] < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detail.structure_similarity(pictures(20, 20), pictures(20, 24)), "must agree"),
        (lambda: detail.structure_similarity(pictures(10, 20), pictures(10, 20)), "too small"),
        (lambda: scorer("structure-similarity")(pictures(20, 20) / 255, pictures(20, 20)), "uint8"),
    ],
)
def test_bad_pairs_are_refused(call, message: str) -> None:
    with pytest.raises(DgkitError, match=message):
        call()
