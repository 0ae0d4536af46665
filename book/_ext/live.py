"""The scripts of the live page, on that page alone."""

from typing import Any

from sphinx.application import Sphinx

PAGE = "book/live"
SCRIPTS = ("noise", "tokenizer", "sampler", "worker", "engine", "map", "data/models", "page")
"""In the order in which they run; `dgbook.live` makes the folder `data`."""


def add_scripts(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    if pagename == PAGE and app.builder.name == "html":
        app.add_css_file("live/live.css")
        for name in SCRIPTS:
            app.add_js_file(f"live/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True}
