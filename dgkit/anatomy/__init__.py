"""What dgkit knows about the insides of diffusers' transformers and pipelines. Nothing else in the package does."""

from dgkit.anatomy.calls import Call, CallReader, Pass, Step, degraded_pass, predicted
from dgkit.anatomy.dissection import Anatomy, Block, dissect
from dgkit.anatomy.gates import Gate, argument, at, chunk, output, table
from dgkit.anatomy.grids import Grid
from dgkit.anatomy.loops import Loop, Runs
from dgkit.anatomy.pipelines import (
    COND,
    DEGRADED,
    NO_CFG,
    PIPELINES,
    TWO_CALLS,
    UNCOND,
    UNKNOWN,
    Pipeline,
    pipeline_row,
)
from dgkit.anatomy.transformers import TRANSFORMERS, Stack, Transformer

__all__ = [
    "COND",
    "DEGRADED",
    "NO_CFG",
    "PIPELINES",
    "TRANSFORMERS",
    "TWO_CALLS",
    "UNCOND",
    "UNKNOWN",
    "Anatomy",
    "Block",
    "Call",
    "CallReader",
    "Gate",
    "Grid",
    "Loop",
    "Pass",
    "Pipeline",
    "Runs",
    "Stack",
    "Step",
    "Transformer",
    "argument",
    "at",
    "chunk",
    "degraded_pass",
    "dissect",
    "output",
    "pipeline_row",
    "predicted",
    "table",
]
