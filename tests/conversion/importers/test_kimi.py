"""AttnRes under the names of Kimi K3, against a stock `kimi_linear` whose norms read the sources."""

import foreign_checkpoints
import pytest
import torch
from foreign_models import logits_with_reads
from imports_of_checkpoints import check_refused, edit, load_complete
from model_checks import relative_max_error
from tiny_hosts import ALL_HOSTS, random_ids, tiny_stock_model

from hf_depthattn.conversion.import_checkpoint import import_checkpoint

pytestmark = pytest.mark.skipif("kimi_linear" not in ALL_HOSTS, reason="transformers has no kimi_linear")


@pytest.fixture(scope="module")
def stock():
    return tiny_stock_model("kimi_linear")


@pytest.mark.parametrize("num_decoder_layers", [1, 2, 12])
def test_logits_are_those_of_its_layers_with_reads(num_decoder_layers, stock, tmp_path):
    source = foreign_checkpoints.kimi(tmp_path / "source", stock, attn_res_block_size=num_decoder_layers)
    report = import_checkpoint(source, tmp_path / "out")
    assert (report.format, report.model_type) == ("kimi", "kimi_linear")
    reads = list(foreign_checkpoints.kimi_reads(stock).values())
    query, key_norm = (torch.stack([value.flatten() for value in reads[start::2]]).float() for start in (0, 1))
    ids = random_ids(2, 9)
    expected = logits_with_reads(stock, query, key_norm, 2 * num_decoder_layers, ids)
    with torch.no_grad():
        found = load_complete(tmp_path / "out")(ids, use_cache=False).logits
    assert relative_max_error(found, expected) <= 1e-5
    assert relative_max_error(stock(ids, use_cache=False).logits, expected) > 1e-2


QUERY = "model.layers.1.self_attention_res_proj.weight"
# label -> tensors, fields, what the message says
REFUSED = {
    "Kimi K3": ({}, {"model_type": "kimi_k3"}, ["model_type 'kimi_k3'", "'kimi_linear'"]),
    "latent experts": ({}, {"routed_expert_hidden_size": 8}, ["routed_expert_hidden_size is 8"]),
    "gate": ({}, {"use_full_rank_gate": True}, ["use_full_rank_gate is True"]),
    "no size": ({}, {"attn_res_block_size": None}, ["attn_res_block_size is None"]),
    "no query": ({QUERY: None}, {}, [f"lacks the tensor '{QUERY}'"]),
    "a tensor too many": ({"model.layers.1.self_attn.g_proj.weight": torch.ones(2)}, {}, ["self_attn.g_proj"]),
}


@pytest.mark.parametrize("tensors, fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, stock, tmp_path):
    source = foreign_checkpoints.kimi(tmp_path / "source", stock)
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)
