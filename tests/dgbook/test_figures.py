"""Figures: what is drawn is what was given, and nothing stays open."""

import base64
import io
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.colors import to_rgb
from PIL import Image

from dgbook.measures.stats import Interval
from dgbook.pages import figures, html
from dgkit.errors import DgkitError

RNG = np.random.default_rng(0)
COLOUR_BLIND = [to_rgb(c) for c in sns.color_palette("colorblind", 10)]

MEAN_ABS = RNG.uniform(0.5, 2, (4, 12))
RATIOS = RNG.uniform(1, 50, (4, 12))
GATES = {"msa": RNG.uniform(0, 1, 12), "mlp": RNG.uniform(0, 1, 12)}
IMAGES = RNG.integers(0, 256, (3, 28, 28, 3), dtype=np.uint8)
TIMES = [950, 500, 50]
TRACKED = RNG.uniform(1, 9, (3, 4))
MAPS = RNG.uniform(0, 9, (3, 2, 7, 7))
SHARES = {
    5: {"timestep": Interval(0.7, 0.6, 0.8), "image": Interval(0.2, 0.1, 0.3)},
    9: {"timestep": Interval(0.4, 0.3, 0.6), "image": Interval(0.5, 0.25, 0.55)},
}
SUMMARY = {
    setting: {
        column: Interval(i + j, i + j - 0.5, i + j + 0.25) for j, column in enumerate(["low_error", "sharpness_ratio"])
    }
    for i, setting in enumerate(["massive", "cfg+dg"])
}
SWEEP = pd.DataFrame(
    [
        {"key": k, "measure": m, "value": k + i, "low": k + i - 0.5, "high": k + i + 1}
        for i, m in enumerate(["sharpness_ratio", "high_error"])
        for k in [0.0, 1.0, 2.0]
    ]
)
TABLE_6 = pd.DataFrame({"setting": ["cond"] * 2 + ["cond+dg"] * 2, "seed": [0, 1] * 2, "frechet": [4.0, 5, 2, 3],
                        "is": [6.0, 7, 8, 9]})  # fmt: skip
TRAINING = pd.DataFrame({"step": [10, 100] * 2, "block": [0, 0, 1, 1], "ratio": [2.0, 3, 4, 20]})
LADDER = pd.DataFrame(
    [("S", 0, 10, 0, 2.0), ("S", 0, 10, 1, 1.5), ("S", 0, 100, 0, 3.0), ("S", 0, 100, 1, 4.0),
     ("L", 0, 10, 0, 2.5), ("L", 0, 10, 1, 6.0), ("L", 0, 100, 0, 7.0), ("L", 0, 100, 1, 12.0),
     ("L", 1, 10, 0, 5.0), ("L", 1, 100, 0, 9.0)],
    columns=["size", "seed", "step", "block", "ratio"],
).assign(low=lambda t: t["ratio"] - 0.5, high=lambda t: t["ratio"] + 1)  # fmt: skip
LOSSES = pd.DataFrame({"step": [1, 10, 100], "loss": [2.0, 1.5, 0.5]})
REGIMES = pd.DataFrame(
    [
        {"channels": channels, "steps": "all steps", "block": block, "k": k}
        | {f"{m}{end}": k + block + add for m in ("low_error", "high_error", "sharpness_ratio", "agreement_change")
           for end, add in (("", 0.0), (".low", -0.5), (".high", 1.0))}
        for channels in ("largest", "random") for block in (0, 2) for k in (1, 8)
    ]
)  # fmt: skip
SIZES = LADDER.loc[[3, 7, 9]].assign(parameters=[500_000, 5_000_000, 5_000_000])

