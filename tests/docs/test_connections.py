"""docs/connections.md: every connection has a row, and the row agrees with its class."""

import re

import pytest
from repository import ROOT

from hf_depthattn.depth_connections import CONNECTIONS
from hf_depthattn.depth_options import DEPTH_OPTIONS

TEXT = (ROOT / "docs" / "connections.md").read_text(encoding="utf-8")
_TABLE = TEXT[TEXT.index("|---") :]
ROWS = {row[0]: row[1:] for row in re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|(.*)\|(.*)\|$", _TABLE, re.MULTILINE)}


def test_rows_are_the_registry():
    assert list(ROWS) == [str(name) for name in CONNECTIONS]


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_row_agrees_with_the_class(connection):
    kind = CONNECTIONS[connection]
    *_, host, paper = ROWS[str(connection)]
    assert host.strip().startswith("yes" if kind.starts_as_host else "no")
    assert re.findall(r"\]\((.*?)\)", paper) == re.findall(r"\]\((.*?)\)", kind.paper)


@pytest.mark.parametrize("connection", CONNECTIONS)
def test_help_of_the_option_names_every_connection(connection):
    assert f'"{connection}"' in DEPTH_OPTIONS["connection"].help
