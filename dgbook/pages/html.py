"""What notebooks show as HTML: tables, and pairs of images under a divider."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd
from IPython.display import HTML
from numpy.typing import NDArray
from PIL import Image

from dgbook.claims.names import label
from dgkit.errors import DgkitError


def table(frame: pd.DataFrame, index: bool = True) -> HTML:
    """A table for a page: whole sentences in its cells, where pandas would cut them off, and a header of one row."""
    with pd.option_context("display.max_colwidth", None):
        return HTML(frame.to_html(index=index, index_names=False))


def sliders(pair: Mapping[str, NDArray[np.uint8]], names: Sequence[str] = (), count: int = 4) -> HTML:
    """Two settings under one divider that the reader moves, image by image: HTML that holds its images.

    Needs the scripts of the book's `_static`; without them the two images stand side by side.

    Args:
        pair: left and right of the divider, images (N, H, W, 3) each, by setting.
        names: of the images, for captions and alternative texts; numbers if there are none.
        count: how many images, from the first.

    Raises:
        DgkitError: other than two settings, images of different shapes, or fewer names than images.
    """
    shapes = {setting: images.shape for setting, images in pair.items()}
    if len(pair) != 2 or len(set(shapes.values())) != 1:
        raise DgkitError(f"pair={shapes}: a slider compares two settings, with as many images of the same shape")
    length, _, width, _ = next(iter(shapes.values()))
    names = names or [f"image {i + 1}" for i in range(length)]
    if len(names) < min(count, length):
        raise DgkitError(f"names={list(names)}: each of the {min(count, length)} images shown needs one")
    shown = {label(setting): images for setting, images in pair.items()}
    # a whole number of screen pixels for each of a small image's
    style = f"width: min(100%, {width * max(1, 160 // width)}px)"
    sliders = [
        f'<figure style="{style}"><img-comparison-slider keyboard="disabled">'
        + "".join(
            f'<div slot="{slot}">{_img(images[i], f"{setting}: {names[i]}")}<span>{escape(setting)}</span></div>'
            for slot, (setting, images) in zip(("first", "second"), shown.items(), strict=True)
        )
        + f"</img-comparison-slider><figcaption>{escape(names[i])}</figcaption></figure>"
        for i in range(min(count, length))
    ]
    return HTML(f'<div class="sliders">{"".join(sliders)}</div>')


def _img(pixels: NDArray[np.uint8], alt: str) -> str:
    """An image (H, W, 3) as an element that holds it, without loss."""
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    rendering = ' style="image-rendering: pixelated"' if pixels.shape[1] < 64 else ""
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return f'<img class="dark-light" alt="{escape(alt)}" src="{source}"{rendering}/>'
