"""The book's figures: from numbers to axes, no computing.

Every function returns a closed figure, which a cell that ends with the call shows once.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

from dgbook.claims.names import label
from dgbook.measures.stats import Interval

WIDTH = 8.5  # inches: the text column of the page
COLOURS = sns.color_palette("colorblind")
MASSIVE, OTHER, ACCENT = COLOURS[3], COLOURS[7], COLOURS[0]

RATIO_TICKS = [1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000]
MILLION_TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")

LABELS = {
    "low_error": "low-frequency\nerror (relative\nsquared)",
    "high_error": "high-frequency\nerror (relative\nsquared)",
    "sharpness_ratio": "sharpness ratio\n(variance of\nthe Laplacian)",
    "high_frequency_change": "change of the\nhigh-frequency\nenergy share",
    "detail_distance": "distance of the\ndetail from real\nimages (dB)",
    "agreement": "agreement with\nthe condition",
    "agreement_change": "change of the\nagreement",
    "frechet": "Frechet distance\n(judge's features)",
    "frechet_change": "change of the\nFrechet distance",
    "is": "inception score\n(classifier)",
}

sns.set_theme(
    style="ticks", palette="colorblind", rc={"figure.dpi": 110, "axes.spines.right": False, "axes.spines.top": False}
)


def _closed(figure: Figure) -> Figure:
    figure.tight_layout()
    plt.close(figure)
    return figure


def _stems(ax: Axes, values: NDArray[Any], dims: Sequence[int], colour: Any = OTHER) -> None:
    ax.vlines(np.arange(len(values)), 0, values, color=colour, linewidth=1)
    for dim in dims:
        ax.vlines(dim, 0, values[dim], color=MASSIVE, linewidth=1.8)
        ax.annotate(str(dim), (dim, values[dim]), xytext=(3, -2), textcoords="offset points", color=MASSIVE, fontsize=9)
    ax.set_xlim(-1, len(values))


def channel_profiles(mean_abs: ArrayLike, blocks: Sequence[int], dims: Sequence[int], ratio: float) -> Figure:
    """Fig. 2: mean |z| of every channel at some blocks, with the median and the detection threshold."""
    table = np.asarray(mean_abs)
    figure, axes = plt.subplots(len(blocks), 1, figsize=(WIDTH, 1.7 * len(blocks) + 0.6), sharex=True, squeeze=False)
    for ax, block in zip(axes[:, 0], blocks, strict=True):
        _stems(ax, table[block], dims)
        median = np.median(table[block])
        ax.axhline(median, color="black", linewidth=0.8, label="median channel")
        ax.axhline(ratio * median, color="black", linewidth=0.8, linestyle="--", label=f"{ratio:g} x median")
        ax.set_ylabel(f"block {block}\nmean |z|")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", frameon=False, fontsize=9, ncols=2)
    axes[-1, 0].set_xlabel("channel")
    return _closed(figure)


def layer_map(ratios: ArrayLike) -> Figure:
    """Fig. 3(a): mean |z| of every channel over its block's median, for all blocks."""
    table = np.asarray(ratios)
    figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.25 * len(table)))
    norm = LogNorm(1, max(2.0, table.max()))
    sns.heatmap(table, ax=ax, cmap="rocket_r", norm=norm, xticklabels=16, cbar=False)
    bar = figure.colorbar(ax.collections[0], ticks=RATIO_TICKS, format=PLAIN, label="mean |z| / block median")
    bar.ax.minorticks_off()
    ax.set(xlabel="channel", ylabel="block")
    ax.tick_params(rotation=0)
    return _closed(figure)


def layer_lines(ratios: ArrayLike, dims: Sequence[int], threshold: float) -> Figure:
    """The ratio of the named channels, and of the largest other one, along the blocks."""
    table = np.asarray(ratios)
    figure, ax = plt.subplots(figsize=(WIDTH, 3.2))
    for i, dim in enumerate(dims):
        ax.plot(table[:, dim], marker="o", color=COLOURS[i % len(COLOURS)], label=f"channel {dim}")
    others = np.delete(table, list(dims), axis=1).max(1)
    ax.plot(others, color=OTHER, linestyle=":", marker=".", label="largest other channel")
    ax.axhline(threshold, color="black", linestyle="--", linewidth=0.8, label=f"{threshold:g} x median")
    ax.set(xlabel="block", ylabel="mean |z| / block median", yscale="log")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set(major_locator=FixedLocator(RATIO_TICKS), major_formatter=PLAIN, minor_locator=NullLocator())
    ax.legend(frameon=False, fontsize=9, bbox_to_anchor=(1, 1), loc="upper left")
    return _closed(figure)


