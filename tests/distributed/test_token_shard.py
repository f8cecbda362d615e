"""A depth state that is divided along tokens gives the logits, gradients and tokens of one process.

With two processes, see `test_two_processes.py`.
"""

import pytest
import torch
from process_groups import passed_checks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)


@pytest.mark.slow
def test_four_processes_compute_what_one_does(tmp_path):
    from token_shard_checks import OF_FOUR, QUICK

    names = [f"token_shard_checks:{name}" for name in (*QUICK, *OF_FOUR)]
    assert passed_checks(names, tmp_path, num_processes=4) == names


def test_models_without_depth_attention_are_refused():
    from tiny_hosts import tiny_stock_model

    from hf_depthattn.distributed.token_shard import shard_tokens

    with pytest.raises(ValueError, match="LlamaForCausalLM is not a model with depth attention"):
        shard_tokens(tiny_stock_model("llama"))


def test_a_parameter_sharded_within_its_layer_is_refused(process_group):
    """FSDP2 would replace the parameter at the forward of its own module, and the sum would be lost."""
    from torch.distributed.fsdp import fully_shard

    from hf_depthattn.summed_gradients import sums_gradients

    norm = torch.nn.LayerNorm(4)
    fully_shard(norm, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    message = "LayerNorm.weight: every process must have the whole parameter"
    with pytest.raises(RuntimeError, match=message), sums_gradients([norm], None):
        pass
