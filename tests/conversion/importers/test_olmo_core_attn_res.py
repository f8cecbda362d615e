"""AttnRes of OLMo-core, against a float64 oracle."""

import math

import foreign_checkpoints
import pytest
import torch
from foreign_models import ForeignModel
from imports_of_checkpoints import check_golden, check_import, check_refused, edit, logits_in_float64
from model_checks import relative_max_error

from hf_depthattn import DepthAttnConfig
from hf_depthattn.conversion.import_checkpoint import import_checkpoint

# The kernel of the library has the epsilon 1e-5; only the first norm and those of queries and keys have the config's.
EPS = {"first": 1e-6, "block": 1e-5, "final": 1e-5, "read": 1e-5, "qk": 1e-6}
# label -> fields of the model, host, first logits of the last token
CASES = {
    "block": ({"sublayers_per_block": 4}, "llama", [-1.06113334698, -0.896150091059, -0.408635681021]),
    # Embeddings as small as at initialisation, where the first epsilon matters.
    "small embeddings": (
        {"sublayers_per_block": 2, "embedding_scale": 0.002},
        "llama",
        [0.684166531803, 0.566412009708, 0.763388359512],
    ),
    "full": ({"sublayers_per_block": 1, "qk_norm": True}, "qwen3", [-3.0293493949, -1.10140664843, 1.56178151883]),
}


