"""The recipe of `tile-matcher`: a small dual encoder that judges samples of the text-to-image models.

It takes the place that CLIP has for large models (Radford et al. 2021): images and captions become points on one
sphere, a tile near its own caption. It is trained on the tiles alone, those that the generators were trained on too,
and never sees a sample nor shares a weight with them. Its 48 penultimate image features take the place of Inception's.

It tells the captions of its own training tiles better than those of held-out tiles, and samples may resemble either:
its scores on the two are the range in which a perfect generator's would lie. The recipe was chosen with the held-out
tiles in sight (see `tile-matcher.toml`), so the score on these is not quite that of tiles never seen.
"""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dgbook.measures.matcher import FEATURES, TileMatcher, to_input
from training.loop import Schedule, device, train
from training.tiles import BACKGROUND, Tiles

LARGEST_SCALE = 100.0
"""CLIP's bound on the learned inverse temperature."""


@dataclass(frozen=True)
class Recipe:
    """The contents of `tile-matcher.toml`.

    Attributes:
        shift: largest shift of a tile over the background, in pixels, each way.
        noise: standard deviation of the noise on the pixels (0 to 255).
        word_dropout: share of the words that a caption loses, never all.
        schedule: see `Schedule`.
    """

    shift: int
    noise: float
    word_dropout: float
    schedule: Schedule

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """The recipe in the TOML file `path`."""
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        return cls(**raw | {"schedule": Schedule(**raw["schedule"])})


def train_matcher(recipe: Recipe, tiles: Tiles, folder: Path) -> TileMatcher:
    """Train the matcher on the training tiles with CLIP's loss (see `contrastive_loss`)."""
    schedule = recipe.schedule
    torch.manual_seed(schedule.seed)
    training = (~tiles.held_out).nonzero()[:, 0]
    captions = [str(tiles.captions[i]) for i in training.tolist()]
    model = TileMatcher(sorted({word for caption in captions for word in caption.split()})).to(device())
    pixels, bags = tiles.pixels[training].to(device()), model.bags(captions)

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pixels), (schedule.batch,), generator=generator).to(device())
        inputs = augment(pixels[rows], recipe, generator)
        texts = drop_words(bags[rows], recipe.word_dropout, generator)
        logits = model.log_scale.exp().clamp(max=LARGEST_SCALE) * model.embed_images(inputs) @ model.embed_bags(texts).T
        return contrastive_loss(logits, describes(texts, bags[rows]))

    train(model, loss, schedule, folder)
    return model


def augment(pixels: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Inputs (N, 3, H, W) from uint8 `pixels` of that shape: shifted over the background, half of them mirrored, noisy.

    None of it changes what a caption says.
    """
    n, _, height, width = pixels.shape

    def windows(size: int) -> Tensor:
        offset = torch.randint(2 * recipe.shift + 1, (n, 1), generator=generator)
        return (offset + torch.arange(size)).to(pixels.device)

    padded = F.pad(pixels, [recipe.shift] * 4, value=BACKGROUND).movedim(1, -1)
    rows, columns = windows(height), windows(width)
    mirrored = (torch.rand(n, 1, generator=generator) < 0.5).to(pixels.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    image = torch.arange(n, device=pixels.device)[:, None, None]
    shifted = padded[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return to_input(shifted) + recipe.noise / 127.5 * torch.randn(pixels.shape, generator=generator).to(pixels.device)


def drop_words(bags: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """`bags` (N, words) with each word left out with probability `share`; a bag that would be empty stays whole."""
    kept = bags * (torch.rand(bags.shape, generator=generator) >= share).to(bags)
    return torch.where(kept.any(1, keepdim=True), kept, bags)


def describes(texts: Tensor, captions: Tensor) -> Tensor:
    """bool (N, M): whether all words of text m are among those of caption n, so that text m is true of image n too."""
    return (1 - captions) @ texts.T == 0


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Symmetric cross-entropy of each image's own text among the texts, and of each text's own image among the images.

    Args:
        logits: scaled similarities (N, N), own pairs on the diagonal.
        true: bool (N, N), the pairs that fit; off the diagonal they count neither as right nor as wrong.
    """
    own = torch.arange(len(logits), device=logits.device)
    logits = logits.masked_fill(true & (own[:, None] != own), -torch.inf)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def save_matcher(model: TileMatcher, folder: Path) -> None:
    """Write `model.safetensors` (float16) and `config.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: t.half() if t.is_floating_point() else t for name, t in model.cpu().state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    config = {"architecture": "TileMatcher", "features": FEATURES, "vocabulary": " ".join(model.vocabulary)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
