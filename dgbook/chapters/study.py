"""What a chapter begins with: a model, what it samples, where its massive activations are, and a result to fill."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dgbook.chapters.sampling import Samples, condition_names, observe, samples, subject
from dgbook.claims.results import Result
from dgbook.measures.judges import Judge, judge_of
from dgkit.recording import Trace
from dgkit.zoo import load, settings_for


@dataclass
class Study:
    """Made by `open_study`; `begin` makes its `result`.

    Attributes:
        pipe: the pipeline.
        run: what it samples.
        trace: what `dgkit.record` saw of the first images of the run.
        block, dims: where the massive activations are.
        guidance_scale: s of CFG.
        w, w_cfg: scale of Detail Guidance alone and beside CFG.
        sampled: the notebook's parameters that every result keeps.
        result: the chapter's numbers.
    """

    pipe: Any
    run: Samples
    trace: Trace
    block: int
    dims: list[int]
    guidance_scale: float
    w: float
    w_cfg: float
    sampled: dict[str, Any]
    result: Result = field(init=False)

    @cached_property
    def names(self) -> list[str]:
        """A short name for the condition of each image."""
        return condition_names(self.pipe, self.run.conditions)

    @cached_property
    def judge(self) -> Judge | None:
        """Tells whether an image shows what was asked for; None for a model of other data than ours."""
        return judge_of(self.pipe, self.run.conditions)

    def begin(self, name: str, **parameters: Any) -> "Study":
        """Begin the result `name`, with the chapter's own `parameters` beside those of all chapters; the same study."""
        self.result = Result(name, self.pipe, **self.sampled, **parameters)
        return self


def open_study(
    *,
    model: str,
    seed: int,
    device: str,
    num_samples: int,
    num_inference_steps: int,
    batch_size: int = 64,
    images_per_condition: int = 1,
    guidance_scale: float | None = None,
    block: int | None = None,
    dims: Sequence[int] | None = None,
    scale: float | None = None,
    cfg: bool = False,
    observed: int | None = 8,
    ratio: float = 5.0,
) -> Study:
    """Load a model and find what its notebook leaves open, by the model's preset or by what a few images show.

    Args:
        model, device: see `dgkit.load`.
        seed, num_samples, num_inference_steps, batch_size, images_per_condition: see `samples`.
        guidance_scale: s of CFG; None for the preset's, else 4.
        block, dims: see `subject`.
        scale: w, alone and beside CFG; None for the preset's, else 1.
        cfg: whether the run is sampled with CFG.
        observed: how many of its images are recorded; None for all.
        ratio: that of massive tokens, see `dgkit.record`.

    Raises:
        DgkitError: as for all of these.
    """
    pipe = load(model, device=device)
    known = settings_for(pipe, scale=scale, guidance_scale=guidance_scale)
    w, w_cfg = known.scale, known.scale_with_cfg
    if w is None or w_cfg is None:
        w = w_cfg = 1.0
    run = samples(
        pipe,
        num_samples,
        seed,
        num_inference_steps,
        known.guidance_scale if cfg else 1.0,
        batch_size,
        images_per_condition,
    )
    trace = observe(pipe, run if observed is None else run.first(observed), ratio=ratio)
    found, channels = subject(trace, block, dims)
    sampled = {
        "model": model,
        "seed": seed,
        "device": device,
        "num_samples": num_samples,
        "num_inference_steps": num_inference_steps,
    }
    return Study(pipe, run, trace, found, channels, known.guidance_scale, w, w_cfg, sampled)
