"""What a published book adds, all from one address: `repository.url` in _config.yml, else `$DGKIT_REPOSITORY_URL`.

With an address: buttons for Binder, Colab, the repository and its issues, canonical links and sitemap.xml. Without one,
none of them: no link could be right. `html.baseurl` is the address of the pages where it is not GitHub's own.
"""

import os
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

VARIABLE = "DGKIT_REPOSITORY_URL"
INSTALL = """```python
%pip install "dgkit[book] @ git+{}"
```"""


def fill_in(app: Sphinx, config: Config) -> None:
    """Put the address wherever the theme and the pages look for it.

    Raises:
        ConfigError: it is not that of a repository on GitHub.
    """
    theme = config.html_theme_options
    address = (theme.get("repository_url") or os.environ.get(VARIABLE, "")).rstrip("/").removesuffix(".git")
    theme["repository_url"] = address
    config.myst_substitutions = config.myst_substitutions | {
        "install": INSTALL.format(address or "https://github.com/OWNER/REPOSITORY")
    }
    if not address:
        theme.pop("launch_buttons", None)
        return
    parts = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+)", address)
    if parts is None:
        raise ConfigError(
            f"repository.url in _config.yml, or ${VARIABLE}, is {address!r}: "
            "https://github.com/OWNER/REPOSITORY is needed"
        )
    theme |= {"use_repository_button": True, "use_issues_button": True}
    if not config.html_baseurl:
        host, name = f"{parts[1].lower()}.github.io", parts[2]
        config.html_baseurl = f"https://{host}/" if name.lower() == host else f"https://{host}/{name}/"


def write_sitemap(app: Sphinx, exception: Exception | None) -> None:
    """sitemap.xml of all pages; sphinx-sitemap would warn, and so stop the build, where there is no address."""
    base = app.config.html_baseurl
    if exception or not base or app.builder.name != "html":
        return
    pages = (f"{base.rstrip('/')}/{app.builder.get_target_uri(page)}" for page in sorted(app.env.found_docs))
    locations = "".join(f"<url><loc>{escape(page)}</loc></url>\n" for page in pages)
    Path(app.outdir, "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{locations}</urlset>\n'
    )


def move_single_page(app: Sphinx, exception: Exception | None) -> None:
    """Put the page of singlehtml where its paths to images and links to itself are right: Sphinx has them for the root.

    They are wrong where the first chapter is in a folder; that chapter's own anchor is missing, too.
    """
    root = app.config.root_doc
    if exception or app.builder.name != "singlehtml" or "/" not in root:
        return
    page = Path(app.outdir, root + ".html")
    text = page.read_text().replace(f'href="{root}.html#', 'href="#').replace(f'href="#document-{root}"', 'href="#"')
    Path(app.outdir, "index.html").write_text(text)
    page.unlink()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", fill_in, priority=100)  # before the theme reads its options
    app.connect("build-finished", write_sitemap)
    app.connect("build-finished", move_single_page, priority=900)  # after index.html has become a redirection
    return {"parallel_read_safe": True, "parallel_write_safe": True}
