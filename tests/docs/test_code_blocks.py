"""Code blocks of README.md, CONTRIBUTING.md and docs/ run, in the order of their page, or are checked otherwise."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import tomllib
from pathlib import Path

import pytest
from document_blocks import CARDS, DOCUMENTS, Block, blocks_of, mentions_of, parse_blocks
from document_commands import check_command, check_mention, commands_of, run_command
from document_folder import fill_folder
from repository import ROOT

PAGES = {document.stem: blocks_of(document) for document in DOCUMENTS}
#: Languages that are not run: text as it is, and directives of the docs site.
NOT_CODE = {"text", "{toctree}", "{eval-rst}"}
PARSERS = {"json": json.loads, "toml": tomllib.loads}


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def pages_with(*modes: str) -> list[str]:
    return [page for page, blocks in PAGES.items() if any(runs(block) and block.mode in modes for block in blocks)]


def runs(block: Block) -> bool:
    return block.language in ("python", "bash") and not block.is_setup


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    fill_folder(folder)
    return folder


@pytest.fixture
def run_page(example_folder, tmp_path, monkeypatch, request):
    """Return a function that runs the blocks of a page with some modes, in a fresh copy of the folder."""
    pytest.importorskip("accelerate")
    folder = tmp_path / "page"
    shutil.copytree(example_folder, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(page: str, *modes: str) -> None:
        names: dict = {"__name__": "__main__"}
        for block in PAGES[page]:
            if block.mode not in modes:
                continue
            if block.language == "python":
                # Lines of the page in tracebacks.
                exec(compile(block.code, block.place, "exec"), names)
            elif block.language == "bash":
                for words in commands_of(block.code):
                    if "--offline" in words:
                        request.getfixturevalue("depthattn_data")
                    run_command(words, folder)

    return run


@pytest.mark.parametrize("page", pages_with("fast"))
def test_page_runs(run_page, page):
    run_page(page, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("slow"))
def test_whole_page_runs(run_page, page):
    run_page(page, "fast", "slow")


@pytest.mark.parametrize("document", [*DOCUMENTS, *CARDS], ids=name_of)
def test_blocks_are_code_that_this_version_knows(document):
    for block in blocks_of(document):
        if block.language == "python":
            check_imports(ast.parse(block.code, block.place))
        elif block.language == "bash":
            for words in commands_of(block.code):
                check_command(words)
        elif block.language in PARSERS:
            PARSERS[block.language](block.code)
        else:
            known = block.language in NOT_CODE or block.language.startswith("{include}")
            assert known, f"{block.place}: language {block.language!r}; 'text' is for what is not code"


def check_imports(tree: ast.Module) -> None:
    """Check the names that are imported from this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_depthattn"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("document", [*DOCUMENTS, *CARDS], ids=name_of)
def test_commands_in_sentences_exist(document):
    for command in mentions_of(document.read_text(encoding="utf-8")):
        check_mention(command)


def test_commands_in_sentences_are_found():
    assert mentions_of("`depthattn eval X`, `make a`\n\n```bash\nmake b `c`\n```\n") == ["depthattn eval X", "make a"]
    check_mention("depthattn eval MODEL --suite SUITE ...")
    for command in (
        "depthattn no-such-command",
        "depthattn eval --no-such-option",
        "depthattn eval owner/name --perplexity X --update-card",
        "make no-such-target",
    ):
        with pytest.raises(AssertionError):
            check_mention(command)


def test_marks_and_setups_are_read():
    text = "<!-- test: setup\nx = 1\n-->\n\n- point\n\n  <!-- test: parse, why -->\n  ```bash\n  make a\n  ```\n"
    text += "\n```text\nb\n```\n"
    setup, command, plain = parse_blocks(text, "page")
    assert (setup.code, setup.is_setup) == ("x = 1\n", True)
    assert (command.code, command.mode, command.place) == ("make a\n", "parse", "page, line 7")
    assert (plain.language, plain.mode) == ("text", "fast")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- test: parse -->\n```bash\nmake\n```\n",
        "<!-- test: later -->\n```bash\nmake\n```\n",
        "<!-- test: slow -->\n\n```bash\nmake\n```\n",
        "```bash\nmake\n",
    ],
    ids=["no reason", "unknown mark", "mark apart from its block", "unclosed"],
)
def test_unusable_marks_are_refused(text):
    with pytest.raises(ValueError, match="page"):
        parse_blocks(text, "page")


@pytest.mark.parametrize(
    "command",
    [
        "depthattn verify MODEL --no-such-option",
        "make no-such-target",
        "make demo NO_SUCH_VARIABLE=1",
        "pip install '.[no_such_extra]'",
        "python -m no_such_module",
        "python examples/no_such_script.py",
        "accelerate launch examples/pretrain.py --no-such-option 1",
        "no-such-program",
    ],
)
def test_commands_that_do_not_exist_are_found(command):
    with pytest.raises(AssertionError):
        check_command(*commands_of(command))
