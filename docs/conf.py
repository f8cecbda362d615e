"""The docs site: Sphinx reads the Markdown of this folder and the docstrings (`make docs`).

The pages are written for reading in the repository as well: links are relative, and lead to files beside `docs/` too.
"""

import re
import sys
import tomllib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

from docstring_markup import to_restructured_text

import hf_depthattn

logger = logging.getLogger(__name__)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = PROJECT["name"]
release = version = hf_depthattn.__version__
author = "the authors of hf-depthattn"
copyright = "the authors of hf-depthattn"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# Anchors of headings down to `####`, as in the repository's own view of the files.
myst_heading_anchors = 4

napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# Single backticks in docstrings are code, as in Markdown; `to_restructured_text` converts the rest.
default_role = "code"

html_theme = "furo"
html_title = f"{project} {release}"
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def link_to_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Point links to files outside this folder at the repository; a missing file is a warning, hence an error."""

    def replace(link: re.Match) -> str:
        path = (DOCS / link["path"]).resolve()
        if not path.exists():
            logger.warning("link to a file that does not exist: %s", link["path"], location=docname)
        kind = "tree" if path.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{path.relative_to(ROOT).as_posix()}{link['anchor'] or ''})"

    source[0] = re.sub(r"\]\((?P<path>\.\./[^)#\s]+)(?P<anchor>#[^)\s]+)?\)", replace, source[0])


def convert_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Convert the Markdown of a docstring, before napoleon reads its sections."""
    lines[:] = to_restructured_text(lines)


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_to_repository)
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
