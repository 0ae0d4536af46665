"""A run's results against the accepted ones: what differs by more than its tolerance, and how to accept a run."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from dgbook.claims.results import ACCEPTED, Record, as_numbers, leaves, read
from dgkit.checks import number
from dgkit.errors import DgkitError
from dgkit.files import read_text

TOLERANCES = ACCEPTED / "tolerances.toml"


@dataclass(frozen=True)
class Tolerance:
    """|new - accepted| <= abs + rel * |accepted|; `ignore` leaves a value (a sentence, say) out of the comparison."""

    abs: float = 0.0
    rel: float = 0.0
    ignore: bool = False

    def __post_init__(self) -> None:
        number("abs", self.abs, 0)
        number("rel", self.rel, 0)


class Tolerances:
    """The tolerances of `tolerances.toml`.

    `[default]` holds for floating-point numbers; integers, bools and strings are equal or not. `[keys]` maps glob
    patterns over "name.path" to tolerances that hold for integers too; the last match wins.

    Raises:
        DgkitError: the file is not of that form.
    """

    def __init__(self, path: Path = TOLERANCES) -> None:
        try:
            table = tomllib.loads(read_text(path))
            self.default = Tolerance(**table.pop("default", {}))
            self.keys = {pattern: Tolerance(**entry) for pattern, entry in table.pop("keys", {}).items()}
            if table:
                raise TypeError(f"unknown table {next(iter(table))!r}")
        except (ValueError, TypeError, AttributeError) as error:
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


def accept(new: Path, accepted: Path, *, arrays: bool = False) -> list[Path]:
    """Copy every result file of a run over the accepted ones and return the files written.

    `arrays`: also what was measured of each image, on which verdicts rest.

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
        for suffix in (".json", ".npz") if arrays else (".json",):
            if path.with_suffix(suffix).is_file():
                shutil.copyfile(path.with_suffix(suffix), target.with_suffix(suffix))
                written.append(target.with_suffix(suffix))
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
    before, after = as_numbers(accepted), as_numbers(new)
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


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
