"""What is sampled, and what comes of it: the settings that the chapters compare, and their outcomes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from dgbook.chapters.sampling import Images, Samples
from dgbook.claims.names import label
from dgkit.anatomy import dissect
from dgkit.guidance import DG, Method, guide

LARGEST_COPY = 1_000_000_000  # parameters


@dataclass(frozen=True)
class Setting:
    """One way of sampling: s of CFG (1 for none), and a method beside CFG or in its place."""

    guidance_scale: float = 1.0
    method: Method | None = None

    @property
    def scale(self) -> float:
        """The method's scale; of plain CFG it is s."""
        return self.guidance_scale if self.method is None else self.method.scale  # type: ignore[return-value]

    def at(self, scale: float) -> "Setting":
        """The same setting at another `scale`."""
        if self.method is None:
            return replace(self, guidance_scale=scale)
        return replace(self, method=replace(self.method, scale=scale))


@dataclass(frozen=True)
class Outcome:
    """The images of a setting, and what they cost.

    Attributes:
        images: (N, H, W, 3).
        setting: how they were sampled.
        steps: sampling steps.
        block_evaluations: of one transformer block for one row of a batch.
        cost_ratio: these over those of full passes for every branch.
    """

    images: Images
    setting: Setting
    steps: int
    block_evaluations: int
    cost_ratio: float = 1.0


def sample(pipe: Any, run: Samples, setting: Setting) -> Outcome:
    """Sample `run` under one setting, whose s takes the place of the run's."""
    run = replace(run, guidance_scale=setting.guidance_scale)
    if setting.method is None:
        passes = 2 if setting.guidance_scale > 1 else 1
        evaluations = passes * run.steps * len(run.seeds) * len(dissect(pipe).blocks)
        return Outcome(run.images(pipe), setting, run.steps, evaluations)
    with guide(pipe, setting.method) as guidance:
        images = run.images(pipe)
    cost = guidance.cost
    return Outcome(images, setting, run.steps, cost.block_evaluations, cost.ratio)


def sample_all(pipe: Any, run: Samples, settings: Mapping[Any, Setting]) -> dict[Any, Outcome]:
    """Sample `run` under each setting, from the same noise."""
    return {name: sample(pipe, run, setting) for name, setting in settings.items()}


def with_dg(w: float, block: int, dims: Sequence[int], guidance_scale: float = 1.0, **options: Any) -> Setting:
    """Detail Guidance with scale w, alone or beside CFG; `options` of `DG`. With w = 0 there is none to compute."""
    return Setting(guidance_scale, DG(scale=w, block=block, dims=list(dims), **options) if w else None)


def total_cost(outcomes: Mapping[Any, Outcome]) -> int:
    """The block evaluations of all of them."""
    return sum(outcome.block_evaluations for outcome in outcomes.values())


def cost_table(outcomes: Mapping[str, Outcome]) -> pd.DataFrame:
    """What each of them cost in block evaluations, and relative to full passes for every branch."""
    columns = {"block evaluations": "block_evaluations", "of full passes": "cost_ratio"}
    rows = {label(name): outcome for name, outcome in outcomes.items()}
    return pd.DataFrame({c: {name: getattr(row, a) for name, row in rows.items()} for c, a in columns.items()})


def worse_copy(pipe: Any, seed: int) -> nn.Module | None:
    """The worse model of autoguidance, in place of an earlier checkpoint; None for models too large to copy.

    Every weight matrix has Gaussian noise of a tenth of its standard deviation.
    """
    if sum(parameter.numel() for parameter in pipe.transformer.parameters()) > LARGEST_COPY:
        return None
    return noisy_copy(pipe.transformer, seed)


def noisy_copy(model: nn.Module, seed: int, relative: float = 0.1) -> nn.Module:
    """A worse version of `model`: every weight matrix with Gaussian noise of `relative` its standard deviation."""
    worse, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in worse.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(relative * parameter.std() * noise)
    return worse
