"""How the site is built: `make docs` runs sphinx-build with warnings as errors, offline, without running a tutorial."""

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

# Markdown: definition lists and admonitions for troubleshooting; headings get anchors that links are checked against.
myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

# Docstrings are Google style with reStructuredText roles inside.
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute that is a property too would otherwise be described twice
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 88
python_display_short_literal_types = True
add_module_names = False
default_role = "code"

# A reference to a public name that leads nowhere is a warning, so an error. Left alone: names of other projects, whose
# inventories are on the network, and modules inside the package, which only type hints and module docstrings name.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"torchrl_sglang\.\w+\..*"),
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


def find_among_public_names(app, env, node, contnode):
    """Docstrings name what users import from the package root by its bare name, in whatever module they stand."""
    if node.get("refdomain") != "py":
        return None
    python, page = env.domains["py"], node.get("refdoc", "")
    for module in ("torchrl_sglang", "torchrl_sglang.errors"):
        full = f"{module}.{node['reftarget']}"
        found = python.resolve_xref(env, page, app.builder, node["reftype"], full, node, contnode)
        if found is not None:
            return found
    return None


# Napoleon takes "Nucleus sampling: keep ..." below a field for a type and its description. Our fields have annotations.
KEPT_COLON = "\ue000"


def hide_colons_from_napoleon(app, what, name, obj, options, lines):
    """Before napoleon reads the docstring of a field."""
    if what == "attribute" and lines:
        lines[0] = lines[0].replace(":", KEPT_COLON)


def show_colons_again(app, what, name, obj, options, lines):
    """After it."""
    lines[:] = [line.replace(KEPT_COLON, ":") for line in lines]


def take_folders_as_text(app, docname, source):
    """A link to a folder of the repository is one where the page is read there; on the site it is only text."""

    def text_of(link):
        return link[1] if (Path(app.srcdir) / link[2]).is_dir() else link[0]

    source[0] = re.sub(r"\[([^]]+)\]\((\.\./[^)]+)\)", text_of, source[0])


def setup(app):
    """Sphinx calls this."""
    app.connect("source-read", take_folders_as_text)
    app.connect("missing-reference", find_among_public_names)
    app.connect("autodoc-process-docstring", hide_colons_from_napoleon, priority=400)
    app.connect("autodoc-process-docstring", show_colons_again, priority=600)
