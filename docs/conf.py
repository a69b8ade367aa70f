"""Sphinx's settings: `make docs`. Pages are Markdown (MyST); flags and operations come from the sources."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from sphinx.util.inspect import signature, stringify_signature  # noqa: E402

from docs.docstrings import restructured  # noqa: E402
from docs.generated import write_pages  # noqa: E402
from epg_fast import __version__  # noqa: E402

project, author, release = "epg_fast", "the authors of epg_fast", __version__
project_copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
nitpicky = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "epg_fast"
html_static_path = ["_static"]
html_css_files = ["own.css"]
html_copy_source = html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "monokai"

# Only links of the site itself are checked without a network: `make docs-links` asks for the others.
linkcheck_timeout = 30
linkcheck_retries = 2

autodoc_member_order = "bysource"
autodoc_default_options = {"special-members": "__call__"}
highlight_language = "none"
add_module_names = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
# Optional libraries that a public module needs.
autodoc_mock_imports = [name for name in ("diffusers",) if importlib.util.find_spec(name) is None]


def as_restructured_text(app, what, name, obj, options, lines) -> None:
    lines[:] = restructured(lines)


def as_constructed(app, what, name, obj, options, arguments, returns) -> tuple[str, str | None] | None:
    """The arguments of `__init__`, where `__new__` of huggingface_hub's mixin would be shown."""
    if what == "class" and arguments == "(*args, **kwargs)":
        return stringify_signature(signature(obj.__init__, bound_method=True)), returns
    return None


def setup(app) -> None:
    write_pages(HERE)
    app.connect("autodoc-process-signature", as_constructed)
    app.connect("autodoc-process-docstring", as_restructured_text)
