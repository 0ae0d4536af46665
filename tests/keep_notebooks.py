"""A pytest plugin beside nbval, whose one run of the notebooks is both their check and the execution for the book.

A notebook that ran to its end goes, with the outputs that nbval saw, to the folder of `--keep-in`.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbval.plugin import IPyNbCell

from dgbook.notebooks import NOTEBOOKS, kernel_environment

NAMES = {file: name for name, file in NOTEBOOKS.items()}
FAILED: set[Path] = set()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-in", type=Path, required=True, metavar="DIR", help="folder for the executed notebooks")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: IPyNbCell) -> None:
    """Set what the kernel inherits, which starts with its notebook's first cell."""
    os.environ.update(kernel_environment(NAMES[item.path.name], {}))


def pytest_runtest_makereport(item: IPyNbCell, call: pytest.CallInfo) -> None:
    if call.excinfo is not None:
        FAILED.add(item.path)


def pytest_runtest_teardown(item: IPyNbCell, nextitem: pytest.Item | None) -> None:
    """Put the outputs into the cell, and after the last one write the notebook."""
    item.cell.execution_count = item.cell_num + 1
    item.cell.outputs = item.test_outputs or []
    for output in item.cell.outputs:
        if output.output_type == "execute_result":
            output.execution_count = item.cell.execution_count  # nbval runs cells outside the kernel's history: 0
    last = nextitem is None or nextitem.parent is not item.parent
    if last and item.path not in FAILED:
        folder = item.config.getoption("keep_in")
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(item.parent.nb, folder / item.path.name)
