"""The one run of the notebooks: nbval fails what fails, and what ran to its end is kept with its outputs."""

from pathlib import Path

import nbformat
import pytest

from dgbook.notebooks import NOTEBOOKS, kernel_environment

PRINT = "import os\nprint('by', os.environ['DGKIT_COMMAND'])"


def write(path: Path, *cells: str) -> bytes:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A title")])
    notebook.cells += map(nbformat.v4.new_code_cell, cells)
    nbformat.write(notebook, path)
    return path.read_bytes()


def test_what_ran_to_its_end_is_kept_as_jupyter_would_write_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in kernel_environment("intervention", {}):
        monkeypatch.setenv(name, "")  # what the plugin sets is put back
    good, bad = NOTEBOOKS["intervention"], NOTEBOOKS["imagenet"]
    committed = [write(tmp_path / good, PRINT, "1 + 1"), write(tmp_path / bad, PRINT, "1 / 0", "2")]
    kept = tmp_path / "kept"
    options = ["-p", "tests.keep_notebooks", "--keep-in", str(kept), "--nbval-lax", "--nbval-current-env"]
    assert pytest.main([*options, "-p", "no:cacheprovider", str(tmp_path)]) == pytest.ExitCode.TESTS_FAILED
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert [(tmp_path / name).read_bytes() for name in (good, bad)] == committed
    assert [path.name for path in kept.iterdir()] == [good]
    first, second = nbformat.read(kept / good, 4).cells[1:]
    assert first.outputs == [nbformat.v4.new_output("stream", name="stdout", text="by dgkit run intervention\n")]
    assert second.outputs == [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=2)]
    assert (first.execution_count, second.execution_count) == (1, 2)
