"""Whether a pipeline fits into memory, and moving it to a GPU as a whole or part by part."""

from collections.abc import Mapping
from typing import Any

import psutil
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from dgkit.errors import LoadError

WORKING_GB = 4.0
"""Memory kept free beside the weights. One image of 1024 pixels needs up to 1.6 GB to be decoded (one at a time,
whatever the batch) and 0.5 GB per row of a transformer call; the rest is room for some more rows and the allocator."""


def placement(weights_gb: float, largest_gb: float, free_gb: float) -> str | None:
    """How a pipeline fits into the memory of a GPU.

    Args:
        weights_gb: of all its parts.
        largest_gb: of the largest part.
        free_gb: free memory of the GPU.

    Returns:
        "whole": everything stays on the GPU. "parts": each part is moved there when it is used. "blocks": each block of
        the transformer is, and each layer of the text encoders. None: it does not fit.
    """
    for way, needed in (("whole", weights_gb), ("parts", largest_gb), ("blocks", 0.0)):
        if needed + WORKING_GB <= free_gb:
            return way
    return None


def check_memory(name: str, weights_gb: float, largest_gb: float, device: torch.device, dtype: torch.dtype) -> None:
    """Before anything is downloaded.

    Args:
        name: of the model, for the error.
        weights_gb, largest_gb: of all parts and of the largest, in 16 bits.
        device: where it shall go.
        dtype: of the weights.

    Raises:
        LoadError: the weights do not fit into main memory, or not even their blocks into the GPU's.
    """
    scale = dtype.itemsize / 2
    # everything is read into main memory first, and stays there if it is moved part by part
    main = psutil.virtual_memory().available / 1e9
    if (needed := scale * weights_gb) > main:
        advice = "use a GPU, or dtype=torch.bfloat16" if dtype == torch.float32 else "use a machine with more"
        raise LoadError(f"{name} needs {needed:.0f} GB of main memory in {dtype}, {main:.0f} GB are free: {advice}")
    if device.type == "cuda" and placement(scale * weights_gb, scale * largest_gb, free_gb(device)) is None:
        raise LoadError(_too_little(name, device))


def free_gb(device: torch.device) -> float:
    """Free memory of a GPU; that of other accelerators is not known."""
    return torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else float("inf")


def place(pipe: Any, device: torch.device, name: str) -> Any:
    """Move a pipeline to its device, as a whole or part by part as the free memory allows.

    Raises:
        LoadError: it does not fit.
    """
    if device.type == "cpu":
        return pipe.to(device)
    sizes = [_gigabytes(part) for part in pipe.components.values() if isinstance(part, nn.Module)]
    way = placement(sum(sizes), max(sizes), free_gb(device))
    if way is None:
        raise LoadError(_too_little(name, device))
    try:
        return move(pipe, device, way)
    except torch.OutOfMemoryError as error:  # another program was faster
        raise LoadError(_too_little(name, device)) from error


def move(pipe: Any, device: torch.device, way: str) -> Any:
    """Move a pipeline to a device in a way of `placement`; in all of them images are decoded one at a time."""
    if hasattr(getattr(pipe, "vae", None), "use_slicing"):
        pipe.vae.enable_slicing()
    if way == "whole":
        return pipe.to(device)
    if way == "parts":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    # group offloading, not `enable_sequential_cpu_offload`, which leaves no weights that could be hashed
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module):
            continue
        if name == "transformer":
            apply_group_offloading(part, device, offload_type="block_level", num_blocks_per_group=1)
        elif name == "vae":
            part.to(device)
        else:
            apply_group_offloading(part, device, offload_type="leaf_level")
    return pipe


def _gigabytes(part: nn.Module) -> float:
    tensors: Mapping[int, torch.Tensor] = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e9


def _too_little(name: str, device: torch.device) -> str:
    return (
        f"{name} does not fit on {device}, which has {free_gb(device):.1f} GB free: sampling takes about "
        f"{WORKING_GB:g} GB even if the weights are moved there block by block; close other programs or use another GPU"
    )
