"""The pipeline of a job as what makes its images."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import torch

import dgkit
from dgbook.claims.provenance import weights_sha256
from dgbook.paper_scale.generate.job import Job, canonical
from dgbook.paper_scale.generate.store import Image
from dgkit.sampling import check_arguments, generate
from dgkit.zoo import row_of


class PipelineSampler:
    """The pipeline of a job on this process's device.

    Raises:
        LoadError: it cannot be loaded.
        DgkitError: a guidance method does not fit it, or the job has arguments that are wrong for every image.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pipe = dgkit.load(job.model, device=own_device(), dtype=getattr(torch, job.dtype))
        check_arguments(self.pipe, job.conditions, job.guidance_scale, job.call)
        # with CPU offload the weights rest elsewhere than where they compute
        device = torch.device(getattr(self.pipe, "_execution_device", self.pipe.device))
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        with self._changed() as (methods, edit):
            self.identity: Mapping[str, Any] = identity(self.pipe, job, methods)
            if edit:
                self.identity = {**self.identity, "disruption": {**job.disruption, "dims": edit.dims}}

    def __call__(self, conditions: Sequence[Any], seeds: Sequence[int]) -> Image:
        with self._changed():
            return generate(
                self.pipe,
                conditions,
                seeds,
                num_inference_steps=self.job.steps,
                guidance_scale=self.job.guidance_scale,
                batch_size=len(conditions),
                **self.job.call,
            )

    @contextmanager
    def _changed(self) -> Iterator[tuple[list[Any], Any]]:
        """The pipeline with the job's guidance, yielded as methods, and its disruption, yielded as an `Edit`."""
        methods = self.job.guidance()
        with ExitStack() as stack:
            if methods:
                methods = stack.enter_context(dgkit.guide(self.pipe, *methods)).methods
            edit = stack.enter_context(dgkit.disrupt(self.pipe, **self.job.disruption)) if self.job.disruption else None
            yield methods, edit


def own_device() -> str:
    """This process's GPU, by its place among those of torchrun or Slurm on this machine; or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    place = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    return f"cuda:{place % torch.cuda.device_count()}"


def identity(pipe: Any, job: Job, methods: Sequence[Any]) -> dict[str, Any]:
    """What decides the images beside the job: weights, scheduler, and what the zoo and presets filled in."""
    row, scheduler = row_of(pipe), pipe.scheduler
    settings = {name: repr(value) for name, value in scheduler.config.items() if not name.startswith("_")}
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "pipeline": type(pipe).__name__,
        "weights_sha256": {name: weights_sha256(part) for name, part in parts.items()},
        "scheduler": {
            "class": type(scheduler).__name__,
            "sha256": hashlib.sha256(canonical(settings).encode()).hexdigest(),
        },
        "call": {**(row.call if row else {}), **job.call},
        "methods": {
            method.name: {f.name: _plain(getattr(method, f.name)) for f in fields(method) if f.init}
            for method in methods
        },
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | list | tuple | None) else repr(value)
