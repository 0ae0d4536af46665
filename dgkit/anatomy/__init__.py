"""What dgkit knows about the insides of diffusers' transformers and pipelines. Nothing else in the package does."""

from dgkit.anatomy.pipelines import COND, DEGRADED, PIPELINES, UNCOND, UNKNOWN, RowLabels, pipeline_row
from dgkit.anatomy.transformers import TRANSFORMERS, Anatomy, Block, Call, Gate, Stack, dissect, select_rows

__all__ = [
    "COND",
    "DEGRADED",
    "PIPELINES",
    "TRANSFORMERS",
    "UNCOND",
    "UNKNOWN",
    "Anatomy",
    "Block",
    "Call",
    "Gate",
    "RowLabels",
    "Stack",
    "dissect",
    "pipeline_row",
    "select_rows",
]
