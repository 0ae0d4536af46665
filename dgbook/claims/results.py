"""Measured numbers as JSON with their provenance, and their comparison with the accepted ones.

A run writes `<results_dir>/<model>/<name>.json`. Accepted files lie under `data/results/<model>/` and, for reference
runs, under `data/results/reference/<model>/`; nothing but `accept` changes them.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from dgbook.measures.stats import Interval
from dgbook.paths import results_dir
from dgkit.errors import DgkitError
from dgkit.paths import CHECKOUT, DATA

ACCEPTED = DATA / "results"
REFERENCE = ACCEPTED / "reference"
TOLERANCES = ACCEPTED / "tolerances.toml"

_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "dgkit")


@dataclass(frozen=True)
class Record:
    """A result file as read; its values are nested tables of numbers, strings, Intervals, arrays and lists.

    `record["methods.cfg+dg.frechet"]` is the value, or the table, at a path (see `at`), with arrays as NumPy's.
    """

    name: str
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    values: dict[str, Any]

    def __getitem__(self, path: str) -> Any:
        value = at(self.values, path)
        if value is None:
            raise DgkitError(f"path={path!r} is not in result {self.name!r}: it holds {', '.join(leaves(self.values))}")
        return _decoded(value)

    def decoded(self) -> dict[str, Any]:
        """All values, as by `record[path]`."""
        return {key: _decoded(value) for key, value in self.values.items()}


class Result:
    """The numbers of one run, collected under names and saved with their provenance.

    The clock starts when the result is made. Set `block_evaluations` to the cost of the run: evaluations of one
    transformer block for one row of a batch.

    Args:
        name: What was measured; the file's name.
        pipe: The pipeline (or bare transformer) that was measured.
        parameters: The notebook's parameters; "model" is required.

    Raises:
        DgkitError: `parameters` lack "model" or holds something that JSON cannot, or a weight has no data because of
            sequential offload.
    """

    def __init__(self, name: str, pipe: Any = None, **parameters: Any) -> None:
        if "model" not in parameters:
            raise DgkitError(f"parameters={parameters!r} is not allowed: the key 'model' is needed")
        self.name = name
        self.parameters = {key: _encoded(value, f"parameters[{key!r}]") for key, value in parameters.items()}
        self.block_evaluations: int | None = None
        self._values: dict[str, Any] = {}
        self._provenance = _provenance(self.parameters, pipe)
        self._start = time.monotonic()

    def __setitem__(self, key: str, value: Any) -> None:
        """Keep a finite number, string, bool, Interval, array or tensor (to 6 significant digits), or list of them.

        Or a table of such values, or of tables. Keys hold no dots, of which paths are made (see `at`).

        Raises:
            DgkitError: `value` is of another type, or NaN or infinite somewhere, or a key holds a dot.
        """
        self._values[key] = _kept(key, value, "result")

    def update(self, values: Mapping[str, Any]) -> None:
        """Keep several values, each as by `result[key] = value`; a table takes the place of an earlier one."""
        for key, value in values.items():
            self[key] = value

    @property
    def values(self) -> dict[str, Any]:
        """What was kept so far, as it will read from the file."""
        return {key: _decoded(value) for key, value in self._values.items()}

    def conclude(self) -> Any:
        """Save, and return as Markdown the chapter's finding: of this run, and of the reference run.

        Where the paper claims something in the chapter's section, the latter comes with a verdict.
        """
        from IPython.display import Markdown

        from dgbook.claims.findings import CLAIMS, FINDINGS, verdict

        sentence = FINDINGS[self.name]
        paragraphs = [f"**This run.** {sentence(self.values | self.parameters)}"]
        reference = reference_of(self.name, self.parameters["model"])
        if reference is not None:
            measured = reference.decoded()
            commit = (reference.provenance["commit"] or "unknown")[:10]
            if reference.provenance["dirty"]:
                commit += " with uncommitted changes"
            paragraphs.append(f"**Reference run.** {sentence(measured | reference.parameters)}")
            if self.name in CLAIMS:
                word, parts = verdict(self.name, measured)
                paragraphs += [
                    f"**Verdict on this model: {word}.** The paper's claim, part by part, by the reference run:",
                    "\n".join(f"* {part}" for part in parts),
                ]
            paragraphs.append(
                f"Reference run: `{reference.provenance['command']}` at commit {commit}, "
                f"{reference.provenance['wall_seconds']:.0f} s on {reference.provenance['device']}."
            )
        self.save()
        return Markdown("\n\n".join(paragraphs))

    def save(self) -> Path:
        """Write the result file (whole or not at all) and return its path."""
        path = results_dir() / safe_name(self.parameters["model"]) / f"{safe_name(self.name)}.json"
        provenance = {
            **self._provenance,
            "block_evaluations": self.block_evaluations,
            "wall_seconds": round(time.monotonic() - self._start, 1),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, _text(Record(self.name, self.parameters, provenance, self._values)))
        return path


def at(values: Mapping[str, Any], path: str) -> Any:
    """What nested tables hold at a path, keys joined by dots: "methods.cfg+dg.frechet"; None where there is nothing."""
    value: Any = values
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def leaves(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of nested tables by their paths."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = leaves(value) if _is_table(value) else None
        found |= {key: value} if inner is None else {f"{key}.{path}": leaf for path, leaf in inner.items()}
    return found


def _is_table(value: Any) -> bool:
    """Whether it is a table, and no Interval as JSON holds it."""
    return isinstance(value, Mapping) and value.keys() != set(Interval.__dataclass_fields__)


def load(name: str, model: str, reference: bool = False) -> Record:
    """The accepted result `name` of `model`: of the default run, or of the reference run.

    Raises:
        DgkitError: there is no such file, or it is not a result file.
    """
    path = (REFERENCE if reference else ACCEPTED) / safe_name(model) / f"{safe_name(name)}.json"
    if not path.is_file():
        kind = "reference" if reference else "accepted"
        raise DgkitError(f"there is no {kind} result {name!r} of model {model!r}: {path.parent.name}/{path.name}")
    return read(path)


def reference_of(name: str, model: str) -> Record | None:
    """The reference run of result `name` on `model`, if there is one."""
    path = REFERENCE / safe_name(model) / f"{safe_name(name)}.json"
    return read(path) if path.is_file() else None


def references(name: str) -> dict[str, Record]:
    """The reference runs of result `name` by model, those of the zoo first and in its order."""
    from dgkit.zoo import MODELS

    measured = {path.parent.name: read(path) for path in sorted(REFERENCE.glob(f"*/{safe_name(name)}.json"))}
    known = {safe_name(model): model for model in MODELS}
    ordered = [folder for folder in known if folder in measured]
    return {known.get(folder, folder): measured[folder] for folder in dict.fromkeys([*ordered, *measured])}


def safe_name(text: str) -> str:
    """`text` as a file name: everything but letters, digits, dot, dash and underscore becomes a dash.

    Raises:
        DgkitError: nothing is left of it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    if not name:
        raise DgkitError(f"{text!r} cannot name a file: a letter or digit is needed")
    return name


