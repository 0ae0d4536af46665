"""One reader for each kind of file that people bring: a table, arrays, weights, an image. Text is `dgkit.files`'."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import load_file

from dgkit.errors import DataError, DgkitError, first_line
from dgkit.files import of_pointer, read_text


def read_table(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file by the names in its first line, each with where it is, "PATH, line 2".

    Args:
        path: the file, in UTF-8; values in quotes may hold commas and ends of lines.
        columns: which it must have, each once and with a value in every row.

    Raises:
        DataError: it lacks one of them, has no rows, is no CSV, or as for `read_text`.
    """
    text = read_text(path)
    if not text:
        raise DataError(f"{path} is empty: its first line must name {','.join(columns)}")
    reader, rows = csv.DictReader(io.StringIO(text, newline=""), strict=True), []
    try:
        names = list(reader.fieldnames or ())
        for column in columns:
            if names.count(column) != 1:
                raise DataError(
                    f"{path} has {names.count(column)} columns {column!r}: its first line must name {','.join(columns)}"
                )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where} does not have {len(names)} values")
            if empty := [column for column in columns if not row[column].strip()]:
                raise DataError(f"{where} has no {empty[0]}")
            rows.append((where, row))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is no line of a CSV file: {error}") from error
    if not rows:
        raise DataError(f"{path} has no rows below its first line")
    return rows


def read_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file, or those that it has of `names`.

    Raises:
        DataError: it is missing, damaged, another kind of file or holds Python objects.
    """
    try:
        with np.load(path) as content:
            return {name: content[name] for name in (content if names is None else names) if name in content}
    except Exception as error:  # of zipfile, zlib and NumPy, which have no common base
        raise DataError(f"{path} is not a whole npz file of arrays{of_pointer(path)}: {first_line(error)}") from error


def read_weights(path: Path, load: Callable[[Path], dict[str, Any]] = load_file) -> dict[str, Any]:
    """All tensors of a safetensors file, as PyTorch's or by another `load`.

    Raises:
        DataError: it is missing, damaged or another kind of file.
    """
    try:
        return load(path)
    except Exception as error:  # of the operating system, safetensors and PyTorch
        raise DataError(f"{path} is not a whole safetensors file{of_pointer(path)}: {first_line(error)}") from error


def read_image(path: Path) -> NDArray[np.uint8]:
    """An image as RGB (H, W, 3) as a browser shows it: turned as its EXIF says, grey and palettes converted.

    Raises:
        DataError: it cannot be read, is transparent in places, has a colour profile, several frames, more than 8 bits
            per channel, or is neither RGB nor grey.
    """
    try:
        with Image.open(path) as file:
            deep = any(re.search(";16[BLN]", str(tile[3])) for tile in file.tile)  # of which PIL would keep 8 bits
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a camera's preview comes second
            if "icc_profile" in file.info:
                raise DataError(f"{path} has a colour profile, which the page would ignore: convert it to plain sRGB")
            if frames > 1:
                raise DataError(f"{path} has {frames} frames: give an image of one")
            if deep or file.mode not in ("RGB", "RGBA", "L", "LA", "P"):
                depth = " in 16 bits" if deep else ""
                raise DataError(f"{path} has pixels of mode {file.mode!r}{depth}: give 8-bit RGB or grey")
            image = ImageOps.exif_transpose(file)
            if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                raise DataError(f"{path} is transparent in places: put it on the background to be judged")
            return np.asarray(image.convert("RGB"))
    except DgkitError:
        raise
    except Exception as error:  # of PIL's many decoders, which have no common base
        raise DataError(f"{path} cannot be read as an image{of_pointer(path)}: {first_line(error)}") from error
