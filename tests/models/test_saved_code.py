"""Whatever is saved or uploaded can be loaded elsewhere: configs bring the model code, models a card that says how."""

import ast
import inspect
import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from processes import run_python
from repository import ROOT
from tiny_checkpoints import save_stock, save_tokenizer
from tiny_hosts import tiny_host_config
from transformers import AutoModelForCausalLM
from transformers.utils.hub import PushToHubMixin, create_and_tag_model_card

from hf_depthattn import (
    DepthAttnConfig,
    DepthAttnForCausalLM,
    DepthAttnForSequenceClassification,
    DepthAttnModel,
    remote_code,
    retrofit,
)
from hf_depthattn.remote_code import AUTO_MAP, export_model_code

BOTH = {"num_blocks": 2, "depth_kv": "attention+mlp"}
#: Of models with MoDA.
MODA_AUTO_MAP = {**AUTO_MAP, "AutoModel": "modeling_depthattn.DepthAttnModelWithOwnAttention"}


def both_config(**fields) -> DepthAttnConfig:
    return DepthAttnConfig.attn_res(tiny_host_config("llama"), **BOTH, **fields)


def code_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


# Where `import hf_depthattn` fails. Only a config is loaded: transformers then copies only what the config imports.
_SAVE_ELSEWHERE = """
import sys
sys.modules["hf_depthattn"] = None
import shutil
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
source, out = sys.argv[1:]
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
config.save_pretrained(out + "/config")
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
tokenizer.save_pretrained(out + "/tokenizer")
tokenizer.save_pretrained(out + "/config")
assert AutoTokenizer.from_pretrained(out + "/tokenizer")("ab").input_ids == tokenizer("ab").input_ids
shutil.rmtree(source)
again = AutoConfig.from_pretrained(out + "/config", trust_remote_code=True)
model = AutoModelForCausalLM.from_config(again, trust_remote_code=True)
model.config.save_pretrained(out + "/config_of_model")
model.save_pretrained(out + "/model")
tokenizer.save_pretrained(out + "/model")
for name in ("config_of_model", "model"):
    again = AutoConfig.from_pretrained(out + "/" + name, trust_remote_code=True)
    AutoModelForCausalLM.from_config(again, trust_remote_code=True)
AutoModelForCausalLM.from_pretrained(out + "/model", trust_remote_code=True)
AutoTokenizer.from_pretrained(out + "/model", trust_remote_code=True)
print("ok")
"""


def test_what_remote_code_saves_loads_again(tmp_path):
    source = tmp_path / "source"
    DepthAttnForCausalLM(both_config()).save_pretrained(source)
    save_tokenizer(source)
    expected = code_in(source)
    home = tmp_path / "home"
    home.mkdir()
    result = run_python("-c", _SAVE_ELSEWHERE, str(source), str(tmp_path), cwd=home, HF_HOME=str(home))
    assert result.stdout.strip() == "ok", result.stderr[-3000:]
    for name in ("config", "config_of_model", "model"):
        assert code_in(tmp_path / name) == expected
        assert json.loads((tmp_path / name / "config.json").read_text())["auto_map"] == MODA_AUTO_MAP
    assert not code_in(tmp_path / "tokenizer")


def test_a_config_of_the_package_brings_the_code_too(tmp_path):
    config = both_config()
    before = dict(config.__dict__)
    config.save_pretrained(tmp_path / "saved")
    assert config.__dict__ == before
    DepthAttnModel(config).save_pretrained(tmp_path / "model")
    assert code_in(tmp_path / "saved") == code_in(tmp_path / "model")
    # As loaded from the Hub, with names that refer to the repository.
    loaded = DepthAttnConfig.from_pretrained(tmp_path / "saved")
    loaded.auto_map = {name: f"org/repo--{reference}" for name, reference in AUTO_MAP.items()}
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == MODA_AUTO_MAP


def test_files_that_the_config_did_not_bring_come_from_the_hub(tmp_path, monkeypatch):
    """A remote config has a copy of some files only, in a folder that is called like the commit."""
    complete, commit, out = tmp_path / "complete", tmp_path / ("ab12" * 10), tmp_path / "out"
    for folder in (complete, commit, out):
        folder.mkdir()
    files = {path.name for path in export_model_code(complete)}
    brought = {"configuration_depthattn.py", "remote_code.py"}
    for name in brought:
        (commit / name).write_bytes((complete / name).read_bytes())
    asked = []

    def cached_file(repository, name, revision):
        asked.append((repository, revision))
        return str(complete / name)

    monkeypatch.setattr(remote_code, "__file__", str(commit / "remote_code.py"))
    monkeypatch.setattr(remote_code, "cached_file", cached_file)
    config = both_config()
    config.name_or_path = "org/repo"
    # Folders beside it may hold another version.
    (complete / "configuration_depthattn.py").write_text("other = 1\n")
    export_model_code(out, config)
    assert code_in(out) == files and set(asked) == {("org/repo", commit.name)}


