"""A hub of the tests' own: a local server that speaks what huggingface_hub and diffusers ask for, and small models of
the real classes in folders laid out as the real ones."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_api
from safetensors.torch import save_file
from torch import Tensor

from dgkit.paths import DATA

SD3, SD35 = "stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-3.5-large"
FLUX, DE_DISTILLED = "black-forest-labs/FLUX.1-dev", "nyanko7/flux-dev-de-distill"
DIT = "facebook/DiT-XL-2-256"


# ----------------------------------------------------------------------------------------------------------- the server


@dataclass
class Hub:
    """What the server serves.

    Attributes:
        root: holds a folder owner/name/revision for each repository, "/" in a revision written as "--".
        gated: status with which a repository's files are refused.
        token: what gives access to those.
        expired: what is not accepted at all.
        served: paths whose content was sent, "owner/name/path".
        unknown: requests that the server does not understand.
    """

    root: Path
    gated: dict[str, int] = field(default_factory=dict)
    token: str = "hf_right"
    expired: str = "hf_expired"
    served: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def folder(self, repo: str, revision: str = "main") -> Path:
        return self.root / repo / revision.replace("/", "--")

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()

    def revision(self, repo: str, asked: str) -> str | None:
        """The revision of a name or commit."""
        known = [f.name.replace("--", "/") for f in (self.root / repo).iterdir()] if (self.root / repo).is_dir() else []
        return next((name for name in known if asked in (name, self.commit(repo, name))), None)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.headers.get("Authorization") == f"Bearer {hub.expired}":
                return self.answer(401, headers={"X-Error-Message": "Invalid credentials in Authorization header"})
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"] and len(parts) >= 4:
                repo, what = "/".join(parts[2:4]), parts[4:5]
                revision = hub.revision(repo, parts[5] if len(parts) > 5 else "main")
                if revision is None:
                    return self.refuse(repo, len(parts) > 5)
                if what == ["tree"]:
                    return self.answer_json(self.tree(repo, revision))
                return self.answer_json(
                    {
                        "id": repo,
                        "modelId": repo,
                        "sha": hub.commit(repo, revision),
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "siblings": [{"rfilename": entry["path"]} for entry in self.tree(repo, revision)],
                    }
                )
            if len(parts) > 4 and parts[2] == "resolve":
                return self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            if parts != [""]:
                hub.unknown.append(f"{self.command} {self.path}")
            self.answer(404 if parts != [""] else 200)

        def tree(self, repo: str, revision: str) -> list[dict[str, Any]]:
            folder = hub.folder(repo, revision)
            return [
                {"type": "file", "path": str(f.relative_to(folder)), "size": f.stat().st_size, "oid": "0" * 40}
                for f in sorted(folder.rglob("*"))
                if f.is_file()
            ]

        def send_file(self, repo: str, asked: str, path: str) -> None:
            revision = hub.revision(repo, asked)
            if revision is None:
                return self.refuse(repo, True)
            if repo in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {repo} is restricted."}
                return self.answer(hub.gated[repo], headers=headers)
            file = hub.folder(repo, revision) / path
            commit = {"X-Repo-Commit": hub.commit(repo, revision)}
            if not file.is_file():
                return self.answer(404, headers=commit | {"X-Error-Code": "EntryNotFound"})
            content = file.read_bytes()
            if self.command == "GET":
                hub.served.append(f"{repo}/{path}")
            self.answer(200, content, commit | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

        def refuse(self, repo: str, revision_asked: bool) -> None:
            """As the real one: without a login, what does not exist is 401."""
            if revision_asked and (hub.root / repo).is_dir():
                return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            status = 404 if self.headers.get("Authorization") else 401
            self.answer(status, headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})

        def answer_json(self, value: Any) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The server's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def connect(monkeypatch: pytest.MonkeyPatch, address: str, home: Path, token: str = "") -> None:
    """Make the hub's client use another address and an empty cache in `home`, as $HF_ENDPOINT and $HF_HOME would."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)


# ------------------------------------------------------------------------------------------------------- the small ones


def randomized(name: str) -> Any:
    """A shipped model's pipeline, which is of the real classes, with random weights in its transformer."""
    pipe = DiffusionPipeline.from_pretrained(DATA / "models" / name, dtype=torch.float32)
    torch.manual_seed(0)
    for weight in pipe.transformer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return pipe


def fill(root: Path) -> Hub:
    """The five repositories, each with what else lies in it on the real hub and must not be downloaded."""
    hub = Hub(root)
    _sd3(hub)
    _sd35(hub)
    _flux(hub)
    _dit(hub)
    return hub


