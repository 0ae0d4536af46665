"""Parts of a pipeline as ONNX graphs, with inputs and outputs that are alike for all models.

transformer
: latents (B, c, h, w), timestep (B,), mask (L, B, C) and the conditions to prediction (B, c, h, w), magnitude and
  energy (L, B, C)

text
: ids_0, ids_1, ... (1, n) of the tokenizers to the conditions of one caption

decoder
: latents (B, c, h, w) to an image (B, 3, H, W) from 0 to 1

L blocks, C channels, B rows, each of which has latents, conditions and a mask of its own. The mask multiplies the image
tokens of each block's output; magnitude and energy are the means of |z| and z^2 over the image tokens after that.
"""

import inspect
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgkit.anatomy import dissect

OPSET = 17


class TransformerGraph(nn.Module):
    """A pipeline's transformer with masks and statistics.

    Args:
        pipe: the pipeline.
        call: the keyword arguments of one call that it makes of its transformer, with one row.
        latent: shape (c, h, w) of the pipeline's latents, before they are packed to tokens (Flux).
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], latent: tuple[int, ...]) -> None:
        super().__init__()
        self.anatomy = dissect(pipe)
        self.model = self.anatomy.model
        self.pipe = [pipe]  # in a list, so that it is no submodule
        self.latent = latent
        row = self.anatomy.row
        own = {row.latents, row.timestep}
        self.packed = call[row.latents].ndim == 3
        self.conditions = {
            name: value
            for name, value in call.items()
            if isinstance(value, Tensor) and name not in own and name not in row.unbatched
        }
        self.fixed = {name: value for name, value in call.items() if name not in own | set(self.conditions)}
        self.timestep_dtype = call[row.timestep].dtype

    def forward(self, latents: Tensor, timestep: Tensor, mask: Tensor, *conditions: Tensor) -> tuple[Tensor, ...]:
        pipe, row, (channels, height, width) = self.pipe[0], self.anatomy.row, self.latent
        magnitude: list[Tensor] = []
        energy: list[Tensor] = []

        def watch(block: Any) -> Any:
            def after(module: nn.Module, args: Any, output: Any) -> Any:
                image = block.image(output) * mask[block.index][:, None]
                magnitude.append(image.abs().mean(1))
                energy.append(image.square().mean(1))
                return block.with_image(output, image)

            return after

        hooks = [block.module.register_forward_hook(watch(block)) for block in self.anatomy.blocks]
        values = pipe._pack_latents(latents, latents.shape[0], channels, height, width) if self.packed else latents
        given = dict(zip(self.conditions, conditions, strict=True))
        call = self.fixed | given | {row.latents: values, row.timestep: timestep, "return_dict": False}
        try:
            output = self.model(**call)[0]
        finally:
            for hook in hooks:
                hook.remove()
        if self.packed:
            scale = pipe.vae_scale_factor
            output = pipe._unpack_latents(output, height * scale, width * scale, scale)
        return output[:, : self.anatomy.predicted_channels], torch.stack(magnitude), torch.stack(energy)


class TextGraph(nn.Module):
    """A pipeline's text encoders, from token ids to what its transformer is called with: its own `encode_prompt`."""

    def __init__(self, pipe: Any, max_sequence_length: int) -> None:
        super().__init__()
        self.pipe = [pipe]
        self.encoders = nn.ModuleList([getattr(pipe, name) for name in parts(pipe, "text_encoder")])
        self.prompts = [""] * (len(self.encoders) - 1)
        self.call = {"max_sequence_length": max_sequence_length}
        if "do_classifier_free_guidance" in inspect.signature(pipe.encode_prompt).parameters:
            self.call["do_classifier_free_guidance"] = False

    def forward(self, *ids: Tensor) -> tuple[Tensor, ...]:
        pipe = self.pipe[0]
        with _tokenized(pipe, ids):
            encoded = pipe.encode_prompt("", *self.prompts, **self.call)
        # the embeddings of the prompt and their pooled vector; SD3 has those of the negative prompt after each
        return encoded[0], next(value for value in encoded[1:] if value is not None and value.ndim == 2)


class DecoderGraph(nn.Module):
    """A pipeline's decoder, from its latents to an image from 0 to 1."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.vae = pipe.vae

    def forward(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        image = self.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
        return (image / 2 + 0.5).clamp(0, 1)


def parts(pipe: Any, name: str) -> list[str]:
    """The pipeline's components `name`, `name`_2, ..., such as its tokenizers."""
    found = [part for part in pipe.components if part == name or re.fullmatch(rf"{name}_\d", part)]
    return sorted(part for part in found if pipe.components[part] is not None)


@dataclass(frozen=True)
class _Given:
    """A tokenizer whose ids are given."""

    input_ids: Tensor

    def __call__(self, *args: Any, **kwargs: Any) -> "_Given":
        return self

    def tokenize(self, text: str) -> list[str]:
        return []


@contextmanager
def _tokenized(pipe: Any, ids: Sequence[Tensor]) -> Iterator[None]:
    """Inside, each tokenizer of the pipeline gives these ids, whatever it is asked."""
    names = parts(pipe, "tokenizer")
    real = {name: getattr(pipe, name) for name in names}
    try:
        for name, given in zip(names, ids, strict=True):
            setattr(pipe, name, _Given(given))
        yield
    finally:
        for name, tokenizer in real.items():
            setattr(pipe, name, tokenizer)


def onnx_bytes(
    graph: nn.Module, example: Mapping[str, Tensor], outputs: Sequence[str], batch: Mapping[str, int] | None = None
) -> bytes:
    """A graph as an ONNX file of standard operators, simplified by onnxruntime, without notes on where it was made.

    Args:
        graph: takes the values of `example` in their order.
        outputs: names.
        batch: the axis that is the batch, by name of input or output; the others keep the sizes of `example`.
    """
    axes = {name: {axis: "batch"} for name, axis in (batch or {}).items()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of every size that it takes as a constant
        raw, simple = Path(folder) / "raw.onnx", Path(folder) / "simple.onnx"
        with mock.patch.object(F, "rms_norm", _rms_norm), mock.patch.object(Tensor, "reshape", _reshape):
            torch.onnx.export(
                graph.eval(),
                tuple(example.values()),
                raw,
                input_names=list(example),
                output_names=list(outputs),
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(simple)
        options.intra_op_num_threads = 1
        onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
        model = onnx.load(simple)
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    return model.SerializeToString()


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`torch.nn.functional.rms_norm`, for which the exporter has no operator."""
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    return normed if weight is None else normed * weight


_plain_reshape = Tensor.reshape


def _reshape(x: Tensor, *shape: Any, **named: Any) -> Tensor:
    """`Tensor.reshape`, where the last axis is cut into pairs (Flux's rotary embedding) without the sizes before it.

    Those come from a slice of a shape, which a trace takes as constants: the batch would be fixed.
    """
    if len(shape) == x.ndim + 1 and shape[-2:] == (-1, 2):
        return x.unflatten(-1, (x.shape[-1] // 2, 2))
    return _plain_reshape(x, *shape, **named)