FIGURES = {
    "channel_profiles": lambda: figures.channel_profiles(MEAN_ABS, [0, 2], [3, 7], 5.0),
    "channel_profiles of one block, no dim": lambda: figures.channel_profiles(MEAN_ABS, [1], [], 5.0),
    "layer_map": lambda: figures.layer_map(RATIOS),
    "layer_map of one block": lambda: figures.layer_map(np.ones((1, 12))),
    "layer_lines": lambda: figures.layer_lines(RATIOS, [3, 7], 5.0),
    "layer_lines of one block, one dim": lambda: figures.layer_lines(RATIOS[:1], [3], 5.0),
    "token_maps": lambda: figures.token_maps(MAPS, ["x", "y", "z"], ["a", "b"]),
    "token_maps of one image": lambda: figures.token_maps(MAPS[:1, :1], ["x"], ["a"]),
    "gates_and_activations": lambda: figures.gates_and_activations(MEAN_ABS[0], GATES, [3, 7], 2),
    "gates_and_activations of a gate": lambda: figures.gates_and_activations(MEAN_ABS[0], {"mlp": MEAN_ABS[1]}, [3], 2),
    "over_time": lambda: figures.over_time(TRACKED, TIMES, ["bag", "coat", "bag", "coat"], 5),
    "over_time of one image": lambda: figures.over_time(TRACKED[:, :1], TIMES, ["bag"], 5),
    "shares": lambda: figures.shares(SHARES),
    "shares of one dim": lambda: figures.shares({5: SHARES[5]}),
    "image_rows": lambda: figures.image_rows({"a": IMAGES, "b": IMAGES[::-1]}, ["x", "y", "z"]),
    "image_rows of one image": lambda: figures.image_rows({"a": IMAGES[:1]}),
    "effects": lambda: figures.effects(SUMMARY, ["massive", "cfg+dg"], ["low_error", "sharpness_ratio"]),
    "effects of one setting": lambda: figures.effects(SUMMARY, ["massive"], ["low_error"]),
    "spectra": lambda: figures.spectra(np.arange(4) / 8, {"a": [9.0, 4, 2, 1], "b": [8.0, 3, 2, 1]}),
    "sweep": lambda: figures.sweep({"w": SWEEP, "lambda": SWEEP}, ["sharpness_ratio", "high_error"]),
    "sweep of one measure": lambda: figures.sweep({"w": SWEEP}, ["sharpness_ratio"]),
    "regimes": lambda: figures.regimes(REGIMES),
    "regimes without a judge": lambda: figures.regimes(
        REGIMES[[column for column in REGIMES if not column.startswith("agreement")]]
    ),
    "table_6": lambda: figures.table_6(TABLE_6),
    "table_6 of one measure": lambda: figures.table_6(TABLE_6[["setting", "seed", "frechet"]]),
    "over_training": lambda: figures.over_training(TRAINING, 5.0),
    "over_training of one block": lambda: figures.over_training(TRAINING[:2], 5.0),
    "training_curve": lambda: figures.training_curve(LOSSES),
    "over_size": lambda: figures.over_size(LADDER, SIZES, 5.0),
    "over_size of one size": lambda: figures.over_size(LADDER[:4], SIZES[:1], 5.0),
}
# sequential colour maps: magnitude as colour, and depth of a block as colour
SEQUENTIAL = ("layer_map", "token_maps", "over_training")
# images and maps carry titles, and these name their axes on the outer panels alone
BARE = ("token_maps", "image_rows")


def test_every_figure_is_covered():
    public = {n for n, f in vars(figures).items() if callable(f) and getattr(f, "__module__", "") == figures.__name__}
    public = {n for n in public if not n.startswith("_")}
    assert public == {name.split()[0] for name in FIGURES}


def pairs(ax):
    """(x, y) of each line of an axes."""
    return [line.get_xydata() for line in ax.lines]


def test_regimes_draws_every_block_of_every_setting():
    axes = figures.regimes(REGIMES).axes
    assert len(axes) == 2 * 4
    for ax, measure in zip(axes[4:], ("low_error", "high_error", "sharpness_ratio", "agreement_change"), strict=True):
        curves = [xy for xy in pairs(ax) if len(xy) == 2 and xy[0, 0] == 1]
        part = REGIMES[REGIMES["channels"] == "random"]
        expected = [part.loc[part["block"] == block, ["k", measure]].to_numpy() for block in (0, 2)]
        assert all(np.array_equal(a, b) for a, b in zip(curves, expected, strict=True))


def line(ax, label):
    return next(found.get_ydata() for found in ax.lines if found.get_label() == label)


def stems(ax):
    """Height of each stem over its channel, of the first collection."""
    first = next(c for c in ax.collections if isinstance(c, LineCollection))
    return np.array([segment[1] for segment in first.get_segments()])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_the_figure_is_closed_labelled_and_draws(name, tmp_path):
    plt.close("all")
    figure = FIGURES[name]()
    assert plt.get_fignums() == []
    assert isinstance(figure, plt.Figure) and figure.axes
    figure.savefig(tmp_path / "figure.png", dpi=40)
    if name.split()[0] not in BARE:
        assert any(ax.get_xlabel() for ax in figure.axes) or name.startswith("shares")
        named = any(ax.get_ylabel() for ax in figure.axes)
        assert named or any(t.get_text() for ax in figure.axes for t in ax.get_yticklabels())


