"""The runs behind the pages: command, parameters, device, time, commit and versions, from their result files."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dgbook import notebooks
from dgbook.claims import results
from dgbook.claims.results import Record
from dgbook.markdown import code, plain, table
from dgbook.pages.text import chapter_link
from dgbook.paths import results_dir, safe_name
from dgkit.errors import DgkitError

BOOK_TOOLS = ("jupyter-book", "Sphinx", "myst-nb", "papermill")


def pages() -> dict[str, Record]:
    """The result of each notebook that the pages show: of this build's execution, else the accepted one.

    A result without a command was not made by `make book`, so its notebook's outputs are not on the pages. A notebook
    that has neither is left out.
    """
    found = {}
    for name, file in notebooks.NOTEBOOKS.items():
        stem = Path(file).stem
        relative = f"{safe_name(notebooks.default_model(name))}/{stem}.json"
        for folder in (results_dir(), results.ACCEPTED):
            if not (folder / relative).is_file():
                continue
            record = results.read(folder / relative)
            if record.provenance["command"] is not None:
                found[stem] = record
                break
    return found


def references() -> list[Record]:
    """Every reference run, by notebook and model."""
    return [record for file in notebooks.NOTEBOOKS.values() for record in results.references(Path(file).stem).values()]


def runs(kind: str) -> str:
    """A table of runs.

    Args:
        kind: "pages" for those whose figures the pages show, "references" for those that the verdicts rest on.

    Raises:
        DgkitError: another kind.
    """
    if kind == "pages":
        found = [*pages().values()]
    elif kind == "references":
        found = references()
    else:
        raise DgkitError(f"kind={kind!r} is not allowed: use pages or references")
    header = ("chapter", "model", "time", "device", "commit", "command, seed and parameters")
    return table(header, map(_row, found))


def _row(record: Record) -> tuple[str, ...]:
    facts = record.provenance
    own = {name: value for name, value in record.parameters.items() if name not in ("model", "device")}
    parameters = plain(", ".join(f"{name} {_shown(value)}" for name, value in own.items()))
    return (
        chapter_link(record.name, ""),
        code(facts["model"]),
        f"{facts['wall_seconds']:,.0f} s",
        plain(f"{facts['device']}, {facts['dtype']}"),
        commit(facts),
        f"{code(facts['command']) if facts['command'] else 'unknown'}: {parameters}",
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def commit(facts: dict[str, Any]) -> str:
    """The commit, and whether the code differed from it."""
    if facts["commit"] is None:
        return "unknown"
    return code(facts["commit"][:10]) + (" with changes" if facts["dirty"] else "")


def versions() -> str:
    """Which library versions made the numbers, and which tools make the pages."""
    made = {"the notebooks on the pages": [*pages().values()], "reference runs": references()}
    names = list(dict.fromkeys(name for found in made.values() for r in found for name in r.provenance["versions"]))
    lines = [
        (label, *(", ".join(sorted({str(r.provenance["versions"].get(name)) for r in found})) for name in names))
        for label, found in made.items()
    ]
    tools = ", ".join(f"{tool} {version(tool)}" for tool in BOOK_TOOLS)
    return table(("", *names), lines) + f"\n\nThe pages: Python {platform.python_version()}, {tools}."


def hardware() -> str:
    """The machine that this build runs on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    rows = [
        ("system", f"{platform.system()}, {platform.machine()}"),
        ("processor", _processor()),
        ("cores", str(os.cpu_count())),
        ("memory", f"{memory:.0f} GiB"),
        ("GPU", gpu),
    ]
    return table(("", "this build"), [(name, plain(value)) for name, value in rows])


def _processor() -> str:
    """The processor's name as Linux gives it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()