def weights_sha256(model: Any) -> str:
    """SHA-256 over the names, types, shapes and bytes of a module's state, in the order of the names.

    Raises:
        DgkitError: a tensor has no data (sequential CPU offload).
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise DgkitError(f"weight {name!r} has no data: make the result before sequential offload is enabled")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Comparison -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tolerance:
    """|new - accepted| <= abs + rel * |accepted|; `ignore` leaves a value (a sentence, say) out of the comparison."""

    abs: float = 0.0
    rel: float = 0.0
    ignore: bool = False


class Tolerances:
    """The tolerances of `tolerances.toml`.

    `[default]` holds for floating-point numbers; integers, bools and strings are equal or not. `[keys]` maps glob
    patterns over "name.path" to tolerances that hold for integers too; the last match wins.

    Raises:
        DgkitError: the file is not of that form.
    """

    def __init__(self, path: Path = TOLERANCES) -> None:
        try:
            table = tomllib.loads(path.read_text())
            self.default = Tolerance(**table.pop("default", {}))
            self.keys = {pattern: Tolerance(**entry) for pattern, entry in table.pop("keys", {}).items()}
            if table:
                raise TypeError(f"unknown table {next(iter(table))!r}")
        except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
            raise DgkitError(f"{path} is not a table of tolerances: {error}") from error

    def __call__(self, name: str, exact: bool) -> Tolerance:
        """The tolerance of "name.path"; `exact` values (integers) get none from the default."""
        matches = [tolerance for pattern, tolerance in self.keys.items() if fnmatchcase(name, pattern)]
        return matches[-1] if matches else Tolerance() if exact else self.default


@dataclass(frozen=True)
class Difference:
    """One disagreement between a new and an accepted result; `key` is a path (see `at`)."""

    result: str
    key: str
    accepted: str
    new: str
    why: str


def check(new: Path, accepted: Path, tolerances: Path = TOLERANCES) -> list[Difference]:
    """Compare every result file of a run with the accepted ones.

    Missing and additional files and keys are differences too, and so are other parameters or weights, which make the
    numbers incomparable. The run must have started from an empty folder: a file left by an earlier one passes for new.

    Args:
        new: Folder the run wrote to, `<model>/<name>.json` below it.
        accepted: Folder of accepted results.
        tolerances: See `Tolerances`.

    Raises:
        DgkitError: either folder holds no result, or a file in them is no result.
    """
    allowed = Tolerances(tolerances)
    files, accepted_files = _files(new), _files(accepted)
    differences = []
    for name in sorted(files | accepted_files):
        if name not in files:
            differences.append(Difference(name, "", "present", "missing", "the run did not write this result"))
        elif name not in accepted_files:
            differences.append(Difference(name, "", "missing", "present", "never accepted"))
        else:
            differences += _compared(name, read(files[name]), read(accepted_files[name]), allowed)
    return differences


def report(differences: list[Difference]) -> str:
    """The differences as a table for people."""
    if not differences:
        return "all results agree with the accepted ones"
    rows = [tuple(Difference.__dataclass_fields__)] + [tuple(asdict(d).values()) for d in differences]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def accept(new: Path, accepted: Path) -> list[Path]:
    """Copy every result file of a run over the accepted ones and return the files written.

    Raises:
        DgkitError: `new` holds no result, or a file in it is no result.
    """
    files = _files(new)
    for path in files.values():
        read(path)
    written = []
    for name, path in files.items():
        target = accepted / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        written.append(target)
    return written


def _files(folder: Path) -> dict[str, Path]:
    """Result files by "<model>/<name>"."""
    files = {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("*/*.json"))}
    if not files:
        raise DgkitError(f"{folder} holds no result file <model>/<name>.json: nothing was measured")
    return files


def _compared(result: str, new: Record, accepted: Record, tolerances: Tolerances) -> Iterator[Difference]:
    settings = [
        (f"parameter {key}", accepted.parameters.get(key), new.parameters.get(key))
        for key in sorted(new.parameters | accepted.parameters)
    ] + [("weights", accepted.provenance.get("weights_sha256"), new.provenance.get("weights_sha256"))]
    changed = [(what, old, now) for what, old, now in settings if old != now]
    if changed:
        what, old, now = (", ".join(_short(row[column]) for row in changed) for column in range(3))
        yield Difference(result, what, old, now, "not comparable")
        return
    old_values, new_values = (
        {**leaves(record.values), "block_evaluations": record.provenance.get("block_evaluations")}
        for record in (accepted, new)
    )
    for key in sorted(old_values.keys() | new_values.keys()):
        if key not in new_values:
            yield Difference(result, key, _short(old_values[key]), "missing", "the run did not measure it")
        elif key not in old_values:
            yield Difference(result, key, "missing", _short(new_values[key]), "never accepted")
        elif why := _disagreement(old_values[key], new_values[key], f"{new.name}.{key}", tolerances):
            yield Difference(result, key, _short(old_values[key]), _short(new_values[key]), why)


def _disagreement(accepted: Any, new: Any, name: str, tolerances: Tolerances) -> str:
    """Why two JSON values differ; "" where they do not."""
    before, after = _numeric(accepted), _numeric(new)
    if before is None or after is None or isinstance(accepted, dict) != isinstance(new, dict):
        same = (type(accepted), accepted) == (type(new), new)
        return "" if same or tolerances(name, exact=True).ignore else "not equal"
    tolerance = tolerances(name, exact=before.dtype.kind in "iu" and after.dtype.kind in "iu")
    if tolerance.ignore:
        return ""
    try:
        np.testing.assert_allclose(after.astype(float), before.astype(float), tolerance.rel, tolerance.abs, strict=True)
    except AssertionError as error:
        return " ".join(str(error).partition(" ACTUAL:")[0].split())
    return ""


def _numeric(value: Any) -> np.ndarray | None:
    """A number, Interval or rectangular nested list of numbers as an array; None for anything else, bools included."""
    if isinstance(value, dict):
        return np.asarray(list(value.values()))
    if isinstance(value, (int, float, list)):
        try:
            array = np.asarray(value)
        except ValueError:  # ragged
            return None
        if array.dtype.kind in "iuf":
            return array
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


# Files ----------------------------------------------------------------------------------------------------------------


def _kept(key: str, value: Any, where: str) -> Any:
    """One value of a result, or a table of them, as JSON holds it."""
    where = f"{where}[{key!r}]"
    if "." in key:
        raise DgkitError(f"{where} is not allowed: a key holds no dot")
    if value is None:
        raise DgkitError(f"{where} is None: leave out what was not measured")
    if isinstance(value, Mapping):
        return {inner: _kept(inner, entry, where) for inner, entry in value.items()}
    return _encoded(value, where)


def _encoded(value: Any, where: str) -> Any:
    """`value` as JSON holds it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Interval):
        return {part: _encoded(number, f"{where}.{part}") for part, number in asdict(value).items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    if hasattr(value, "detach"):  # a tensor; NumPy has no bfloat16
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    if not isinstance(value, (bool, int, float, np.generic, np.ndarray)) or np.asarray(value).dtype.kind not in "biuf":
        allowed = "a number, bool, string, Interval, array, tensor or list of them"
        raise DgkitError(f"{where} has type {type(value).__name__}: {allowed} is needed")
    array = np.asarray(value)
    if not np.isfinite(array).all():
        first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        at = f" at {list(first)}" if first else ""
        raise DgkitError(f"{where} is {array[first]}{at}: only finite numbers are kept")
    if array.ndim and array.dtype.kind == "f":
        return _rounded(array.tolist())
    return array.tolist()


def _rounded(entries: Any) -> Any:
    return [_rounded(entry) for entry in entries] if isinstance(entries, list) else float(f"{entries:.6g}")


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(entry) for key, entry in value.items()} if _is_table(value) else Interval(**value)
    if not isinstance(value, list):
        return value
    array = _numeric(value)
    return [_decoded(entry) for entry in value] if array is None else array


