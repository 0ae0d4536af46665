"""Result files: what they keep, and that a changed number is caught while a small one passes."""

import copy
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgbook.claims import provenance, results
from dgbook.claims.acceptance import Tolerances, accept, check, report
from dgbook.claims.provenance import weights_sha256
from dgbook.claims.results import Result
from dgbook.measures.stats import Interval
from dgbook.paths import safe_name
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS

SETTINGS = {"cfg+dg": {"mse": 0.5, "gain": Interval(1.0, 0.5, 1.5)}, "none": {"loose_count": 10}}
PARAMETERS = {"model": "tiny-dit", "seed": 3, "num_samples": 8, "dims": None}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folder of the run and folder of accepted results, and tolerances like the shipped ones."""
    monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path / "new"))
    monkeypatch.setattr(results, "ACCEPTED", tmp_path / "accepted")
    monkeypatch.setattr(results, "REFERENCE", tmp_path / "accepted" / "reference")
    (tmp_path / "tolerances.toml").write_text(
        '[default]\nabs = 1e-6\nrel = 1e-3\n[keys]\n"demo.loose_*" = { abs = 2 }\n"demo.sentence" = { ignore = true }\n'
        '"demo.settings.*.loose_count" = { abs = 1 }\n'
    )
    return tmp_path / "new", tmp_path / "accepted", tmp_path / "tolerances.toml"


def measure(changes=None, parameters=PARAMETERS, pipe=None, name="demo"):
    result = Result(name, pipe, **parameters)
    values = {
        "mse": 0.25,
        "count": 7,
        "verdict": True,
        "sentence": "Zeroing smooths.",
        "gain": Interval(1.0, 0.5, 1.5),
        "curve": np.linspace(0.0, 1.0, 5),
        "dims": [3, 5],
        "names": ["coat", "bag"],
        "loose_count": 10,
        "settings": SETTINGS,
    }
    for key, value in (values | (changes or {})).items():
        result[key] = value
    result.block_evaluations = 320
    return result.save()


def accepted_then(folders, changes=None, **kwargs):
    """Differences when a run is accepted and the next run differs by `changes`."""
    new, accepted, tolerances = folders
    measure()
    accept(new, accepted)
    measure(changes, **kwargs)
    return check(new, accepted, tolerances)


# Writing and reading --------------------------------------------------------------------------------------------------


def test_saved_values_come_back(folders):
    path = measure({"tensor": torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16), "flags": np.array([True, False])})
    assert path == folders[0] / "tiny-dit" / "demo.json"
    accept(folders[0], folders[1])
    record = results.read(folders[1] / "tiny-dit" / "demo.json")
    assert record["mse"] == 0.25 and record["count"] == 7 and record["verdict"] is True
    assert record["gain"] == Interval(1.0, 0.5, 1.5)
    assert np.array_equal(record["curve"], [0, 0.25, 0.5, 0.75, 1])
    assert np.array_equal(record["tensor"], [[1, 2]])
    assert record["flags"] == [True, False] and record["names"] == ["coat", "bag"]
    assert record["settings.cfg+dg.gain"] == record.decoded()["settings"]["cfg+dg"]["gain"] == Interval(1.0, 0.5, 1.5)
    assert record["settings.none"] == {"loose_count": 10}
    assert record.parameters == PARAMETERS
    for path in ("nothing", "settings.cfg", "mse.value"):
        with pytest.raises(DgkitError, match=r"is not in result 'demo': it holds .*settings\.cfg\+dg\.mse"):
            record[path]


def test_arrays_keep_six_significant_digits_and_scalars_all(folders):
    path = measure({"array": np.array([1.23456789e-5, 123456789.0]), "number": 1.23456789})
    values = json.loads(path.read_text())["values"]
    assert values["array"] == [1.23457e-5, 1.23457e8] and values["number"] == 1.23456789


def test_reference_results_are_apart(folders):
    measure()
    accept(folders[0], results.REFERENCE)
    record = results.reference_of("demo", "tiny-dit")
    assert record is not None and record["count"] == 7
    assert results.reference_of("demo", "tiny-sd3") is None


def test_reference_runs_come_in_the_order_of_the_zoo_then_by_name(folders):
    for model in ("tiny-dit", "zz/other", "a-folder", "sd3"):
        measure(parameters={"model": model})
    accept(folders[0], results.REFERENCE)
    expected = [name for name in MODELS if name in ("tiny-dit", "sd3")] + ["a-folder", "zz-other"]
    assert list(results.references("demo")) == expected
    assert results.references("nothing") == {}


def test_provenance(folders, monkeypatch):
    monkeypatch.setenv("DGKIT_COMMAND", "dgkit run demo")
    model = torch.nn.Linear(2, 3, dtype=torch.bfloat16)
    facts = json.loads(measure(pipe=model).read_text())["provenance"]
    assert facts["weights_sha256"] == weights_sha256(model)
    assert (facts["device"], facts["dtype"]) == ("cpu", "bfloat16")
    assert (facts["model"], facts["seed"]) == ("tiny-dit", 3)
    assert facts["block_evaluations"] == 320 and facts["wall_seconds"] >= 0
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["command"] == "dgkit run demo"


def test_weight_hash_is_over_names_types_shapes_and_bytes():
    model = torch.nn.Linear(2, 1)
    digest = hashlib.sha256()
    for name, shape in (("bias", (1,)), ("weight", (1, 2))):
        digest.update(f"{name} torch.float32 {shape}\n".encode() + model.state_dict()[name].numpy().tobytes())
    before = weights_sha256(model)
    assert before == digest.hexdigest()
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    assert weights_sha256(model) != before
    with pytest.raises(DgkitError, match="sequential offload"):
        weights_sha256(torch.nn.Linear(2, 1, device="meta"))


def test_commit_and_dirty_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.commit_and_changes() == (None, None)

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", "-C", tmp_path, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert provenance.commit_and_changes() == (None, None)
    (tmp_path / "code.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert provenance.commit_and_changes() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "n.ipynb").write_text("rewritten by every run")
    assert provenance.commit_and_changes()[1] is False
    (tmp_path / "code.py").write_text("2")
    assert provenance.commit_and_changes()[1] is True


def test_a_failed_save_leaves_the_earlier_file(folders, monkeypatch):
    path = measure()
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(DgkitError, match="cannot be written: full"):
        measure({"mse": 9.0})
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "nan"),
        (np.array([[0.0, 1.0], [np.inf, 0.0]]), r"inf at \[1, 0\]"),
        (torch.tensor([float("nan")]), "nan"),
        ([1.0, float("-inf")], r"\[1\]"),
        (Interval(1.0, float("nan"), 2.0), "low"),
        (None, "None"),
        (1 + 2j, "complex"),
        ({"a": {"b": None}}, r"result\['x'\]\['a'\]\['b'\] is None"),
        ({"a": {"b": 1 + 2j}}, "complex"),
        ({"a.b": 1}, "no dot"),
        (np.array(["a"]), "ndarray"),
    ],
)
def test_values_that_cannot_be_kept_are_refused(value, message):
    result = Result("demo", **PARAMETERS)
    with pytest.raises(DgkitError, match=message):
        result["x"] = value


def test_parameters_must_name_the_model():
    with pytest.raises(DgkitError, match="model"):
        Result("demo", seed=1)


@pytest.mark.parametrize(
    ("text", "name"),
    [("tiny-dit", "tiny-dit"), ("facebook/DiT-XL-2-256", "facebook-DiT-XL-2-256"), ("../../x y", "x-y")],
)
def test_safe_name(text, name):
    assert safe_name(text) == name


def test_empty_safe_name_is_refused():
    with pytest.raises(DgkitError):
        safe_name("../..")


# Comparing ------------------------------------------------------------------------------------------------------------


def test_equal_runs_agree(folders):
    assert accepted_then(folders) == []
    assert "agree" in report([])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"mse": 0.2503}, "mse"),
        ({"count": 8}, "count"),
        ({"verdict": False}, "verdict"),
        ({"gain": Interval(1.0, 0.5, 1.6)}, "gain"),
        ({"gain": [1.0, 0.5, 1.5]}, "gain"),
        ({"curve": np.array([0, 0.25, 0.6, 0.75, 1.01])}, "curve"),
        ({"curve": np.linspace(0, 1, 6)}, "curve"),
        ({"dims": [3, 6]}, "dims"),
        ({"names": ["coat", "shirt"]}, "names"),
        ({"loose_count": 13}, "loose_count"),
        ({"extra": 1.0}, "extra"),
        ({"count": "7"}, "count"),
        ({"verdict": 1}, "verdict"),
        ({"settings": SETTINGS | {"none": {"loose_count": 12}}}, "settings.none.loose_count"),
        ({"settings": SETTINGS | {"cfg+dg": {"mse": 0.5, "gain": Interval(1, 0.4, 1.5)}}}, "settings.cfg+dg.gain"),
        ({"settings": SETTINGS | {"dg": {"mse": 0.5}}}, "settings.dg.mse"),
    ],
)
def test_one_perturbed_value_is_caught(folders, changes, key):
    differences = accepted_then(folders, changes)
    assert [difference.key for difference in differences] == [key]
    assert key in report(differences)


@pytest.mark.parametrize(
    "changes",
    [
        {"mse": 0.2502},
        {"gain": Interval(1.0005, 0.5, 1.4995)},
        {"curve": np.linspace(0.0, 1.0, 5) + 9e-7},
        {"loose_count": 12},
        {"settings": SETTINGS | {"none": {"loose_count": 11}}},
        {"sentence": "Zeroing sharpens."},
    ],
)
def test_a_change_within_tolerance_passes(folders, changes):
    assert accepted_then(folders, changes) == []


def test_an_array_reports_how_many_entries_are_off_and_the_worst(folders):
    (difference,) = accepted_then(folders, {"curve": np.array([0, 0.25, 0.6, 0.75, 1.01])})
    assert difference.new == "[0.0, 0.25, 0.6, 0.75, 1.01]"
    assert "2 / 5" in difference.why and "difference among violations: 0.1" in difference.why


def test_a_missing_key_is_a_difference(folders):
    new, accepted, tolerances = folders
    measure({"extra": 1.0})
    accept(new, accepted)
    measure()
    assert [(d.key, d.new) for d in check(new, accepted, tolerances)] == [("extra", "missing")]


def test_other_parameters_are_one_message(folders):
    (difference,) = accepted_then(folders, {"mse": 9.0, "count": 9}, parameters=PARAMETERS | {"num_samples": 4})
    assert difference.why == "not comparable"
    assert "num_samples" in difference.key and (difference.accepted, difference.new) == ("8", "4")


def test_other_weights_are_not_comparable(folders):
    (difference,) = accepted_then(folders, pipe=torch.nn.Linear(2, 2))
    assert difference.key == "weights"


def test_block_evaluations_are_compared(folders):
    new, accepted, tolerances = folders
    path = measure()
    accept(new, accepted)
    path.write_text(path.read_text().replace('"block_evaluations": 320', '"block_evaluations": 321'))
    assert [difference.key for difference in check(new, accepted, tolerances)] == ["block_evaluations"]


def test_nothing_written_is_an_error(folders):
    new, accepted, tolerances = folders
    path = measure()
    accept(new, accepted)
    path.unlink()
    with pytest.raises(DgkitError, match="nothing was measured"):
        check(new, accepted, tolerances)
    with pytest.raises(DgkitError, match="nothing was measured"):
        accept(new, accepted)


def test_every_accepted_result_must_be_written_and_every_written_one_accepted(folders):
    new, accepted, tolerances = folders
    first = measure()
    accept(new, accepted)
    measure(name="other")
    assert [(d.result, d.why) for d in check(new, accepted, tolerances)] == [("tiny-dit/other", "never accepted")]
    accept(new, accepted)
    first.unlink()
    assert [(d.result, d.new) for d in check(new, accepted, tolerances)] == [("tiny-dit/demo", "missing")]


def test_broken_files_are_errors(folders, tmp_path):
    new, accepted, tolerances = folders
    path = measure()
    accept(new, accepted)
    path.write_text("{")
    with pytest.raises(DgkitError, match="not a result file"):
        check(new, accepted, tolerances)
    for text in ("[keys]\na = { absolute = 1 }", "[other]\na = 1", "abs ="):
        (tmp_path / "broken.toml").write_text(text)
        with pytest.raises(DgkitError, match="not a table of tolerances"):
            Tolerances(tmp_path / "broken.toml")


def test_the_last_matching_tolerance_wins(tmp_path):
    path = tmp_path / "t.toml"
    path.write_text('[default]\nrel = 0.1\n[keys]\n"a.*" = { abs = 1 }\n"a.b" = { abs = 2 }\n')
    tolerances = Tolerances(path)
    assert tolerances("a.b", exact=True).abs == 2
    assert tolerances("a.c", exact=True).abs == 1
    assert tolerances("c.c", exact=False).rel == 0.1
    assert tolerances("c.c", exact=True).rel == 0


# the accepted results and their tolerances as shipped -----------------------------------------------------------------

SHIPPED = sorted((results.ACCEPTED / "tiny-dit").glob("*.json"))


def _scaled(value: Any, factor: float) -> Any:
    """Every floating-point number of a stored value times `factor`; None when there is none."""
    if isinstance(value, dict):
        return {key: _scaled(number, factor) for key, number in value.items()}
    if isinstance(value, list):
        scaled = [_scaled(entry, factor) for entry in value]
        return None if any(entry is None for entry in scaled) or not scaled else scaled
    return value * factor if isinstance(value, float) else None


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_rounding_passes_and_a_change_of_a_quarter_does_not(path: Path, tmp_path: Path) -> None:
    """Each number of each accepted result in turn; 1e-5 is what another instruction set does to it."""
    stored = json.loads(path.read_text())
    (tmp_path / "accepted" / "m").mkdir(parents=True)
    (tmp_path / "new" / "m").mkdir(parents=True)
    (tmp_path / "accepted" / "m" / path.name).write_text(json.dumps(stored))
    tried = 0
    for key, value in results.leaves(stored["values"]).items():
        for factor, caught in ((1 + 1e-5, False), (1.25, True)):
            changed = _scaled(value, factor)
            if changed is None or max(map(abs, _flat(value))) < 0.5:
                continue  # an absolute tolerance is meant to pass changes of what is near zero
            run = copy.deepcopy(stored)
            table, _, last = f"values.{key}".rpartition(".")
            results.at(run, table)[last] = changed
            (tmp_path / "new" / "m" / path.name).write_text(json.dumps(run))
            differences = check(tmp_path / "new", tmp_path / "accepted")
            assert [difference.key for difference in differences] == [key] * caught, (key, factor, value)
            tried += 1
    assert tried >= 4


def _flat(value: Any) -> list[float]:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return [n for e in entries for n in (_flat(e) if isinstance(e, dict | list) else [e])]
