"""Loading by name, folder and hub id; presets are the paper's tables; every failure is one sentence."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline, DiTPipeline, FluxPipeline, SD3Transformer2DModel
from safetensors import safe_open

import dgkit
from benchmarks.models import subject
from dgbook.chapters.sampling import observe, samples
from dgbook.claims import paper
from dgkit import zoo
from dgkit.anatomy import TRANSFORMERS
from dgkit.anatomy.pipelines import PIPELINES
from dgkit.errors import DgkitError, LoadError
from dgkit.paths import DATA
from dgkit.sampling import generate
from tests.tiny_models import build, pipeline, sample
from training.flow import FAMILIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipelines") / "dit"
    pipeline("dit").save_pretrained(path)
    return path


def test_presets_are_tables_4_and_5() -> None:
    names = {"SD3": "sd3", "SD3.5": "sd3.5-large", "Flux": "flux-dev"}
    for _, line in paper.table(4).iterrows():
        row = zoo.MODELS[names[line["model"]]]
        assert (row.blocks, row.channels) == (line["blocks"], line["hidden_size"])
        assert list(row.preset.dims or ()) == [int(d) for d in str(line["dims"]).split()]
        assert row.preset.block == line["depth"] - 1
    for _, line in paper.table(5).iterrows():
        preset = zoo.MODELS[names[line["model"]]].preset
        assert preset.steps == line["steps"]
        if line["type"] == "CFG":
            assert preset.guidance_scale == line["lambda"]
        else:
            assert {"DG": preset.scale, "CFG+DG": preset.scale_with_cfg}[line["type"]] == line["w"]


def test_settings_are_those_given_else_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("dit")
    settings = zoo.settings_for(model, scale=2.0, dims=[3])
    assert (settings.block, settings.dims, settings.scale, settings.scale_with_cfg) == (None, [3], 2.0, 2.0)
    assert settings.guidance_scale == 4.0
    preset = zoo.Preset(1, (2,), 1.5, 0.5, 1.75, 28, "test")
    monkeypatch.setattr(zoo, "preset_of", lambda target: preset)
    assert zoo.settings_for(model, block=0) == replace(preset, block=0)
    assert zoo.settings_for(model, scale=0.0) == replace(preset, scale=0.0, scale_with_cfg=0.0)
    assert zoo.settings_for(model, scale_with_cfg=3.0) == replace(preset, scale_with_cfg=3.0)


def test_a_users_own_pipeline_is_recognised_by_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("sd3")
    assert zoo.preset_of(pipe) is None
    preset = zoo.Preset(1, (2, 3), 1.5, 0.5, 4.0, 28, "test")
    row = zoo.Model("x/y", "StableDiffusion3Pipeline", "SD3Transformer2DModel", 3, 16, "none", 1.0, preset, dual=True)
    monkeypatch.setitem(zoo.MODELS, "small", row)
    assert zoo.preset_of(pipe) is preset == zoo.settings_for(pipe)
    with dgkit.detail_guidance(pipe) as guidance:
        with_cfg = sample(pipe, "sd3", guidance_scale=4.0)
    dg = guidance.dg
    assert (dg.block, dg.dims, dg.scale, dg.scale_with_cfg) == (1, [2, 3], 1.5, 0.5)
    with dgkit.detail_guidance(pipe, scale=0.5, block=1, dims=[2, 3]):
        assert torch.equal(sample(pipe, "sd3", guidance_scale=4.0), with_cfg)
    with dgkit.detail_guidance(pipe):
        alone = sample(pipe, "sd3")
    with dgkit.detail_guidance(pipe, scale=1.5, block=1, dims=[2, 3]):
        assert torch.equal(sample(pipe, "sd3"), alone)


def test_sd3_is_told_from_sd3_5() -> None:
    """Medium has the class, depth and width of SD3, and second attentions; Large has none, and another size."""
    for name in ("sd3", "sd3.5-large"):
        assert zoo.row_of(subject(name, device="meta").model) is zoo.MODELS[name]
    with torch.device("meta"):
        medium = SD3Transformer2DModel(  # the released configuration
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
        )  # fmt: skip
    assert zoo.row_of(medium) is None and zoo.preset_of(medium) is None


def test_the_calls_of_embedded_models_are_those_they_were_trained_for() -> None:
    for name, family in FAMILIES.items():
        assert zoo.MODELS[name].call == family.call


def test_flux_needs_the_scale_because_its_first_call_cannot_know_of_cfg(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = zoo.Preset(1, (2,), 4.0, 2.0, 3.5, 50, "test")
    row = zoo.Model("x/y", "FluxPipeline", "FluxTransformer2DModel", 5, 16, "none", 1.0, preset)
    monkeypatch.setitem(zoo.MODELS, "small", row)
    with pytest.raises(DgkitError, match="4 alone and 2 beside true CFG"), dgkit.detail_guidance(pipeline("flux")):
        pass


def test_load_folder(folder: Path) -> None:
    pipe = dgkit.load(str(folder), device="cpu")
    assert type(pipe).__name__ == "DiTPipeline" and pipe.transformer.dtype == torch.float32
    assert dgkit.load(folder, device="cpu", dtype=torch.bfloat16).transformer.dtype == torch.bfloat16
    own = build("dit").state_dict()
    assert all(torch.equal(v, own[k]) for k, v in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("name", ["", None, 5])
def test_load_refuses_what_is_no_name(name: Any) -> None:
    with pytest.raises(LoadError, match="is not allowed: give a name"):
        dgkit.load(name)


@pytest.mark.parametrize("name", ["sd4", "./missing", "/nowhere/at/all", "a/b/c", "a/b.safetensors", "x.safetensors"])
def test_load_refuses_unknown_names(name: str) -> None:
    with pytest.raises(LoadError, match=r"is unknown: use tiny-dit, tiny-sd3, .* a pipeline folder or a hub id"):
        dgkit.load(name)


def test_load_refuses_a_folder_without_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"is not a diffusers pipeline folder: it has no model_index.json"):
        dgkit.load(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing", "config"])
def test_load_refuses_broken_weights(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "garbage":
        weights.write_bytes(b"not a safetensors file")
    elif damage == "missing":
        weights.unlink()
    else:
        (broken / "transformer" / "config.json").write_text("{")
    with pytest.raises(LoadError, match="could not be loaded"):
        dgkit.load(str(broken))


def test_load_refuses_an_unknown_or_absent_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoadError, match="device='gpu' is not allowed"):
        dgkit.load(str(folder), device="gpu")
    with pytest.raises(LoadError, match="device=5.5 is not allowed"):
        dgkit.load(str(folder), device=5.5)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LoadError, match="torch finds no GPU"):
        dgkit.load(str(folder), device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LoadError, match="device='cuda:2' is not available here: torch finds 2 GPU"):
        dgkit.load(str(folder), device="cuda:2")


@pytest.mark.parametrize(
    ("gpu", "name", "expected"),
    [
        (True, "tiny-dit", ("cpu", torch.float32)),  # a CPU runs them in seconds
        (True, "folder", ("cuda", torch.bfloat16)),
        (False, "folder", ("cpu", torch.float32)),
    ],
)
def test_the_device_and_dtype_if_none_is_given(
    gpu: bool, name: str, expected: tuple[str, torch.dtype], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(zoo.memory, "place", lambda pipe, device, name: (device.type, pipe.transformer.dtype))
    assert dgkit.load(str(folder) if name == "folder" else name) == expected


def real_parts(name: str) -> dict[str, int]:
    """Numbers in the weights of each part, counted on the real architectures without memory."""

    def text(kind: str, config: Any) -> Any:
        return getattr(transformers, kind)(config)

    clip = {"hidden_act": "quick_gelu", "projection_dim": 768}
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    clip_l = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **clip
    )
    clip_g = transformers.CLIPTextConfig(**large, hidden_act="gelu", projection_dim=1280)
    t5 = transformers.T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    kinds = {
        "sd3": [("CLIPTextModelWithProjection", clip_l), ("CLIPTextModelWithProjection", clip_g)],
        "flux-dev": [("CLIPTextModel", clip_l)],
    }
    kinds["sd3.5-large"] = kinds["sd3"]
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    quant = name == "dit-xl-2"
    with torch.device("meta"):
        parts = {
            "transformer": subject(name, device="meta").model,
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4 if quant else 16,
                use_quant_conv=quant, use_post_quant_conv=quant, **blocks,
            ),
        }  # fmt: skip
        for kind, config in kinds.get(name, []):
            parts[f"text {len(parts)}"] = text(kind, config)
        if name in kinds:
            parts["t5"] = text("T5EncoderModel", t5)
    sizes = {}
    for part, model in parts.items():
        tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}  # T5 has its embedding under two names
        sizes[part] = sum(t.numel() for t in tensors.values())
    return sizes


@pytest.mark.parametrize("name", ["sd3", "sd3.5-large", "flux-dev", "dit-xl-2"])
def test_sizes_are_those_of_the_real_architectures(name: str) -> None:
    row, parts = zoo.MODELS[name], real_parts(name)
    assert row.weights_gb == pytest.approx(2 * sum(parts.values()) / 1e9, abs=0.05)
    assert row.largest_gb == pytest.approx(2 * max(parts.values()) / 1e9, abs=0.05)
    stored = 4 if name == "dit-xl-2" else 2  # bytes per number: float32 and 16 bits
    assert row.download_gb == pytest.approx(stored * sum(parts.values()) / 1e9, abs=0.05)


def test_the_de_distilled_flux_is_flux_dev_with_another_transformer() -> None:
    row, flux = zoo.MODELS["flux-dev-de-distill"], zoo.MODELS["flux-dev"]
    assert row.single and not flux.single
    assert replace(row, single="", single_licence="") == flux


def test_generate_depends_on_the_seed_of_each_image_alone() -> None:
    pipe = pipeline("dit")
    images = generate(pipe, [1, 2, 3], [7, 8, 9], num_inference_steps=2, guidance_scale=4.0, batch_size=2)
    assert images.shape == (3, 16, 16, 3) and images.dtype == "uint8"
    alone = generate(pipe, [2], [8], num_inference_steps=2, guidance_scale=4.0)
    assert abs(images[1].astype(int) - alone[0]).max() <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [1]}, "one seed per condition, got 2 conditions and 1 seeds"),
        ({"conditions": []}, "got 0 conditions"),
        ({"conditions": "a prompt"}, "one seed per condition"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is not allowed"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 is not allowed"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5 is not allowed"),
        ({"guidance_scale": "4"}, "guidance_scale='4' is not allowed"),
        ({"guidance_scale": None}, "guidance_scale=None is not allowed"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan is not allowed"),
        ({"conditions": [0, 1001]}, "class=1001 is not allowed: give an integer from 0 to 999"),  # 1000 is none of them
        ({"conditions": [0, -1]}, "class=-1 is not allowed"),
        ({"conditions": [0, True]}, "class=True is not allowed"),
        ({"conditions": [0, 1.0]}, "class=1.0 is not allowed"),
        ({"conditions": ["boot", "shirt"]}, "class='boot' is not allowed"),
        ({"conditions": [None, 1]}, "class=None is not allowed"),
        ({"seeds": [1, 2.5]}, "seed=2.5 is not allowed"),
        ({"seeds": [1, True]}, "seed=True is not allowed"),
        ({"seeds": [1, None]}, "seed=None is not allowed"),
        ({"seeds": [1, 2**64]}, "seed=18446744073709551616 is not allowed"),
        ({"output_type": "pil"}, "output_type='pil' is not allowed: leave it out"),
        ({"generator": None}, "generator=None is not allowed: leave it out"),
        ({"class_labels": [1]}, "class_labels=.* is not allowed: leave it out"),
        ({"return_dict": False}, "return_dict=False is not allowed: leave it out"),
        ({"heigth": 512}, "DiTPipeline has no argument 'heigth': it takes class_labels, guidance_scale"),
        ({"prompt": "a cat"}, "DiTPipeline has no argument 'prompt'"),
    ],
)
def test_generate_refuses(change: dict[str, Any], words: str) -> None:
    arguments = {"conditions": [1, 2], "seeds": [1, 2], "num_inference_steps": 2} | change
    with pytest.raises(DgkitError, match=words):
        generate(pipeline("dit"), **arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conditions": ["a cat", 3]}, "prompt=3 is not allowed: give a string"),
        ({"conditions": ["a cat", None]}, "prompt=None is not allowed"),
        ({"conditions": [["a cat"], ["a dog"]]}, "prompt=.'a cat'. is not allowed"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt=2 is not allowed: leave it out"),
        ({"true_cfg_scale": 2.0}, "true_cfg_scale=2.0 is not allowed: leave it out"),
        ({"negative_promt": "blurred"}, "FluxPipeline has no argument 'negative_promt': it takes prompt, prompt_2"),
        ({"negative_prompt": "blurred"}, "has no effect without CFG: give a guidance_scale above 1"),
        ({"negative_prompt_2": ["blurred"]}, "has no effect without CFG"),
    ],
)
def test_generate_refuses_for_prompts(change: dict[str, Any], words: str) -> None:
    arguments = {"conditions": ["a cat", "a dog"], "seeds": [1, 2], "num_inference_steps": 2} | change
    with pytest.raises(DgkitError, match=words):
        generate(pipeline("flux"), **arguments)


def test_only_classes_that_the_model_was_trained_on_are_sampled() -> None:
    """Of the rows for 1,000 classes that diffusers asks for, ten were trained."""
    pipe = pipeline("dit")
    pipe.labels = {
        "a": 0,
        "b": 1,
        "c": 3,
        "also c": 3,
    }  # 2 lost its name, as ImageNet's first "crane" does
    for condition in (2, np.int64(3)):
        assert generate(pipe, [condition], [0], num_inference_steps=1).shape == (1, 16, 16, 3)
    with pytest.raises(DgkitError, match="class=4 is not allowed: give an integer from 0 to 3"):
        generate(pipe, [0, 4], [0, 1], num_inference_steps=1)


def test_flux_takes_a_negative_prompt() -> None:
    """Tiny-flux, against the pipeline called by hand with a text for each image."""
    pipe = dgkit.load("tiny-flux")
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 16}
    images = generate(pipe, ["a red fish", "a wall"], [1, 2], guidance_scale=3.0, negative_prompt="a statue", **call)
    by_hand = pipe(
        ["a red fish", "a wall"], negative_prompt=["a statue"] * 2, true_cfg_scale=3.0, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)], **call,
    ).images  # fmt: skip
    assert np.array_equal(images, (by_hand * 255).round().astype(np.uint8))
    plain = generate(pipe, ["a red fish", "a wall"], [1, 2], guidance_scale=3.0, **call)
    assert not np.array_equal(images, plain)


def test_generate_gives_flux_its_true_cfg_with_a_negative_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noting(FluxPipeline):
        calls: list[dict[str, Any]] = []

        def __call__(self, **call: Any) -> Any:
            self.calls.append(call)
            return type("Output", (), {"images": np.zeros((len(call["prompt"]), 4, 4, 3))})

    pipe = Noting(**pipeline("flux").components)
    generate(pipe, ["a", "b", "c"], [1, 2, 3], num_inference_steps=2, guidance_scale=3.0, batch_size=2)
    generate(pipe, ["a"], [1], num_inference_steps=2)
    assert [c.get("true_cfg_scale") for c in pipe.calls] == [3.0, 3.0, None]
    assert [c.get("negative_prompt") for c in pipe.calls] == [["", ""], [""], None]
    assert all("guidance_scale" not in c for c in pipe.calls)


def test_the_shipped_models_preset_is_what_detection_finds_in_it() -> None:
    """Nothing is typed that the weights do not bear out: the dims are those massive in the preset's block."""
    pipe = dgkit.load("tiny-dit")
    preset = zoo.MODELS["tiny-dit"].preset
    trace = observe(pipe, samples(pipe, 20, seed=1, steps=10, guidance_scale=preset.guidance_scale))
    assert preset.block is not None
    assert sorted(dgkit.detect_massive(trace).in_block(preset.block)) == sorted(preset.dims or ())
    assert zoo.preset_of(pipe) is preset


