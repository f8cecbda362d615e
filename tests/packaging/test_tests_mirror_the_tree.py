"""A test file is found beside what it tests: the folders of `tests/` are those of the source, and so are the names."""

import pytest
from repository import ROOT, TESTS

#: Folder of tests -> folders whose modules they test, where that is not the folder of the same path. What travels with
#: a checkpoint lies in one flat folder; its tests are sorted by part.
SOURCES = {
    "ops": ("hf_depthattn",),
    "connections": ("hf_depthattn",),
    "models": ("hf_depthattn",),
    "hosts": ("hf_depthattn",),
    "integrations": ("hf_depthattn/integrations", "hf_depthattn"),
    "checkpoints": ("hf_depthattn/checkpoints", "hf_depthattn"),
    "cli": ("hf_depthattn/cli",),
    "errors": ("hf_depthattn/errors",),
    "utils": ("hf_depthattn/utils",),
    "distributed": ("hf_depthattn/distributed",),
    "lm_eval": ("hf_depthattn/lm_eval",),
    "serve": ("hf_depthattn/serve",),
    "pretraining": ("hf_depthattn/pretraining",),
}

#: Folder -> test files of something that is no module: other people's libraries, files, several modules at once.
TOPICS = {
    "cli": {"bad_input", "damaged_checkpoints"},
    "eval/report": {"page_in_browser"},
    "connections": {"every_connection"},
    "distributed": {"context_parallel", "ddp", "fsdp", "trainer_engines", "two_processes"},
    "conversion": {"retrofit_moda", "retrofit_refusals"},
    "kernels": {"bytes_moved", "whole_models"},
    "models": {"caches", "named_configs", "saved_code", "structure"},
    "integrations": {
        "engines",
        "export",
        "finetuning",
        "other_libraries",
        "quantised",
        "stock_adapters",
        "tied_embeddings",
        "trl",
    },
}
#: Folders of topics only: pushing and pulling, the built package and the repository, its documents.
TOPIC_FOLDERS = {"hub", "packaging", "docs"}
NOT_TESTS = {"support", "data", "upstream"}

FOLDERS = sorted(
    {
        path.parent.relative_to(TESTS).as_posix()
        for path in TESTS.rglob("test_*.py")
        if path.relative_to(TESTS).parts[0] not in NOT_TESTS
    }
    - TOPIC_FOLDERS
    - {"."}
)


def stems_in(folder: str) -> set[str]:
    return {path.stem.removeprefix("test_") for path in (TESTS / folder).glob("test_*.py")}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_has_the_name_of_a_module_or_of_a_listed_topic(folder):
    sources = [ROOT / source for source in SOURCES.get(folder, (folder,))]
    missing = [str(source) for source in sources if not source.is_dir()]
    assert not missing, f"tests/{folder} has the name of no folder of the source, or a row in SOURCES is out of date"
    modules = {path.stem for source in sources for path in source.glob("*.py")}
    unknown = stems_in(folder) - modules - TOPICS.get(folder, set())
    assert not unknown, f"tests/{folder}: no module and no topic in TOPICS: {sorted(unknown)}"


@pytest.mark.parametrize("folder", TOPICS)
def test_every_listed_topic_has_its_file(folder):
    assert TOPICS[folder] <= stems_in(folder)


def test_no_test_file_lies_outside_a_folder():
    assert not sorted(path.name for path in TESTS.glob("test_*.py"))
