"""BLIPScore: whether BLIP's matching head takes image and prompt for a pair."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from dgbook.measures.base import MetricId, Scorer, normalise
from dgbook.paper_scale.scores.clip import from_tensors
from dgbook.paper_scale.scores.weights import label, weights

_SQUARE = "pil-bicubic-square-{size}-clip-norm"


class BLIPScore(Scorer):
    """100 times the probability of a match by BLIP (Li et al. 2022), ViT-L fine-tuned on COCO retrieval.

    Prompts are read up to the 512 tokens of the text encoder, as `transformers` does. (BLIP's own demonstration cuts
    them at 35; the paper does not say which it used.)
    """

    def __init__(self, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, BlipConfig, BlipForImageTextRetrieval

        found = weights("blip-itm-large-coco")
        config: Any = BlipConfig.from_pretrained(found.path.parent)
        self.network: Any = from_tensors(BlipForImageTextRetrieval, config, found).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(found.path.parent)
        self.device, self.size = device, config.vision_config.image_size
        self.length = config.text_config.max_position_embeddings
        self.id = MetricId(
            "blipscore", label("blip-itm-large-coco", found), _SQUARE.format(size=self.size), True, "float32",
            "100*softmax(itm)[1]",
        )  # fmt: skip

    @torch.no_grad()
    def _score(self, images: NDArray[np.uint8], prompts: list[str]) -> Any:
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        logits = self.network(
            input_ids=tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device),
            pixel_values=squared(images, self.size).to(self.device),
        ).itm_score
        return 100 * logits.double().softmax(dim=-1)[:, 1].cpu()


def squared(images: NDArray[np.uint8], size: int) -> Tensor:
    """BLIP's input (N, 3, size, size): both sides to `size` by PIL's bicubic, normalised."""
    resized = (transforms.resize(Image.fromarray(i), [size, size], InterpolationMode.BICUBIC) for i in images)
    return normalise(torch.stack([transforms.to_tensor(image) for image in resized]))
