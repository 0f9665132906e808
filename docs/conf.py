"""Sphinx settings; build with ``make docs``."""

import re

from gradmark._version import __version__

project = "gradmark"
author = "The gradmark authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"gradmark {__version__}"
autodoc_member_order = "bysource"
autodoc_typehints = "description"


def escape_shapes(app, what, name, obj, options, lines):
    """Docstrings write shapes as (b, *shape); reStructuredText takes that star for emphasis."""
    lines[:] = [re.sub(r"(?<![`*\\])\*(?=shape\b)", r"\\*", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", escape_shapes)


myst_enable_extensions = ["dollarmath"]
