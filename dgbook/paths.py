"""Where runs write to, and under which names."""

import os
import re
from pathlib import Path

from dgkit.errors import DgkitError
from dgkit.paths import CHECKOUT


def build_dir() -> Path:
    """Folder for everything a run creates: `_build` in the checkout, else in the current directory."""
    return (CHECKOUT or Path.cwd()) / "_build"


def results_dir() -> Path:
    """Folder that result files are written to: `$DGKIT_RESULTS_DIR`, else `_build/results`."""
    return Path(os.environ.get("DGKIT_RESULTS_DIR") or build_dir() / "results")


def safe_name(text: str) -> str:
    """`text` as a file name: everything but letters, digits, dot, dash and underscore becomes a dash.

    Raises:
        DgkitError: nothing is left of it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    if not name:
        raise DgkitError(f"{text!r} cannot name a file: a letter or digit is needed")
    return name
