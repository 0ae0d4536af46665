"""Pictures made by dgkit with the live page: a model's first setting, for where it cannot run, and the first page's."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import dgkit
from dgbook.files import replacing
from dgkit import sampling, zoo
from dgkit.massive import channel_ratio

SEED = 0


def draw(name: str, path: Path) -> None:
    """The panels of the page's first setting as a PNG file."""
    pipe = zoo.load(name, device="cpu")
    preset = zoo.MODELS[name].preset
    assert preset.block is not None and preset.dims is not None and preset.scale_with_cfg is not None
    edit: dict[str, Any] = {"block": preset.block, "dims": preset.dims}
    condition = sampling.own_conditions(pipe, 1)

    def image(context: Any, guidance_scale: float) -> Any:
        with context:
            return sampling.generate(
                pipe, condition, [SEED], num_inference_steps=preset.steps, guidance_scale=guidance_scale
            )[0]

    s = preset.guidance_scale
    guided = {"scale": preset.scale_with_cfg, **edit}
    panels = {
        "plain": image(nullcontext(), 1),
        "channels zeroed": image(dgkit.disrupt(pipe, **edit), 1),
        "DG": image(dgkit.detail_guidance(pipe, **guided), 1),
        "CFG": image(nullcontext(), s),
        "CFG + DG": image(dgkit.detail_guidance(pipe, **guided), s),
    }
    figure = Figure(figsize=(10, 2.3), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, pixels) in zip(axes, panels.items(), strict=True):
        axis.imshow(pixels, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    _save(figure, path)


def draw_first(path: Path, name: str, images: int = 4) -> None:
    """The picture of the first page as a PNG file: the channels of the edited block, and what they do to images.

    On the left mean |z| of every channel over the median channel's; on the right, from the same noise, images with CFG,
    with the marked channels zeroed, and with CFG + DG.
    """
    pipe = zoo.load(name, device="cpu")
    preset = zoo.MODELS[name].preset
    assert preset.block is not None and preset.dims is not None and preset.scale_with_cfg is not None
    edit: dict[str, Any] = {"block": preset.block, "dims": preset.dims}
    call: dict[str, Any] = {"num_inference_steps": preset.steps, "guidance_scale": preset.guidance_scale}
    conditions, seeds = sampling.own_conditions(pipe, images), range(images)

    def sampled(context: Any) -> Any:
        with context as value:
            return sampling.generate(pipe, conditions, seeds, **call), value

    plain, trace = sampled(dgkit.record(pipe))
    rows = {
        "CFG": plain,
        "channels\nzeroed": sampled(dgkit.disrupt(pipe, **edit))[0],
        "CFG + DG": sampled(dgkit.detail_guidance(pipe, scale=preset.scale_with_cfg, **edit))[0],
    }
    ratio = channel_ratio(trace.mean_abs())[preset.block]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    left, right = halves
    axis = left.subplots()
    axis.vlines(range(len(ratio)), 0, ratio, color="#949494", linewidth=1.2)
    for dim in preset.dims:
        axis.vlines(dim, 0, ratio[dim], color="#d55e00", linewidth=2.5)
        axis.annotate(f"channel {dim}", (dim, ratio[dim]), (4, -2), textcoords="offset points", color="#d55e00")
    axis.set(
        xlabel=f"channel of block {preset.block}", ylabel="mean |z| over the median channel's", xlim=(-1, len(ratio))
    )
    axis.set_ylim(0)
    axis.spines[["top", "right"]].set_visible(False)
    axes = right.subplots(len(rows), images)
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        for panel, pixels in zip(line, pictures, strict=True):
            panel.imshow(pixels, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
