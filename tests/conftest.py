"""Fixtures that several test files share."""

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor


@pytest.fixture
def weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Group offloading within the CPU moves nothing: weights that are away become NaN, and indices impossible."""
    away: dict[int, Tensor] = {}

    def tensors(group: ModuleGroup) -> list[Tensor]:
        inside = [t for module in group.modules for t in (*module.parameters(), *module.buffers())]
        return [*inside, *group.parameters, *group.buffers]

    def offload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            if id(tensor) not in away:
                value = float("nan") if tensor.is_floating_point() else -(10**9)
                away[id(tensor)], tensor.data = tensor.data, torch.full_like(tensor.data, value)

    def onload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            if id(tensor) in away:
                tensor.data = away.pop(id(tensor))

    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)
