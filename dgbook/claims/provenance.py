"""What made a result: the command, the commit, the weights, the device and the versions."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from dgkit.errors import DgkitError
from dgkit.paths import CHECKOUT

_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "dgkit")


def provenance(parameters: Mapping[str, Any], pipe: Any = None) -> dict[str, Any]:
    """What made a result: command, commit, weights, device and versions.

    Args:
        parameters: of the notebook, with "model".
        pipe: the pipeline (or bare transformer) that was measured.
    """
    commit, dirty = commit_and_changes()
    facts: dict[str, Any] = {
        "command": os.environ.get("DGKIT_COMMAND"),  # set by dgkit's own runner
        "commit": commit,
        "dirty": dirty,
        "model": parameters["model"],
        "seed": parameters.get("seed"),
        "weights_sha256": None,
        "device": None,
        "dtype": None,
        "versions": {"python": platform.python_version()} | {library: _version(library) for library in _LIBRARIES},
    }
    if pipe is not None:
        transformer = getattr(pipe, "transformer", pipe)
        weight = next(transformer.parameters())
        # with CPU offload the weights rest elsewhere than where they compute
        device = torch.device(getattr(pipe, "_execution_device", weight.device))
        facts["weights_sha256"] = weights_sha256(transformer)
        facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        facts["dtype"] = str(weight.dtype).removeprefix("torch.")
    return facts


def weights_sha256(model: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's state, in the order of the names.

    Raises:
        DgkitError: a tensor has no data (sequential CPU offload).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise DgkitError(f"weight {name!r} has no data: make the result before sequential offload is enabled")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # dgkit used from its folder without being installed
        return None


def commit_and_changes() -> tuple[str | None, bool | None]:
    """Commit of the checkout and whether anything but notebooks and results, which runs rewrite, differs from it."""
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return None, None
    rewritten = (":(exclude)notebooks", ":(exclude)data/results")
    try:
        commit, status = (
            subprocess.run(["git", "-C", CHECKOUT, *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", ".", *rewritten))
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None, None
    return commit.strip(), bool(status.strip())