def _sd3(hub: Hub) -> None:
    folder, pipe = hub.folder(SD3), randomized("tiny-sd3").to(torch.float16)
    pipe.save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        part = getattr(pipe, name)
        shard = {"max_shard_size": "300KB"} if name == "text_encoder_3" else {}
        shutil.rmtree(folder / name)
        part.save_pretrained(folder / name, **shard)
        part.save_pretrained(folder / name, variant="fp16", **shard)
    assert (folder / "text_encoder_3" / "model.safetensors.index.fp16.json").is_file()
    (folder / "README.md").write_text("licence")


def _sd35(hub: Hub) -> None:
    folder, pipe = hub.folder(SD35), randomized("tiny-sd3").to(torch.bfloat16)
    pipe.save_pretrained(folder, max_shard_size="3MB")
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    save_file(original_sd3(pipe.transformer.state_dict()), folder / "sd3.5_large.safetensors")
    (folder / "text_encoders").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "text_encoders" / "t5xxl_fp16.safetensors")


def _flux(hub: Hub) -> None:
    folder, pipe = hub.folder(FLUX), randomized("tiny-flux").to(torch.bfloat16)
    with_guidance(pipe)
    pipe.save_pretrained(folder, max_shard_size="1500KB")
    assert len(list((folder / "transformer").glob("*-of-00003.safetensors"))) == 3
    weights = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    save_file(original_flux(weights), folder / "flux1-dev.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "ae.safetensors")
    hub.folder(DE_DISTILLED).mkdir(parents=True)
    other = {name: weight + 1 for name, weight in weights.items() if "guidance" not in name}
    save_file(original_flux(other), hub.folder(DE_DISTILLED) / "consolidated_s6700.safetensors")


def with_guidance(pipe: Any) -> None:
    """Give a small Flux the embedding of the distilled guidance that Flux-dev has."""
    config = dict(pipe.transformer.config) | {"guidance_embeds": True}
    torch.manual_seed(1)
    made = type(pipe.transformer).from_config(config).to(torch.bfloat16)
    made.load_state_dict(pipe.transformer.state_dict(), strict=False)
    pipe.register_modules(transformer=made)


def _dit(hub: Hub) -> None:
    """The main branch has pickles, and configurations of a time when the class had another name."""
    for revision, safe in (("main", False), ("refs/pr/1", True)):
        folder, pipe = hub.folder(DIT, revision), randomized("tiny-dit")
        pipe.save_pretrained(folder)
        index = json.loads((folder / "model_index.json").read_text())
        index["transformer"] = ["diffusers", "Transformer2DModel"]
        index["_diffusers_version"] = "0.12.0.dev0"
        index["id2label"] = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus"}
        (folder / "model_index.json").write_text(json.dumps(index))
        config = json.loads((folder / "transformer" / "config.json").read_text())
        legacy = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False}
        config |= legacy | {"_class_name": "Transformer2DModel", "use_linear_projection": False}
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
        for part in ("transformer", "vae"):
            torch.save(getattr(pipe, part).state_dict(), folder / part / "diffusion_pytorch_model.bin")
            if not safe:
                (folder / part / "diffusion_pytorch_model.safetensors").unlink()


# ------------------------------------------------------------------------------ the layouts of the models' own authors


