"""Sphinx configuration. `make docs` builds the site offline, with warnings as errors, and runs no tutorial."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import torchrl_sglang

project = "torchrl-sglang"
author = "the torchrl-sglang contributors"
copyright = author
release = version = torchrl_sglang.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "command_help"]
exclude_patterns = ["_build", "requirements.txt"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}

# Markdown: definition lists and admonitions for troubleshooting; heading anchors, so that links to them are checked.
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

# Docstrings are in Google style, with reStructuredText roles.
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # otherwise an attribute that is also a property would be described twice
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 88
python_display_short_literal_types = True
add_module_names = False
default_role = "code"

# A reference to a public name that does not exist is a warning, and so an error. Ignored are names of other projects,
# whose inventories are on the network, and modules inside the package, which only type hints and docstrings mention.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"torchrl_sglang\.\w+\..*"),
    (r"py:.*", r"Weight(State|Source|Transport)"),  # internal classes
    (r"py:.*", r"Servers"),  # what users pass as servers: a type alias
    (r"py:.*", r"(?!torchrl_sglang\b|SGLang|AsyncSG|Weight|Sync|Server|Client|Sampling|Generation$|Reward).*"),
]

html_theme = "furo"
html_title = f"torchrl-sglang {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "sidebar_hide_name": False,
    "navigation_with_keys": True,
    "light_css_variables": {
        "font-stack": "system-ui, sans-serif",
        "color-brand-primary": "#2166ac",
        "color-brand-content": "#2166ac",
    },
    "dark_css_variables": {"color-brand-primary": "#7fb3e0", "color-brand-content": "#7fb3e0"},
}


def resolve_public_name(app, env, node, contnode):
    """Resolve a bare name in a docstring to the public name of the package root or of ``torchrl_sglang.errors``."""
    if node.get("refdomain") != "py":
        return None
    python, page = env.domains["py"], node.get("refdoc", "")
    for module in ("torchrl_sglang", "torchrl_sglang.errors"):
        full = f"{module}.{node['reftarget']}"
        found = python.resolve_xref(env, page, app.builder, node["reftype"], full, node, contnode)
        if found is not None:
            return found
    return None


# Napoleon reads "Nucleus sampling: keep ..." in a field's docstring as a type and a description. The fields here have
# annotations, so the colon is hidden from napoleon.
HIDDEN_COLON = "\ue000"


def hide_colons_from_napoleon(app, what, name, obj, options, lines):
    """Replace the colon in the first line of a field's docstring; runs before napoleon."""
    if what == "attribute" and lines:
        lines[0] = lines[0].replace(":", HIDDEN_COLON)


def restore_colons(app, what, name, obj, options, lines):
    """Put the colons back; runs after napoleon."""
    lines[:] = [line.replace(HIDDEN_COLON, ":") for line in lines]


def unlink_folders(app, docname, source):
    """Replace links to folders of the repository by their text: they work on the code host, but not on the site."""

    def text_of(link):
        return link[1] if (Path(app.srcdir) / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^]]+)\]\((\.\./[^)]+)\)", text_of, source[0])


def setup(app):
    """Connect the functions above to Sphinx's events."""
    app.connect("source-read", unlink_folders)
    app.connect("missing-reference", resolve_public_name)
    app.connect("autodoc-process-docstring", hide_colons_from_napoleon, priority=400)
    app.connect("autodoc-process-docstring", restore_colons, priority=600)