@pytest.mark.parametrize("fields, host, golden", CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_the_oracle(fields, host, golden, tmp_path):
    model = ForeignModel(eps=EPS, **fields)
    check_golden(model.logits(), golden)
    report = check_import(foreign_checkpoints.olmo_core(tmp_path / "source", model), model)
    assert (report.format, report.model_type) == ("olmo-core-attn-res", host)
    assert report.notes == ("config.json names the tokenizer 'someone/tokenizer'",)
    config = DepthAttnConfig.from_pretrained(tmp_path / "imported")
    assert (config.text_config.eos_token_id, config.text_config.max_position_embeddings) == (2, 64)


def test_without_the_epsilon_of_the_first_norm_logits_differ(tmp_path):
    """The trap that `norm_eps_overrides` is for."""
    model = ForeignModel(eps=EPS, sublayers_per_block=2, embedding_scale=0.002)
    import_checkpoint(foreign_checkpoints.olmo_core(tmp_path / "source", model), tmp_path / "out")
    edit(tmp_path / "out", norm_eps_overrides=None)
    assert relative_max_error(logits_in_float64(tmp_path / "out"), model.logits()) > 1e-2


def test_scales_of_logits_are_folded_into_the_queries(tmp_path):
    model = ForeignModel(eps=EPS, sublayers_per_block=4)
    plain, scaled = (foreign_checkpoints.olmo_core(tmp_path / name, model) for name in ("plain", "scaled"))
    names = [f"blocks.{site // 2}.{'mlp_' if site % 2 else ''}attnres_logit_scale" for site in range(6)]
    scales = dict.fromkeys([*names, "final_attnres_logit_scale"], torch.tensor([math.log(2.0)]))
    edit(scaled, scales, model__block__attnres_learn_logit_scale=True)
    doubled = {
        f"{name}proj.weight": 2 * model.tensor(f"query.{site}")[None]
        for site, name in enumerate(
            [f"blocks.{site // 2}.{'mlp' if site % 2 else 'attn'}_res_" for site in range(6)] + ["res_"]
        )
        if site > 0
    }
    edit(plain, doubled)
    for source in (plain, scaled):
        import_checkpoint(source, tmp_path / f"{source.name}-out")
    folded, expected = (logits_in_float64(tmp_path / f"{name}-out") for name in ("scaled", "plain"))
    # The factors are rounded to float32.
    assert relative_max_error(folded, expected) <= 1e-6
    assert relative_max_error(folded, model.logits()) > 1e-2


def test_blocks_of_older_versions_are_recognised_by_their_size_and_queries(tmp_path):
    model = ForeignModel(eps=EPS, sublayers_per_block=2)
    source = foreign_checkpoints.olmo_core(tmp_path / "source", model)
    edit(source, model__block__name="default")
    assert check_import(source, model).format == "olmo-core-attn-res"
    edit(source, model__block__attnres_block_size=None)
    check_refused(source, tmp_path / "out", "model.block.name is 'default'", "'attnres'")


# label -> tensors, fields, what the message says
REFUSED = {
    **{
        f"block {name}": ({}, {"model__block__name": name}, [f"model.block.name is '{name}'", "'attnres'"])
        for name in ("hc", "mhc", "keel", "deepnorm", "default_scaled", "peri_norm")
    },
    "another block": (
        {},
        {"model__block_overrides": {"2": {"name": "default"}}},
        ["model.block_overrides", "all alike"],
    ),
    "pattern": ({}, {"model__block_pattern": ["a", "b"]}, ["model.block_pattern"]),
    "scaled embeddings": ({}, {"model__embed_scale": 2.0}, ["model.embed_scale=2.0"]),
    "norm of embeddings": ({}, {"model__embedding_norm": {"name": "rms"}}, ["model.embedding_norm"]),
    "gate": ({}, {"model__block__sequence_mixer__gate": {"granularity": "headwise"}}, ["sequence_mixer.gate"]),
    "clipping": ({}, {"model__block__sequence_mixer__clip_qkv": 8.0}, ["sequence_mixer.clip_qkv=8.0"]),
    "window": ({}, {"model__block__sequence_mixer__sliding_window": {"pattern": [1]}}, ["sliding_window"]),
    "scaled rotation": ({}, {"model__block__sequence_mixer__rope__scaling": {"factor": 2}}, ["rope.scaling"]),
    "partial rotation": (
        {},
        {"model__block__sequence_mixer__rope__partial_rotary_factor": 0.5},
        ["rope.partial_rotary_factor is 0.5", "1"],
    ),
    "rotation in some layers": (
        {},
        {"model__block__sequence_mixer__rope__no_global_rope": True},
        ["rope.no_global_rope=True"],
    ),
    "no attention": (
        {},
        {"model__block__sequence_mixer__type": "gated_delta_net"},
        ["sequence_mixer.type is 'gated_delta_net'", "'attention'"],
    ),
    "no rotation": ({}, {"model__block__sequence_mixer__rope": None}, ["sequence_mixer.rope is None"]),
    "complex rotation": ({}, {"model__block__sequence_mixer__rope__name": "complex"}, ["'complex'", "'default'"]),
    "layer norm": ({}, {"model__block__layer_norm__name": "default"}, ["layer_norm.name is 'default'", "'rms'"]),
    "norm without a name": (
        {},
        {"model__block__layer_norm": {"eps": 1e-5}},
        ["layer_norm.name is None", "'rms' or 'fused_rms'"],
    ),
    "no final norm": ({}, {"model__lm_head__layer_norm": None}, ["lm_head.layer_norm.name is None"]),
    "tied head": ({}, {"model__tie_word_embeddings": True}, ["model.tie_word_embeddings=True"]),
    "norm over all heads": (
        {},
        {"model__block__sequence_mixer__qk_norm": {"name": "rms"}},
        ["use_head_qk_norm is False", "norms of single heads"],
    ),
    "scaled residual": ({}, {"model__block__attention_residual_alpha": 0.5}, ["attention_residual_alpha is 0.5"]),
    "bias of scores": ({}, {"model__block__attnres_use_bias": True}, ["attnres_use_bias is True"]),
    "top k": ({}, {"model__block__attnres_topk_fraction": 0.5}, ["attnres_topk_fraction is 0.5"]),
    "bias": ({"blocks.1.attention.w_q.bias": torch.ones(24)}, {}, ["layers.1.self_attn.q_proj.bias"]),
    "no scale of logits": (
        {},
        {"model__block__attnres_learn_logit_scale": True},
        ["lacks the tensor 'blocks.0.mlp_attnres_logit_scale'"],
    ),
    "no query": ({"res_proj.weight": None}, {}, ["lacks the tensor 'res_proj.weight'"]),
}


@pytest.mark.parametrize("tensors, fields, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_expressed_is_refused_in_one_line(tensors, fields, words, tmp_path):
    source = foreign_checkpoints.olmo_core(tmp_path / "source", ForeignModel(eps=EPS, sublayers_per_block=4))
    check_refused(edit(source, tensors, **fields), tmp_path / "out", *words)


def test_a_distributed_checkpoint_is_refused_with_the_command_that_converts_it(tmp_path):
    (tmp_path / "source" / "model_and_optim").mkdir(parents=True)
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "source" / "model_and_optim" / ".metadata").write_bytes(b"pickle")
    check_refused(tmp_path / "source", tmp_path / "out", "unshard_checkpoint", "use_safetensors=True", "config.json")
