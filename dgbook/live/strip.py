"""What the live page shows of a model before it runs, and where it cannot run: the same five images, made by dgkit."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import dgkit
from dgbook.files import replacing
from dgkit import sampling, zoo

SEED = 0


def draw(name: str, path: Path) -> None:
    """The panels of the page's first setting as a PNG file."""
    pipe = zoo.load(name, device="cpu")
    preset = zoo.MODELS[name].preset
    assert preset.block is not None and preset.dims is not None and preset.scale is not None
    edit: dict[str, Any] = {"block": preset.block, "dims": preset.dims}
    condition = sampling.own_conditions(pipe, 1)

    def image(context: Any, guidance_scale: float) -> Any:
        with context:
            return sampling.generate(
                pipe, condition, [SEED], num_inference_steps=preset.steps, guidance_scale=guidance_scale
            )[0]

    s = preset.guidance_scale
    guided = {"scale": preset.scale, **edit}
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
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
