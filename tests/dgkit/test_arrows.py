"""The library knows of nothing above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dgkit

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "dgkit"
ABOVE = {"dgbook", "training", "benchmarks", "tests"}


def imported(source: str) -> set[str]:
    """The packages that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_what_a_module_imports_is_seen() -> None:
    assert imported("def f():\n    import dgbook.pages as p\n    from training import x") == {"dgbook", "training"}


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_no_module_imports_what_is_above(path: Path) -> None:
    assert not imported(path.read_text()) & ABOVE


def test_importing_the_library_loads_nothing_above_it_and_nothing_large() -> None:
    program = "import sys, dgkit; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "dgkit" in loaded and not loaded & (ABOVE | {"torch", "diffusers", "pandas"})


def test_every_name_of_the_package_is_there_and_errors_can_be_caught() -> None:
    assert all(getattr(dgkit, name) is not None for name in dgkit.__all__)
    with pytest.raises(dgkit.DgkitError, match="expected a diffusers pipeline"):
        dgkit.dissect(3)
    for error in (dgkit.DataError, dgkit.LoadError, dgkit.ModelError):
        assert issubclass(error, dgkit.DgkitError) and issubclass(error, ValueError)


def test_every_text_that_is_opened_names_its_encoding() -> None:
    """Else it is the machine's: ASCII on some clusters, another code page on Windows."""
    lacking = []
    for package in ("dgkit", "dgbook", "training", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call):
                    continue
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                first = next((a.value for a in call.args if isinstance(a, ast.Constant)), "r")
                owner = getattr(getattr(call.func, "value", None), "id", "")
                method = isinstance(call.func, ast.Attribute)
                text = (method and name in ("read_text", "write_text")) or (
                    name == "open" and owner not in ("Image", "archive", "content") and "b" not in str(first)
                )
                if text and not any(keyword.arg == "encoding" for keyword in call.keywords):
                    lacking.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert lacking == []
