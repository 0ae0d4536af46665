"""Guidance by a degraded version of the model itself, and the other guidance methods on the same engine."""

from dgkit.guidance.branches import SHARING, Cost, Engine, Perturbation
from dgkit.guidance.calibrate import Calibration, calibrate
from dgkit.guidance.guide import Guidance, detail_guidance, guide
from dgkit.guidance.methods import METHODS, Method, Reuse

__all__ = [
    "METHODS",
    "SHARING",
    "Calibration",
    "Cost",
    "Engine",
    "Guidance",
    "Method",
    "Perturbation",
    "Reuse",
    "calibrate",
    "detail_guidance",
    "guide",
]