@pytest.mark.parametrize("name", [n for n in FIGURES if n.split()[0] not in (*SEQUENTIAL, "image_rows")])
def test_colours_are_those_of_the_colour_blind_palette(name):
    for ax in FIGURES[name]().axes:
        colours = [to_rgb(found.get_color()) for found in ax.lines]
        for collection in ax.collections:
            read = collection.get_edgecolor if isinstance(collection, LineCollection) else collection.get_facecolor
            colours += [tuple(colour[:3]) for colour in read()]
        colours += [to_rgb(patch.get_facecolor()) for patch in ax.patches]
        # reference lines and error bars are black or nearly
        assert all(max(c) < 0.2 or any(np.allclose(c, good) for good in COLOUR_BLIND) for c in colours)


def test_training_curve():
    figure = figures.training_curve(LOSSES)
    assert np.allclose(pairs(figure.axes[0])[0], LOSSES.to_numpy())


def test_channel_profiles():
    figure = figures.channel_profiles(MEAN_ABS, [0, 2], [3, 7], 5.0)
    for ax, block in zip(figure.axes, [0, 2], strict=True):
        assert np.allclose(stems(ax), np.stack([np.arange(12), MEAN_ABS[block]], 1))
        assert [text.get_text() for text in ax.texts] == ["3", "7"]
        assert np.allclose(line(ax, "median channel"), np.sort(MEAN_ABS[block])[5:7].mean())
        assert np.allclose(line(ax, "5 x median"), 5 * np.sort(MEAN_ABS[block])[5:7].mean())
        marked = [c.get_segments()[0] for c in ax.collections[1:]]
        assert np.allclose(marked, [[[d, 0], [d, MEAN_ABS[block, d]]] for d in (3, 7)])
        assert np.allclose([c.get_edgecolor()[0][:3] for c in ax.collections[1:]], figures.MASSIVE)


def test_layer_map():
    ax, bar = figures.layer_map(RATIOS).axes
    assert np.allclose(np.asarray(ax.collections[0].get_array()).reshape(4, 12), RATIOS)
    assert ax.collections[0].norm.vmin == 1 and ax.collections[0].norm.vmax == RATIOS.max()
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == ("channel", "block", "mean |z| / block median")


def test_layer_lines():
    ax = figures.layer_lines(RATIOS, [3, 7], 6.0).axes[0]
    assert np.array_equal(line(ax, "channel 3"), RATIOS[:, 3]) and np.array_equal(line(ax, "channel 7"), RATIOS[:, 7])
    rest = [max(row[c] for c in range(12) if c not in (3, 7)) for row in RATIOS]
    assert np.array_equal(line(ax, "largest other channel"), rest)
    assert np.allclose(line(ax, "6 x median"), 6)


def test_token_maps_share_one_scale():
    axes = figures.token_maps(MAPS, ["x", "y", "z"], ["a", "b"]).axes
    for ax, values in zip(axes[:6], MAPS.reshape(6, 7, 7), strict=True):
        assert np.array_equal(ax.images[0].get_array(), values)
        assert ax.images[0].get_clim() == (0, MAPS.max())
    assert [ax.get_title() for ax in axes[:3]] == ["a", "b", ""]
    assert [axes[i].get_ylabel() for i in (0, 2, 4)] == ["x", "y", "z"] and axes[6].get_ylabel() == "|z|"


def test_gates_and_activations():
    axes = figures.gates_and_activations(MEAN_ABS[0], GATES, [3], 2).axes
    for ax, values in zip(axes, [MEAN_ABS[0], *GATES.values()], strict=True):
        assert np.allclose(stems(ax)[:, 1], values)
    assert [ax.get_ylabel() for ax in axes] == ["mean |z|", "mean |alpha|\nmsa", "mean |alpha|\nmlp"]
    assert axes[-1].get_xlabel() == "channel (block 2)"


