"""Files that are whole or not there."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dgkit.errors import DgkitError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end, and only if nothing failed.

    It lies beside `path` as a hidden file `.NAME.HOST.PROCESS.partial`, which a killed process leaves behind.

    Raises:
        DgkitError: it cannot be written, as where the disk is full; what was there stays.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise DgkitError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 by `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
