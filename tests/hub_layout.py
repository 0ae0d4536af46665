"""A hub cache and a home folder of the tests' own, laid out as huggingface_hub and dgkit lay out theirs."""

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from dgbook.downloads import Published


def isolate(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Home, hub cache and data folder under `home`; no network."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("DGKIT_DATA_DIR", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def folder_of(item: Published, home: Path) -> Path:
    """Snapshot folder of a hub repository, made if need be."""
    kind = "datasets" if item.dataset else "models"
    repository = home / "hub" / f"{kind}--{item.hub.replace('/', '--')}"
    snapshot = repository / "snapshots" / item.revision
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(item.revision)
    return snapshot


def put(item: Published, files: Mapping[str, bytes], home: Path) -> None:
    """Files of a hub repository: blobs, and links to them in the snapshot."""
    snapshot = folder_of(item, home)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    for name, content in files.items():
        blob, link = blobs / f"blob-of-{name.replace('/', '-')}", snapshot / name
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(blob, link.parent))


def pickled(content: object) -> bytes:
    """`content` as a file of `torch.save`."""
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
