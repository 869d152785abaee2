"""The directive ``command-help``: what ``torchrl-sglang COMMAND --help`` prints, asked when the site is built."""

from __future__ import annotations

import contextlib
import io
import os
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from torchrl_sglang.cli import main


class CommandHelp(SphinxDirective):
    """``.. command-help:: serve`` shows the help of that command; without an argument that of the program."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Ask, and show the answer as it would look on a terminal."""
        words = [*self.arguments, "--help"]
        said = io.StringIO()
        # argparse wraps to the terminal's width, and the machine that builds the site has none
        as_wide = mock.patch.dict(os.environ, COLUMNS="100")
        with as_wide, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main(words)
        shown = f"$ torchrl-sglang {' '.join(words)}\n{said.getvalue()}"
        return [nodes.literal_block(shown, shown, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
