"""Models, adapters and configs on a stand-in of the Hub: what is pushed loads where this package is missing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from local_hub import PART_SIZE, LocalHub, local_hub
from processes import run_python
from repository import ROOT, SUPPORT

from hf_depthattn.remote_code import AUTO_MAP

pytest.importorskip("peft")

# Runs where `import hf_depthattn` fails, with an empty cache.
_PULL = """
import sys
sys.modules["hf_depthattn"] = None
from pathlib import Path
import peft, torch, transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
transformers.logging.set_verbosity_error()
reference = load_file(sys.argv[1])

def check(name, model):
    with torch.no_grad():
        assert torch.allclose(model.eval()(reference["ids"], use_cache=False).logits, reference[name], atol=1e-5), name

def load(repository, **revisions):
    return AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, **revisions)

model = load("user/depth", revision="v1")
assert type(model).__module__.startswith("transformers_modules."), type(model)
check("first", model)
check("adapter", peft.PeftModel.from_pretrained(model, "user/adapter"))
# The weights of the second version run with the code of the first; its own code fails.
check("second", load("user/depth", code_revision="v1"))
try:
    load("user/depth")
except ImportError as error:
    assert "a later version" in str(error)
else:
    raise AssertionError("the code of the second version did not run")
check("trained", load("user/trained"))
# A config alone brings only some files; the others are fetched when it is saved.
AutoConfig.from_pretrained("user/config", trust_remote_code=True).save_pretrained("config")
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("config", trust_remote_code=True), trust_remote_code=True)
# The code in the card.
card = Path(hf_hub_download("user/retrofitted", "README.md")).read_text()
names = {}
exec(card.split("```python")[1].split("```")[0], names)
check("retrofitted", names["model"])
assert names["tokenizer"]("ab").input_ids
print("ok")
"""


class Published(NamedTuple):
    """The stand-in, and the folder of the process that pushed to it."""

    hub: LocalHub
    folder: Path

    def metadata(self, repository: str) -> dict:
        return yaml.safe_load(self.hub.text(repository, "README.md").split("---\n")[1])


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("publisher")
    with local_hub() as hub:
        environment = hub.environment(folder / "home")
        result = run_python(
            str(SUPPORT / "hub_publisher.py"), str(folder), cwd=folder, python_path=str(ROOT), **environment
        )
        assert result.returncode == 0, result.stderr[-3000:]
        yield Published(hub, folder)


def test_what_is_pushed_loads_without_the_package(published, tmp_path):
    reference = str(published.folder / "reference.safetensors")
    result = run_python("-c", _PULL, reference, cwd=tmp_path, **published.hub.environment(tmp_path / "home"))
    assert result.stdout.strip().endswith("ok"), result.stderr[-3000:]
    assert json.loads((tmp_path / "config" / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_weights_are_uploaded_as_large_files_and_only_once(published):
    files = published.hub.repository("user/depth").files()
    weights = files["model.safetensors"]
    assert weights.is_large and len(weights.content) > PART_SIZE
    uploads = [path for method, path in published.hub.requests if method == "PUT" and weights.oid in path]
    assert len(uploads) == -(-len(weights.content) // PART_SIZE), "in parts, each once"
    # Small enough for one piece, and the same file in both repositories of adapters would be stored once.
    adapter = published.hub.repository("user/adapter").files()["adapter_model.safetensors"]
    assert adapter.is_large and ("PUT", f"/objects/{adapter.oid}") in published.hub.requests


@pytest.mark.parametrize("repository", ["depth", "trained", "retrofitted"])
def test_every_pushed_model_has_its_code_and_tags(published, repository):
    repository = f"user/{repository}"
    files = published.hub.repository(repository).files()
    assert {f"{name.partition('.')[0]}.py" for name in AUTO_MAP.values()} <= set(files)
    metadata = published.metadata(repository)
    assert metadata["library_name"] == "transformers"
    assert {"custom_code", "hf-depthattn", "attention-residuals"} <= set(metadata["tags"])


def test_tags_and_card_survive_the_next_push(published):
    metadata = published.metadata("user/depth")
    assert {"mine", "mixture-of-depths-attention"} <= set(metadata["tags"])
    assert len(metadata["tags"]) == len(set(metadata["tags"]))
    assert 'from_pretrained("user/depth", trust_remote_code=True)' in published.hub.text("user/depth", "README.md")
    assert "generated_from_trainer" in published.metadata("user/trained")["tags"]


def test_a_retrofit_is_pushed_as_it_was_written(published):
    files = published.hub.repository("user/retrofitted").files()
    local = {path.name: path.read_bytes() for path in (published.folder / "retrofitted").iterdir()}
    assert {name: file.content for name, file in files.items() if name != ".gitattributes"} == local
    again = published.hub.repository("user/again")
    assert again.is_private and {name: file.content for name, file in again.files().items()} == {
        name: file.content for name, file in files.items()
    }
    metadata = published.metadata("user/retrofitted")
    assert (metadata["license"], metadata["language"]) == ("mit", ["de"])
    assert "gguf" not in metadata["tags"], "the formats of the source are not those of the retrofit"
    card = files["README.md"].content.decode()
    assert re.findall(r'from_pretrained\("(.+?)"', card) == ["user/retrofitted"] * 2
    assert "depthattn verify SOURCE retrofitted" in card


@pytest.mark.parametrize("repository", ["adapter", "adapter-of-transformers"])
def test_adapters_are_pushed_without_model_code(published, repository):
    if f"user/{repository}" not in published.hub.repositories:
        pytest.skip("this transformers wants a newer PEFT")
    files = set(published.hub.repository(f"user/{repository}").files())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not [name for name in files if name.endswith(".py")]
    config = json.loads(published.hub.text(f"user/{repository}", "adapter_config.json"))
    assert config["base_model_name_or_path"] == "user/depth"