def test_over_time():
    ax = figures.over_time(TRACKED, TIMES, ["bag", "coat", "bag", "coat"], 5).axes[0]
    assert np.allclose(line(ax, "bag"), (TRACKED[:, 0] + TRACKED[:, 2]) / 2)
    assert np.allclose(line(ax, "coat"), (TRACKED[:, 1] + TRACKED[:, 3]) / 2)
    assert ax.xaxis_inverted() and "5" in ax.get_ylabel()
    band = next(c for c in ax.collections if isinstance(c, PolyCollection)).get_paths()[0].vertices
    for i, timestep in enumerate(TIMES):
        at = band[band[:, 0] == timestep, 1]
        assert at.min() == TRACKED[i].min() and at.max() == TRACKED[i].max()


def test_shares():
    ax = figures.shares(SHARES).axes[0]
    assert [p.get_height() for p in ax.patches] == [0.7, 0.4, 0.2, 0.5]  # timestep of both dims, then image
    ends = [segment[:, 1] for c in ax.collections for segment in c.get_segments()]
    assert np.allclose(ends, [[0.6, 0.8], [0.3, 0.6], [0.1, 0.3], [0.25, 0.55]])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["channel 5", "channel 9"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["timestep", "image"]


def test_image_rows():
    figure = figures.image_rows({"cfg": IMAGES, "massive": IMAGES[::-1]}, ["x", "y", "z"], count=2)
    axes = np.array(figure.axes).reshape(2, 2)
    for row, batch in enumerate([IMAGES, IMAGES[::-1]]):
        for column in range(2):
            assert np.array_equal(axes[row, column].images[0].get_array(), batch[column])
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["CFG", "massive"]
    assert [ax.get_title() for ax in axes[0]] == ["x", "y"]


def test_image_rows_show_no_more_than_the_shortest_row():
    assert len(figures.image_rows({"a": IMAGES, "b": IMAGES[:2]}).axes) == 4


def sliders(*args, **kwargs):
    """The sliders as [(caption, [(slot, label, alternative text, image), (...)], style), ...]."""
    found = []
    for figure in ElementTree.fromstring(html.sliders(*args, **kwargs).data):
        sides = []
        for side in figure.find("img-comparison-slider"):
            kind, code = side.find("img").get("src").split(",")
            assert kind == "data:image/png;base64"
            image = np.array(Image.open(io.BytesIO(base64.b64decode(code))))
            sides.append((side.get("slot"), side.find("span").text, side.find("img").get("alt"), image))
        found.append((figure.find("figcaption").text, sides, figure.get("style")))
    return found


def test_sliders_hold_their_images_without_loss():
    found = sliders({"cfg": IMAGES, "<massive>": IMAGES[::-1]}, ['a "coat"', "bag", "shirt"], count=2)
    assert [caption for caption, _, _ in found] == ['a "coat"', "bag"]
    for i, (caption, sides, _) in enumerate(found):
        expected = [("first", "CFG", IMAGES[i]), ("second", "<massive>", IMAGES[2 - i])]
        for (slot, label, alt, image), (named_slot, setting, pixels) in zip(sides, expected, strict=True):
            assert (slot, label, alt) == (named_slot, setting, f"{setting}: {caption}")
            assert np.array_equal(image, pixels)


def test_sliders_without_names_are_numbered_and_no_more_than_the_images():
    found = sliders({"a": IMAGES, "b": IMAGES}, count=9)
    assert [caption for caption, _, _ in found] == ["image 1", "image 2", "image 3"]


def test_small_images_in_sliders_keep_their_pixels_square():
    assert sliders({"a": IMAGES, "b": IMAGES})[0][2] == "width: min(100%, 140px)"  # 5 x 28
    assert "image-rendering: pixelated" in html.sliders({"a": IMAGES, "b": IMAGES}).data
    large = np.zeros((1, 192, 192, 3), np.uint8)
    assert sliders({"a": large, "b": large})[0][2] == "width: min(100%, 192px)"
    assert "pixelated" not in html.sliders({"a": large, "b": large}).data


@pytest.mark.parametrize("pair", [{"a": IMAGES}, {"a": IMAGES, "b": IMAGES[:2]}, dict.fromkeys("abc", IMAGES)])
def test_sliders_compare_two_settings_of_the_same_images(pair):
    with pytest.raises(DgkitError, match="two settings"):
        html.sliders(pair)


def test_sliders_need_a_name_for_each_image_shown():
    with pytest.raises(DgkitError, match="each of the 3 images"):
        html.sliders({"a": IMAGES, "b": IMAGES}, ["x", "y"])
    assert len(sliders({"a": IMAGES, "b": IMAGES}, ["x", "y"], count=2)) == 2


def test_effects():
    axes = figures.effects(SUMMARY, ["massive", "cfg+dg"], ["low_error", "sharpness_ratio"]).axes
    for ax, column in zip(axes, ["low_error", "sharpness_ratio"], strict=True):
        for i, setting in enumerate(["massive", "cfg+dg"]):
            interval = SUMMARY[setting][column]
            whisker, point = pairs(ax)[2 * i : 2 * i + 2]
            assert np.allclose(whisker, [[interval.low, i], [interval.high, i]])
            assert np.allclose(point, [[interval.value, i]])
        assert ax.get_xlabel() == figures.LABELS[column]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["massive", "CFG + DG"]
    assert len(axes[0].lines) == 4 and np.allclose(axes[1].lines[4].get_xdata(), 1)  # the neutral ratio


def test_spectra_leave_the_mean_out():
    ax = figures.spectra(np.arange(4) / 8, {"a": [9.0, 4, 2, 1], "b": [8.0, 3, 2, 1]}).axes[0]
    assert np.allclose(pairs(ax)[0], [[1 / 8, 4], [2 / 8, 2], [3 / 8, 1]])
    assert np.allclose(line(ax, "b"), [3, 2, 1]) and ax.get_yscale() == "log"


def test_sweep():
    second = SWEEP.assign(value=SWEEP["value"] * 2)
    figure = figures.sweep({"w": SWEEP, "lambda": second}, ["sharpness_ratio", "high_error"])
    axes = np.array(figure.axes).reshape(2, 2)
    for column, factor in enumerate([1, 2]):
        for row in range(2):
            assert np.allclose(pairs(axes[row, column])[0], [[k, factor * (k + row)] for k in range(3)])
            band = axes[row, column].collections[0].get_paths()[0].vertices
            assert band[band[:, 0] == 1.0, 1].min() == row + 0.5 and band[band[:, 0] == 1.0, 1].max() == row + 2
    assert [ax.get_xlabel() for ax in axes[1]] == ["w", "lambda"]
    assert [ax.get_ylabel() for ax in axes[:, 0]] == [figures.LABELS[m] for m in ("sharpness_ratio", "high_error")]


def test_table_6():
    axes = figures.table_6(TABLE_6).axes
    for ax, measure in zip(axes, ["frechet", "is"], strict=True):
        points = np.concatenate([c.get_offsets() for c in ax.collections if isinstance(c, PathCollection)])
        assert sorted(points.tolist()) == sorted([TABLE_6[measure][i], i // 2] for i in range(4))
        assert ax.get_xlabel() == figures.LABELS[measure]


def test_over_training():
    ax = figures.over_training(TRAINING, 5.0).axes[0]
    assert np.allclose(pairs(ax)[0], [[10, 2], [100, 3]]) and np.allclose(pairs(ax)[1], [[10, 4], [100, 20]])
    assert any(np.allclose(found.get_ydata(), 5) for found in ax.lines)


def test_over_size():
    along, across = figures.over_size(LADDER, SIZES, 5.0).axes
    assert [found.get_ydata().tolist() for found in along.lines[:3]] == [[2, 4], [6, 12], [5, 9]]
    colours = [found.get_color() for found in along.lines[:3]]
    assert colours[0] != colours[1] == colours[2]  # a colour per size, a line per training
    assert [t.get_text() for t in along.get_legend().get_texts()] == ["S", "L"]
    bands = [np.concatenate([path.vertices for path in band.get_paths()]) for band in along.collections]
    assert [(band[:, 1].min(), band[:, 1].max()) for band in bands] == [(1.5, 5), (5.5, 13), (4.5, 10)]
    segments = [bars.get_segments() for bars in across.collections]
    assert np.allclose(segments[0], [[[0.5, 3.5], [0.5, 5]]])
    assert np.allclose(segments[1], [[[5, 11.5], [5, 13]], [[5, 8.5], [5, 10]]])
    for found, expected in zip(pairs(across)[:2], [[[0.5, 4]], [[5, 12], [5, 9]]], strict=True):
        assert np.allclose(found, expected)
    assert [text.get_text() for text in across.texts] == ["S", "L"]
    assert across.get_xlabel() == "million parameters (after 100 steps)"
    for ax in (along, across):
        assert np.allclose(ax.lines[-1].get_ydata(), 5) and ax.get_yscale() == ax.get_xscale() == "log"
