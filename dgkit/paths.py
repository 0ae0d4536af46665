"""Where data is read from and results are written to."""

import os
from pathlib import Path

_PACKAGED = Path(__file__).parent / "data"

CHECKOUT: Path | None = None if _PACKAGED.is_dir() else Path(__file__).parent.parent
"""Root of the repository in a checkout or editable install; None for an installed wheel, which carries its own data."""

DATA: Path = _PACKAGED if CHECKOUT is None else CHECKOUT / "data"
"""Shipped models, prompts, the paper's tables and accepted results."""


def build_dir() -> Path:
    """Folder for everything a run creates: `_build` in the checkout, else in the current directory."""
    return (CHECKOUT or Path.cwd()) / "_build"


def results_dir() -> Path:
    """Folder that result files are written to: `$DGKIT_RESULTS_DIR`, else `_build/results`."""
    return Path(os.environ.get("DGKIT_RESULTS_DIR") or build_dir() / "results")
