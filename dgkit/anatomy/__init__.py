"""What dgkit knows about the insides of diffusers' transformers and pipelines. Nothing else in the package does."""

from dgkit.anatomy.calls import Call, CallReader, Pass, Step, calling_pipeline, degraded_pass
from dgkit.anatomy.dissection import Anatomy, Block, dissect
from dgkit.anatomy.gates import Gate
from dgkit.anatomy.pipelines import COND, DEGRADED, PIPELINES, UNCOND, UNKNOWN, pipeline_row
from dgkit.anatomy.transformers import TRANSFORMERS, Stack, Transformer

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
    "CallReader",
    "Gate",
    "Pass",
    "Stack",
    "Step",
    "Transformer",
    "calling_pipeline",
    "degraded_pass",
    "dissect",
    "pipeline_row",
]
