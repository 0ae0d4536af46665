"""The networks behind the metrics: where their weights are published, and how they are read.

A pickle is opened only after its hash was checked, only as tensors (`weights_only=True`), and only once: it is kept as
safetensors in `~/.cache/dgkit/weights` under the hash of the pickle.
"""

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dgbook.downloads import Found, NotHere, Published, cache_dir, fetch
from dgbook.files import replacing
from dgbook.readers import read_weights
from dgkit.errors import DataError, DgkitError, first_line


class MetricUnavailable(DgkitError):
    """A metric cannot be computed on this machine; the message says what to do."""


# Hashes are those that other projects publish and check, each found in at least two unrelated ones; none was computed
# here. Where none was found it is None.
WEIGHTS: dict[str, Published] = {
    # also what the hub's metadata states at this commit, as quoted by those who audited it
    "clip-vit-large-patch14": Published(
        files=("model.safetensors",), licence="MIT (openai/CLIP)", gigabytes=1.7,
        sha256="a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        hub="openai/clip-vit-large-patch14", revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
        companions=("config.json", "tokenizer.json", "tokenizer_config.json"),
    ),
    # the commit is the one that MTEB pins; no source states a hash, so the first download is what later ones must equal
    "blip-itm-large-coco": Published(
        files=("model.safetensors", "pytorch_model.bin"), licence="BSD-3-Clause", gigabytes=1.9, sha256=None,
        hub="Salesforce/blip-itm-large-coco", revision="fef05cafc05298067cbbca00b125749394a77a6f",
        companions=("config.json", "tokenizer.json", "tokenizer_config.json"),
    ),
    # stated together with this commit
    "hpsv2.1": Published(
        files=("HPS_v2.1_compressed.pt",), licence="Apache-2.0", gigabytes=2.0,
        sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        hub="xswu/HPSv2", revision="697403c78157020a1ae59d23f111aa58ced35b0a",
    ),
    # one of the projects checked the file that is served at this commit
    "laion-aesthetics": Published(
        files=("sac+logos+ava1-l14-linearMSE.pth",), licence="Apache-2.0", gigabytes=0.004,
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
        url="https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/"
            "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth",
    ),
    # the first eight digits are in the published name too
    "inception-2015-12-05": Published(
        files=("weights-inception-2015-12-05-6726825d.pth",), licence="Apache-2.0", gigabytes=0.1,
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
    ),
    # the reference batch of guided-diffusion's evaluator: 10,000 images, and mean and covariance of the training set
    "imagenet-256-reference": Published(
        files=("VIRTUAL_imagenet256_labeled.npz",), licence="ImageNet terms, non-commercial research", gigabytes=2.0,
        sha256=None,
        url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
            "VIRTUAL_imagenet256_labeled.npz",
    ),
}  # fmt: skip


def package(name: str, install: str) -> Any:
    """An optional package.

    Raises:
        MetricUnavailable: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MetricUnavailable(f'{install} is not installed: pip install "dgkit[scores]"') from error


def weights(name: str) -> Found:
    """The file of `WEIGHTS` on this machine, downloaded if need be, its hash checked.

    Raises:
        MetricUnavailable: it is neither here nor to be downloaded.
        DataError: it is not the published file, or has changed since its first use.
    """
    try:
        return fetch(WEIGHTS[name])
    except NotHere as error:
        raise MetricUnavailable(str(error)) from error


def label(name: str, found: Found) -> str:
    """How a metric id names weights: the first 12 digits of their hash, marked if it is that of the first use."""
    return f"{name}@{found.sha256[:12]}{'' if found.published else '(first-use)'}"


def tensors(found: Found, key: str = "") -> dict[str, Tensor]:
    """State dict in a checked file, safetensors or pickle.

    Args:
        found: what `weights` returned.
        key: the entry of a pickle that holds the state dict; "" if the pickle is the state dict.

    Raises:
        DataError: the file does not hold (only) named tensors.
    """
    path = found.path
    if path.suffix != ".safetensors":
        path = cache_dir() / "weights" / f"{found.sha256}.safetensors"
        if not path.is_file():
            _convert(found.path, path, key)
    return read_weights(path)


def _convert(source: Path, target: Path, key: str) -> None:
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{source} is not a file of tensors: {first_line(error)}") from error
    content = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise DataError(f"{source} does not hold a state dict{f' under {key!r}' if key else ''}")
    with replacing(target) as partial:
        save_file({name: value.contiguous().clone() for name, value in content.items()}, partial)
