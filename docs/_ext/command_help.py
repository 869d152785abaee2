"""The directive ``command-help``: the output of ``torchrl-sglang COMMAND --help`` when the site is built."""

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
    """``.. command-help:: serve`` shows the help of that command; without an argument, the help of the program."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Run the command and return its output as a literal block."""
        arguments = [*self.arguments, "--help"]
        output = io.StringIO()
        # argparse wraps to the terminal's width, and a build has no terminal
        fixed_width = mock.patch.dict(os.environ, COLUMNS="100")
        with fixed_width, contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main(arguments)
        text = f"$ torchrl-sglang {' '.join(arguments)}\n{output.getvalue()}"
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
