"""Workflows, issue forms, citation and changelog agree with the project."""

import re
import tomllib

import pytest
import yaml
from repository import ROOT

import hf_depthattn

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


def read_yaml(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_developers_run(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    workflow = read_yaml(path)
    # YAML reads the key `on` as a boolean.
    assert workflow[True] and workflow["permissions"] == {"contents": "read"}
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for command in commands:
        program, *words = command.split()
        if program == "make":
            assert set(words) <= targets, command
        else:
            assert command == "bash .ci/run"
    assert all("timeout-minutes" in job for name, job in workflow["jobs"].items() if name != "publish")


def test_the_checks_run_with_both_ends_of_the_versions():
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    assert "bash .ci/run" in text and "make test-oldest" in text and "make docs" in text


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_the_forge_requires(path):
    form = read_yaml(path)
    assert {"name", "description", "body"} <= set(form)
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown", "checkboxes", "markdown")
        assert field["attributes"]["label"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)


def test_addresses_agree():
    address = PROJECT["urls"]["Repository"]
    texts = {ROOT / "SECURITY.md", ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"}
    found = [url for path in texts for url in re.findall(r"https://github\.com/[\w-]+/[\w-]+", path.read_text())]
    assert found and set(found) == {address}
    assert all(url.startswith(address) for url in PROJECT["urls"].values())
    assert read_yaml(ROOT / "CITATION.cff")["repository-code"] == address


def test_version_is_that_of_the_changelog_and_the_citation():
    sections = re.findall(r"^## \[(.*?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    released, date = sections[1]
    citation = read_yaml(ROOT / "CITATION.cff")
    assert (citation["version"], str(citation["date-released"])) == (released, date)
    assert citation["license"] == PROJECT["license"]
    # After a release, development continues under the next number.
    assert hf_depthattn.__version__ == released or ".dev" in hf_depthattn.__version__
