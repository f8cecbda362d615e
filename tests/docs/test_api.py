"""The API reference has what the other pages use."""

import ast
import re

from document_blocks import DOCUMENTS, blocks_of
from repository import ROOT

import hf_depthattn
from hf_depthattn import DepthAttnConfig

API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
DOCUMENTED = {
    name.removeprefix("hf_depthattn.") for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", API, re.MULTILINE)
}


def test_every_public_name_is_in_the_reference():
    assert sorted({name for name in hf_depthattn.__all__ if not name.startswith("__")} - DOCUMENTED) == []


def test_every_name_that_examples_import_is_in_the_reference():
    """From sub-packages; the modules beside them are for those who change this package."""
    used = set()
    for block in (block for document in DOCUMENTS for block in blocks_of(document)):
        if block.language != "python" or block.is_setup:
            continue
        for node in ast.walk(ast.parse(block.code)):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module.startswith("hf_depthattn.") and module.count(".") > 1:
                used |= {f"{module}.{alias.name}".removeprefix("hf_depthattn.") for alias in node.names}
    assert len(used) > 7 and sorted(used - DOCUMENTED) == []


def test_every_way_to_make_a_config_is_in_the_reference():
    own = {name for name, value in vars(DepthAttnConfig).items() if isinstance(value, classmethod)}
    members = re.search(r"autoclass:: DepthAttnConfig\n   :members: (.*)", API)
    # `from_dict` is that of every config.
    public = {name for name in own if not name.startswith("_")} - {"from_dict"}
    assert members is not None and set(members[1].split(", ")) == public
