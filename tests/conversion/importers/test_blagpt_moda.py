"""The language model of MoDA's authors, against the logits of their code."""

import foreign_checkpoints
import moda_released
import pytest
import torch
from foreign_models import IDS, in_float64
from imports_of_checkpoints import check_refused, edit, load_complete, logits_in_float64
from safetensors.torch import load_file

from hf_depthattn.conversion.import_checkpoint import import_checkpoint


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_logits_are_those_of_the_released_code(compiled, tmp_path):
    source = foreign_checkpoints.blagpt(tmp_path / "source", bias=True, compiled=compiled)
    report = import_checkpoint(source, tmp_path / "out")
    assert (report.format, report.model_type) == ("blagpt-moda", "hy_v3")
    assert "apex" in report.notes[0] and len(report.dropped) == 3
    logits = logits_in_float64(tmp_path / "out", torch.tensor(moda_released.IDS))
    golden = torch.tensor(moda_released.LOGITS, dtype=torch.float64)
    assert torch.allclose(logits[0, [0, 3, 7], :4], golden, rtol=1e-12, atol=1e-12)
    assert logits.norm().item() == pytest.approx(moda_released.NORM, rel=1e-12)


def test_without_biases_the_host_is_qwen3_with_the_same_function(tmp_path):
    """Biases of zero are no biases."""
    without = foreign_checkpoints.blagpt(tmp_path / "without", bias=False)
    zero = foreign_checkpoints.blagpt(tmp_path / "zero", bias=True)
    tensors = load_file(zero / "model.safetensors")
    edit(zero, {name: torch.zeros_like(value) for name, value in tensors.items() if name.endswith(".bias")})
    assert import_checkpoint(without, tmp_path / "out").model_type == "qwen3"
    import_checkpoint(zero, tmp_path / "zero-out")
    ids = IDS % moda_released.VOCAB_SIZE
    with torch.no_grad():
        qwen3, hy_v3 = (
            in_float64(load_complete(tmp_path / name, dtype=torch.float64))(ids, use_cache=False).logits
            for name in ("out", "zero-out")
        )
    assert torch.allclose(qwen3, hy_v3, rtol=1e-12, atol=1e-12)


PROJECTION = "transformer.h.1.mlp.kv_proj.weight"
# label -> tensors, fields, what the message says
REFUSED = {
    "activation": ({}, {"activation": "polynorm"}, ["activation is 'polynorm'", "'swiglu'"]),
    "rotation": ({}, {"rope_variant": "simplified"}, ["rope_variant is 'simplified'", "'standard'"]),
    "norm": ({}, {"norm_layer": "dytnorm"}, ["norm_layer is 'dytnorm'"]),
    "soft capping": ({}, {"use_soft_logit_capping": True}, ["use_soft_logit_capping is True"]),
    "scale": ({}, {"attention_regularization": 0.1}, ["attention_regularization is 0.1"]),
    "untied": ({}, {"tie_embed_weights": False}, ["tie_embed_weights is False"]),
    "value residual": ({}, {"use_value_residual": True}, ["use_value_residual=True", "cannot be imported"]),
    "scaled logits": ({}, {"logit_scale": 0.5}, ["logit_scale=0.5", "cannot be imported"]),
    # The code has defaults for them, those of its largest model.
    **{f"no {name}": ({}, {name: None}, [f"{name} is None"]) for name in ("n_embd", "n_head", "n_kv_head", "n_layer")},
    "no projection": ({PROJECTION: None}, {}, [f"lacks the tensor '{PROJECTION}'"]),
    "a tensor too many": ({"transformer.h.1.res_w1": torch.ones(1)}, {}, ["transformer.h.1.res_w1"]),
    "biases that the config leaves out": ({}, {"bias": False}, [".bias"]),
}


@pytest.mark.parametrize("tensors, fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, tmp_path):
    source = foreign_checkpoints.blagpt(tmp_path / "source", bias=True)
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "source" / "state_step005100.pt").write_bytes(b"pickle")
    check_refused(tmp_path / "source", tmp_path / "out", "only a pickle (state_step005100.pt)", "docs/importing.md")
