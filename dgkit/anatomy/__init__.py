"""What dgkit knows about the insides of diffusers' transformers and pipelines. Nothing else in the package does."""

from dgkit.anatomy.pipelines import (
    COND,
    DEGRADED,
    PIPELINES,
    UNCOND,
    UNKNOWN,
    RowLabels,
    Step,
    calling_pipeline,
    pipeline_row,
    step_of,
)
from dgkit.anatomy.transformers import TRANSFORMERS, Anatomy, Block, Call, Gate, Stack, dissect

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
    "Step",
    "Stack",
    "calling_pipeline",
    "dissect",
    "pipeline_row",
    "step_of",
]
