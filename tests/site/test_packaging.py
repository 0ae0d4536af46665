"""What is installed: pyproject.toml lists it once, the other lists agree, and one wheel holds all of it."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
DISTRIBUTIONS = packages_distributions()


def bounds(requirements: list[str]) -> dict[str, SpecifierSet]:
    parsed = [Requirement(line) for line in requirements]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}


def pins() -> set[str]:
    return {canonicalize_name(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}


def imported(package: str) -> set[str]:
    """The distributions that a package's modules import, those that are only guarded or lazy included."""
    nodes = [node for path in (ROOT / package).rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    found = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"dgkit", "dgbook"}
    return {canonicalize_name(DISTRIBUTIONS[name][0]) for name in found}


def test_the_library_pulls_what_it_imports() -> None:
    by_diffusers = {"accelerate"}  # which places weights by it
    to_draw = {"matplotlib"}  # which `Calibration.figure` asks for, with an error of its own
    assert set(bounds(PROJECT["dependencies"])) == imported("dgkit") - to_draw | by_diffusers


def test_the_extra_book_pulls_what_the_companion_imports_besides() -> None:
    by_papermill, by_ipykernel, by_torchvision = {"nbformat"}, {"ipython", "jupyter-client"}, {"pillow"}
    elsewhere = by_papermill | by_ipykernel | by_torchvision
    others = set(bounds(EXTRAS["pages"] + EXTRAS["reference"] + EXTRAS["scores"] + EXTRAS["cluster"]))
    needed = imported("dgbook") - set(bounds(PROJECT["dependencies"])) - elsewhere - others
    assert set(bounds(EXTRAS["book"])) == needed | {"ipykernel"}


def test_conda_and_make_install_every_extra_within_the_pins() -> None:
    assert f"python{PROJECT['requires-python']}" in ENVIRONMENT
    makefile = (ROOT / "Makefile").read_text()
    extras = re.search(r"^EXTRAS := (.+)$", makefile, re.MULTILINE)
    assert extras and set(extras[1].split(",")) == set(EXTRAS)
    assert {"pip": ["-c constraints.txt", f"-e .[{extras[1]}]"]} in ENVIRONMENT
    assert "pip install -c constraints.txt -e '.[$(EXTRAS)]'" in makefile
    assert set(bounds(sum(EXTRAS.values(), PROJECT["dependencies"]))) <= pins()


def test_every_pin_installs_on_the_oldest_python() -> None:
    """3.11.0, where the project asks for 3.11: systems keep the patch release that they began with."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    installed = {canonicalize_name(found.metadata["Name"]): found for found in distributions()}
    pinned = {name: installed[name] for name in pins() if name in installed}
    assert len(pinned) > len(pins()) / 2
    demands = {name: found.metadata.get("Requires-Python") for name, found in pinned.items()}
    assert {name: said for name, said in demands.items() if said and oldest not in SpecifierSet(said)} == {}


def test_one_wheel_holds_library_companion_notebooks_and_data(tmp_path: Path) -> None:
    """Built in pip's own isolated environment; a machine without a registry cannot do that."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("no package registry: the build backend cannot be fetched")
    assert built.returncode == 0, built.stderr
    wheel = zipfile.ZipFile(next(tmp_path.glob("dgkit-*.whl")))
    places = {"dgkit": "dgkit", "dgbook": "dgbook", "data": "dgkit/data", "notebooks": "dgkit/data/notebooks"}
    ours = {
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == ours

    wheel.extractall(tmp_path / "installed")
    ask = "import dgbook.notebooks as n, dgkit.paths as p; print(p.CHECKOUT, p.DATA, n.default_model('intervention'))"
    command = [sys.executable, "-c", ask]  # which looks in its own folder first
    ran = subprocess.run(command, cwd=tmp_path / "installed", capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["None", str(tmp_path / "installed" / "dgkit" / "data"), "tiny-sd3"]
