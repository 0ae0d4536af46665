"""Scores on CLIP towers: CLIPScore and LAION-Aesthetics on ViT-L/14, HPSv2.1 on its own ViT-H/14."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from dgbook.downloads import Found
from dgbook.measures.base import MetricId, Scorer, cosine, normalise
from dgbook.paper_scale.scores.weights import label, package, tensors, weights
from dgkit.errors import DataError

HPS_ARCHITECTURE = "ViT-H-14"
"""open_clip's name of the network that HPSv2 is fine-tuned from."""

_CROPPED = "pil-bicubic-shortest-224-centre-crop-clip-norm"
_PADDED = "tensor-bicubic-longest-224-zero-pad-clip-norm"


class CLIPScore(Scorer):
    """100 max(cos, 0) of image and prompt (Hessel et al. 2021, without their factor 2.5) with CLIP ViT-L/14.

    Images are prepared as in OpenAI's CLIP. Prompts are cut at the 77 tokens that CLIP reads.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.tower = _tower(device)
        self.id = MetricId("clipscore", self.tower.label, _CROPPED, True, "float32", "100*max(cos,0)")

    def _score(self, images: NDArray[np.uint8], prompts: list[str]) -> Any:
        return 100 * cosine(self.tower.image(images), self.tower.text(prompts)).clamp(min=0).cpu()


class Aesthetic(Scorer):
    """LAION-Aesthetics (Schuhmann 2022): a linear head on the normalised image embedding of CLIP ViT-L/14.

    About 1 to 10. The prompt plays no part. The head is "sac+logos+ava1-l14-linearMSE", which has no non-linearity.
    """

    def __init__(self, device: str = "cpu") -> None:
        found = weights("laion-aesthetics")
        self.tower = _tower(device)
        widths = (768, 1024, 128, 64, 16, 1)
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Linear(before, after), *([nn.Dropout()] if i < 3 else [])]
        self.head = nn.Sequential(*layers)
        _load(self.head, {name.removeprefix("layers."): value for name, value in tensors(found).items()}, found)
        self.head.to(device)
        names = f"{self.tower.label}+{label('laion-aesthetics', found)}"
        self.id = MetricId("aesthetic", names, _CROPPED, True, "float32", "rating")

    @torch.no_grad()
    def _score(self, images: NDArray[np.uint8], prompts: list[str]) -> Any:
        embedding = nn.functional.normalize(self.tower.image(images), dim=-1)
        return self.head(embedding)[:, 0].cpu()


class HPSv2(Scorer):
    """100 cos of image and prompt with HPSv2.1 (Wu et al. 2023).

    Images are prepared on tensors as in the official code, which since torchvision 0.17 low-passes them (before, its
    default did not, and scores differ). Prompts are cut at 77 tokens. The network computes in float32; in the official
    code's mixed precision scores have three digits.
    """

    def __init__(self, device: str = "cpu") -> None:
        open_clip = package("open_clip", "open_clip_torch")
        found = weights("hpsv2.1")
        self.network = open_clip.CLIP(**open_clip.get_model_config(HPS_ARCHITECTURE))
        _load(self.network, tensors(found, key="state_dict"), found)
        self.network.to(device).eval()
        self.tokenizer = open_clip.get_tokenizer(HPS_ARCHITECTURE)
        self.device = device
        self.id = MetricId("hpsv2.1", label("hpsv2.1", found), _PADDED, True, "float32", "100*cos")

    @torch.no_grad()
    def _score(self, images: NDArray[np.uint8], prompts: list[str]) -> Any:
        pixels, text = padded(images).to(self.device), self.tokenizer(prompts).to(self.device)
        image_features = self.network.encode_image(pixels, normalize=True)
        text_features = self.network.encode_text(text, normalize=True)
        return 100 * cosine(image_features, text_features).cpu()


class ClipTower:
    """CLIP ViT-L/14: embeddings of images and of text in its common space."""

    def __init__(self, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        found = weights("clip-vit-large-patch14")
        folder = found.path.parent
        config: Any = CLIPConfig.from_pretrained(folder)
        self.network: Any = from_tensors(CLIPModel, config, found).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.device, self.length = device, config.text_config.max_position_embeddings
        self.label = label("clip-vit-large-patch14", found)

    @torch.no_grad()
    def image(self, images: NDArray[np.uint8]) -> Tensor:
        """Embeddings (N, 768) of uint8 images (N, H, W, 3), not normalised."""
        return self.network.get_image_features(pixel_values=cropped(images).to(self.device)).pooler_output

    @torch.no_grad()
    def text(self, prompts: list[str]) -> Tensor:
        """Embeddings (N, 768) of prompts, not normalised."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        return self.network.get_text_features(
            input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
        ).pooler_output


@cache
def _tower(device: str) -> ClipTower:
    """One tower for all scores that share it."""
    return ClipTower(device)


def cropped(images: NDArray[np.uint8], size: int = 224) -> Tensor:
    """CLIP's input (N, 3, size, size): shortest side to `size` by PIL's bicubic, centre crop, normalised."""
    crops = []
    for image in images:
        resized = transforms.resize(Image.fromarray(image), size, InterpolationMode.BICUBIC)
        crops.append(transforms.to_tensor(transforms.center_crop(resized, [size, size])))
    return normalise(torch.stack(crops))


def padded(images: NDArray[np.uint8], size: int = 224) -> Tensor:
    """HPSv2's input (N, 3, size, size): longest side to `size`, bicubic on float tensors, black margins, normalised."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    height, width = pixels.shape[2:]
    scale = size / max(height, width)
    new = [round(height * scale), round(width * scale)]
    if scale != 1:
        pixels = transforms.resize(pixels, new, InterpolationMode.BICUBIC, antialias=True)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    return normalise(transforms.pad(pixels, [left, top, size - new[1] - left, size - new[0] - top]))


def from_tensors(kind: Any, config: Any, found: Found) -> nn.Module:
    """A transformers model of class `kind` in float32 for evaluation, from a checked file.

    Raises:
        DataError: weights that the model needs are missing from the file or have another shape.
    """
    try:
        with _quiet():
            model, report = kind.from_pretrained(
                None, config=config, state_dict=tensors(found), dtype=torch.float32, output_loading_info=True
            )
    except RuntimeError as error:
        raise DataError(f"{found.path} does not fit {kind.__name__}: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        raise DataError(f"{found.path} lacks {sorted(report['missing_keys'])[0]} of {kind.__name__}")
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of the weights that do not fit, which become an error anyway."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _load(network: nn.Module, state: dict[str, Tensor], found: Found) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{found.path} does not fit {type(network).__name__}: {str(error).splitlines()[0]}") from error
    network.eval()
