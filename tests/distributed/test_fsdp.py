"""FSDP2 in one gloo process: sharded layers train, and a sharded model saves a checkpoint that loads anywhere."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from connection_cases import CASES, random_case
from process_groups import free_port
from processes import run_python
from repository import ROOT
from tiny_hosts import random_ids
from training_models import DECAY, LR, OPTIMIZERS, backward, small_model

from hf_depthattn import depth_param_groups
from hf_depthattn.integrations.trainer import (
    MuonWithAdamW,
    is_depth_name,
    is_projection_name,
    muon_param_groups,
)

_SHARD_TRAIN_SAVE = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/support"]
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from model_checks import depth_model, randomise_depth
from tiny_hosts import random_ids, tiny_stock_model

dist.init_process_group("gloo", rank=0, world_size=1)
fields = {"sublayers_per_block": 2}
if "moda" in sys.argv[3]:
    fields |= {"depth_kv": "attention+mlp", "depth_gate": "head", "value_residual": True}
    fields |= {"depth_kv_bias": True, "depth_slots": [[], [0, 1], [1, 2]]}
model = depth_model(tiny_stock_model("llama"), **fields).train()
randomise_depth(model)
ids = random_ids(2, 9)
if "checkpointed" in sys.argv[3]:
    model.gradient_checkpointing_enable()
loss = model(ids, labels=ids, use_cache=False).loss
loss.backward()
expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
model.zero_grad()
mesh = torch.distributed.init_device_mesh("cpu", (1,))
if "sites-apart" in sys.argv[3]:
    # In half precision transformers gives every module that stays in float32 a group of its own, which frees the
    # module's parameters as soon as its forward is over.
    for name, module in reversed(list(model.named_modules())):
        if name.endswith(("_depth", "depth_reads", "attn_depth_kv", "value_residual")):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert type(model).__name__ == "FSDPDepthAttnForCausalLM", type(model)
sharded_loss = model(ids, labels=ids, use_cache=False).loss
sharded_loss.backward()
torch.testing.assert_close(sharded_loss, loss)
for name, parameter in model.named_parameters():
    torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-5, atol=1e-7)
model.eval()
with torch.no_grad():
    logits = model(ids, use_cache=False).logits
model.save_pretrained(sys.argv[2])
torch.save({"ids": ids, "logits": logits}, sys.argv[2] + "/expected.pt")
dist.destroy_process_group()
print("ok")
"""

_LOAD = """
import sys
sys.modules["hf_depthattn"] = None
import torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
expected = torch.load(sys.argv[1] + "/expected.pt", weights_only=True)
with torch.no_grad():
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
print("ok")
"""


def run(code: str, *arguments: str, home: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = run_python("-c", code, *arguments, cwd=home, HF_HOME=str(home), **address)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip().endswith("ok")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize(
    "variant",
    [
        "moda-sites-apart",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("plain", "checkpointed", "sites-apart", "moda", "moda-checkpointed")
        ),
    ],
)
def test_fsdp2_layers_train_and_save_a_checkpoint_that_loads_without_the_package(tmp_path, variant):
    run(_SHARD_TRAIN_SAVE, str(ROOT), str(tmp_path / "saved"), variant, home=tmp_path)
    run(_LOAD, str(tmp_path / "saved"), home=tmp_path)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layers-only"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_fsdp2_trains_as_the_plain_model(process_group, kind, whole):
    from torch.distributed.fsdp import fully_shard

    def optimizer_of(instance):
        if kind == "muon":
            return MuonWithAdamW(muon_param_groups(instance, lr=LR, weight_decay=DECAY), lr=LR)
        # With sharded layers only, some parameters are on a mesh and some are not: one kernel cannot take both.
        return torch.optim.AdamW(depth_param_groups(instance, lr=LR, weight_decay=DECAY), foreach=True)

    plain, ids = small_model(), random_ids(2, 11)
    sharded = copy.deepcopy(plain)
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in sharded.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    if whole:
        fully_shard(sharded, mesh=mesh)
    for model in (plain, sharded):
        optimizer = optimizer_of(model)
        for _ in range(2):
            optimizer.zero_grad()
            backward(model, ids)
            optimizer.step()
    trained = dict(sharded.named_parameters())
    for name, parameter in plain.named_parameters():
        actual = trained[name].full_tensor() if hasattr(trained[name], "full_tensor") else trained[name].data
        torch.testing.assert_close(actual, parameter.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sites_apart", [False, True], ids=["layers", "sites-apart"])
@pytest.mark.parametrize("case", CASES)
def test_fsdp2_keeps_the_gradients_of_every_connection(process_group, case, sites_apart):
    from torch.distributed.fsdp import fully_shard

    plain, ids = random_case(case), random_ids(2, 9)
    sharded, mesh = copy.deepcopy(plain), dist.init_device_mesh("cpu", (1,))
    if sites_apart:
        # As transformers does in half precision: every module with float32 parameters of its own, freed after use.
        for name, module in reversed(list(sharded.named_modules())):
            if is_depth_name(name) and not is_projection_name(name) and list(module.parameters(recurse=False)):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for layer in sharded.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    backward(plain, ids)
    backward(sharded, ids)
    found = dict(sharded.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name].grad.full_tensor(), parameter.grad, rtol=1e-5, atol=1e-7)
