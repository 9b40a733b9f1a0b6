"""Sphinx configuration: `make docs` builds these pages and README.md as a site in `docs/_build`."""

from ecar_dist import __version__

project = "ecar_dist"
author = "the ecar_dist developers"
copyright = author
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
python_use_unqualified_type_names = True
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 4  # links such as data.md#manifest are checked against the headings
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"ecar_dist {release}"

# Strict: an unknown link target, a page outside the table of contents, or a bad heading level fails the build (-W).
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other libraries have no page here
# Files of the repository that pages link to, beside the pages: they are no documents of the site.
myst_url_schemes = {"http": None, "https": None, "mailto": None}
