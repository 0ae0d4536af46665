"""The network of `data/external/mnist_dit.safetensors`, as its README's description has it."""

import math
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dgkit.anatomy import Stack, Transformer, output
from dgkit.paths import DATA

WIDTH, HEADS = 64, 4

ROW = Transformer(
    (Stack("dits", None, (output("msa", "alpha1"), output("mlp", "alpha2"))),),
    channels=lambda model: WIDTH,
    latents="x",
    timestep="t",
    direct=True,
)
"""What dgkit has to be told of it."""


class MnistBlock(nn.Module):
    """z + alpha1 * attention(adaLN(z)), then + alpha2 * ff(adaLN(z)), each part of adaLN by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("beta1", "gamma1", "alpha1", "beta2", "gamma2", "alpha2"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        for name in ("wq", "wk", "wv"):
            setattr(self, name, nn.Linear(WIDTH, HEADS * WIDTH))
        self.lv = nn.Linear(HEADS * WIDTH, WIDTH)
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def attention(self, x: Tensor) -> Tensor:
        """Heads as wide as the model; logits over the square root of the number of tokens."""
        q, k, v = (getattr(self, name)(x).unflatten(2, (HEADS, WIDTH)).transpose(1, 2) for name in ("wq", "wk", "wv"))
        weights = (q @ k.mT / math.sqrt(x.shape[1])).softmax(-1)
        return self.lv((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Tokens (B, T, C) under a condition (B, C)."""
        z = z + self.alpha1(condition)[:, None] * self.attention(self._modulated(z, condition, 1))
        return z + self.alpha2(condition)[:, None] * self.ff(self._modulated(z, condition, 2))

    def _modulated(self, z: Tensor, condition: Tensor, number: int) -> Tensor:
        gamma, beta, norm = (getattr(self, f"{name}{number}") for name in ("gamma", "beta", "ln"))
        return norm(z) * (1 + gamma(condition)[:, None]) + beta(condition)[:, None]


class TimeEmbedding(nn.Module):
    """Sine and cosine of t times the frequencies in the weights."""

    half_emb: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("half_emb", torch.zeros(WIDTH // 2))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, C)."""
        angles = t[:, None] * self.half_emb
        return torch.cat([angles.sin(), angles.cos()], -1)


class MnistDiT(nn.Module):
    """x (B, 1, 28, 28), integer t (B,) and y (B,) in 0..9 to the predicted noise (B, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.patch_emb = nn.Conv2d(1, 16, 4, 4), nn.Linear(16, WIDTH)
        self.patch_pos_emb = nn.Parameter(torch.zeros(1, 49, WIDTH))
        self.time_emb = nn.Sequential(TimeEmbedding(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.label_emb = nn.Embedding(10, WIDTH)
        self.dits = nn.ModuleList(MnistBlock() for _ in range(3))
        self.ln, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See the class."""
        z = self.patch_emb(self.conv(x).flatten(2).mT) + self.patch_pos_emb
        condition = self.time_emb(t) + self.label_emb(y)
        for block in self.dits:
            z = block(z, condition)
        patches = self.linear(self.ln(z)).unflatten(2, (4, 4)).unflatten(1, (7, 7))  # (B, 7, 7, 4, 4)
        return patches.transpose(2, 3).reshape(len(x), 1, 28, 28)


def load() -> Any:
    """The trained network."""
    model = MnistDiT()
    model.load_state_dict(load_file(DATA / "external" / "mnist_dit.safetensors"), strict=True)
    return model.eval().requires_grad_(False)
