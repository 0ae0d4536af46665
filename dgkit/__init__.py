"""Massive activations in diffusion transformers: record, disrupt, guide. A companion to arXiv 2510.11538."""

from dgkit.gates import gate_agreement, residual_gates
from dgkit.guidance import detail_guidance
from dgkit.hooks import disrupt, record
from dgkit.massive import detect_massive
from dgkit.zoo import load

__all__ = [
    "detail_guidance",
    "detect_massive",
    "disrupt",
    "gate_agreement",
    "load",
    "record",
    "residual_gates",
]
