"""Settings of Sphinx: `make docs` builds these pages, and takes every warning for an error."""

import hpclab

project = "hpclab"
author = "hpclab developers"
copyright = author
version = release = hpclab.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as on GitHub, so that links to headings work in both

# The reference is made of the docstrings. A name in single backticks is one of ours, or plain code.
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them in the source; docstrings say types in words
default_role = "py:obj"
suppress_warnings = ["ref.python"]  # Run and Network are found twice: in hpclab, and where they are at home
autodoc_default_options = {"exclude-members": "set"}  # matplotlib's, in a docstring that only its own pages can read
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"hpclab {release}"
html_show_sphinx = False
html_show_copyright = False