def original_sd3(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD3's layout, as in sd3_medium.safetensors, from diffusers' (independent of its conversion the other way)."""
    left, made = dict(weights), {}
    count = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks."))

    def put(name: str, value: Tensor) -> None:
        made[f"model.diffusion_model.{name}"] = value.contiguous().clone()

    def move(name: str, *sources: str) -> None:
        for kind in ("weight", "bias"):
            put(f"{name}.{kind}", torch.cat([left.pop(f"{source}.{kind}") for source in sources]))

    put("pos_embed", left.pop("pos_embed.pos_embed"))
    move("x_embedder.proj", "pos_embed.proj")
    move("context_embedder", "context_embedder")
    for own, other in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        move(f"{own}.mlp.0", f"time_text_embed.{other}.linear_1")
        move(f"{own}.mlp.2", f"time_text_embed.{other}.linear_2")
    for i in range(count):
        own, other, last = f"joint_blocks.{i}", f"transformer_blocks.{i}", i == count - 1
        move(f"{own}.x_block.attn.qkv", *(f"{other}.attn.to_{x}" for x in "qkv"))
        move(f"{own}.context_block.attn.qkv", *(f"{other}.attn.add_{x}_proj" for x in "qkv"))
        for side, added in (("x_block", ""), ("context_block", "added_")):
            for x in "qk":
                if (source := f"{other}.attn.norm_{added}{x}.weight") in left:
                    put(f"{own}.{side}.attn.ln_{x}.weight", left.pop(source))
        move(f"{own}.x_block.attn.proj", f"{other}.attn.to_out.0")
        move(f"{own}.x_block.adaLN_modulation.1", f"{other}.norm1.linear")
        move(f"{own}.x_block.mlp.fc1", f"{other}.ff.net.0.proj")
        move(f"{own}.x_block.mlp.fc2", f"{other}.ff.net.2")
        if last:  # no more text after it, and (scale, shift) the other way round
            for kind in ("weight", "bias"):
                scale, shift = left.pop(f"{other}.norm1_context.linear.{kind}").chunk(2)
                put(f"{own}.context_block.adaLN_modulation.1.{kind}", torch.cat([shift, scale]))
        else:
            move(f"{own}.context_block.adaLN_modulation.1", f"{other}.norm1_context.linear")
            move(f"{own}.context_block.attn.proj", f"{other}.attn.to_add_out")
            move(f"{own}.context_block.mlp.fc1", f"{other}.ff_context.net.0.proj")
            move(f"{own}.context_block.mlp.fc2", f"{other}.ff_context.net.2")
    move("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = left.pop(f"norm_out.linear.{kind}").chunk(2)
        put(f"final_layer.adaLN_modulation.1.{kind}", torch.cat([shift, scale]))
    assert not left, left.keys()
    made["first_stage_model.decoder.conv_in.weight"] = torch.zeros(1)  # the real files hold an autoencoder too
    return made


def original_flux(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flux's layout, as in flux1-dev.safetensors, from diffusers' (independent of its conversion the other way)."""
    left, made = dict(weights), {}

    def move(name: str, *sources: str) -> None:
        for kind in ("weight", "bias"):
            made[f"{name}.{kind}"] = torch.cat([left.pop(f"{source}.{kind}") for source in sources]).clone()

    def norm(name: str, source: str) -> None:
        made[f"{name}.scale"] = left.pop(f"{source}.weight").clone()

    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    for own, other in embedders.items():
        if f"time_text_embed.{other}.linear_1.weight" in left:
            move(f"{own}.in_layer", f"time_text_embed.{other}.linear_1")
            move(f"{own}.out_layer", f"time_text_embed.{other}.linear_2")
    move("txt_in", "context_embedder")
    move("img_in", "x_embedder")
    for other in sorted({name.rsplit(".", 2)[0] for name in left if name.startswith("transformer_blocks.")}):
        i = other.split(".")[1]
        own, other = f"double_blocks.{i}", f"transformer_blocks.{i}"
        if f"{own}.img_mod.lin.weight" in made:
            continue
        move(f"{own}.img_mod.lin", f"{other}.norm1.linear")
        move(f"{own}.txt_mod.lin", f"{other}.norm1_context.linear")
        move(f"{own}.img_attn.qkv", *(f"{other}.attn.to_{x}" for x in "qkv"))
        move(f"{own}.txt_attn.qkv", *(f"{other}.attn.add_{x}_proj" for x in "qkv"))
        for side, added in (("img", ""), ("txt", "added_")):
            norm(f"{own}.{side}_attn.norm.query_norm", f"{other}.attn.norm_{added}q")
            norm(f"{own}.{side}_attn.norm.key_norm", f"{other}.attn.norm_{added}k")
        move(f"{own}.img_attn.proj", f"{other}.attn.to_out.0")
        move(f"{own}.txt_attn.proj", f"{other}.attn.to_add_out")
        for side, ff in (("img", "ff"), ("txt", "ff_context")):
            move(f"{own}.{side}_mlp.0", f"{other}.{ff}.net.0.proj")
            move(f"{own}.{side}_mlp.2", f"{other}.{ff}.net.2")
    for i in sorted({name.split(".")[1] for name in left if name.startswith("single_transformer_blocks.")}):
        own, other = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        move(f"{own}.modulation.lin", f"{other}.norm.linear")
        move(f"{own}.linear1", *(f"{other}.attn.to_{x}" for x in "qkv"), f"{other}.proj_mlp")
        norm(f"{own}.norm.query_norm", f"{other}.attn.norm_q")
        norm(f"{own}.norm.key_norm", f"{other}.attn.norm_k")
        move(f"{own}.linear2", f"{other}.proj_out")
    move("final_layer.linear", "proj_out")
    for kind in ("weight", "bias"):
        scale, shift = left.pop(f"norm_out.linear.{kind}").chunk(2)
        made[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    assert not left, left.keys()
    return made
