"""One list of dependencies: pyproject.toml, environment.yml and constraints.txt must not disagree."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())


def bounds(requirements: list[str]) -> dict[str, SpecifierSet]:
    parsed = [Requirement(line) for line in requirements]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in parsed}


ALL_BOUNDS = bounds(PROJECT["dependencies"] + [line for extra in EXTRAS.values() for line in extra])


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def conda_packages() -> dict[str, SpecifierSet]:
    return bounds([entry for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)])


def pip_lines() -> list[str]:
    return next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))


def test_conda_environment_asks_for_the_same_python() -> None:
    assert conda_packages()["python"] == SpecifierSet(PROJECT["requires-python"])


def test_conda_environment_has_the_same_dependencies() -> None:
    """What conda and pip are asked for, expanded, is exactly pyproject's list with all its extras."""
    requested = {name: bound for name, bound in conda_packages().items() if name not in {"python", "pip"}}
    for line in pip_lines():
        if editable := re.fullmatch(r"-e \.\[(.+)\]", line):
            names = editable[1].split(",")
            requested |= bounds(PROJECT["dependencies"] + [entry for name in names for entry in EXTRAS[name]])
        elif not line.startswith("-c "):
            requested |= bounds([line])
    assert requested == ALL_BOUNDS


def test_conda_environment_and_makefile_install_alike() -> None:
    makefile = (ROOT / "Makefile").read_text()
    extras = re.search(r"^EXTRAS := (.+)$", makefile, re.MULTILINE)
    assert extras
    assert f"-e .[{extras[1]}]" in pip_lines()
    assert "-c constraints.txt" in pip_lines() and "-c constraints.txt" in makefile


@pytest.mark.parametrize("name", sorted(ALL_BOUNDS))
def test_the_pinned_version_is_within_its_bound(name: str) -> None:
    assert pins()[name] in ALL_BOUNDS[name]


def test_constraints_are_plain_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(pins()) == len(lines)
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []


def test_every_pin_installs_on_the_oldest_python() -> None:
    """3.11.0, where the project asks for 3.11: systems keep the patch release that they began with."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    installed = {canonicalize_name(found.metadata["Name"]): found for found in distributions()}
    pinned = {name: installed[name] for name in pins() if name in installed}
    assert len(pinned) > len(pins()) / 2
    demands = {name: found.metadata["Requires-Python"] for name, found in pinned.items()}
    assert {name: said for name, said in demands.items() if said and oldest not in SpecifierSet(said)} == {}


def test_wheel_holds_the_package_and_its_data(tmp_path: Path) -> None:
    """Built in pip's own isolated environment; a machine without a registry cannot do that."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("no package registry: the build backend cannot be fetched")
    assert built.returncode == 0, built.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("dgkit-*.whl"))).namelist())
    data = [path.relative_to(ROOT) for path in (ROOT / "data").rglob("*") if path.is_file()]
    assert {f"dgkit/{path.as_posix()}" for path in data} <= names
    modules = [path.relative_to(ROOT) for path in (ROOT / "dgkit").rglob("*.py")]
    assert {path.as_posix() for path in modules} <= names
    assert not any(name.startswith(("tests/", "book/", "notebooks/", "data/")) for name in names)
