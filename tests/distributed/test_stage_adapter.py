"""Adapters in stages that cannot be trained or saved; `support/checkpoint_processes.py` trains and saves one."""

import needs_stage_interface  # noqa: F401
import pytest
from tiny_hosts import tiny_host_config

from hf_depthattn import DepthAttnConfig
from hf_depthattn.distributed.pipeline import build_pipeline
from hf_depthattn.distributed.stage_checkpoint import save_pipeline
from hf_depthattn.errors import UserError

peft = pytest.importorskip("peft")


def adapted_pipeline(*adapters, **host_fields):
    config = DepthAttnConfig(text_config=tiny_host_config("llama", **host_fields), sublayers_per_block=1)

    def adapt(model):
        for number, modules in enumerate(adapters):
            peft.inject_adapter_in_model(peft.LoraConfig(target_modules=modules), model, adapter_name=f"lora_{number}")
        return model

    return build_pipeline(config, "LoopedBFS", num_microbatches=2, device="cpu", stages_per_rank=2, parallelize=adapt)


def test_adapters_of_tied_embeddings_are_refused(process_group):
    """The first and the last stage would train different ones."""
    with pytest.raises(ValueError, match=r"adds an adapter to model\.embed_tokens\.weight, which several stages"):
        adapted_pipeline(["embed_tokens"], tie_word_embeddings=True)


def test_several_adapters_are_not_saved_as_one(process_group, tmp_path):
    pipeline = adapted_pipeline(["q_proj"], ["v_proj"])
    with pytest.raises(UserError, match="adapters lora_0, lora_1: a pipeline is saved with one adapter"):
        save_pipeline(pipeline, tmp_path / "model")
    assert not (tmp_path / "model").exists()
