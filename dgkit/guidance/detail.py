"""Detail Guidance (DG), Eq. 4 and Eq. 5 of the paper."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dgkit.anatomy import COND, UNCOND, Call, RowLabels, dissect, pipeline_row
from dgkit.errors import DgkitError, ModelError
from dgkit.guidance.branches import Branch, Cost
from dgkit.hooks import make_edit
from dgkit.zoo import preset_of

_guided: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Guidance:
    """What `detail_guidance` does inside its `with`.

    Attributes:
        block: zero-based block whose output is edited.
        dims: the edited channels.
        scale: w of Eq. 4 and Eq. 5, without and with CFG.
        cost: block evaluations so far.
    """

    block: int
    dims: list[int]
    scale: tuple[float, float]
    cost: Cost


@contextmanager
def detail_guidance(
    pipe: Any,
    *,
    scale: float | None = None,
    block: int | None = None,
    dims: Sequence[int] | None = None,
    kind: str = "zero",
    seed: int = 0,
    sharing: str = "replay",
) -> Iterator[Guidance]:
    """Guide every sampling step of `pipe` inside the `with` away from its own detail-deficient version.

    With c and u the conditional and unconditional predictions and c_m the conditional one with `dims` of block `block`
    edited, the step uses c + w (c - c_m) without CFG (Eq. 4) and u + s (c - u) + w (c - c_m) with the pipeline's own
    CFG at `guidance_scale` s, where s = lambda + 1 in terms of Eq. 5. In DiT the noise is guided, the learned sigma is
    not.

    Args:
        pipe: a `DiTPipeline`, `StableDiffusion3Pipeline` or `FluxPipeline` (also with `true_cfg_scale`).
        scale: w; the model's preset (Table 5) by default.
        block: zero-based block, the paper's m - 1; the model's preset (Table 4) by default.
        dims: channels to edit; the model's preset (Table 4) by default.
        kind, seed: how to edit them, see `dgkit.disrupt`; the paper zeroes them.
        sharing: "replay" computes the blocks that both passes share once, "none" is two full passes.

    Raises:
        DgkitError: an argument out of range, or one left out for a model that has no preset for it.
        ModelError: a pipeline dgkit cannot guide, a transformer compiled as a whole or already guided.
    """
    row = pipeline_row(pipe)
    anatomy = dissect(pipe)
    if anatomy.model in _guided:
        raise ModelError("this pipeline's transformer is already guided: leave the outer `with detail_guidance` first")
    if scale is not None:
        scales = (_checked_scale(scale),) * 2
    if scale is None or block is None or dims is None:
        preset = preset_of(anatomy)
        missing = [n for n, v in (("scale", scale), ("block", block), ("dims", dims)) if v is None]
        lacking = [n for n in missing if preset is None or getattr(preset, n) is None]
        if preset is None or lacking:
            raise DgkitError(f"{', '.join(lacking)} left out, but no preset for this model states it: give a value")
        block = preset.block if block is None else block
        dims = preset.dims if dims is None else dims
        if scale is None:
            scales = (_checked_scale(preset.scale), _checked_scale(preset.scale_with_cfg))
            if not row.batched_cfg and scales[0] != scales[1]:
                raise DgkitError(
                    f"scale left out, but the preset has {scales[0]:g} alone and {scales[1]:g} beside true CFG, and "
                    f"{type(pipe).__name__} does not tell which before its second call: give a value"
                )
    assert block is not None and dims is not None
    edit = make_edit(anatomy, dims, kind, seed)
    branch = Branch(anatomy, block, edit, sharing)
    row_labels = RowLabels(pipe)
    cond_delta: list[Tensor] = []  # of the conditional call, for the unconditional call that may follow (Flux)

    def guide(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("skip_layers") is not None:
            raise ModelError("skip_guidance_layers cannot be combined with detail_guidance: leave it out")
        call = Call.of(args, kwargs)
        labels = row_labels(call)
        rows = [row for row, label in enumerate(labels) if label == COND]
        branch.count_pass(call.batch)
        if rows:
            w = scales[UNCOND in labels]
            degraded = branch.degraded(args, kwargs, rows, call.timesteps())
            cond_delta[:] = [w * (_upcast(_prediction(output)[rows]) - _upcast(_prediction(degraded)))]
        # w (c - c_m) on both halves: CFG, being affine with weights that sum to 1, passes it on unchanged
        delta = cond_delta[0].repeat(len(labels) // len(cond_delta[0]), *[1] * (cond_delta[0].ndim - 1))
        prediction = _prediction(output)
        guided = _upcast(prediction)
        channels = anatomy.predicted_channels
        if channels is None:
            guided = guided + delta
        else:
            guided = torch.cat([guided[:, :channels] + delta[:, :channels], guided[:, channels:]], 1)
        return _with_prediction(output, guided.to(prediction.dtype))

    with branch.attached():
        handle = anatomy.model.register_forward_hook(guide, with_kwargs=True)
        _guided.add(anatomy.model)
        try:
            yield Guidance(branch.block.index, edit.dims, scales, branch.cost)
        finally:
            _guided.discard(anatomy.model)
            handle.remove()


def _checked_scale(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale) or scale < 0:
        raise DgkitError(f"scale={scale!r} is not allowed: give a finite number, 0 or above")
    return float(scale)


def _upcast(prediction: Tensor) -> Tensor:
    """At least float32: differences of predictions are small."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))


def _prediction(output: Any) -> Tensor:
    """The prediction in a transformer's output, which is a tuple or a dataclass with `sample`."""
    return output[0]


def _with_prediction(output: Any, prediction: Tensor) -> Any:
    return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)
