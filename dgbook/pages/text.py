"""MyST text from rows and values."""

import re
from collections.abc import Iterable, Sequence

from dgbook import notebooks
from dgbook.paper_scale import protocol

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|$~#])")


def plain(text: object) -> str:
    """`text` with everything escaped that MyST would take for markup."""
    return _SPECIAL.sub(r"\\\1", str(text))


def code(text: str) -> str:
    """`text` in a code span that a table cell can hold."""
    return f"`{text}`".replace("|", "\\|")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are MyST text of one line each."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def chapter_link(notebook: str, words: str = "chapter") -> str:
    """A link to the page of a notebook, such as "chapter 3"."""
    return f"{{doc}}`{f'{words} {int(notebook[:2])}'.strip()} </notebooks/{notebook}>`"


def on_models(command: str, models: Sequence[str]) -> str:
    """A command with the first model, and the others that it takes, each with the options that it needs there."""
    name = command.removeprefix("dgkit reproduce ")
    first, *others = (model + (protocol.options(name, model) if name in protocol.TABLES else "") for model in models)
    return code(f"{command} --model {first}") + "".join(f" or {code(model)}" for model in others)


def command_of(notebook: str) -> str:
    """The name of a notebook for `dgkit run`."""
    return next(name for name, file in notebooks.NOTEBOOKS.items() if file == f"{notebook}.ipynb")
