"""What the hand-written pages say about the software has to be so."""

import ast
import re
from pathlib import Path

import pytest

import dgkit
from dgkit import anatomy
from dgkit.guidance import METHODS, SHARING
from dgkit.zoo import MODELS
from tests.small_pipelines import FAMILIES

BOOK = Path(__file__).parents[2] / "book"
PIPELINES = (BOOK / "pipelines.md").read_text()


def test_settings_shown_for_real_models_are_their_presets() -> None:
    for name, w in (("sd3.5-large", 2.0), ("flux-dev", 4.0)):
        preset = MODELS[name].preset
        assert f"scale={w}, block={preset.block}, dims={list(preset.dims or ())}" in PIPELINES
        assert w in (preset.scale, preset.scale_with_cfg)


@pytest.mark.parametrize("page", ["pipelines.md", "rerun.md", "method.md", "intro.md", "../README.md"])
def test_code_on_the_pages_uses_names_that_exist(page: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", (BOOK / page).read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dgkit":
                assert hasattr(dgkit, node.attr)
            if isinstance(node, ast.ImportFrom) and node.module == "dgkit.guidance":
                assert all(hasattr(dgkit.guidance, alias.name) for alias in node.names)


def test_every_method_and_way_of_sharing_is_on_the_page() -> None:
    assert all(f"`{method.__name__}`" in PIPELINES for method in METHODS.values())
    assert all(f'`"{way}"`' in PIPELINES for way in SHARING)


def test_the_table_of_families_names_what_ran() -> None:
    table = PIPELINES.split("(families)=")[1].split("`Pipeline` is left out")[0]
    lines = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    named = {name for line in lines for name in re.findall(r"\b[A-Z]\w+", line[2].split(";")[0])} - {"Images", "Videos"}
    ran = {entry.name.split()[0].removesuffix("Pipeline") for entry in FAMILIES}
    assert named <= {name.removesuffix("Pipeline") for name in anatomy.PIPELINES}
    assert ran == named