def test_without_its_code_a_config_promises_none(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(remote_code, "__file__", str(tmp_path / "empty" / "remote_code.py"))
    warnings = []
    monkeypatch.setattr(remote_code.logger, "warning", warnings.append)
    both_config().save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("auto_map", {}) == {}
    assert len(warnings) == 1 and "not found at" in warnings[0]
    assert DepthAttnConfig.from_pretrained(tmp_path / "out").block_size_sublayers == 4


@pytest.mark.parametrize("kind", ["config", "model"])
def test_an_upload_takes_the_code_along(kind, tmp_path, monkeypatch):
    """transformers uploads what is newer than when it began to save; the code is there before."""
    seen = {}

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        seen[kind] = {name for name in os.listdir(working_dir) if name not in files_timestamps}

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    saved = both_config() if kind == "config" else DepthAttnModel(both_config())
    saved.save_pretrained(tmp_path)
    timestamps = {path.name: path.stat().st_mtime for path in tmp_path.iterdir()}
    saved._upload_modified_files(tmp_path, "org/repo", timestamps, token=None)
    assert seen[kind] == code_in(tmp_path) != set()


# --- the oldest transformers ---


def test_an_older_transformers_is_refused_by_name(monkeypatch):
    source = ROOT / "hf_depthattn" / "configuration_depthattn.py"
    code = compile(source.read_text(encoding="utf-8"), str(source), "exec")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.6.0")
    with pytest.raises(ImportError, match=r"transformers 5\.16 or newer, and 5\.6\.0 is installed"):
        exec(code, {"__name__": "transformers_modules.folder.configuration_depthattn"})


def test_the_refused_versions_are_those_that_the_package_does_not_allow():
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (requirement,) = (line for line in requirements if line.startswith("transformers"))
    source = (ROOT / "hf_depthattn" / "configuration_depthattn.py").read_text(encoding="utf-8")
    oldest = re.search(r'_OLDEST_TRANSFORMERS = "(.+)"', source)[1]
    assert requirement.startswith(f"transformers>={oldest},")


def test_nothing_is_imported_before_the_version_is_checked():
    """And what the config imports, it imports itself: older versions copy no more than that before they run it."""
    tree = ast.parse((ROOT / "hf_depthattn" / "configuration_depthattn.py").read_text(encoding="utf-8"))
    first = []
    for node in tree.body:
        if isinstance(node, ast.If):
            break
        first += [ast.unparse(node)] if isinstance(node, ast.Import | ast.ImportFrom) else []
    assert first == ["import os", "import transformers", "from packaging.version import Version"]

    def siblings(name: str) -> set[str]:
        source = ast.parse((ROOT / "hf_depthattn" / f"{name}.py").read_text(encoding="utf-8"))
        return {node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and node.level}

    direct = siblings("configuration_depthattn")
    assert direct and all(siblings(name) <= direct for name in direct)


# --- cards ---


def metadata_of(card: Path) -> dict:
    return yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])


def loading_lines(card: Path) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_card_of_a_saved_model_loads_it(tmp_path, monkeypatch):
    model = DepthAttnForCausalLM(both_config())
    model.save_pretrained(tmp_path / "saved")
    save_tokenizer(tmp_path / "saved")
    metadata = metadata_of(tmp_path / "saved" / "README.md")
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert {"custom_code", "attention-residuals", "mixture-of-depths-attention"} <= set(metadata["tags"])
    assert "base_model" not in metadata
    lines = loading_lines(tmp_path / "saved" / "README.md")
    assert lines.count("trust_remote_code=True") == 2
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    # Registered here, so that no code of the folder has to run.
    exec(lines.replace(", trust_remote_code=True", ""), names)
    assert isinstance(names["model"], DepthAttnForCausalLM) and names["tokenizer"]("a").input_ids


def test_a_card_keeps_what_is_known_of_the_source(tmp_path):
    source = save_stock(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [de]\n---\n# Source\n")
    retrofit(source, tmp_path / "depth", num_blocks=2)
    card = tmp_path / "depth" / "README.md"
    card.write_text(card.read_text().replace("license: mit", "license: mit\nbase_model: org/source"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "depth").save_pretrained(tmp_path / "trained")
    metadata = metadata_of(tmp_path / "trained" / "README.md")
    assert (metadata["license"], metadata["language"], metadata["base_model"]) == ("mit", ["de"], "org/source")
    assert "[org/source](https://huggingface.co/org/source)" in (tmp_path / "trained" / "README.md").read_text()


def test_the_base_model_is_the_repository_a_model_came_from(tmp_path):
    model = DepthAttnForSequenceClassification(both_config(num_labels=1))
    model.config.name_or_path = "org/retrofitted"
    model.add_model_tags(["trl", "reward-trainer"])
    model.save_pretrained(tmp_path)
    metadata = metadata_of(tmp_path / "README.md")
    assert metadata["base_model"] == "org/retrofitted" and metadata["base_model_relation"] == "finetune"
    assert metadata["pipeline_tag"] == "text-classification" and "reward-trainer" in metadata["tags"]
    assert "AutoModelForSequenceClassification" in loading_lines(tmp_path / "README.md")


def test_a_card_that_is_there_stays(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    DepthAttnModel(both_config()).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_an_upload_replaces_the_empty_card_of_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", lambda *args, **kwargs: None)
    description = re.search(r'model_description = "(.+)"', inspect.getsource(create_and_tag_model_card))[1]
    model = DepthAttnForCausalLM(both_config())
    model.save_pretrained(tmp_path)
    data = ModelCardData(tags=["mine"], library_name="transformers")
    ModelCard.from_template(data, model_description=description).save(tmp_path / "README.md")
    model._upload_modified_files(tmp_path, "org/new-model", {})
    assert "mine" in metadata_of(tmp_path / "README.md")["tags"]
    assert 'AutoModelForCausalLM.from_pretrained("org/new-model", trust_remote_code=True)' in loading_lines(
        tmp_path / "README.md"
    )


def test_an_adapter_gets_neither_code_nor_card_of_a_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = DepthAttnForCausalLM(both_config())
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path)
    except (ImportError, ValueError) as error:
        if "version" not in str(error):
            raise
        pytest.skip(str(error))
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not code_in(tmp_path) and not (tmp_path / "README.md").exists()
