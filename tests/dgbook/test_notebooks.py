"""The runner on small stand-in notebooks: parameters, results, what is left in the file, and failures."""

import json
import re
import sys
from pathlib import Path

import nbformat
import papermill
import papermill.cli
import pytest

from dgbook import notebooks
from dgkit.errors import DgkitError
from dgkit.zoo import MODELS

MEASURE = """
import json, os, pathlib
path = pathlib.Path(os.environ["DGKIT_RESULTS_DIR"], model, "demo.json")
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps([num_samples, dims, os.environ["DGKIT_COMMAND"]]))
print("measured", num_samples)
"""


def write_notebook(path: Path, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    parameters = 'model = "tiny-dit"\nnum_samples = 8\ndims = [1]'
    notebook.cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    nbformat.write(notebook, path)


def texts(path: Path) -> str:
    return "".join(output.text for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", []))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder (its name is a trap for papermill) with the notebooks `demo` and `failing`."""
    folder = tmp_path / "a {model} folder"
    folder.mkdir()
    write_notebook(folder / "01_demo.ipynb", MEASURE)
    write_notebook(folder / "02_failing.ipynb", MEASURE, "raise ValueError('num_samples is odd')")
    (folder / "reference.toml").write_text(
        "[demo]\nnum_samples = 64\n[demo.other]\nnum_samples = 128\nseed = 1\n[demo.tiny-dit]\nseed = 7\n"
    )
    monkeypatch.setattr(notebooks, "FOLDER", folder)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", {"demo": "01_demo.ipynb", "failing": "02_failing.ipynb"})
    monkeypatch.setattr(notebooks, "build_dir", lambda: tmp_path / "_build")
    monkeypatch.setenv("DGKIT_RESULTS_DIR", str(tmp_path / "results"))
    return folder


def test_execute_passes_parameters_and_keeps_results_beside_the_notebook(folder, tmp_path):
    before = (folder / "01_demo.ipynb").read_bytes()
    output = notebooks.execute("demo", {"num_samples": 3, "dims": [4, 5]}, progress=False)
    assert output == tmp_path / "_build" / "runs" / "demo-tiny-dit-1"
    command = "dgkit run demo -p num_samples=3 -p 'dims=[4, 5]'"
    assert json.loads((output / "tiny-dit" / "demo.json").read_text()) == [3, [4, 5], command]
    assert "measured 3" in texts(output / "01_demo.ipynb")
    assert not (tmp_path / "results").exists()
    assert (folder / "01_demo.ipynb").read_bytes() == before
    assert notebooks.os.environ["DGKIT_RESULTS_DIR"] == str(tmp_path / "results")
    assert "DGKIT_COMMAND" not in notebooks.os.environ


def test_execute_makes_a_new_folder_for_each_run_and_model(folder, tmp_path):
    runs = tmp_path / "_build" / "runs"
    (runs / "demo-tiny-dit-1").mkdir(parents=True)
    assert notebooks.execute("demo", {}, progress=False) == runs / "demo-tiny-dit-2"
    assert notebooks.execute("demo", {"model": "org/other"}, progress=False) == runs / "demo-org-other-1"


def test_executed_notebook_holds_no_times_and_no_paths(folder, tmp_path):
    path = notebooks.execute("demo", {"num_samples": 3}, tmp_path / "out", progress=False) / "01_demo.ipynb"
    notebook = nbformat.read(path, 4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert "version" not in notebook.metadata.language_info
    assert [dict(cell.metadata) for cell in notebook.cells] == [
        {"tags": ["parameters"]},
        {"tags": ["injected-parameters"]},
        {},
    ]
    assert str(tmp_path) not in path.read_text()
    assert not re.search(r"\d\d:\d\d:\d\d", path.read_text())
    assert sorted(p.name for p in path.parent.iterdir()) == ["01_demo.ipynb", "tiny-dit"]


def test_an_unknown_parameter_is_an_error_that_lists_the_known_ones(folder, tmp_path):
    with pytest.raises(DgkitError, match="num_sample: it has model, num_samples, dims"):
        notebooks.execute("demo", {"num_sample": 3}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_failing_cell_is_one_error_and_leaves_the_notebook_to_look_at(folder, tmp_path):
    with pytest.raises(DgkitError, match=r"stopped in cell 3: ValueError: num_samples is odd \(see .*02_failing"):
        notebooks.execute("failing", {}, tmp_path / "out", progress=False)
    assert "measured 8" in (tmp_path / "out" / "02_failing.ipynb").read_text()
    assert "DGKIT_COMMAND" not in notebooks.os.environ


@pytest.mark.parametrize("value", [2024, 0.5, True, None, ["tiny-dit"]])
def test_text_is_given_as_text(folder, tmp_path, value):
    with pytest.raises(DgkitError, match=r"model=.* is not allowed: give text such as .tiny-dit"):
        notebooks.execute("demo", {"model": value}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_kernel_that_is_killed_is_one_error(folder, tmp_path):
    write_notebook(folder / "02_failing.ipynb", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(DgkitError, match=r"the kernel of notebook 'failing' died.* \(see .*02_failing") as caught:
        notebooks.execute("failing", {}, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value) and (tmp_path / "out" / "02_failing.ipynb").exists()


def test_another_python_under_the_kernels_name_is_not_run(folder, tmp_path, monkeypatch):
    spec = {"argv": ["/no/such/python", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (tmp_path / "jupyter" / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    write_notebook(folder / "01_demo.ipynb", "import sys\nprint('run by', sys.executable)")
    path = notebooks.execute("demo", {}, tmp_path / "out", progress=False) / "01_demo.ipynb"
    assert f"run by {sys.executable}" in texts(path)


def test_unknown_and_missing_notebooks_are_errors(folder):
    with pytest.raises(DgkitError, match="use one of demo, failing"):
        notebooks.execute("dem", {})
    (folder / "01_demo.ipynb").unlink()
    with pytest.raises(DgkitError, match="missing"):
        notebooks.execute("demo", {})


@pytest.fixture
def site(folder, tmp_path):
    """Both notebooks as `make book` leaves them where a build with other outputs executed them."""
    site = tmp_path / "_build" / "site" / "notebooks"
    site.mkdir(parents=True)
    for source in folder.glob("*.ipynb"):
        executed = nbformat.read(source, 4)
        executed.cells[1].outputs = [nbformat.v4.new_output("stream", text="measured 8")]
        nbformat.write(executed, site / source.name)
    return site


def test_accept_commits_what_the_book_executed(folder, site):
    assert notebooks.accept() == [folder / "01_demo.ipynb", folder / "02_failing.ipynb"]
    assert texts(folder / "01_demo.ipynb") == "measured 8"
    for executed in site.iterdir():
        assert (folder / executed.name).read_bytes() == executed.read_bytes()
        assert (folder / executed.name).stat().st_mtime_ns == executed.stat().st_mtime_ns  # make has nothing to do
    assert notebooks.accept() == []


def test_accept_refuses_what_was_not_executed_as_it_is(folder, site):
    write_notebook(folder / "01_demo.ipynb", MEASURE, "print('a new cell')")
    with pytest.raises(DgkitError, match="01_demo.ipynb has not been executed as it is: run make book first"):
        notebooks.accept()
    assert "a new cell" in (folder / "01_demo.ipynb").read_text()
    write_notebook(folder / "01_demo.ipynb", MEASURE)
    (site / "02_failing.ipynb").unlink()
    with pytest.raises(DgkitError, match="02_failing.ipynb has not been executed"):
        notebooks.accept()


@pytest.mark.parametrize("value", ["3", "-1", "0.5", "1e-3", "True", "False", "None", "tiny-dit", "a=b", "", "true"])
def test_values_are_read_as_papermill_does(value, tmp_path, monkeypatch):
    passed = {}
    monkeypatch.setattr(papermill.cli, "execute_notebook", lambda parameters, **others: passed.update(parameters))
    arguments = [str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), "-p", "key", value]
    papermill.cli.papermill.main(arguments, standalone_mode=False)
    name, parsed = notebooks.parse_parameter(f"key={value}")
    assert name == "key"
    assert (parsed, type(parsed)) == (passed["key"], type(passed["key"]))


def test_lists_are_read_from_brackets():
    assert notebooks.parse_parameter("dims=[3, 5]") == ("dims", [3, 5])


@pytest.mark.parametrize("text", ["dims", "=3", "dims=[3,"])
def test_malformed_parameters_are_errors(text):
    with pytest.raises(DgkitError, match="-p"):
        notebooks.parse_parameter(text)


def test_default_model(folder):
    assert notebooks.default_model("demo") == "tiny-dit"
    with pytest.raises(DgkitError, match="'nothing' is unknown: use one of"):
        notebooks.default_model("nothing")


def test_reference_parameters(folder):
    assert notebooks.reference_parameters("demo") == {"num_samples": 64, "seed": 7}  # the notebook's default model
    assert notebooks.reference_parameters("demo", "other") == {"num_samples": 128, "seed": 1}
    assert notebooks.reference_parameters("demo", "a third") == {"num_samples": 64}
    with pytest.raises(DgkitError, match=r"\[failing\]"):
        notebooks.reference_parameters("failing")


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_reference_runs_set_parameters_that_the_notebooks_have(name):
    known = papermill.inspect_notebook(notebooks.FOLDER / notebooks.NOTEBOOKS[name])
    for model in (None, *MODELS):
        assert notebooks.reference_parameters(name, model).keys() <= known.keys()


@pytest.mark.parametrize("name", notebooks.NOTEBOOKS)
def test_cells_are_short_and_fit_the_page(name):
    """A code line of at most 76 characters needs no scrolling at a page width of 1200 pixels."""
    cells = [c for c in nbformat.read(notebooks.FOLDER / notebooks.NOTEBOOKS[name], 4).cells if c.cell_type == "code"]
    lines = {cell.id: cell.source.splitlines() for cell in cells}
    parameters = [cell.id for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    assert not [cell for cell, shown in lines.items() if len(shown) > 8 and cell not in parameters]
    assert not [line for shown in lines.values() for line in shown if len(line) > 76]
