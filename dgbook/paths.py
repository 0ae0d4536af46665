"""Where runs write to."""

import os
from pathlib import Path

from dgkit.paths import CHECKOUT


def build_dir() -> Path:
    """Folder for everything a run creates: `_build` in the checkout, else in the current directory."""
    return (CHECKOUT or Path.cwd()) / "_build"


def results_dir() -> Path:
    """Folder that result files are written to: `$DGKIT_RESULTS_DIR`, else `_build/results`."""
    return Path(os.environ.get("DGKIT_RESULTS_DIR") or build_dir() / "results")
