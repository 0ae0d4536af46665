"""Measured numbers as JSON with their provenance, and beside it what was measured of each image.

A run writes `<results_dir>/<model>/<name>.json` and `<name>.npz`. Accepted files lie under `data/results/<model>/` and,
for reference runs, under `data/results/reference/<model>/`; nothing but `acceptance.accept` changes them.
"""

import io
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dgbook.claims.provenance import provenance
from dgbook.files import replacing, write_whole
from dgbook.measures.stats import Interval
from dgbook.paths import results_dir, safe_name
from dgbook.readers import read_npz
from dgkit.errors import DataError, DgkitError
from dgkit.files import read_json
from dgkit.paths import DATA
from dgkit.zoo import MODELS

ACCEPTED = DATA / "results"
REFERENCE = ACCEPTED / "reference"


@dataclass(frozen=True)
class Record:
    """A result file as read; its values are nested tables of numbers, strings, Intervals, arrays and lists.

    `record["methods.cfg+dg.frechet"]` is the value, or the table, at a path (see `at`), with arrays as NumPy's.
    `arrays` holds what was measured of each image, the images along the last axis: verdicts are computed from these.
    """

    name: str
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    values: dict[str, Any]
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Any:
        value = at(self.values, path)
        if value is None:
            raise DgkitError(f"path={path!r} is not in result {self.name!r}: it holds {', '.join(leaves(self.values))}")
        return _decoded(value)

    def decoded(self) -> dict[str, Any]:
        """All values, as by `record[path]`."""
        return {key: _decoded(value) for key, value in self.values.items()}

    def write(self, path: Path) -> None:
        """Write the result file and the arrays beside it, each whole or not at all."""
        if self.arrays:
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **self.arrays)  # type: ignore[arg-type]
            with replacing(path.with_suffix(".npz")) as partial:
                partial.write_bytes(buffer.getvalue())
        write_whole(path, _text(self))


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
        self.parameters = {key: encoded(value, f"parameters[{key!r}]") for key, value in parameters.items()}
        self.block_evaluations: int | None = None
        self._values: dict[str, Any] = {}
        self._arrays: dict[str, NDArray[np.float32]] = {}
        self._provenance = provenance(self.parameters, pipe)
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

    def keep(self, arrays: Mapping[str, ArrayLike]) -> None:
        """Keep what was measured of each image, (..., images) by name, in single precision.

        Raises:
            DgkitError: NaN or infinite somewhere.
        """
        for name, values in arrays.items():
            array = np.asarray(values, np.float32)
            if not np.isfinite(array).all():
                raise DgkitError(f"arrays[{name!r}] holds values that are not finite")
            self._arrays[name] = array

    @property
    def values(self) -> dict[str, Any]:
        """What was kept so far, as it will read from the file."""
        return {key: _decoded(value) for key, value in self._values.items()}

    def save(self) -> Path:
        """Write the result file (whole or not at all) and return its path."""
        path = results_dir() / safe_name(self.parameters["model"]) / f"{safe_name(self.name)}.json"
        made_by = {
            **self._provenance,
            "block_evaluations": self.block_evaluations,
            "wall_seconds": round(time.monotonic() - self._start, 1),
        }
        Record(self.name, self.parameters, made_by, self._values, self._arrays).write(path)
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


def reference_of(name: str, model: str) -> Record | None:
    """The reference run of result `name` on `model`, if there is one."""
    path = REFERENCE / safe_name(model) / f"{safe_name(name)}.json"
    return read(path) if path.is_file() else None


def references(name: str) -> dict[str, Record]:
    """The reference runs of result `name` by model, those of the zoo first and in its order."""
    measured = {path.parent.name: read(path) for path in sorted(REFERENCE.glob(f"*/{safe_name(name)}.json"))}
    known = {safe_name(model): model for model in MODELS}
    ordered = [folder for folder in known if folder in measured]
    return {known.get(folder, folder): measured[folder] for folder in dict.fromkeys([*ordered, *measured])}


def _kept(key: str, value: Any, where: str) -> Any:
    """One value of a result, or a table of them, as JSON holds it."""
    where = f"{where}[{key!r}]"
    if "." in key:
        raise DgkitError(f"{where} is not allowed: a key holds no dot")
    if value is None:
        raise DgkitError(f"{where} is None: leave out what was not measured")
    if isinstance(value, Mapping):
        return {inner: _kept(inner, entry, where) for inner, entry in value.items()}
    return encoded(value, where)


def encoded(value: Any, where: str) -> Any:
    """A number, string, bool, None, Interval, array or tensor, or list of them, as JSON holds it.

    Raises:
        DgkitError: `value`, which `where` names, is of another type, or NaN or infinite somewhere.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Interval):
        return {part: encoded(number, f"{where}.{part}") for part, number in asdict(value).items()}
    if isinstance(value, (list, tuple)):
        return [encoded(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
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


def as_numbers(value: Any) -> np.ndarray | None:
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


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(entry) for key, entry in value.items()} if _is_table(value) else Interval(**value)
    if not isinstance(value, list):
        return value
    array = as_numbers(value)
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
    """The result file `path`, with the arrays beside it.

    Raises:
        DgkitError: it is missing or no result file, or the arrays cannot be read.
    """
    beside = path.with_suffix(".npz")
    try:
        record = Record(**read_json(path), arrays=read_npz(beside) if beside.is_file() else {})
        if not all(isinstance(part, dict) for part in (record.parameters, record.provenance, record.values)):
            raise TypeError("its parameters, provenance and values must be tables")
    except (DataError, TypeError) as error:
        raise DgkitError(f"{path} is not a result file: {error}") from error
    return record
