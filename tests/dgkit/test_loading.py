"""Loading the large models, proven on small ones of the same classes: laid out as on the hub, through a hub of our own.

What each failure says is tested as the sentence that a user gets.
"""

import errno
import json
import shutil
import types
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FluxTransformer2DModel
from diffusers.loaders import single_file_model
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dgkit
from dgbook.claims import provenance
from dgbook.paper_scale.generate.job import Job
from dgbook.paper_scale.generate.pipeline import PipelineSampler
from dgkit import loading, memory, zoo
from dgkit.errors import LoadError
from tests.fake_hub import DE_DISTILLED, DIT, FLUX, SD3, SD35, Hub, connect, fill, original_sd3, serving

NAMES = {"sd3": SD3, "sd3.5-large": SD35, "flux-dev": FLUX, "flux-dev-de-distill": FLUX, "dit-xl-2": DIT}
GIB = 2**30 / 1e9


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    with loading.quiet():
        return fill(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def address(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The hub on the air, an empty cache, no login, memory enough, and Flux's converter set to the small width."""
    hub.gated, hub.served = {}, []
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1e12))
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = entry["checkpoint_mapping_fn"]
    constants = convert.__code__.co_consts
    assert 3072 in constants, "the converter has Flux's width written into its code"
    code = convert.__code__.replace(co_consts=tuple(96 if c == 3072 else c for c in constants))
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", types.FunctionType(code, convert.__globals__))
    with serving(hub) as where:
        connect(monkeypatch, where, tmp_path)
        yield where


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large models' rows with the sizes of the small ones, so that a lone transformer is recognised."""
    # both SD3 are 8 blocks of 96 channels here: the first is put out of the way
    for name, blocks in (("sd3", 99), ("sd3.5-large", 8), ("flux-dev", 8), ("flux-dev-de-distill", 8)):
        monkeypatch.setitem(zoo.MODELS, name, replace(zoo.MODELS[name], blocks=blocks, channels=96))


def stored(folder: Path) -> dict[str, Tensor]:
    """The weights in a transformer's folder, read without diffusers."""
    files = [file for file in sorted(folder.glob("*.safetensors")) if "fp16" not in file.name]
    return {name: weight for file in files for name, weight in load_file(file).items()}


def assert_weights(pipe: Any, expected: dict[str, Tensor]) -> None:
    found = pipe.transformer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight.to(found[name].dtype)) for name, weight in expected.items())


# ------------------------------------------------------------------------------------------------------ through the hub


