"""The recipes of `tiny-sd3` and `tiny-flux`: text-to-image transformers, rectified flow (Esser et al. 2024).

Both classes here hold what is trained: a transformer and its text encoders. `forward` predicts the velocity from noisy
latents, noise levels and tokens, as the class's pipeline would; the rest of this module is the same for both.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional as F

from training import text
from training.autoencoder import encode
from training.loop import Schedule, device, read_toml, train
from training.tiles import Tiles

TIMESTEPS = 1000
"""The transformers' timestep at noise level 1 (the schedulers' default `num_train_timesteps`)."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the trained model, but for the autoencoder: the contents of a TOML file beside this module.

    Attributes:
        family: a key of `FAMILIES`: the name of the file, or of its base.
        text_rate: the learning rate of the text encoders over that of the transformer.
    """

    family: str
    transformer: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    schedule: Schedule
    caption_dropout: float
    snapshots: tuple[int, ...]
    text_rate: float = 1.0

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in the TOML file `path`, see `read_toml`."""
        raw = read_toml(path)
        return cls(
            Path(raw.get("base", path)).stem,
            raw["transformer"],
            tuple(raw["text_encoders"]),
            Schedule(**raw["schedule"]),
            raw["caption_dropout"],
            tuple(raw["snapshots"]),
            raw.get("text_rate", 1.0),
        )


class TextToImage(nn.Module, ABC):
    """A transformer and the text encoders that are trained with it.

    Attributes:
        call: what every call of the pipeline has to pass, since its own defaults are those of large models.
        transformer: adaLN-zero as DiT's (Peebles & Xie 2023), which diffusers leaves undone: the gates of the blocks
            and the output start at zero.
        text_encoders: in the order of the pipeline.
        tokenizers: one per text encoder.
    """

    call: ClassVar[dict[str, Any]]

    def __init__(self, transformer: Any, text_encoders: Sequence[nn.Module], tokenizers: Sequence[Any]) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoders = nn.ModuleList(text_encoders)
        self.tokenizers = tuple(tokenizers)
        modulations = [m.linear for m in transformer.modules() if type(m).__name__.startswith("AdaLayerNorm")]
        for layer in (*modulations, transformer.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids (N, encoders, LENGTH), padded as the pipeline pads."""
        padding: dict[str, Any] = {"padding": "max_length", "max_length": text.LENGTH, "truncation": True}
        encodings = [tokenizer(list(captions), **padding, return_tensors="pt") for tokenizer in self.tokenizers]
        return torch.stack([encoding.input_ids for encoding in encodings], 1)

    @abstractmethod
    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the pipeline's `encode_prompt` makes of `tokens` (B, encoders, LENGTH): the text tokens' embeddings
        (B, text tokens, width) and the pooled text (B, width)."""

    @abstractmethod
    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """Velocity (B, C, h, w) predicted for latents `noisy` (B, C, h, w) of noise level `sigma` (B,), under the text
        of `tokens` (B, encoders, LENGTH)."""

    @abstractmethod
    def pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """The complete pipeline. Its scheduler has no timestep shift: that is for images of more tokens."""


class SD3(TextToImage):
    """`StableDiffusion3Pipeline`: two CLIP encoders side by side, then the T5 encoder, along the sequence."""

    call = {"max_sequence_length": text.LENGTH}

    def __init__(self, recipe: Recipe, captions: Sequence[str]) -> None:
        clip, t5 = text.clip_tokenizer(captions), text.t5_tokenizer(captions)
        first, second, third = recipe.text_encoders
        encoders = (
            text.clip_encoder(clip, first, projection=True),
            text.clip_encoder(clip, second, projection=True),
            text.t5_encoder(t5, third),
        )
        super().__init__(SD3Transformer2DModel(**recipe.transformer), encoders, (clip, clip, t5))

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        *clips, t5 = self.text_encoders
        outputs = [encoder(tokens[:, i], output_hidden_states=True) for i, encoder in enumerate(clips)]
        long = t5(tokens[:, -1])[0]
        side_by_side = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        padded = F.pad(side_by_side, (0, long.shape[-1] - side_by_side.shape[-1]))
        return torch.cat([padded, long], 1), torch.cat([output.text_embeds for output in outputs], -1)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        embeddings, pooled = self.embed(tokens)
        return self.transformer(noisy, embeddings, pooled, sigma * TIMESTEPS).sample

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            self.transformer, FlowMatchEulerDiscreteScheduler(), vae,
            self.text_encoders[0], self.tokenizers[0],
            self.text_encoders[1], self.tokenizers[1],
            self.text_encoders[2], self.tokenizers[2],
        )  # fmt: skip


