"""A depth state that is divided along tokens gives the logits, gradients and tokens of one process."""

import pytest
import torch
from process_groups import passed_checks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch is built without torch.distributed"
)
if torch.distributed.is_available():
    from token_shard_checks import CHECKS, CHECKS_OF_FOUR, MORE_CHECKS
else:
    CHECKS = CHECKS_OF_FOUR = MORE_CHECKS = {}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[str]:
    return passed_checks("token_shard_checks.py", [*CHECKS], tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_more(tmp_path_factory) -> list[str]:
    return passed_checks("token_shard_checks.py", [*MORE_CHECKS], tmp_path_factory.mktemp("more"))


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> list[str]:
    names = [*CHECKS, *CHECKS_OF_FOUR]
    return passed_checks("token_shard_checks.py", names, tmp_path_factory.mktemp("four"), num_processes=4)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_compute_what_one_does(two, name):
    assert name in two


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_CHECKS)
def test_two_processes_compute_what_one_does_on_further_models(two_more, name):
    assert name in two_more


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CHECKS, *CHECKS_OF_FOUR])
def test_four_processes_compute_what_one_does(four, name):
    assert name in four


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
