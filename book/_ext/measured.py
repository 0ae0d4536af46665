"""`{measured} NAME [ARGUMENT]`: a part of a page made from data, anew at every build (`dgbook.pages.measured`)."""

from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from dgbook.pages.measured import measured
from dgkit.errors import DgkitError


class Measured(SphinxDirective):
    """Puts the MyST text of `dgbook.pages.measured` in its place; what that cannot make is an error of the build."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # the data may have changed where the page has not
        try:
            text = measured(*self.arguments)
        except DgkitError as error:
            raise self.error(str(error)) from error
        container = nodes.container(classes=["measured"])
        self.state.nested_parse(StringList(text.splitlines(), self.arguments[0]), 0, container)
        return [container]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}