def _text(record: Record) -> str:
    """JSON with one line per value, so that arrays stay readable and changes show as single lines."""
    sections = [f' "name": {json.dumps(record.name)}']
    for section in ("parameters", "provenance"):
        rows = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in getattr(record, section).items())
        sections.append(f' "{section}": {_block(rows, 1)}')
    sections.append(f' "values": {_table(record.values, 1)}')
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _table(values: Mapping[str, Any], indent: int) -> str:
    texts = {
        key: _table(value, indent + 1) if _is_table(value) else json.dumps(value, allow_nan=False)
        for key, value in values.items()
    }
    return _block((f"{json.dumps(key)}: {text}" for key, text in texts.items()), indent)


def _block(rows: Iterable[str], indent: int) -> str:
    """An object of one row per line, of an indent that its own lines go beyond."""
    inner = "\n" + " " * (indent + 1)
    return "{" + inner + f",{inner}".join(rows) + "\n" + " " * indent + "}"


def read(path: Path) -> Record:
    """The result file `path`.

    Raises:
        DgkitError: it is missing or no result file.
    """
    try:
        return Record(**json.loads(path.read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise DgkitError(f"{path} is not a result file: {error}") from error


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _provenance(parameters: dict[str, Any], pipe: Any) -> dict[str, Any]:
    commit, dirty = _git()
    facts: dict[str, Any] = {
        "command": os.environ.get("DGKIT_COMMAND"),  # set by dgkit's own runner
        "commit": commit,
        "dirty": dirty,
        "model": parameters["model"],
        "seed": parameters.get("seed"),
        "weights_sha256": None,
        "device": None,
        "dtype": None,
        "versions": {"python": platform.python_version()} | {library: _version(library) for library in _LIBRARIES},
    }
    if pipe is not None:
        import torch

        transformer = getattr(pipe, "transformer", pipe)
        weight = next(transformer.parameters())
        # with CPU offload the weights rest elsewhere than where they compute
        device = torch.device(getattr(pipe, "_execution_device", weight.device))
        facts["weights_sha256"] = weights_sha256(transformer)
        facts["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        facts["dtype"] = str(weight.dtype).removeprefix("torch.")
    return facts


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # dgkit used from its folder without being installed
        return None


def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout and whether anything but notebooks and results, which runs rewrite, differs from it."""
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return None, None
    rewritten = (":(exclude)notebooks", ":(exclude)data/results")
    try:
        commit, status = (
            subprocess.run(["git", "-C", CHECKOUT, *arguments], capture_output=True, text=True, check=True).stdout
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", ".", *rewritten))
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None, None
    return commit.strip(), bool(status.strip())
