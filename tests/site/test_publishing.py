"""What is published: the workflows, the buttons and addresses of the pages, the single page, the citation."""

import importlib.util
import json
import os
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import yaml
from jupyter_book.sphinx import build_sphinx
from sphinx.errors import ConfigError

from tests.site.test_packaging import PROJECT, bounds

ROOT = Path(__file__).parents[2]
ADDRESS = "https://github.com/Someone/dg-book"

# ------------------------------------------------------------------------------------------------------- the workflows

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def commands(workflow: str) -> list[str]:
    return [step["run"] for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"] if "run" in step]


def test_the_jobs_are_all_of_make_test_and_the_book() -> None:
    prerequisites = re.search("^test: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert prerequisites
    made = [*prerequisites[1].split(), "book", "test-book"]
    assert commands("tests") == [f"make {target} PYTHON=python" for target in made]


def test_what_is_published_is_the_book_of_the_default_branch_with_its_own_address() -> None:
    branch = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["branch"]
    assert WORKFLOWS["pages"][True] == {"push": {"branches": [branch]}, "workflow_dispatch": None}  # YAML's `on`
    assert commands("pages") == ["make book PYTHON=python", "make test-book PYTHON=python"]
    (environment,) = (step["env"] for step in WORKFLOWS["pages"]["jobs"]["build"]["steps"] if "env" in step)
    assert environment == {publishing().VARIABLE: "${{ github.server_url }}/${{ github.repository }}"}


# ------------------------------------------------------------------------------------------------------------ addresses


def publishing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publishing", ROOT / "book" / "_ext" / "publishing.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled_in(url: str, baseurl: str = "") -> Any:
    config = SimpleNamespace(
        html_theme_options={"repository_url": url, "launch_buttons": {}}, html_baseurl=baseurl, myst_substitutions={}
    )
    publishing().fill_in(None, config)
    return config


@pytest.mark.parametrize(
    ("url", "pages"),
    [
        (ADDRESS, "https://someone.github.io/dg-book/"),
        (ADDRESS + ".git", "https://someone.github.io/dg-book/"),
        (ADDRESS + "/", "https://someone.github.io/dg-book/"),
        ("https://github.com/Someone/someone.github.io", "https://someone.github.io/"),
    ],
)
def test_the_pages_are_where_github_puts_them(url: str, pages: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(publishing().VARIABLE, raising=False)
    assert filled_in(url).html_baseurl == pages
    assert filled_in(url, "https://book.example/").html_baseurl == "https://book.example/"
    monkeypatch.setenv(publishing().VARIABLE, url)
    assert filled_in("").html_baseurl == pages
    assert filled_in("https://github.com/other/one").html_baseurl == "https://other.github.io/one/"


@pytest.mark.parametrize(
    "url", ["github.com/a/b", "https://github.com/a", "https://gitlab.com/a/b", "https://github.com/a/b/c"]
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{url!r}: https://github.com/OWNER/REPOSITORY is needed")):
        filled_in(url)


# ------------------------------------------------------------------------------------------------------ a book of pages


class Page(HTMLParser):
    """The links, images and ids of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.canonical = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.ids.add(values.get("id", ""))
        if tag == "link" and values.get("rel") == "canonical":
            self.canonical = values["href"]
        else:
            self.links += [values[name] for name in ("href", "src") if name in values]

    def to(self, words: str) -> list[str]:
        return sorted({link for link in self.links if words in link})


def build(folder: Path, address: str, builder: str = "html") -> Path:
    """A book of a page and a notebook, with the real configuration, warnings being errors."""
    (folder / "book").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    for shared in ("_ext", "_static", "references.bib"):
        (folder / "book" / shared).symlink_to(ROOT / "book" / shared)
    shutil.copy(ROOT / "_config.yml", folder)
    chapter = {"file": "notebooks/01_demo"}
    toc = {"format": "jb-book", "root": "book/intro", "parts": [{"caption": "All", "chapters": [chapter]}]}
    (folder / "_toc.yml").write_text(yaml.safe_dump(toc))
    (folder / "book" / "intro.md").write_text(
        "# A book\n\nSee {doc}`../notebooks/01_demo`.\n\n{{ install }}\n\n## More\n"
    )
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": "# A notebook\n\n## More\n\nSee {doc}`../book/intro`."}
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"nbformat": 4, "nbformat_minor": 4, "metadata": {"kernelspec": kernel}, "cells": cells}
    (folder / "notebooks" / "01_demo.ipynb").write_text(json.dumps(notebook))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, publishing().VARIABLE, address)
        status = build_sphinx(
            folder,
            folder / "out",
            path_config=folder / "_config.yml",
            noconfig=True,
            confoverrides={"external_toc_path": "_toc.yml", "latex_individualpages": False, "nitpicky": True},
            builder=builder,
            freshenv=True,
            warningiserror=True,
            keep_going=True,
            really_quiet=True,
        )
    assert status == 0
    return folder / "out"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("here"), "")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("published"), ADDRESS)


def test_a_notebook_can_be_downloaded(here: Path) -> None:
    (link,) = Page(here / "notebooks" / "01_demo.html").to(".ipynb")
    target = here / "notebooks" / link
    assert json.loads(target.read_text()) == json.loads((here.parent / "notebooks" / "01_demo.ipynb").read_text())


def test_without_an_address_nothing_points_to_one(here: Path) -> None:
    for name in ("book/intro.html", "notebooks/01_demo.html"):
        page = Page(here / name)
        assert not page.canonical
        assert [link for link in page.links if urlsplit(link).scheme in ("http", "https")] == []
    assert not (here / "sitemap.xml").exists()


def test_with_an_address_the_buttons_open_this_notebook(published: Path) -> None:
    page = Page(published / "notebooks" / "01_demo.html")
    assert page.to("mybinder") == [
        "https://mybinder.org/v2/gh/Someone/dg-book/main?urlpath=lab/tree/notebooks/01_demo.ipynb"
    ]
    assert page.to("colab.research") == [
        "https://colab.research.google.com/github/Someone/dg-book/blob/main/notebooks/01_demo.ipynb"
    ]
    assert ADDRESS in page.links and page.to(f"{ADDRESS}/issues/new?")
    assert all(link.startswith(ADDRESS) for link in page.to("https://github.com"))
    assert Page(published / "book" / "intro.html").to("mybinder") == []


def test_with_an_address_pages_have_theirs(published: Path) -> None:
    names = ["book/intro.html", "notebooks/01_demo.html"]
    pages = [f"https://someone.github.io/dg-book/{name}" for name in names]
    assert [Page(published / name).canonical for name in names] == pages
    locations = ElementTree.parse(published / "sitemap.xml").iter("{http://www.sitemaps.org/schemas/sitemap/0.9}loc")
    assert [location.text for location in locations] == pages
    text = unescape(re.sub("<[^>]+>", "", (published / "book" / "intro.html").read_text()))
    assert f'%pip install "dgkit[book] @ git+{ADDRESS}"' in text


def test_the_single_page_is_whole(tmp_path: Path) -> None:
    single = build(tmp_path, "", "singlehtml")
    page = Page(single / "index.html")
    inside = [urlsplit(link) for link in page.links if not urlsplit(link).scheme]
    assert {unquote(link.fragment) for link in inside if not link.path} <= page.ids
    files = {link.path for link in inside if link.path} - {"search.html", "genindex.html"}  # a single page has neither
    assert any(name.endswith(".css") for name in files)
    assert [name for name in files if not (single / name).is_file()] == []
    assert "A notebook" in (single / "index.html").read_text()


# ------------------------------------------------------------------------------------------ citation, changelog, Binder


def test_this_version_is_cited_and_in_the_changelog() -> None:
    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"version = {{{version}}}" in (ROOT / "book" / "cite.md").read_text()
    heading = re.search(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading and re.fullmatch(rf"## (\[Unreleased\]: {version}|\[{version}\] - \d{{4}}-\d\d-\d\d)", heading[0])


def test_binder_gets_what_the_package_needs() -> None:
    """PyTorch without CUDA from conda-forge; pip, for the package itself, then finds the bounds kept."""
    asked = bounds(yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())["dependencies"])
    needed = bounds(PROJECT["dependencies"])
    assert asked["pytorch-cpu"] == needed["torch"] and asked["torchvision"] == needed["torchvision"]
    assert "pip install -e '.[book]'" in (ROOT / "binder" / "postBuild").read_text()
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)