def token_maps(magnitudes: ArrayLike, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Where in the image and when a channel is large: |z| per token, (rows, columns, H, W), on one colour scale."""
    maps = np.asarray(magnitudes)
    side = WIDTH / (maps.shape[1] + 1)
    figure, axes = plt.subplots(
        *maps.shape[:2], figsize=(WIDTH, side * len(maps) + 0.3), squeeze=False, layout="constrained"
    )
    for line, row in zip(axes, maps, strict=True):
        for ax, values in zip(line, row, strict=True):
            image = ax.imshow(values, cmap="rocket_r", vmin=0, vmax=maps.max())
            ax.set_xticks([])
            ax.set_yticks([])
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(textwrap.fill(title, 16), fontsize=8)
    for ax, title in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(title, fontsize=9)
    figure.colorbar(image, ax=axes.ravel().tolist(), label="|z|", shrink=0.8)
    plt.close(figure)
    return figure


def gates_and_activations(
    mean_abs: ArrayLike, gates: Mapping[str, ArrayLike], dims: Sequence[int], block: int
) -> Figure:
    """Fig. 4(a): mean |z| of every channel above the residual gates of the same block."""
    figure, axes = plt.subplots(1 + len(gates), 1, figsize=(WIDTH, 1.5 * (1 + len(gates)) + 0.6), sharex=True)
    _stems(axes[0], np.asarray(mean_abs), dims)
    axes[0].set_ylabel("mean |z|")
    for ax, (branch, values) in zip(axes[1:], gates.items(), strict=True):
        _stems(ax, np.asarray(values), dims, ACCENT)
        ax.set_ylabel(f"mean |alpha|\n{branch}")
    axes[-1].set_xlabel(f"channel (block {block})")
    return _closed(figure)


def over_time(values: ArrayLike, timesteps: Sequence[float], names: Sequence[str], dim: int) -> Figure:
    """Fig. 4(b): mean |z| of one channel (T, N) against the timestep: mean of each condition, range over images."""
    table = np.asarray(values)
    figure, ax = plt.subplots(figsize=(WIDTH, 3.6))
    ax.fill_between(timesteps, table.min(1), table.max(1), color=OTHER, alpha=0.25, linewidth=0, label="all images")
    distinct = list(dict.fromkeys(names))[:10]
    for i, name in enumerate(distinct):
        columns = [k for k, n in enumerate(names) if n == name]
        ax.plot(
            timesteps,
            table[:, columns].mean(1),
            color=sns.color_palette("colorblind", 10)[i],
            linewidth=1.3,
            label=name,
        )
    ax.invert_xaxis()
    ax.set(xlabel="timestep (noise to image)", ylabel=f"mean |z| of channel {dim}", ylim=(0, None))
    ax.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    return _closed(figure)


def shares(table: Mapping[int, Mapping[str, Interval]]) -> Figure:
    """Shares of variance explained, one group of bars per channel, with intervals."""
    parts = list(next(iter(table.values())))
    figure, ax = plt.subplots(figsize=(WIDTH, 2.8))
    width = 0.8 / len(parts)
    for i, part in enumerate(parts):
        intervals = [row[part] for row in table.values()]
        heights = [v.value for v in intervals]
        errors = [[max(0.0, v.value - v.low) for v in intervals], [max(0.0, v.high - v.value) for v in intervals]]
        ax.bar(np.arange(len(table)) + i * width, heights, width, yerr=errors, color=COLOURS[i], label=part, capsize=2)
    ax.set_xticks(np.arange(len(table)) + 0.4 - width / 2, [f"channel {d}" for d in table])
    ax.set(ylabel="share of variance", ylim=(0, 1))
    ax.legend(frameon=False, fontsize=9, bbox_to_anchor=(1, 1), loc="upper left")
    return _closed(figure)


def image_rows(rows: Mapping[str, NDArray[np.uint8]], names: Sequence[str] = (), count: int = 10) -> Figure:
    """Fig. 5(a), 6, 7, 16: one row of images per setting, paired by column."""
    count = min(count, *(len(images) for images in rows.values()))
    height = WIDTH / (count + 1.6)
    titles = [textwrap.fill(name, 100 // count) for name in names[:count]]
    lines = max((title.count("\n") + 1 for title in titles), default=1)
    size = (WIDTH, height * len(rows) + 0.15 * lines + 0.15)
    figure, axes = plt.subplots(len(rows), count, figsize=size, squeeze=False)
    for r, (title, images) in enumerate(rows.items()):
        for c in range(count):
            ax = axes[r, c]
            ax.imshow(images[c], interpolation="nearest" if images.shape[1] < 64 else "auto")
            ax.set_xticks([])
            ax.set_yticks([])
            sns.despine(ax=ax, left=True, bottom=True)
            if r == 0 and len(titles) > c:
                ax.set_title(titles[c], fontsize=8)
        axes[r, 0].set_ylabel(label(title), rotation=0, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    plt.close(figure)
    return figure


def effects(summary: Mapping[str, Mapping[str, Interval]], settings: Sequence[str], columns: Sequence[str]) -> Figure:
    """One panel per measure, one point with its interval per setting."""
    figure, axes = plt.subplots(
        1, len(columns), figsize=(WIDTH, 0.36 * len(settings) + 1.5), sharey=True, squeeze=False
    )
    for ax, column in zip(axes[0], columns, strict=True):
        for i, setting in enumerate(settings):
            if column not in summary[setting]:
                continue  # draws have no distances
            point = summary[setting][column]
            colour = MASSIVE if setting == "massive" else ACCENT
            ax.plot([point.low, point.high], [i, i], color=colour, linewidth=2)
            ax.plot(point.value, i, "o", color=colour)
        ax.set_xlabel(LABELS.get(column, column), fontsize=9)
        if column in ("sharpness_ratio", "frechet_change"):
            ax.axvline(int(column == "sharpness_ratio"), color="black", linewidth=0.8, linestyle="--")
        ax.grid(axis="x", alpha=0.4)
    axes[0, 0].set_yticks(range(len(settings)), [label(setting) for setting in settings])
    axes[0, 0].invert_yaxis()
    return _closed(figure)


def spectra(frequencies: ArrayLike, powers: Mapping[str, ArrayLike]) -> Figure:
    """Radially averaged power spectra, mean over images."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.2))
    others = iter([colour for colour in COLOURS if colour != MASSIVE])
    for name, power in powers.items():
        colour, width = (MASSIVE, 2.2) if name == "massive" else (next(others), 1.1)
        ax.plot(np.asarray(frequencies)[1:], np.asarray(power)[1:], marker=".", color=colour, lw=width, label=name)
    ax.set(xlabel="spatial frequency (cycles / pixel)", ylabel="power", yscale="log")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(frameon=False, fontsize=9, bbox_to_anchor=(1, 1), loc="upper left")
    return _closed(figure)


def sweep(tables: Mapping[str, pd.DataFrame], measures: Sequence[str]) -> Figure:
    """Fig. 8: one column per sweep (its name labels the x axis), one row per measure, with 95 % intervals."""
    figure, axes = plt.subplots(
        len(measures),
        len(tables),
        figsize=(WIDTH, 1.9 * len(measures) + 0.5),
        sharey="row",
        sharex="col",
        squeeze=False,
    )
    for column, (name, table) in enumerate(tables.items()):
        for row, measure in enumerate(measures):
            ax, part = axes[row, column], table[table["measure"] == measure]
            ax.fill_between(part["key"], part["low"], part["high"], color=ACCENT, alpha=0.25, linewidth=0)
            ax.plot(part["key"], part["value"], "o-", color=ACCENT, markersize=4)
            if measure == "sharpness_ratio":
                ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
            if column == 0:
                ax.set_ylabel(LABELS.get(measure, measure), fontsize=9)
            ax.grid(alpha=0.4)
        axes[-1, column].set_xlabel(name)
    return _closed(figure)


def regimes(table: pd.DataFrame) -> Figure:
    """What zeroing k channels does (columns of `regimes.sweep`): one row per choice of channels and steps.

    One panel per measure, one line per block, with 95 % intervals.
    """
    measures = ["low_error", "high_error", "sharpness_ratio"] + ["agreement_change"] * ("agreement_change" in table)
    rows = list(table.groupby(["channels", "steps"], sort=False))
    colours = dict(zip(sorted(table["block"].unique()), COLOURS, strict=False))
    figure, axes = plt.subplots(
        len(rows), len(measures), figsize=(WIDTH, 1.75 * len(rows) + 0.5), sharex=True, sharey="col", squeeze=False
    )
    for line, ((channels, steps), part) in enumerate(rows):
        for ax, measure in zip(axes[line], measures, strict=True):
            for block, curve in part.groupby("block"):
                ax.fill_between(
                    curve["k"], curve[f"{measure}.low"], curve[f"{measure}.high"], color=colours[block], alpha=0.2, lw=0
                )
                ax.plot(curve["k"], curve[measure], "o-", color=colours[block], markersize=3, label=f"block {block}")
            if measure in ("sharpness_ratio", "agreement_change"):
                ax.axhline(int(measure == "sharpness_ratio"), color="black", linewidth=0.8, linestyle="--")
            ax.set(xscale="log")
            ax.xaxis.set(major_locator=FixedLocator(sorted(table["k"].unique())), major_formatter=PLAIN)
            ax.xaxis.set_minor_locator(NullLocator())
            if line == 0:
                ax.set_title(LABELS.get(measure, measure), fontsize=8)
        axes[line, 0].set_ylabel(f"{channels},\n{steps}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("channels zeroed (k)", fontsize=9)
    axes[0, -1].legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1), loc="upper left")
    return _closed(figure)


