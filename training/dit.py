"""The recipe of `tiny-dit`: a latent, class-conditional DiT (Peebles & Xie 2023) on Fashion-MNIST."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from dgbook.measures import datasets
from training.loop import Schedule, device, read_toml, train

NULL_CLASS = 1000  # DiTPipeline hard-codes it


@dataclass(frozen=True)
class Recipe:
    """All that decides the trained model: the contents of a TOML file beside this module."""

    autoencoder: dict[str, Any]
    autoencoder_schedule: Schedule
    kl_weight: float
    transformer: dict[str, Any]
    transformer_schedule: Schedule
    label_dropout: float
    scheduler: dict[str, Any]
    snapshots: tuple[int, ...]
    seeds: tuple[int, ...]
    """One training of the transformer for each; the schedule's seed alone if the file names none."""

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in the TOML file `path`, see `read_toml`."""
        raw = read_toml(path)
        schedule = Schedule(**raw["transformer"]["schedule"])
        return cls(
            autoencoder=raw["autoencoder"]["config"],
            autoencoder_schedule=Schedule(**raw["autoencoder"]["schedule"]),
            kl_weight=raw["autoencoder"]["kl_weight"],
            transformer=raw["transformer"]["config"],
            transformer_schedule=schedule,
            label_dropout=raw["transformer"]["label_dropout"],
            scheduler=raw["scheduler"],
            snapshots=tuple(raw["transformer"]["snapshots"]),
            seeds=tuple(raw["transformer"].get("seeds", [schedule.seed])),
        )


def to_rgb(images: Tensor) -> Tensor:
    """Grey uint8 images (N, 1, H, W) as the autoencoder's input (N, 3, H, W) in [-1, 1]."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)


def train_autoencoder(recipe: Recipe, folder: Path) -> AutoencoderKL:
    """Train the autoencoder (mean squared error plus a small KL term) and normalise its latents."""
    schedule = recipe.autoencoder_schedule
    torch.manual_seed(schedule.seed)
    vae = AutoencoderKL(**recipe.autoencoder).to(device())
    images, _ = datasets.fashion_mnist("train")

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (schedule.batch,), generator=generator)
        pixels = to_rgb(images[rows].to(vae.device))
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample(generator=generator)
        kl = posterior.kl().mean() / latents[0].numel()
        return F.mse_loss(vae.decode(latents).sample, pixels) + recipe.kl_weight * kl

    train(vae, loss, schedule, folder)
    normalise_latents(vae, encode(vae, images[:5000]))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means (N, C, h, w) of grey uint8 images."""
    return torch.cat([vae.encode(to_rgb(part.to(vae.device))).latent_dist.mean for part in images.split(250)])


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold the mean and standard deviation of `latents` into the 1x1 convolutions around the latent space.

    `DiTPipeline` ignores `shift_factor`, so the latents themselves have to have mean 0 and variance 1 per channel.
    The autoencoder computes the same reconstructions as before.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log variance of the scaled latents
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def build_transformer(config: dict[str, Any]) -> DiTTransformer2DModel:
    """A `DiTTransformer2DModel` ready for training.

    diffusers leaves two things undone that DiT's own training code does: adaLN-zero (the gates and the output start at
    zero) and label dropout per *sample* (each block's embedding drops on its own coin in `.train()`, so a sample would
    almost never be unconditional in all of them).
    """
    model = DiTTransformer2DModel(**config)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        embedder = block.norm1.emb.class_embedder
        embedder.dropout_prob = 0.0
        nn.init.normal_(embedder.embedding_table.weight, std=0.02)
        embedder.embedding_table.weight.data[len(datasets.FASHION_MNIST_CLASSES) : NULL_CLASS] = 0.0  # unused
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def train_transformer(recipe: Recipe, vae: AutoencoderKL, folder: Path) -> DiTTransformer2DModel:
    """Train the transformer to predict the DDPM noise (Ho et al. 2020); the learned-sigma half stays zero."""
    schedule = recipe.transformer_schedule
    torch.manual_seed(schedule.seed)
    model = build_transformer(recipe.transformer).to(device())
    noise_scheduler = DDIMScheduler(**recipe.scheduler)
    images, labels = datasets.fashion_mnist("train")
    latents = encode(vae.to(device()), images)
    channels = latents.shape[1]

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (schedule.batch,), generator=generator)
        dropped = torch.rand(schedule.batch, generator=generator) < recipe.label_dropout
        condition = labels[rows].masked_fill(dropped, NULL_CLASS)
        timestep = torch.randint(noise_scheduler.config.num_train_timesteps, (schedule.batch,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        timestep, condition, noise = timestep.to(device()), condition.to(device()), noise.to(device())
        noisy = noise_scheduler.add_noise(latents[rows], noise, timestep)
        return F.mse_loss(model(noisy, timestep, condition).sample[:, :channels], noise)

    return train(model, loss, schedule, folder, snapshots=recipe.snapshots)  # type: ignore[return-value]


@torch.no_grad()
def loss_on_test_images(pipe: DiTPipeline) -> float:
    """Mean squared error of the noise that `pipe` predicts, always for the same noised images.

    100 test images, encoded, each with DDPM noise at ten timesteps 50, 150, ..., 950, under their own class.
    """
    images, labels = (tensor[:100] for tensor in datasets.fashion_mnist("test"))
    latents = encode(pipe.vae, images)
    times = range(50, 1000, 100)
    noise = torch.randn((len(times), *latents.shape), generator=torch.Generator().manual_seed(0)).to(latents.device)
    losses = []
    for time, noise_at_time in zip(times, noise, strict=True):
        timestep = torch.full((len(latents),), time, device=latents.device)
        noisy = pipe.scheduler.add_noise(latents, noise_at_time, timestep)
        predicted = pipe.transformer(noisy, timestep=timestep, class_labels=labels.to(latents.device)).sample
        losses.append(F.mse_loss(predicted[:, : latents.shape[1]], noise_at_time))
    return torch.stack(losses).mean().item()


def save_pipeline(
    vae: AutoencoderKL, transformer: DiTTransformer2DModel, scheduler: dict[str, Any], folder: Path
) -> None:
    """Write the complete pipeline folder, weights in bfloat16 safetensors; turns the two models into bfloat16."""
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler(**scheduler))
    pipe.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"
    entries = json.loads(index.read_text(encoding="utf-8"))  # save_pretrained forgets the class names
    entries["id2label"] = {str(i): name for i, name in enumerate(datasets.FASHION_MNIST_CLASSES)}
    index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
