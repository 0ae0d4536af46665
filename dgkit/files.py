"""Files that somebody else wrote: one way to read each kind of text, and one sentence if it is not such a file."""

import json
import math
from pathlib import Path
from typing import Any

from dgkit.errors import DataError


def read_text(path: Path) -> str:
    r"""Text in UTF-8, with or without a byte-order mark; "\r\n" becomes "\n", and nothing else is a line's end.

    Raises:
        DataError: it cannot be read, or is in another encoding.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is no character of it"
        raise DataError(f"{path} is not text in UTF-8 ({reason}): save it in UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path} holds a zero character: give text in UTF-8")
    return text.replace("\r\n", "\n")


def read_lines(path: Path) -> list[str]:
    """The lines of a text, see `read_text`, of which none is empty or of spaces alone.

    Raises:
        DataError: there is none, or one is empty, and as for `read_text`.
    """
    text = read_text(path)
    if not text:
        raise DataError(f"{path} is empty: give one prompt per line")
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"{path}, line {number} is empty: give one prompt per line")
    return lines


def read_json(path: Path, kind: type = dict, *, finite: bool = True) -> Any:
    """A JSON object, or a list; its numbers are finite, unless Python's NaN and Infinity may be among them.

    Raises:
        DataError: it is not one, or holds NaN or an infinity, and as for `read_text`.
    """
    text = read_text(path)
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite) if finite else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON{of_pointer(path)}: {error}") from error
    if not isinstance(value, kind):
        raise DataError(f"{path} is not a JSON {'object' if kind is dict else 'list'}: it holds {type(value).__name__}")
    return value


def of_pointer(path: Path) -> str:
    """What to say of a file that is a Git LFS pointer, in place of which a clone without LFS lacks the file."""
    try:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs.github.com/spec/")
    except OSError:
        return ""
    return " (it is a Git LFS pointer: run `git lfs pull` in the repository)" if pointer else ""


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value
