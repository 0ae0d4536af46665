"""The command line: what each verb calls, and errors as one line."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import dgkit
from dgbook import cli, notebooks, paths
from dgbook.claims import acceptance, results
from dgkit import zoo


@pytest.fixture
def executed(monkeypatch):
    """Calls of the notebook runner."""
    calls = []

    def execute(name, parameters, output):
        calls.append((name, parameters, output))
        return Path("there")

    monkeypatch.setattr(notebooks, "execute", execute)
    return calls


def test_run_passes_parameters(executed, capsys):
    assert cli.main(["run", "intervention", "-p", "block=4", "-p", "dims=[3]", "--model", "sd3", "--output", "d"]) == 0
    assert executed == [("intervention", {"block": 4, "dims": [3], "model": "sd3"}, Path("d"))]
    assert capsys.readouterr().out == "there\n"


def test_reference_run_starts_from_its_parameters(executed, monkeypatch):
    monkeypatch.setattr(
        notebooks, "reference_parameters", lambda name, model: {"num_samples": 256, "seed": 1} if model == "m" else {}
    )
    assert cli.main(["run", "intervention", "--reference", "--model", "m", "-p", "seed=2"]) == 0
    expected = {"num_samples": 256, "seed": 2, "model": "m"}
    assert executed == [("intervention", expected, paths.build_dir() / "reference")]


@pytest.mark.parametrize("arguments", [["run", "nonsense"], ["run", "nonsense", "--reference"]])
def test_errors_are_one_line_and_exit_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "build_dir", lambda: tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dgkit: ") and captured.err.count("\n") == 1 and captured.out == ""


def test_other_errors_are_not_hidden(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(notebooks, "execute", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["run", "intervention"])


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    def missing(*arguments):
        importlib.import_module(absent)

    monkeypatch.setattr(notebooks, "execute", missing)
    absent = "absent.module"
    assert cli.main(["run", "intervention"]) == 2
    assert capsys.readouterr().err == 'dgkit: absent is not installed: pip install "dgkit[book]"\n'
    absent = "dgbook.absent"  # no extra has it
    with pytest.raises(ModuleNotFoundError):
        cli.main(["run", "intervention"])


def test_book_accept(monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "accept", lambda: [Path("changed.ipynb")])
    assert cli.main(["book", "accept"]) == 0 and capsys.readouterr().out == "changed.ipynb\n"


def test_results_check_and_accept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "build_dir", lambda: tmp_path / "_build")
    assert acceptance.TOLERANCES == results.ACCEPTED / "tolerances.toml"  # which hold in the folders below, too
    monkeypatch.setattr(results, "ACCEPTED", tmp_path / "accepted")
    monkeypatch.setattr(results, "REFERENCE", tmp_path / "accepted" / "reference")

    def measure(folder, value):
        monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path / "_build" / folder))
        result = results.Result("demo", model="tiny-dit")
        result["x"] = value
        result.save()

    monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path / "_build" / "results"))
    assert cli.main(["results", "check"]) == 2  # nothing measured
    measure("reference", 5.0)
    measure("results", 1.0)
    assert cli.main(["results", "accept"]) == 0
    assert cli.main(["results", "check"]) == 0
    measure("results", 2.0)
    capsys.readouterr()
    assert cli.main(["results", "check"]) == 1
    assert "tiny-dit/demo  x" in capsys.readouterr().out
    assert cli.main(["results", "accept", "--reference"]) == 0
    assert results.read(results.REFERENCE / "tiny-dit" / "demo.json")["x"] == 5.0
    assert results.read(results.ACCEPTED / "tiny-dit" / "demo.json")["x"] == 1.0


def test_models_lists_names_memory_and_licences(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(zoo.MODELS)
    for line, model in zip(lines, zoo.MODELS.values(), strict=True):
        assert line.endswith(model.licence) and f"{model.weights_gb:.2f} GB" in line


def test_the_parser_needs_no_heavy_import():
    program = """
import sys, types
sys.modules["dgkit"] = package = types.ModuleType("dgkit")  # without what `import dgkit` itself loads
package.__path__ = [sys.argv[1]]
import dgbook.cli
dgbook.cli._parser().format_help()
print(*{"torch", "diffusers", "papermill", "numpy", "scipy"} & set(sys.modules))
"""
    command = [sys.executable, "-c", program, str(Path(dgkit.__file__).parent)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == []


def test_usage_errors_exit_2():
    for arguments in ([], ["run"], ["results"], ["nonsense"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
