"""The grid in which a call's image tokens stand: readers for the rows of `dgkit.anatomy.transformers`."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgkit.errors import ModelError


class Grid(NamedTuple):
    """The generated image tokens of a call: frame by frame, in each row by row.

    Attributes:
        frames: in tokens, as are the others; 1 for images. One is several latent frames where patches have a length.
        height, width: of a frame.
    """

    frames: int
    height: int
    width: int

    def fit(self, image: Tensor) -> None:
        """Check that there are as many image tokens (B, T, C).

        Raises:
            ModelError: there are more or fewer.
        """
        if image.shape[1] != prod(self):
            raise ModelError(
                f"a block put out {image.shape[1]} image tokens where the call says {self.frames} x {self.height} x "
                f"{self.width}: leave out maps and Frames"
            )


ReadGrid = Callable[[Any, dict[str, Any]], Grid]


def patches(model: Any, arguments: dict[str, Any]) -> Grid:
    """Of latents (B, C, H, W) or (B, C, F, H, W), cut into patches."""
    return _cut(arguments["hidden_states"].shape[2:], model.config)


def patches_of_frames(model: Any, arguments: dict[str, Any]) -> Grid:
    """Of latents (B, F, C, H, W), cut into patches."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    return _cut((frames, height, width), model.config)


def _cut(sides: tuple[int, ...], config: Any) -> Grid:
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    height, width = sides[-2] // patch[-2], sides[-1] // patch[-1]
    return Grid(sides[0] // patch[0] if len(sides) == 3 else 1, height, width)


def image_ids(model: Any, arguments: dict[str, Any]) -> Grid:
    """Of positions `img_ids` (T, 3) or (B, T, 3), in Flux 2 one more: image, row, column; the first image is meant.

    Raises:
        ModelError: they are not those of one image row by row.
    """
    ids = arguments["img_ids"]
    ids = ids if ids.ndim == 2 else ids[0]
    image, row, column = (values[: int((ids[:, 0] == ids[0, 0]).sum())] for values in ids[:, :3].unbind(1))
    height, width = len(row.unique()), len(column.unique())
    place = (row - row[0]) * width + column - column[0]
    if not torch.equal(place, torch.arange(len(image), device=place.device, dtype=place.dtype)):
        raise ModelError(
            f"the img_ids of this call of {type(model).__name__} do not number the rows and columns of one image: "
            f"leave out maps and Frames"
        )
    return Grid(1, height, width)


def image_shapes(model: Any, arguments: dict[str, Any]) -> Grid:
    """Of `img_shapes`: for each batch row the (frames, height, width) of its images, that which is generated first."""
    first = arguments["img_shapes"][0]
    return Grid(*(first[0] if isinstance(first, list) else first))


def stated(model: Any, arguments: dict[str, Any]) -> Grid:
    """Of `num_frames`, `height` and `width`.

    Raises:
        ModelError: the call states none, as those of LTXConditionPipeline, which have coordinates instead.
    """
    sides = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sides:
        raise ModelError(
            f"this call of {type(model).__name__} does not state num_frames, height and width, so that the grid of its "
            f"tokens is not known: leave out maps and Frames"
        )
    return Grid(*sides)  # type: ignore[arg-type]


def hidream(model: Any, arguments: dict[str, Any]) -> Grid:
    """Of latents (B, C, H, W), or of `img_sizes`, (height, width) of each batch row."""
    if arguments.get("hidden_states_masks") is None:
        return patches(model, arguments)
    height, width = arguments["img_sizes"][0]
    return Grid(1, int(height), int(width))


def z_image(model: Any, arguments: dict[str, Any]) -> Grid:
    """Of a list of latents (C, F, H, W)."""
    _, frames, height, width = arguments["x"][0].shape
    spatial, temporal = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    return Grid(frames // temporal, height // spatial, width // spatial)
