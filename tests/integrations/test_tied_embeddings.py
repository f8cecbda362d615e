"""PEFT sees which embeddings are tied, as on the stock host: the two training runs and what is saved are the same."""

import copy
import warnings

import pytest
import torch
from model_checks import depth_model
from tiny_hosts import ALL_HOSTS, random_ids, tiny_host_config, tiny_stock_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_depthattn import (
    DepthAttnConfig,
    DepthAttnForCausalLM,
    DepthAttnForQuestionAnswering,
    DepthAttnForSequenceClassification,
    DepthAttnForTokenClassification,
    DepthAttnModel,
)

peft = pytest.importorskip("peft")

# Exactly the host's function, so that its losses can be compared.
FIELDS = {"num_blocks": 2, "read_scale": "sum", "depth_kv": "attention+mlp", "depth_gate": "head"}
TRAINED = {
    "token indices": {"trainable_token_indices": [5, 6, 7]},
    "token indices, tied": {"trainable_token_indices": [5, 6, 7], "ensure_weight_tying": True},
    "embedding, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on the embedding, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "LoRA on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
CLASSES = {
    DepthAttnModel: AutoModel,
    DepthAttnForCausalLM: AutoModelForCausalLM,
    DepthAttnForSequenceClassification: AutoModelForSequenceClassification,
    DepthAttnForTokenClassification: AutoModelForTokenClassification,
    DepthAttnForQuestionAnswering: AutoModelForQuestionAnswering,
}


def stock_and_depth_model(model_type: str, is_tied: bool):
    """Two models of one function, each with a config of its own, since PEFT writes into it."""
    torch.manual_seed(0)
    stock = tiny_stock_model(model_type, tie_word_embeddings=is_tied)
    source = copy.deepcopy(stock)
    source.config = copy.deepcopy(stock.config)
    return stock, depth_model(source, **FIELDS)


def trained_and_merged(model, ids, **kwargs):
    """Losses of three steps, after them, and after merging; the merged model; whether PEFT has said that it untied."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **copy.deepcopy(kwargs)})
        adapted = peft.get_peft_model(model, config).train()
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.3)
        losses = []
        for _ in range(3):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with torch.no_grad():
            losses.append(adapted.eval()(input_ids=ids, labels=ids).loss.item())
            merged = adapted.merge_and_unload()
            losses.append(merged(input_ids=ids, labels=ids).loss.item())
    return losses, merged, any("no longer tied" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe"])
def test_training_and_merging_give_what_the_stock_host_gives(model_type, is_tied, trained, tmp_path):
    stock, model = stock_and_depth_model(model_type, is_tied)
    ids = random_ids(2, 11)
    expected, merged_stock, says_untied = trained_and_merged(stock, ids, **TRAINED[trained])
    losses, merged, says_so_too = trained_and_merged(model, ids, **TRAINED[trained])
    # Also where PEFT itself loses something: LoRA on both of two tied matrices.
    assert losses == pytest.approx(expected, rel=1e-4)
    assert says_so_too == says_untied
    is_still_tied = merged_stock.config.tie_word_embeddings
    assert merged.config.tie_word_embeddings == is_still_tied
    assert merged.config.to_dict()["tie_word_embeddings"] == is_still_tied
    shares = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert shares == (merged_stock.get_input_embeddings().weight is merged_stock.get_output_embeddings().weight)
    merged.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert reloaded.eval()(input_ids=ids, labels=ids).loss.item() == pytest.approx(losses[-1], rel=1e-6)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", [name for name in ALL_HOSTS if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
def test_every_class_says_what_is_tied_as_the_hosts_class_does(model_type, is_tied):
    host_config = tiny_host_config(model_type)
    host_config.tie_word_embeddings = is_tied
    for own_class, auto_class in CLASSES.items():
        if type(host_config) not in auto_class._model_mapping:
            continue
        stock = auto_class.from_config(copy.deepcopy(host_config))
        model = own_class(DepthAttnConfig(text_config=copy.deepcopy(host_config), num_blocks=2))
        assert (model._tied_weights_keys or {}) == (stock._tied_weights_keys or {})
        assert model.all_tied_weights_keys == stock.all_tied_weights_keys
        assert model.config.tie_word_embeddings == model.config.to_dict()["tie_word_embeddings"] == is_tied
        assert DepthAttnConfig(**model.config.to_dict()).tie_word_embeddings == is_tied
        named_by_peft, expected = map(peft.utils.other._get_module_names_tied_with_embedding, (model, stock))
        assert named_by_peft == expected
