"""Sphinx configuration: `make docs` builds these pages and README.md as a site in `docs/_build`."""

from ecar_dist import __version__

project = "ecar_dist"
author = "the ecar_dist developers"
copyright = author
release = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "dollarmath", "amsmath"]
myst_heading_anchors = 4  # links such as data.md#manifest are checked against the headings
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"ecar_dist {release}"

# Strict: an unknown link target, a page outside the table of contents, or a bad heading level fails the build (-W).
nitpicky = True
# Files of the repository that pages link to, beside the pages: they are no documents of the site.
myst_url_schemes = {"http": None, "https": None, "mailto": None}
