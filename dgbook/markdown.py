"""Markdown from rows and values: what a table's cell can hold, and tables."""

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|$~#])")


def plain(text: object) -> str:
    """`text` with everything escaped that MyST would take for markup."""
    return _SPECIAL.sub(r"\\\1", str(text))


def code(text: str) -> str:
    """`text` in a code span that a table cell can hold."""
    return f"`{text}`".replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are Markdown of one line each."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
