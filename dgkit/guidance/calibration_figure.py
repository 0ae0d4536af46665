"""The figure of a calibration, drawn by matplotlib, which dgkit imports nowhere else."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dgkit.errors import DgkitError
from dgkit.guidance.calibrate import RATIO, Calibration
from dgkit.massive import channel_ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 7.2, 5.4  # inches
COLUMNS = 400  # of the map; more would be less than a dot each
SHOWN = 4  # dims at most with a line of their own
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito's, for any colour vision
MARKERS = ("o", "s", "^", "D")
GREY = "#666666"


def draw(calibration: Calibration) -> "Figure":
    """See `Calibration.figure`."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise DgkitError(
            f"the figure is drawn by matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error
    with plt.rc_context({"font.size": 9, "axes.titlesize": "medium", "figure.titlesize": "large"}):
        return _drawn(calibration, plt)


def _drawn(calibration: Calibration, plt: Any) -> "Figure":
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, MaxNLocator

    trace, block, dims = calibration.trace, calibration.block, calibration.dims
    ratios = channel_ratio(trace.mean_abs()).cpu()
    energy = trace.energy_share()[:, dims].cpu()
    steps = trace.timesteps()
    by_step = torch.stack([channel_ratio(trace.mean_abs(timestep=t))[block, dims] for t in steps]).cpu()
    energy_by_step = torch.stack([trace.energy_share(timestep=t)[block, dims] for t in steps]).cpu()

    figure = plt.figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    plt.close(figure)  # else notebooks show it twice
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 2))
    upper, lower = grid[0].subgridspec(1, 3, width_ratios=(3, 1, 1)), grid[1].subgridspec(1, 2)
    chart = figure.add_subplot(upper[0])
    block_ratio, block_energy = (figure.add_subplot(upper[i], sharey=chart) for i in (1, 2))
    step_ratio, step_energy = (figure.add_subplot(lower[i]) for i in (0, 1))

    shown, wide = _binned(ratios)
    norm = LogNorm(1, max(float(ratios[ratios.isfinite()].max()), 2 * RATIO))
    extent = (-0.5, wide * shown.shape[1] - 0.5, len(ratios) - 0.5, -0.5)
    image = chart.imshow(
        shown.numpy(), norm=norm, cmap="cividis", aspect="auto", interpolation="nearest", extent=extent
    )
    bar = figure.colorbar(image, ax=chart, location="top", extend="min", aspect=40, pad=0.02)
    bar.set_label("ratio: mean |z| over that of the block's median channel")
    bar.ax.axvline(RATIO, color="white", ls="--", lw=1)
    chart.scatter(dims, [block] * len(dims), s=60, facecolors="none", edgecolors="white", lw=1.5, zorder=3)
    chart.set(xlabel="channel" if wide == 1 else f"channel (largest of each {wide})", ylabel="block")
    chart.set_xlim(extent[:2])
    chart.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))

    places, times = range(len(ratios)), range(1, len(steps) + 1)
    for number, dim in enumerate(dims[:SHOWN]):
        style: dict[str, Any] = {"color": COLOURS[number], "marker": MARKERS[number], "ms": 3.5, "lw": 1.2}
        block_ratio.plot(ratios[:, dim], places, label=f"channel {dim}", **style)
        block_energy.plot(100 * energy[:, number], places, **style)
        step_ratio.plot(times, by_step[:, number], **style)
        step_energy.plot(times, 100 * energy_by_step[:, number], **style)
    for axes in (block_ratio, block_energy):
        axes.axhline(block, color=GREY, lw=6, alpha=0.25, zorder=0)
        axes.tick_params(labelleft=False)
        axes.margins(x=0.1)
    low, high = 0.9 * min(1.0, float(ratios[:, dims].min())), 1.2 * max(2 * RATIO, float(ratios[:, dims].max()))
    massive = block_ratio.axvline(RATIO, color=GREY, ls="--", lw=1, label=f"ratio {RATIO:g}: massive above")
    step_ratio.axhline(RATIO, color=massive.get_color(), ls="--", lw=1)
    block_ratio.set(xlabel="ratio", xscale="log", xlim=(low, high))
    block_energy.set(xlabel="share of energy (%)", xlim=(0, None))
    step_ratio.set(xlabel="step (from noise to image)", ylabel="ratio", yscale="log", title=f"in block {block}")
    step_ratio.set_ylim(min(low, 0.9 * float(by_step.min())), max(high, 1.2 * float(by_step.max())))
    step_energy.set(xlabel="step (from noise to image)", ylabel="share of energy (%)", title=f"in block {block}")
    step_energy.set_ylim(0, None)
    for axes in (step_ratio, step_energy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    for axis in (block_ratio.xaxis, step_ratio.yaxis, bar.ax.xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 else (1, 3) if high < 1000 else (1,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    more = f" and {len(dims) - SHOWN} more" if len(dims) > SHOWN else ""
    handles, labels = block_ratio.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{type(trace.anatomy.model).__name__}: block {block} (grey), dims {dims[:SHOWN]}{more} (rings)")
    return figure


def _binned(ratios: Tensor) -> tuple[Tensor, int]:
    """The largest of each few neighbouring channels of (L, C), so that none gets lost, and how many those are."""
    wide = -(-ratios.shape[1] // COLUMNS)
    missing = -ratios.shape[1] % wide
    return torch.nn.functional.pad(ratios, (0, missing)).unflatten(1, (-1, wide)).amax(2), wide