@pytest.mark.parametrize("name", NAMES)
def test_models_load_by_name_and_only_what_is_needed_is_downloaded(
    name: str, hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, repo = zoo.MODELS[name], NAMES[name]
    pipe = dgkit.load(name, device="cpu")
    assert (type(pipe).__name__, type(pipe.transformer).__name__) == (row.pipeline, row.transformer)
    assert pipe.transformer.dtype == torch.float32 and pipe.device.type == "cpu"
    weights = stored(hub.folder(repo, row.revision) / "transformer")
    if row.single:  # other weights, and no embedding of the distilled guidance
        weights = {key: value + 1 for key, value in weights.items() if "guidance" not in key}
        assert not pipe.transformer.config.guidance_embeds
    assert_weights(pipe, weights)
    paths = {path.removeprefix(f"{repo}/") for path in hub.served}
    assert not [p for p in paths if p.endswith(".bin") or "fp16" in p or p.startswith("text_encoders/")]
    at_root = {"model_index.json"} | ({row.single} if row.single else set())
    assert {p for p in paths if "/" not in p or p.startswith(DE_DISTILLED)} == at_root
    if row.single:
        assert {p for p in paths if p.startswith("transformer/")} == {"transformer/config.json"}
    first, hub.served = hub.served, []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_weights(dgkit.load(name, device="cpu", dtype=torch.bfloat16), weights)
    assert first and not hub.served


def test_what_was_loaded_samples(hub: Hub, address: str) -> None:
    pipe = dgkit.load("flux-dev-de-distill", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 1, "output_type": "latent", "height": 32, "width": 32, "max_sequence_length": 16}
    images = [
        pipe("a cat", true_cfg_scale=s, negative_prompt="", generator=torch.Generator().manual_seed(0), **call).images
        for s in (1.0, 3.5)
    ]
    assert images[0].isfinite().all() and not torch.equal(*images)
    pipe = dgkit.load("dit-xl-2", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(pipe.get_label_ids(["goldfish"]), num_inference_steps=1).images[0].size == (28, 28)


def test_any_other_pipeline_loads_by_its_id(hub: Hub, address: str) -> None:
    assert_weights(dgkit.load(SD35), stored(hub.folder(SD35) / "transformer"))


def test_a_job_runs_on_a_model_of_the_hub(hub: Hub, address: str) -> None:
    job = Job(model="sd3", conditions=("a cat",), count=1, steps=1, dtype="float32", call={"max_sequence_length": 16})
    sampler = PipelineSampler(job)
    assert set(sampler.identity["weights_sha256"]) >= {"transformer", "vae", "text_encoder_3"}
    assert len(sampler(["a cat"], [0])) == 1


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("name", "licence"), [("sd3", "(Stability AI Community)"), ("flux-dev", "(FLUX.1 [dev] Non-Commercial)")]
)
def test_a_gated_model_names_its_licence_and_the_login(
    name: str, licence: str, status: int, hub: Hub, address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.gated = {NAMES[name]: status}
    with pytest.raises(LoadError) as caught:
        dgkit.load(name, device="cpu")
    assert str(caught.value) == (
        f"{NAMES[name]} is gated: accept its licence {licence} at {address}/{NAMES[name]}, and log in with "
        "`hf auth login`"
    )
    assert capfd.readouterr().err == ""


def test_access_opens_a_gated_model_and_the_cache_needs_none(
    hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.gated = {SD3: 401}
    connect(monkeypatch, address, tmp_path, token="hf_wrong")
    with pytest.raises(LoadError, match="is gated"):
        dgkit.load("sd3", device="cpu")
    connect(monkeypatch, address, tmp_path, token=hub.token)
    dgkit.load("sd3", device="cpu")
    connect(monkeypatch, address, tmp_path)
    hub.served = []
    dgkit.load("sd3", device="cpu")
    assert not hub.served


def test_a_token_that_is_not_valid_any_more(
    hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    connect(monkeypatch, address, tmp_path, token=hub.expired)
    with pytest.raises(LoadError) as caught:
        dgkit.load("sd3", device="cpu")
    assert str(caught.value) == (
        f"the hub does not accept this machine's token: log in with `hf auth login`, and see {address}/{SD3}"
    )


def test_the_licence_of_a_single_file_is_named_too(hub: Hub, address: str) -> None:
    hub.gated = {DE_DISTILLED: 403}
    with pytest.raises(
        LoadError, match=rf"{DE_DISTILLED} is gated: accept its licence \(FLUX.1 \[dev\] Non-Commercial"
    ):
        dgkit.load("flux-dev-de-distill", device="cpu")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("some/body", "some/body is not on the hub, or is private: check the name, or log in with `hf auth login`"),
        ("some/body/weights.safetensors", "some/body is not on the hub, or is private"),
        (DIT, "has no safetensors weights, and dgkit opens no pickles: give a folder with converted weights"),
        (DE_DISTILLED, "is not a diffusers pipeline"),
        (f"{FLUX}/nothing.safetensors", "is not a diffusers pipeline: 404"),
    ],
)
def test_what_the_hub_lacks(name: str, words: str, hub: Hub, address: str) -> None:
    with pytest.raises(LoadError, match=words):
        dgkit.load(name, device="cpu")
    assert not [path for path in hub.served if path.endswith((".bin", ".safetensors"))]


def test_without_a_network(hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connect(monkeypatch, "http://127.0.0.1:9", tmp_path)  # nobody listens there
    with pytest.raises(LoadError) as caught:
        dgkit.load("sd3", device="cpu")
    assert str(caught.value).startswith(
        f"{SD3} is not completely on this machine and the hub cannot be reached: run `hf download {SD3} "
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"the hub is switched off \(HF_HUB_OFFLINE\): run `hf download"):
        dgkit.load("dit-xl-2", device="cpu")


@pytest.mark.parametrize("name", ["sd3", "dit-xl-2"])
def test_the_command_that_it_names_brings_what_is_needed(
    name: str, hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = zoo.MODELS[name]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError) as caught:
        dgkit.load(name, device="cpu")
    words = str(caught.value).partition("`hf download ")[2].partition("`")[0].replace('"', "").split()
    assert words[:3] == [NAMES[name], "--revision", row.revision]
    options = list(zip(words[3::2], words[4::2], strict=True))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    snapshot_download(
        words[0],
        revision=words[2],
        allow_patterns=[value for option, value in options if option == "--include"],
        ignore_patterns=[value for option, value in options if option == "--exclude"],
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_weights(dgkit.load(name, device="cpu"), stored(hub.folder(NAMES[name], row.revision) / "transformer"))


def test_an_interrupted_download_is_told_and_goes_on(
    hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dgkit.load("sd3.5-large", device="cpu")
    shard = next((tmp_path / "hub").rglob("*-00002-of-00002.safetensors"))
    shard.resolve().unlink()
    shard.unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match="is not completely on this machine"):
        dgkit.load("sd3.5-large", device="cpu")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.served = []
    assert_weights(dgkit.load("sd3.5-large", device="cpu"), stored(hub.folder(SD35) / "transformer"))
    assert [path.rpartition("/")[2] for path in hub.served] == [shard.name]


def test_whether_a_model_is_here(hub: Hub, address: str, tmp_path: Path) -> None:
    assert not loading.cached(SD3)
    dgkit.load("sd3", device="cpu")
    assert loading.cached(SD3) and not loading.cached(SD3, "other") and not loading.cached(DIT)
    shutil.rmtree(next((tmp_path / "hub").rglob("snapshots/*/text_encoder_2")))
    assert not loading.cached(SD3)


def test_a_full_disk(hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("download failed") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "download", full)
    with pytest.raises(LoadError, match="the disk is full: make room in .*hub, or set HF_HOME to a folder on another"):
        dgkit.load("sd3", device="cpu")


def test_other_failures_of_the_hub_keep_their_reason(hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("peer closed connection\nlong trace")

    monkeypatch.setattr(DiffusionPipeline, "download", broken)
    with pytest.raises(LoadError, match=r"could not be downloaded: peer closed connection$"):
        dgkit.load("sd3", device="cpu")


# -------------------------------------------------------------------------------------------------------- from folders


@pytest.mark.parametrize("name", ["sd3", "sd3.5-large", "flux-dev", "dit-xl-2"])
def test_a_clone_of_the_repository_loads_as_a_folder(name: str, hub: Hub) -> None:
    folder = hub.folder(NAMES[name], zoo.MODELS[name].revision)
    assert_weights(dgkit.load(folder, device="cpu"), stored(folder / "transformer"))


def test_a_folder_with_fp16_variants_alone_will_do(hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(hub.folder(SD3), tmp_path / "sd3")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        for file in (folder / part).glob("model*"):
            if "fp16" not in file.name:
                file.unlink()
    pipe = dgkit.load(folder, device="cpu")
    expected = DiffusionPipeline.from_pretrained(hub.folder(SD3), dtype=torch.float32).text_encoder_3.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in pipe.text_encoder_3.state_dict().items())


def only_variant(part: Path, variant: str, *, others: bool = False) -> None:
    """Leave a part its weights under the name of a variant, of values that no other file has; or beside the others."""
    for file in part.glob("*fp16*"):
        file.unlink()
    for index in part.glob("*.index.json"):
        content = json.loads(index.read_text())
        content["weight_map"] = {k: v.replace("-0", f".{variant}-0", 1) for k, v in content["weight_map"].items()}
        index.with_suffix(f".{variant}.json").write_text(json.dumps(content))
        if not others:
            index.unlink()
    for whole in list(part.glob("*.safetensors")):
        halved = {name: (weight / 2).to(torch.bfloat16) for name, weight in load_file(whole).items()}
        stem, dash, shard = whole.stem.partition("-")
        save_file(halved, part / f"{stem}.{variant}{dash}{shard}.safetensors", {"format": "pt"})
        if not others:
            whole.unlink()


def test_a_variant_is_read_only_where_there_is_no_other(hub: Hub, tmp_path: Path) -> None:
    """bf16 alone for one encoder, fp16 alone for another, fp16 beside the full weights of the transformer."""
    folder = shutil.copytree(hub.folder(SD3), tmp_path / "sd3")
    only_variant(folder / "text_encoder", "bf16")
    only_variant(folder / "text_encoder_2", "fp16")
    only_variant(folder / "transformer", "fp16", others=True)
    pipe = dgkit.load(folder, device="cpu")
    assert_weights(pipe, stored(hub.folder(SD3) / "transformer"))
    assert_read(pipe, folder, "text_encoder", "text_encoder_2")


def assert_read(pipe: Any, folder: Path, *parts: str) -> None:
    """In float32 the very numbers of the files."""
    for part in parts:
        found = pipe.components[part].state_dict()
        for file in (folder / part).glob("*.safetensors"):
            assert all(torch.equal(found[name], weight.float()) for name, weight in load_file(file).items())


def test_a_folder_with_bf16_files_alone_will_do(hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(hub.folder(SD3), tmp_path / "sd3")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"):
        only_variant(folder / part, "bf16")
    pipe = dgkit.load(folder, device="cpu")
    assert_read(pipe, folder, "transformer", "text_encoder", "text_encoder_3", "vae")


def test_pointers_in_place_of_weights_are_named(hub: Hub, address: str, tmp_path: Path) -> None:
    """What a clone without Git LFS has."""
    folder = shutil.copytree(hub.folder(SD3), tmp_path / "sd3")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for file in (folder / "transformer").glob("*.safetensors"):
        file.write_bytes(pointer)
    (tmp_path / "lone.safetensors").write_bytes(pointer)
    for path in (folder, tmp_path / "lone.safetensors"):
        with pytest.raises(LoadError, match="Git LFS pointer: run `git lfs pull`"):
            dgkit.load(path, device="cpu")


def test_pickles_are_not_opened(hub: Hub, tmp_path: Path) -> None:
    folder = shutil.copytree(hub.folder(DIT), tmp_path / "dit")
    with pytest.raises(LoadError, match="it has pickles, which dgkit does not open: convert them to safetensors"):
        dgkit.load(folder, device="cpu")


@pytest.mark.parametrize("where", ["pipeline", "component"])
def test_code_that_comes_with_a_model_is_not_run(where: str, hub: Hub, tmp_path: Path) -> None:
    folder, ran = shutil.copytree(hub.folder(SD3), tmp_path / "sd3"), tmp_path / "ran"
    index = json.loads((folder / "model_index.json").read_text())
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Own: ...\n"
    if where == "pipeline":
        index["_class_name"] = ["own", "Own"]
        (folder / "own.py").write_text(code)
    else:
        index["transformer"] = ["own", "Own"]
        (folder / "transformer" / "own.py").write_text(code)
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match="could not be loaded"):
        dgkit.load(folder, device="cpu")
    assert not ran.exists()


def test_code_of_a_repository_is_not_run(hub: Hub, address: str, tmp_path: Path) -> None:
    folder, ran = hub.folder("some/code"), tmp_path / "ran"
    shutil.copytree(hub.folder(SD3), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Own"]}))
    (folder / "pipeline.py").write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Own: ...\n")
    with pytest.raises(LoadError, match="some/code needs code of its own, and dgkit runs no code from the hub"):
        dgkit.load("some/code", device="cpu")
    assert not ran.exists()


# --------------------------------------------------------------------------------------------------- transformers alone


def test_single_files_of_a_clone_take_their_other_parts_from_it(hub: Hub, address: str) -> None:
    for repo, name in ((SD35, "sd3.5_large"), (FLUX, "flux1-dev")):
        pipe = dgkit.load(hub.folder(repo) / f"{name}.safetensors", device="cpu")
        assert_weights(pipe, stored(hub.folder(repo) / "transformer"))
    assert not hub.served


def test_a_lone_file_takes_its_other_parts_from_the_hub(
    hub: Hub, address: str, small_rows: None, tmp_path: Path
) -> None:
    lone = tmp_path / "lone"
    lone.mkdir()
    for repo, source in (
        (SD35, hub.folder(SD35) / "sd3.5_large.safetensors"),
        (FLUX, hub.folder(FLUX) / "flux1-dev.safetensors"),
        (SD35, hub.folder(SD3) / "transformer" / "diffusion_pytorch_model.safetensors"),  # diffusers' own layout
    ):
        hub.served = []
        pipe = dgkit.load(shutil.copy(source, lone), device="cpu")
        holder = hub.folder(SD3) if "transformer" in source.parts else hub.folder(repo)
        assert_weights(pipe, stored(holder / "transformer"))
        assert not [path for path in hub.served if path.startswith(f"{repo}/transformer/diffusion")]


def test_a_de_distilled_file_beside_flux_dev(hub: Hub, address: str, tmp_path: Path) -> None:
    clone = shutil.copytree(hub.folder(FLUX), tmp_path / "flux")
    file = shutil.copy(hub.folder(DE_DISTILLED) / "consolidated_s6700.safetensors", clone)
    pipe = dgkit.load(file, device="cpu")
    weights = stored(clone / "transformer")
    assert_weights(pipe, {name: weight + 1 for name, weight in weights.items() if "guidance" not in name})
    assert not pipe.transformer.config.guidance_embeds and not hub.served


def test_a_file_on_the_hub(hub: Hub, address: str, small_rows: None) -> None:
    pipe = dgkit.load(f"{DE_DISTILLED}/consolidated_s6700.safetensors", device="cpu")
    assert not pipe.transformer.config.guidance_embeds


def test_a_transformers_folder(hub: Hub, address: str, small_rows: None, tmp_path: Path) -> None:
    """In a pipeline's folder, and alone with the rest from the hub."""
    own = hub.folder(FLUX) / "transformer"
    assert_weights(dgkit.load(own, device="cpu"), stored(own))
    assert not hub.served
    alone = shutil.copytree(own, tmp_path / "alone" / "deep" / "transformer")
    assert_weights(dgkit.load(alone, device="cpu"), stored(own))
    assert f"{FLUX}/vae/config.json" in hub.served and f"{FLUX}/transformer/config.json" in hub.served


@pytest.mark.parametrize("layout", ["authors'", "diffusers'", "folder"])
def test_sd3_5_medium_alone_is_not_taken_for_sd3(
    layout: str, hub: Hub, address: str, small_rows: None, tmp_path: Path
) -> None:
    """It has second attentions in some blocks, and is otherwise of SD3's class, depth and width."""
    own, lone = hub.folder(SD35) / "transformer", tmp_path / "lone.safetensors"
    if layout == "folder":
        lone = shutil.copytree(own, tmp_path / "deep" / "er" / "transformer")
        config = json.loads((lone / "config.json").read_text()) | {"dual_attention_layers": [0]}
        (lone / "config.json").write_text(json.dumps(config))
    elif layout == "diffusers'":
        save_file(stored(own) | {"transformer_blocks.0.attn2.to_q.weight": torch.zeros(96, 96)}, lone)
    else:
        second = "model.diffusion_model.joint_blocks.0.x_block.attn2.qkv.weight"
        save_file(original_sd3(stored(own)) | {second: torch.zeros(288, 96)}, lone)
    with pytest.raises(LoadError, match="8 blocks of 96 channels and dual attention, which is no model known here"):
        dgkit.load(lone, device="cpu")


def test_what_no_transformer_can_be_read_from(hub: Hub, address: str, tmp_path: Path) -> None:
    good = original_sd3(dict(stored(hub.folder(SD35) / "transformer")))

    def file(weights: dict[str, Tensor], name: str = "a.safetensors") -> Path:
        save_file(weights, tmp_path / name)
        return tmp_path / name

    key = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"
    cut = {name: weight for name, weight in good.items() if name != key}
    (tmp_path / "weights.ckpt").write_bytes(b"\x80\x02")
    (tmp_path / "garbage.safetensors").write_bytes(b"nothing")
    shutil.copytree(hub.folder(SD35), tmp_path, dirs_exist_ok=True)
    other = shutil.copytree(hub.folder(SD35) / "transformer", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"_class_name": "Own"}))
    part = {name: weight for name, weight in stored(hub.folder(SD3) / "transformer").items() if name != "proj_out.bias"}
    wider = {name: weight.repeat_interleave(2, 0) if name == key else weight for name, weight in good.items()}
    for path, words in (
        (tmp_path / "weights.ckpt", "is not a .safetensors file, and dgkit opens no other kind of weights"),
        (tmp_path / "garbage.safetensors", "could not be read"),
        (file(good | {key: good[key].to(torch.float8_e4m3fn)}), "has F8_E4M3 weights, with which the activations are"),
        (file({"lora_a": torch.zeros(1)}, "b.safetensors"), "holds no SD3 or Flux transformer in a layout known here"),
        (
            file(cut, "c.safetensors"),
            "c.safetensors could not be loaded as SD3Transformer2DModel: KeyError.*mlp.fc1.wei",
        ),
        (file(wider, "d.safetensors"), "d.safetensors could not be loaded as SD3Transformer2DModel: .*shape"),
        (file(part, "e.safetensors"), "e.safetensors could not be loaded as SD3Transformer2DModel: IndexError"),
        (
            tmp_path / "vae",
            "is not a diffusers pipeline folder: it has no model_index.json, and no config.json of a tra",
        ),
    ):
        with pytest.raises(LoadError, match=words):
            dgkit.load(path, device="cpu")


def test_missing_weights_are_not_filled_up(hub: Hub, address: str, tmp_path: Path) -> None:
    clone = shutil.copytree(hub.folder(FLUX), tmp_path / "flux")
    weights = load_file(clone / "flux1-dev.safetensors")
    save_file({k: v for k, v in weights.items() if "single_blocks.4." not in k}, clone / "shallow.safetensors")
    with pytest.raises(LoadError, match="shallow.safetensors could not be loaded as Flux.*: weights are missing$"):
        dgkit.load(clone / "shallow.safetensors", device="cpu")


def test_a_transformer_of_no_known_model_needs_a_pipelines_folder(hub: Hub, address: str, tmp_path: Path) -> None:
    lone = tmp_path / "lone"
    lone.mkdir()
    with pytest.raises(
        LoadError, match="a FluxTransformer2DModel with 8 blocks of 96 channels, which is no model know"
    ):
        dgkit.load(shutil.copy(hub.folder(FLUX) / "flux1-dev.safetensors", lone), device="cpu")


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("sd3", ("whole", "whole", "whole")),
        ("sd3.5-large", ("parts", "whole", "whole")),
        ("flux-dev", ("blocks", "whole", "whole")),
        ("flux-dev-de-distill", ("blocks", "whole", "whole")),
        ("dit-xl-2", ("whole", "whole", "whole")),
    ],
)
def test_placement_on_24_48_and_80_gb(name: str, ways: tuple[str, ...]) -> None:
    """Free memory as on RTX 4090 and A6000 without a display, and A100; half a GiB goes to the driver."""
    row = zoo.MODELS[name]
    found = [memory.placement(row.weights_gb, row.largest_gb, (gib - 0.5) * GIB) for gib in (24, 47.5, 79)]
    assert tuple(found) == ways
    assert memory.placement(row.weights_gb, row.largest_gb, 3.9) is None


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, on "meta"; attention is as if fused."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = {}, 0  # type: dict[int, int], int

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.live:
                self.live[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.live.pop, key)
                self.peak = max(self.peak, sum(self.live.values()))
        return output


@torch.no_grad()
def test_sampling_at_1024_pixels_needs_what_is_kept_free(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = lambda query, key, value, **options: torch.empty_like(query)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, **blocks,
        ).bfloat16()  # fmt: skip
        # the widest of the transformers; a peak is reached within one block
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).bfloat16()
        latents = torch.empty(1, 16, 128, 128, dtype=torch.bfloat16)

        def call(rows: int) -> dict[str, Tensor]:
            half = {"dtype": torch.bfloat16}
            return {
                "hidden_states": torch.empty(rows, 4096, 64, **half), "timestep": torch.empty(rows, **half),
                "encoder_hidden_states": torch.empty(rows, 512, 4096, **half), "guidance": torch.empty(rows, **half),
                "pooled_projections": torch.empty(rows, 768, **half), "img_ids": torch.empty(4096, 3),
                "txt_ids": torch.empty(512, 3),
            }  # fmt: skip

        with Live() as decoding:
            vae.decode(latents)
        peaks = []
        for rows in (1, 3):
            inputs = call(rows)
            with Live() as passing:
                flux(**inputs)
            peaks.append(passing.peak)
    row = (peaks[1] - peaks[0]) / 2e9
    assert decoding.peak / 1e9 == pytest.approx(1.6, abs=0.05) and row == pytest.approx(0.5, abs=0.05)
    # images of a batch are decoded one at a time; CFG has two rows
    assert max(decoding.peak / 1e9, 2 * row) < memory.WORKING_GB


def test_memory_is_checked_before_anything_is_downloaded(
    hub: Hub, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gigabytes = {"main": 20.0, "gpu": 3.0}
    main = types.SimpleNamespace
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: main(available=1e9 * gigabytes["main"]))
    monkeypatch.setattr(memory, "free_gb", lambda device: gigabytes["gpu"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device, words in (
        ("cpu", r"sd3 needs 31 GB of main memory in torch.float32, 20 GB are free: use a GPU, or dtype=torch.bfloat16"),
        (
            "cuda",
            r"sd3 does not fit on cuda, which has 3.0 GB free: sampling takes about 4 GB even if .* block by block",
        ),
    ):
        with pytest.raises(LoadError, match=words):
            dgkit.load("sd3", device=device)
    gigabytes["main"] = 15.0
    with pytest.raises(
        LoadError, match=r"sd3 needs 16 GB .* in torch.bfloat16, 15 GB are free: use a machine with more"
    ):
        dgkit.load("sd3", device="cpu", dtype=torch.bfloat16)
    assert not hub.served
    gigabytes["main"] = 16.0
    dgkit.load("sd3", device="cpu", dtype=torch.bfloat16)


def test_the_way_is_chosen_by_the_sizes_of_what_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, device = dgkit.load("tiny-sd3"), torch.device("cuda")
    parts = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    sizes = [sum(t.nbytes for t in part.state_dict().values()) / 1e9 for part in parts]
    moved: list[str] = []
    monkeypatch.setattr(memory, "move", lambda pipe, device, way: moved.append(way) or pipe)
    for way, weights in (("whole", sum(sizes)), ("parts", max(sizes)), ("blocks", 0.0)):
        monkeypatch.setattr(memory, "free_gb", lambda device, weights=weights: memory.WORKING_GB + weights + 2e-4)
        assert memory.place(pipe, device, "tiny-sd3") is pipe
        assert moved[-1] == way
    monkeypatch.setattr(memory, "free_gb", lambda device: 3.0)
    with pytest.raises(LoadError, match="tiny-sd3 does not fit on cuda, which has 3.0 GB free"):
        memory.place(pipe, device, "tiny-sd3")


def test_a_gpu_that_fills_up_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "free_gb", lambda device: 10.0)
    monkeypatch.setattr(memory, "move", full)
    with pytest.raises(LoadError, match="does not fit on cuda"):
        memory.place(dgkit.load("tiny-dit"), torch.device("cuda"), "tiny-dit")


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux"])
@pytest.mark.parametrize("way", ["whole", "parts", "blocks"])
def test_every_way_gives_the_same_guided_images(way: str, name: str, weights_leave: None) -> None:
    """Text encoders, transformer and decoder; twice, because offloading renews its hooks after each call."""

    def images(pipe: Any) -> list[Tensor]:
        pipe.set_progress_bar_config(disable=True)
        call: dict[str, Any] = dict(zoo.MODELS[name].call) | {"num_inference_steps": 2, "output_type": "pt"}
        call |= {"true_cfg_scale": 3.0, "negative_prompt": ""} if "flux" in name else {"guidance_scale": 3.0}
        with dgkit.detail_guidance(pipe, scale=1.0):
            return [
                pipe("a stone floor", generator=torch.Generator().manual_seed(seed), **call).images for seed in (0, 1)
            ]

    reference, pipe = dgkit.load(name), dgkit.load(name)
    hashed = provenance.weights_sha256(reference.transformer)
    pipe = memory.move(pipe, torch.device("cpu"), way)
    if way == "blocks":
        assert next(pipe.text_encoder_2.parameters()).isnan().all()
    else:
        assert provenance.weights_sha256(pipe.transformer) == hashed
    assert pipe.vae.use_slicing and not torch.equal(*images(reference))
    assert all(torch.equal(*pair) for pair in zip(images(pipe), images(reference), strict=True))


def test_weights_moved_by_blocks_can_be_hashed() -> None:
    pipe = dgkit.load("tiny-sd3")
    hashed = provenance.weights_sha256(pipe.transformer)
    assert provenance.weights_sha256(memory.move(pipe, torch.device("cpu"), "blocks").transformer) == hashed
