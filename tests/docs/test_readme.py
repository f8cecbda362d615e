"""README.md is short; the demo's model is small, and the committed model card is what `retrofit` writes."""

import re

from huggingface_hub import ModelCard
from repository import ROOT

from hf_depthattn import retrofit

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEMO_MODEL = ROOT / "examples" / "demo_model" / "checkpoint"


def test_readme_is_short_and_has_a_start_for_both_life_cycles():
    assert len(README.splitlines()) <= 160
    from_scratch, from_checkpoint = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "DepthAttnConfig.attn_res(" in from_scratch and "retrofit(" in from_checkpoint
    assert all(len(code.splitlines()) <= 10 for code in (from_scratch, from_checkpoint))


def test_demo_model_is_small():
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 2_000_000


def test_committed_model_card_is_what_retrofit_writes(tmp_path):
    retrofit(DEMO_MODEL, tmp_path / "demo-attn-res", num_blocks=8)
    card = (tmp_path / "demo-attn-res" / "README.md").read_text(encoding="utf-8")
    assert card == (ROOT / "model_cards" / "demo-attn-res.md").read_text(encoding="utf-8")
    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == "transformers"
    assert "custom_code" in data["tags"]
    assert "[More Information Needed]" not in card
