"""Where shipped data is read from."""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "data"

CHECKOUT: Path | None = None if _PACKAGED.is_dir() else Path(__file__).parent.parent
"""Root of the repository in a checkout or editable install; None for an installed wheel, which carries its own data."""

DATA: Path = _PACKAGED if CHECKOUT is None else CHECKOUT / "data"
"""Shipped models, prompts, the paper's tables and accepted results."""
