"""Runs the book's notebooks with other parameters, through papermill, and accepts those that `make book` executed."""

import ast
import json
import os
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import nbformat
import papermill
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbformat import NotebookNode
from papermill.cli import _resolve_type as resolve_type
from papermill.exceptions import PapermillExecutionError

from dgbook.paths import build_dir, safe_name
from dgkit.checks import refuse
from dgkit.errors import DgkitError, first_line
from dgkit.files import read_text
from dgkit.paths import CHECKOUT, DATA

NOTEBOOKS = {
    "layer-properties": "01_layer_properties.ipynb",
    "timestep-vs-text": "02_timestep_vs_text.ipynb",
    "intervention": "03_intervention.ipynb",
    "detail-guidance": "04_detail_guidance.ipynb",
    "ablations": "05_ablations.ipynb",
    "imagenet": "06_imagenet.ipynb",
    "ambiguities": "07_ambiguities.ipynb",
}
"""Short names and files, in the book's order."""

# with reference.toml; an installed wheel has them beside its data
FOLDER = (CHECKOUT or DATA) / "notebooks"


def execute(name: str, parameters: dict[str, Any], output: Path | None = None, progress: bool = True) -> Path:
    """Run a notebook with some parameters changed.

    Args:
        name: A key of `NOTEBOOKS`.
        parameters: Values by name; the others keep the notebook's defaults.
        output: Folder for the executed notebook and, in `<model>/`, its result file; None makes a new
            `_build/runs/<name>-<model>-<number>`.
        progress: Show a progress bar where standard error is a terminal.

    Returns:
        The output folder.

    Raises:
        DgkitError: `name` or a parameter is unknown, a parameter that is text is given something else, or a cell of
            the notebook raised or ended the kernel; the notebook up to that cell is then left in `output`.
    """
    source = _source(name)
    known = papermill.inspect_notebook(_literal(source))
    unknown = [key for key in parameters if key not in known]
    if unknown:
        raise DgkitError(f"notebook {name!r} has no parameter {', '.join(unknown)}: it has {', '.join(known)}")
    for key, value in parameters.items():
        missing = value is None and key != "model"  # the device, say
        if not isinstance(value, str) and not missing and isinstance(ast.literal_eval(known[key]["default"]), str):
            refuse(key, value, f"give text such as {known[key]['default']}")
    if output is None:
        model = parameters["model"] if "model" in parameters else _default_model(source)
        runs = build_dir() / "runs"
        candidates = (runs / f"{name}-{safe_name(model)}-{number}" for number in count(1))
        output = next(folder for folder in candidates if not folder.exists())
    output.mkdir(parents=True, exist_ok=True)
    target = output / source.name
    with _environment(kernel_environment(name, parameters) | {"DGKIT_RESULTS_DIR": str(output.absolute())}):
        try:
            notebook = papermill.execute_notebook(
                _literal(source),
                _literal(target),
                parameters,
                kernel_name="python3",
                kernel_manager_class=ThisPython,
                progress_bar=progress and sys.stderr.isatty(),
            )
        except RuntimeError as error:  # of which DeadKernelError is one; it may also die before it answers
            raise DgkitError(
                f"the kernel of notebook {name!r} died, perhaps for want of memory: {first_line(error)} (see {target})"
            ) from error
        except PapermillExecutionError as error:
            raise DgkitError(
                f"notebook {name!r} stopped in cell {error.exec_count}: {error.ename}: {error.evalue} (see {target})"
            ) from error
    _write(_scrubbed(notebook), target)
    return output


class ThisPython(AsyncKernelManager):
    """A kernel of the Python that runs this, whatever another one has put under the name "python3"."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


def kernel_environment(name: str, parameters: dict[str, Any]) -> dict[str, str]:
    """What the kernel of a run inherits: the command for its result file, and no warning that a page would show."""
    options = "".join(f" -p {shlex.quote(f'{key}={_shown(value)}')}" for key, value in parameters.items())
    # tqdm misses widgets, which a page cannot show anyway
    return {"DGKIT_COMMAND": f"dgkit run {name}{options}", "PYTHONWARNINGS": "ignore:IProgress not found"}


def accept() -> list[Path]:
    """Make the notebooks as `make book` executed them, in `_build/site/notebooks`, the committed ones.

    Returns:
        Those that changed.

    Raises:
        DgkitError: one of them was not executed to its end, or has other cells by now.
    """
    changed = []
    for file in NOTEBOOKS.values():
        executed, committed = build_dir() / "site" / "notebooks" / file, FOLDER / file
        if not executed.is_file() or _cells(executed) != _cells(committed):
            raise DgkitError(f"{committed} has not been executed as it is: run make book first")
        if executed.read_bytes() != committed.read_bytes():
            shutil.copy2(executed, committed)  # with its time, so that make does not find it newer than its execution
            changed.append(committed)
    return changed


def _cells(path: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(path, 4).cells]


def parse_parameter(text: str) -> tuple[str, Any]:
    """Name and value of "name=value": the value as papermill's `-p` reads it, and besides a JSON list in brackets.

    Raises:
        DgkitError: there is no name or no "=", or the list is not JSON.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise DgkitError(f"-p {text} is not allowed: use -p name=value")
    if not value.startswith("["):
        return name, resolve_type(value)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError as error:
        raise DgkitError(f"-p {text} is not allowed: a value in brackets is a JSON list ({error})") from error


def reference_parameters(name: str, model: str | None = None) -> dict[str, Any]:
    """The parameters of a notebook's reference run, from `notebooks/reference.toml`.

    Args:
        name: A key of `NOTEBOOKS`.
        model: The model it runs on, the notebook's default if None; the table [name.model] is laid over [name].

    Raises:
        DgkitError: `name` is unknown or the file has no such table.
    """
    path = _source(name).with_name("reference.toml")
    table = tomllib.loads(read_text(path))
    if name not in table:
        raise DgkitError(f"{path} has no table [{name}]")
    own = table[name].get(model or _default_model(path.with_name(NOTEBOOKS[name])), {})
    return {key: value for key, value in table[name].items() if not isinstance(value, dict)} | own


def default_model(name: str) -> str:
    """The model that a notebook runs on unless told otherwise.

    Raises:
        DgkitError: `name` is unknown.
    """
    return _default_model(_source(name))


def _default_model(source: Path) -> str:
    return ast.literal_eval(papermill.inspect_notebook(_literal(source))["model"]["default"])


def _source(name: str) -> Path:
    if name not in NOTEBOOKS:
        raise DgkitError(f"notebook {name!r} is unknown: use one of {', '.join(NOTEBOOKS)}")
    path = FOLDER / NOTEBOOKS[name]
    if not path.is_file():
        raise DgkitError(f"notebook {name!r} is missing: {path}")
    return path


def _literal(path: Path) -> str:
    """A path for papermill, which fills braces in paths with parameters."""
    return str(path.absolute()).replace("{", "{{").replace("}", "}}")


def _shown(value: Any) -> str:
    """A value as `parse_parameter` reads it."""
    return json.dumps(value) if isinstance(value, list) else str(value)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, which the kernel inherits."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _scrubbed(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from run to run and machine to machine: times, paths, Python's version."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill gives every cell an empty list
    return notebook


def _write(notebook: NotebookNode, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)
