"""Guidance by a degraded version of the model itself."""

from dgkit.guidance.branches import SHARING, Branch, Cost
from dgkit.guidance.detail import Guidance, detail_guidance

__all__ = ["SHARING", "Branch", "Cost", "Guidance", "detail_guidance"]
