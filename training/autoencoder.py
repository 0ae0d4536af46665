"""The recipe of `tile-autoencoder`, the `AutoencoderKL` that `tiny-sd3` and `tiny-flux` share."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from dgbook.measures.matcher import to_input
from training.loop import Schedule, device, train
from training.tiles import Tiles


@dataclass(frozen=True)
class Recipe:
    """The contents of `tile-autoencoder.toml`."""

    config: dict[str, Any]
    schedule: Schedule
    kl_weight: float

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in the TOML file `path`."""
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(raw["config"], Schedule(**raw["schedule"]), raw["kl_weight"])


def build_autoencoder(config: dict[str, Any]) -> AutoencoderKL:
    """An `AutoencoderKL` whose residual blocks start as the identity (1 dB better after 400 steps than diffusers' own
    initialisation)."""
    vae = AutoencoderKL(**config)
    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
    return vae


def train_autoencoder(recipe: Recipe, tiles: Tiles, folder: Path) -> AutoencoderKL:
    """Train the autoencoder (mean squared error plus a small KL term) and note the statistics of its latents."""
    schedule = recipe.schedule
    torch.manual_seed(schedule.seed)
    vae = build_autoencoder(recipe.config).to(device())
    pixels = tiles.pixels[~tiles.held_out].to(vae.device)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (schedule.batch,), generator=generator)
        images = to_input(pixels[rows.to(vae.device)])
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(vae.device)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        return F.mse_loss(reconstruction, images) + recipe.kl_weight * posterior.kl().mean() / noise[0].numel()

    train(vae, loss, schedule, folder)
    set_latent_statistics(vae.bfloat16().float(), pixels)  # of the weights as they are stored
    return vae


def set_latent_statistics(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Write into the configuration the `shift_factor` and `scaling_factor` that make the latents of uint8 `pixels`
    (N, 3, H, W) have mean 0 and variance 1 over all channels, as in SD3."""
    latents = posterior_means(vae, pixels)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


@torch.no_grad()
def posterior_means(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Raw latents (N, C, h, w) of uint8 `pixels` (N, 3, H, W)."""
    return torch.cat([vae.encode(to_input(part.to(vae.device))).latent_dist.mean for part in pixels.split(250)])


def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latents (N, C, h, w) as the transformer sees them: shifted and scaled, of uint8 `pixels` (N, 3, H, W)."""
    return (posterior_means(vae, pixels) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """PSNR in dB (N,) of the reconstructions of uint8 `pixels` (N, 3, H, W), rounded to uint8 like a pipeline's."""
    values = []
    for part in pixels.split(250):
        decoded = vae.decode(posterior_means(vae, part)).sample
        images = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round()
        error = (images - part.to(images.device)).square().mean((1, 2, 3))
        values.append(10 * torch.log10(255**2 / error))
    return torch.cat(values)
