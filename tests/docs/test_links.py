"""Links between files of the repository lead somewhere, with their anchors (the site is checked by `make docs`)."""

import re
from pathlib import Path

import pytest
from repository import ROOT

DOCUMENTS = [
    path.relative_to(ROOT)
    for pattern in (
        "*.md",
        "docs/*.md",
        "kernels/*.md",
        "examples/**/*.md",
        "benchmarks/**/*.md",
        ".github/**/*.md",
        "model_cards/*.md",
    )
    for path in sorted(ROOT.glob(pattern))
]
_CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors_of(document: Path) -> set[str]:
    """Return the anchors of the headings of a document, as in the repository's view and on the site."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings(document):
    text = _CODE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        found = (ROOT / document).parent / path if path else ROOT / document
        assert found.exists(), target
        if anchor:
            # A page of the site includes this file.
            included = ROOT / "kernels" / "README.md" if found.name == "kernels.md" else found
            assert anchor in anchors_of(found) | anchors_of(included), target


def test_anchors_are_made_as_by_the_forge(tmp_path):
    (tmp_path / "a.md").write_text("# One `code`: two\n\n```bash\n# no heading\n```\n\n## Attention (3.2), etc.\n")
    assert anchors_of(tmp_path / "a.md") == {"one-code-two", "attention-32-etc"}
