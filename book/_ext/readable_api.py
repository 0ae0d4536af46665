"""What autodoc shows of docstrings and signatures, made readable."""

from typing import Any

from sphinx.application import Sphinx


def escape_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape every bar outside `code`: in |z| for a magnitude, reStructuredText would see a substitution's name."""
    for number, line in enumerate(lines):
        parts = line.split("`")
        parts[::2] = [text.replace("|", r"\|") for text in parts[::2]]
        lines[number] = "`".join(parts)


def hide_factories(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write ... for a default that a dataclass makes anew: "<factory>" is no Python, and Sphinx could not parse it."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", escape_bars, priority=400)  # before napoleon adds types such as int | None
    app.connect("autodoc-process-signature", hide_factories)
    return {"parallel_read_safe": True}