def table_6(table: pd.DataFrame) -> Figure:
    """Every seed block of every row of Table 6, one panel per measure (columns setting, seed, then the measures)."""
    measures = [column for column in table.columns if column not in ("setting", "seed")]
    table = table.assign(setting=table["setting"].map(label))
    figure, axes = plt.subplots(1, len(measures), figsize=(WIDTH, 2.6), sharey=True, squeeze=False)
    for ax, measure in zip(axes[0], measures, strict=True):
        sns.stripplot(table, x=measure, y="setting", hue="setting", ax=ax, jitter=False, size=7, legend=False)
        ax.set(ylabel="", xlabel=LABELS.get(measure, measure))
        ax.grid(axis="x", alpha=0.4)
    return _closed(figure)


def over_training(ratios: pd.DataFrame, threshold: float) -> Figure:
    """Largest channel over the block's median along training, one line per block (columns step, block, ratio)."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.2))
    if ratios.empty:
        ax.text(0.5, 0.5, "no training checkpoints of this model are recorded", ha="center", transform=ax.transAxes)
        return _closed(figure)
    sns.lineplot(ratios, x="step", y="ratio", hue="block", palette="viridis", marker="o", ax=ax, legend="full")
    ax.axhline(threshold, color="black", linestyle="--", linewidth=0.8)
    ax.set(xlabel="training step", ylabel="largest channel / block median", xscale="log", yscale="log")
    ax.yaxis.set(major_locator=FixedLocator(RATIO_TICKS), major_formatter=PLAIN, minor_locator=NullLocator())
    ax.legend(frameon=False, fontsize=8, title="block", bbox_to_anchor=(1, 1), loc="upper left")
    return _closed(figure)


def over_size(history: pd.DataFrame, sizes: pd.DataFrame, threshold: float) -> Figure:
    """Fig. 3(b) and (c): the largest channel of any block along training, and against the size at equal steps.

    Args:
        history: columns size, seed, step, ratio, low, high; one row per block.
        sizes: columns size, seed, parameters, step, ratio, low, high; one row per training.
        threshold: the ratio above which a channel counts as massive.
    """
    figure, (along, across) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), sharey=True)
    for i, size in enumerate(dict.fromkeys(sizes["size"])):
        colour = COLOURS[i]
        for number, (_, snapshots) in enumerate(history[history["size"] == size].groupby("seed")):
            largest = snapshots.loc[snapshots.groupby("step")["ratio"].idxmax()]
            label = None if number else f"{size}"
            along.plot(largest["step"], largest["ratio"], "o-", color=colour, markersize=4, label=label)
            along.fill_between(largest["step"], largest["low"], largest["high"], color=colour, alpha=0.25, linewidth=0)
        trainings = sizes[sizes["size"] == size]
        millions = trainings["parameters"] / 1e6
        across.vlines(millions, trainings["low"], trainings["high"], color=colour, linewidth=2)
        across.plot(millions, trainings["ratio"], "o", color=colour)
        highest = (millions.iloc[0], trainings["ratio"].max())
        across.annotate(size, highest, xytext=(6, -3), textcoords="offset points", fontsize=9)
    for ax in (along, across):
        ax.axhline(threshold, color="black", linestyle="--", linewidth=0.8)
        ax.set(xscale="log", yscale="log")
    along.set(xlabel="training step", ylabel="largest channel / block median")
    along.legend(frameon=False, fontsize=9, title="size", loc="lower right")
    along.yaxis.set(major_locator=FixedLocator(RATIO_TICKS), major_formatter=PLAIN, minor_locator=NullLocator())
    across.set(xlabel=f"million parameters (after {sizes['step'].iloc[0]:,} steps)")
    across.xaxis.set(major_locator=FixedLocator(MILLION_TICKS), major_formatter=PLAIN, minor_locator=NullLocator())
    across.margins(x=0.15)
    return _closed(figure)


def training_curve(losses: pd.DataFrame) -> Figure:
    """Training loss (columns step, loss), means over spans of steps."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.6))
    ax.plot(losses["step"], losses["loss"], color=ACCENT)
    ax.set(xlabel="training step", ylabel="loss (mean squared\nerror of the velocity)", xscale="log", ylim=(0, None))
    ax.xaxis.set_major_formatter(PLAIN)
    return _closed(figure)