class Flux(TextToImage):
    """`FluxPipeline`: the pooled text from a CLIP encoder, the text tokens from a T5 encoder, packed latents.

    Classifier-free guidance takes `true_cfg_scale` and one empty negative prompt per prompt.
    """

    call = {"max_sequence_length": text.LENGTH, "height": 32, "width": 32}

    def __init__(self, recipe: Recipe, captions: Sequence[str]) -> None:
        clip, t5 = text.clip_tokenizer(captions), text.t5_tokenizer(captions)
        first, second = recipe.text_encoders
        encoders = (text.clip_encoder(clip, first, projection=False), text.t5_encoder(t5, second))
        super().__init__(FluxTransformer2DModel(**recipe.transformer), encoders, (clip, t5))

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        clip, t5 = self.text_encoders
        return t5(tokens[:, 1])[0], clip(tokens[:, 0]).pooler_output

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        embeddings, pooled = self.embed(tokens)
        batch, channels, height, width = noisy.shape
        velocity = self.transformer(
            FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            embeddings,
            pooled,
            sigma,  # this transformer multiplies by 1000 itself
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
            txt_ids=torch.zeros(text.LENGTH, 3, device=noisy.device),
        ).sample
        return FluxPipeline._unpack_latents(velocity, height, width, vae_scale_factor=1)

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        return FluxPipeline(
            FlowMatchEulerDiscreteScheduler(), vae,
            self.text_encoders[0], self.tokenizers[0],
            self.text_encoders[1], self.tokenizers[1],
            self.transformer,
        )  # fmt: skip


FAMILIES: dict[str, type[SD3] | type[Flux]] = {"tiny-sd3": SD3, "tiny-flux": Flux}
"""The classes by the name of the shipped model."""


def noised(latents: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) on the straight line to `noise` at noise level `sigma` (B,), and the line's velocity."""
    level = sigma.view(-1, 1, 1, 1)
    return (1 - level) * latents + level * noise, noise - latents


def build_model(recipe: Recipe, tiles: Tiles) -> TextToImage:
    """The untrained model of a recipe; its tokenizers know the words of all captions."""
    torch.manual_seed(recipe.schedule.seed)
    return FAMILIES[recipe.family](recipe, [str(caption) for caption in tiles.captions])


def train_model(recipe: Recipe, model: TextToImage, vae: AutoencoderKL, tiles: Tiles, folder: Path) -> TextToImage:
    """Train `model` on the tiles that are not held out, with logit-normal noise levels.

    A share `caption_dropout` of the samples has the empty text, through the same encoders. On a GPU all data lie in its
    memory and matrix products are in TF32; bfloat16 autocast would also round Flux's timesteps, to multiples of 4 above
    512, which sampling in float32 does not.
    """
    place, schedule = device(), recipe.schedule
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")
    model.to(place)
    latents = encode(vae.to(place), tiles.pixels[~tiles.held_out])
    captions = [str(caption) for caption, held_out in zip(tiles.captions, tiles.held_out, strict=True) if not held_out]
    tokens, no_text = model.tokenize(captions).to(place), model.tokenize([""]).to(place)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (schedule.batch,), generator=generator).to(place)
        dropped = (torch.rand(schedule.batch, generator=generator) < recipe.caption_dropout).to(place)
        sigma = torch.randn(schedule.batch, generator=generator).sigmoid().to(place)
        noise = torch.randn(latents[rows].shape, generator=generator).to(place)
        noisy, velocity = noised(latents[rows], noise, sigma)
        condition = torch.where(dropped[:, None, None], no_text, tokens[rows])
        return F.mse_loss(model(noisy, sigma, condition), velocity)

    rates = {"text_encoders": recipe.text_rate}
    train(model, loss, schedule, folder, snapshots=recipe.snapshots, rates=rates)
    return model


def save_pipeline(model: TextToImage, vae: AutoencoderKL, folder: Path) -> None:
    """Write the complete pipeline folder, weights in bfloat16 safetensors; turns the models into bfloat16."""
    pipe = model.pipeline(vae)
    pipe.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    # text encoders load in the type that their configuration names, all else in float32
    for config in folder.glob("text_encoder*/config.json"):
        config.write_text(
            json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}, indent=2) + "\n",
            encoding="utf-8",
        )
