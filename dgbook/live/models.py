"""One model as the live page needs it: its graphs, its constants and its tokenizers."""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dgbook.live.graphs import DecoderGraph, TextGraph, TransformerGraph, onnx_bytes, parts
from dgkit import sampling, zoo
from dgkit.anatomy import dissect
from dgkit.files import read_lines
from dgkit.paths import DATA

MODELS = ("tiny-sd3", "tiny-flux", "tiny-dit")
"""The shipped models, in the order in which the page offers them."""

MAX_STEPS = 50
"""The largest number of sampling steps the page offers."""

_ROWS = 3  # of the traced call


@dataclass
class _Run:
    """What one run of a pipeline hands to its transformer and scheduler.

    Attributes:
        call: the keyword arguments of the last call of the transformer.
        latent: shape (c, h, w) of what is decoded.
        steps: for each step the timestep given to the transformer and a, b, p, q: of latents x and prediction v, the
            scheduler makes the next latents a x + b v and takes p x + q v for the finished ones.
    """

    call: dict[str, Any] = field(default_factory=dict)
    latent: tuple[int, ...] = ()
    steps: list[list[float]] = field(default_factory=list)


@contextmanager
def _watched(pipe: Any) -> Iterator[_Run]:
    """Inside, the transformer and the decoder of a pipeline do nothing, and its scheduler tells its coefficients."""
    run = _Run()
    model, scheduler = pipe.transformer, pipe.scheduler
    step, anatomy = scheduler.step, dissect(pipe)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        run.call = dict(signature.bind(*args, **kwargs).arguments)
        latents = run.call[anatomy.row.latents]
        sigma = latents if anatomy.predicted_channels else latents[:, :0]
        return _Output((torch.cat([latents, sigma], 1),))

    def coefficients(prediction: Tensor, t: Any, latents: Tensor, **kwargs: Any) -> Any:
        x, v = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        made = step(v, t, x, **kwargs)
        following = made[0]
        finished = made[1] if len(made) > 1 else x - scheduler.sigmas[scheduler.step_index - 1] * v
        timestep = run.call[anatomy.row.timestep].reshape(-1)[0]
        run.steps.append([float(value) for value in (timestep, *following, *finished)])
        return type(made)((latents,)) if isinstance(made, tuple) else type(made)(prev_sample=latents)

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        run.latent = tuple(latents.shape[1:])
        return _Output((latents.new_zeros(len(latents), 3, *latents.shape[2:]),))

    signature = inspect.signature(model.forward)
    with (
        mock.patch.object(model, "forward", forward),
        mock.patch.object(scheduler, "step", coefficients),
        mock.patch.object(pipe.vae, "decode", decode),
    ):
        yield run


class _Output(tuple[Tensor]):
    """A tuple that is an output of diffusers, too."""

    @property
    def sample(self) -> Tensor:
        return self[0]


@dataclass(frozen=True)
class Exported:
    """A model for the page.

    Attributes:
        graphs: ONNX files by name: "transformer", "decoder" and, for captions, "text".
        constants: what the worker needs beside them; plain JSON.
        choices: what the page shows before anything is loaded; plain JSON.
    """

    graphs: dict[str, bytes]
    constants: dict[str, Any]
    choices: dict[str, Any]


def export(name: str) -> Exported:
    """A shipped model for the page."""
    pipe = zoo.load(name, device="cpu")
    row, anatomy = zoo.MODELS[name], dissect(pipe)
    condition = sampling.own_conditions(pipe, 1)
    tables = []
    for steps in range(1, MAX_STEPS + 1):
        with _watched(pipe) as run:
            sampling.generate(pipe, condition, [0], num_inference_steps=steps)
        tables.append(run.steps)
    graph = TransformerGraph(pipe, run.call, run.latent)
    timestep = run.call[anatomy.row.timestep]
    example = {
        "latents": torch.randn(_ROWS, *run.latent),
        "timestep": timestep.repeat(_ROWS),
        "mask": torch.ones(len(anatomy.blocks), _ROWS, anatomy.channels),
        **{key: torch.cat([value] * _ROWS) for key, value in graph.conditions.items()},
    }
    outputs = ("prediction", "magnitude", "energy")
    batch = dict.fromkeys([*example, *outputs], 0) | dict.fromkeys(("mask", "magnitude", "energy"), 1)
    graphs = {
        "transformer": onnx_bytes(graph, example, outputs, batch),
        "decoder": onnx_bytes(
            DecoderGraph(pipe), {"latents": torch.randn(1, *run.latent)}, ["image"], {"latents": 0, "image": 0}
        ),
    }
    constants = {
        "latent": run.latent,
        "blocks": len(anatomy.blocks),
        "channels": anatomy.channels,
        "conditions": {key: list(value.shape[1:]) for key, value in graph.conditions.items()},
        "integerTimestep": not timestep.is_floating_point(),
        "tables": tables,
    }
    choices = _choices(name, pipe) | {"blocks": len(anatomy.blocks), "channels": anatomy.channels, "side": row.side}
    if tokenizers := parts(pipe, "tokenizer"):
        length = row.call["max_sequence_length"]
        ids = {f"ids_{i}": torch.ones(1, length, dtype=torch.int64) for i in range(len(tokenizers))}
        by_rank = sorted(graph.conditions, key=lambda key: -graph.conditions[key].ndim)  # as the graph puts them out
        graphs["text"] = onnx_bytes(TextGraph(pipe, length), ids, by_rank)
        constants["tokenizers"] = [tokenizer_data(getattr(pipe, part), length) for part in tokenizers]
    else:
        constants["null"] = pipe.transformer.config.num_embeds_ada_norm
    return Exported(graphs, constants, choices)


def _choices(name: str, pipe: Any) -> dict[str, Any]:
    row = zoo.MODELS[name]
    preset = row.preset
    chosen: dict[str, Any] = {
        "name": name,
        "pipeline": row.pipeline,
        "preset": {
            "block": preset.block,
            "dims": list(preset.dims or ()),
            "scale": preset.scale_with_cfg,  # of the panel with both; DG alone starts from it, too
            "guidance": preset.guidance_scale,
            "steps": preset.steps,
        },
        "maxSteps": MAX_STEPS,
    }
    if labels := getattr(pipe, "labels", None):
        classes = {index: label for label, index in labels.items()}
        return chosen | {"classes": [classes[index] for index in sorted(classes)]}
    return chosen | {"captions": list(dict.fromkeys(read_lines(DATA / "prompts" / f"{row.data}.txt")))}


def tokenizer_data(tokenizer: Any, length: int) -> dict[str, Any]:
    """What the page's own tokenizers need of a byte-pair or unigram tokenizer."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    ids = {token["content"]: token["id"] for token in data["added_tokens"]}
    common = {"length": length, "end": ids[tokenizer.eos_token], "pad": ids[tokenizer.pad_token], "special": list(ids)}
    if model["type"] == "BPE":
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        return common | {
            "kind": "bpe",
            "start": ids[tokenizer.bos_token],
            "unknown": ids[tokenizer.unk_token],
            "vocabulary": sorted(model["vocab"], key=model["vocab"].get),
            "merges": merges,
        }
    return common | {"kind": "unigram", "unknown": model["unk_id"], "vocabulary": model["vocab"]}


def files_of(name: str) -> list[Path]:
    """All files of a shipped model that its export depends on."""
    folder = DATA / "models" / name
    return sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".model", ".txt"))
