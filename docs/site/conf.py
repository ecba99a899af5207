"""Sphinx's settings of the site. `make docs` builds it; every warning is an error."""

import spt_ds

project = "spt_ds"
version = release = spt_ds.__version__
html_title = f"{project} {version}"
language = "en"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
highlight_language = "text"
# The anchors that a forge gives to headings.
myst_heading_anchors = 4
# Docstrings write code in single backticks.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