def test_the_shipped_model_loads_and_samples_as_the_real_one() -> None:
    """Plain diffusers, class names, CFG; bfloat16 on disk, float32 in memory."""
    folder = DATA / "models" / "tiny-dit"
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipe, DiTPipeline) and pipe.labels["sneaker"] == 7 and len(pipe.labels) == 10
    pipe.set_progress_bar_config(disable=True)
    images = pipe(pipe.get_label_ids(["sneaker", "coat"]), guidance_scale=4.0, num_inference_steps=4).images
    assert [image.size for image in images] == [(28, 28)] * 2
    files = list(folder.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 12e6
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


@pytest.mark.parametrize("name", ["tiny-dit", "tiny-sd3", "tiny-flux"])
def test_the_shipped_models_w_is_that_of_its_calibration(name: str) -> None:
    """The positive w of one grid with the lowest distance to real images, without and with CFG, as the plan says."""
    preset = zoo.MODELS[name].preset
    rows = json.loads((DATA / "models" / name / "quality.json").read_text())["guidance"]
    for scale, w in ((1.0, preset.scale), (preset.guidance_scale, preset.scale_with_cfg)):
        distances = {row["w"]: row["frechet"] for row in rows if row["guidance_scale"] == scale}
        assert list(distances) == [0, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
        assert min(list(distances)[1:], key=distances.__getitem__) == w


@pytest.mark.parametrize("name", zoo.MODELS)
def test_rows_name_what_exists(name: str) -> None:
    row = zoo.MODELS[name]
    assert issubclass(getattr(diffusers, row.pipeline), diffusers.DiffusionPipeline)
    assert issubclass(getattr(diffusers, row.transformer), diffusers.ModelMixin) and row.transformer in TRANSFORMERS
    assert row.pipeline in PIPELINES
    assert row.licence and row.weights_gb > 0
    assert row.source.count("/") == 1 if row.source else (DATA / "models" / name / "model_index.json").is_file()
    assert row.preset.block is None or 0 <= row.preset.block < row.blocks
    assert all(0 <= dim < row.channels for dim in row.preset.dims or ())
