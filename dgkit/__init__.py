"""Massive activations in diffusion transformers: record, disrupt, guide. A companion to arXiv 2510.11538."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgkit.anatomy import dissect
    from dgkit.disruption import Frames, disrupt
    from dgkit.errors import DataError, DgkitError, LoadError, ModelError
    from dgkit.gates import gate_agreement, residual_gates
    from dgkit.guidance.calibrate import calibrate
    from dgkit.guidance.guide import detail_guidance, guide
    from dgkit.guidance.modular import DetailGuidance
    from dgkit.massive import detect_massive
    from dgkit.recording import record
    from dgkit.zoo import load

# imported on first use: torch and diffusers take seconds, and `dgkit --help` needs neither
_HOMES = {
    "DataError": "errors",
    "DetailGuidance": "guidance.modular",
    "DgkitError": "errors",
    "Frames": "disruption",
    "LoadError": "errors",
    "ModelError": "errors",
    "calibrate": "guidance",
    "detail_guidance": "guidance",
    "detect_massive": "massive",
    "disrupt": "disruption",
    "dissect": "anatomy",
    "gate_agreement": "gates",
    "guide": "guidance",
    "load": "zoo",
    "record": "recording",
    "residual_gates": "gates",
}

__all__ = [
    "DataError",
    "DetailGuidance",
    "DgkitError",
    "Frames",
    "LoadError",
    "ModelError",
    "calibrate",
    "detail_guidance",
    "detect_massive",
    "disrupt",
    "dissect",
    "gate_agreement",
    "guide",
    "load",
    "record",
    "residual_gates",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"dgkit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dgkit' has no attribute {name!r}")
