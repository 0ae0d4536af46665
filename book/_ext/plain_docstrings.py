"""Docstrings write |z| for a magnitude; reStructuredText would take it for the name of a substitution."""

from typing import Any

from sphinx.application import Sphinx


def escape_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape every bar that stands outside `code`."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [text.replace("|", r"\|") for text in parts[::2]]
        lines[number] = "`".join(parts)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape_bars, priority=400)  # before napoleon adds types such as int | None
    return {"parallel_read_safe": True}
