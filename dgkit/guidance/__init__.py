"""Guidance by a degraded version of the model itself, and the other guidance methods on the same engine."""

from typing import TYPE_CHECKING, Any

from dgkit.guidance.branches import SHARING, Cost, Engine, Perturbation
from dgkit.guidance.calibrate import Calibration, calibrate
from dgkit.guidance.guide import Guidance, detail_guidance, guide
from dgkit.guidance.methods import METHODS, Method, Reuse

if TYPE_CHECKING:
    from dgkit.guidance.modular import DetailGuidance

__all__ = [
    "METHODS",
    "SHARING",
    "Calibration",
    "Cost",
    "DetailGuidance",
    "Engine",
    "Guidance",
    "Method",
    "Perturbation",
    "Reuse",
    "calibrate",
    "detail_guidance",
    "guide",
]


def __getattr__(name: str) -> Any:
    if name == "DetailGuidance":  # imported on first use: diffusers calls its guiders experimental
        from dgkit.guidance.modular import DetailGuidance

        return DetailGuidance
    raise AttributeError(f"module 'dgkit.guidance' has no attribute {name!r}")
