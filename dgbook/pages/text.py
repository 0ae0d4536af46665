"""Links and commands as MyST text."""

from collections.abc import Sequence

from dgbook import notebooks
from dgbook.markdown import code
from dgbook.paper_scale import protocol
from dgbook.paper_scale.row import NAMES

ZOO = NAMES | {"DiT-XL": "dit-xl-2"}
"""The paper's names of its models, and ours."""


def chapter_link(notebook: str, words: str = "chapter") -> str:
    """A link to the page of a notebook, such as "chapter 3"."""
    return f"{{doc}}`{f'{words} {int(notebook[:2])}'.strip()} </notebooks/{notebook}>`"


def claim_target(claim: str) -> str:
    """The label of a claim's card, for references."""
    return f"claim-{claim.lower().replace('.', '-')}"


def on_models(command: str, models: Sequence[str]) -> str:
    """A command with the first model, and the others that it takes, each with the options that it needs there."""
    name = command.removeprefix("dgkit reproduce ")
    first, *others = (model + (protocol.options(name, model) if name in protocol.TABLES else "") for model in models)
    return code(f"{command} --model {first}") + "".join(f" or {code(model)}" for model in others)


def command_of(notebook: str) -> str:
    """The name of a notebook for `dgkit run`."""
    return next(name for name, file in notebooks.NOTEBOOKS.items() if file == f"{notebook}.ipynb")
