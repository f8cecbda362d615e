"""The cards in `model_cards/`: their metadata is valid, and the template has what `save_pretrained` writes."""

import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from repository import ROOT
from transformers import LlamaConfig

from hf_depthattn import DepthAttnConfig
from hf_depthattn.model_card import write_missing_card

FOLDER = ROOT / "model_cards"
FIELDS = (FOLDER / "README.md").read_text(encoding="utf-8")
CARDS = sorted(path.name for path in FOLDER.glob("*.md") if path.name != "README.md")


def card(name: str) -> ModelCard:
    return ModelCard.load(FOLDER / name, ignore_metadata_errors=False)


@pytest.mark.parametrize("name", CARDS)
def test_metadata_is_what_huggingface_hub_writes_and_is_explained(name):
    metadata = card(name).data.to_dict()
    assert (
        ModelCardData(**metadata).to_yaml() == (FOLDER / name).read_text(encoding="utf-8").split("---\n")[1].rstrip()
    )
    for field in metadata:
        assert f"`{field}`" in FIELDS, field
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert f"({name})" in FIELDS


def test_the_template_has_what_is_written_for_such_a_model(tmp_path):
    config = DepthAttnConfig.attn_res(LlamaConfig(), num_blocks=None, sublayers_per_block=6, read_scale="sum")
    config.name_or_path = "owner/base-model"
    write_missing_card(tmp_path, config, depth_class="DepthAttnForCausalLM", name="owner/name")
    written, template = ModelCard.load(tmp_path / "README.md"), card("template.md")
    for field, value in written.data.to_dict().items():
        assert template.data.get(field) == value, field
    # Paragraphs between the title with its sentence and the parts to fill in.
    for part in re.split(r"\n\n+", written.text.strip())[2:]:
        assert part in template.text, part
