"""Guidance by a degraded version of the model itself, and the other guidance methods on the same engine."""

from typing import TYPE_CHECKING, Any

from dgkit.guidance.baselines import (
    APG,
    CFG,
    PAG,
    SEG,
    SLG,
    TPG,
    Autoguidance,
    BlockDrop,
    CFGPlusPlus,
    CFGZeroStar,
    SGPrev,
)
from dgkit.guidance.calibrate import Calibration, calibrate
from dgkit.guidance.dg import DG
from dgkit.guidance.engine import SHARING, Cost, Engine, Perturbation
from dgkit.guidance.guide import Guidance, detail_guidance, guide
from dgkit.guidance.methods import Method
from dgkit.guidance.schedule import SCHEDULES, Every, Schedule

if TYPE_CHECKING:
    from dgkit.guidance.modular import DetailGuidance

__all__ = [
    "APG",
    "CFG",
    "DG",
    "METHODS",
    "PAG",
    "SCHEDULES",
    "SEG",
    "SHARING",
    "SLG",
    "TPG",
    "Autoguidance",
    "BlockDrop",
    "CFGPlusPlus",
    "CFGZeroStar",
    "Calibration",
    "Cost",
    "DetailGuidance",
    "Engine",
    "Every",
    "Guidance",
    "Method",
    "Perturbation",
    "SGPrev",
    "Schedule",
    "calibrate",
    "detail_guidance",
    "guide",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (DG, PAG, SEG, SLG, TPG, BlockDrop, Autoguidance, SGPrev, CFG, APG, CFGPlusPlus, CFGZeroStar)
}
"""All methods by the names that job files give them."""


def __getattr__(name: str) -> Any:
    if name == "DetailGuidance":  # imported on first use: diffusers calls its guiders experimental
        from dgkit.guidance.modular import DetailGuidance

        return DetailGuidance
    raise AttributeError(f"module 'dgkit.guidance' has no attribute {name!r}")
