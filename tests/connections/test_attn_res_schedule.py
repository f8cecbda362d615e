"""Grouped reads compute the same function as single ones, wherever a group opens or ends."""

import copy
import json

import pytest
import torch
from depth_forms import random_model
from tiny_hosts import random_ids, tiny_host_config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM, attn_res_connection
from hf_depthattn.attn_res_reads import DepthReads, read_weights
from hf_depthattn.attn_res_schedule import ReadGroup, last_site_of_group, uses_groups
from hf_depthattn.depth_connections import depth_site
from hf_depthattn.depth_options import AttnResSchedule
from hf_depthattn.depth_state import Carried

NUM_LAYERS = 5
SIZES = [1, 2, 3, 5]
every_size = pytest.mark.parametrize("size", SIZES)


def config_of(size: int, **fields) -> DepthAttnConfig:
    host = tiny_host_config("llama", num_hidden_layers=NUM_LAYERS)
    return DepthAttnConfig(text_config=host, sublayers_per_block=size, **fields)


def model_of(size: int, **fields) -> DepthAttnForCausalLM:
    """Build a float64 model with random depth parameters in training mode."""
    torch.manual_seed(0)
    host_fields = {"num_hidden_layers": NUM_LAYERS}
    return random_model(host_fields=host_fields, sublayers_per_block=size, **fields).double().train()


def results(model: DepthAttnForCausalLM, schedule: str, ids: Tensor) -> dict[str, Tensor]:
    """Return the logits and all gradients of one training step."""
    model.config.attn_res_schedule = schedule
    model.zero_grad(set_to_none=True)
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_equal_results(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, rtol=1e-10, atol=1e-14), name


@pytest.fixture
def grouped_reads(monkeypatch) -> dict[str, list[int]]:
    """Calls of the two ops of grouped reads: the number of reads in phase 1, of newer sources in phase 2."""
    calls: dict[str, list[int]] = {"phase1": [], "phase2": []}
    phase1, phase2 = attn_res_connection.attn_res_phase1, attn_res_connection.attn_res_phase2

    def counting_phase1(sources, score_weights, **kwargs):
        calls["phase1"].append(len(score_weights))
        return phase1(sources, score_weights, **kwargs)

    def counting_phase2(inputs, **kwargs):
        calls["phase2"].append(len(inputs.sources))
        return phase2(inputs, **kwargs)

    monkeypatch.setattr(attn_res_connection, "attn_res_phase1", counting_phase1)
    monkeypatch.setattr(attn_res_connection, "attn_res_phase2", counting_phase2)
    return calls


@pytest.mark.parametrize("moda", [{}, {"depth_kv": "attention+mlp", "depth_gate": "head"}], ids=["attn_res", "both"])
@pytest.mark.parametrize("read_scale", ["mean", "sum"])
@every_size
def test_all_schedules_compute_the_same_function(size, read_scale, moda, grouped_reads):
    model, ids = model_of(size, read_scale=read_scale, **moda), random_ids(2, 7)
    single = results(model, "single", ids)
    assert not grouped_reads["phase2"]
    grouped = results(model, "grouped", ids)
    assert grouped_reads["phase1"] and grouped_reads["phase2"]
    assert_equal_results(grouped, single)
    for name, tensor in results(model, "auto", ids).items():
        assert torch.equal(tensor, grouped[name]), name
    assert_equal_results(results(model, "layer", ids), single)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [3, 3, 3, 3, 7, 7, 7, 7, 10, 10, 10]),
        (2, [3, 3, 3, 3, 7, 7, 7, 7, 10, 10, 10]),
        (3, [5, 5, 5, 5, 5, 5, 10, 10, 10, 10, 10]),
        (4, [3, 3, 3, 3, 7, 7, 7, 7, 10, 10, 10]),
        (5, [4, 4, 4, 4, 4, 10, 10, 10, 10, 10, 10]),
        (8, [7, 7, 7, 7, 7, 7, 7, 7, 10, 10, 10]),
    ],
)
def test_groups_are_blocks_or_several_small_blocks(size, expected):
    config = config_of(size)
    assert [last_site_of_group(config, site) for site in range(config.num_sublayers + 1)] == expected


def test_the_output_site_reads_alone_after_a_block_of_16():
    host = tiny_host_config("llama", num_hidden_layers=16)
    for size, expected in ((16, [15] * 16 + [31] * 16 + [32]), (15, [14] * 15 + [29] * 15 + [32] * 3)):
        config = DepthAttnConfig(text_config=host, sublayers_per_block=size)
        assert [last_site_of_group(config, site) for site in range(33)] == expected


def test_the_automatic_schedule_reads_alone_only_when_a_gpu_decodes():
    # The meta device stands for any that is not the CPU.
    one, two = (torch.empty(1, length, 8, device="meta") for length in (1, 2))
    assert uses_groups("auto", one) and uses_groups("auto", two)
    with torch.no_grad():
        assert not uses_groups("auto", one)
        assert uses_groups("auto", two) and uses_groups("auto", torch.empty(1, 1, 8))
        assert uses_groups("grouped", one) and not uses_groups("single", two)


@pytest.mark.parametrize("opened", range(1, 2 * NUM_LAYERS + 1))
@every_size
def test_a_group_can_open_at_any_site(size, opened):
    """Also within a block, and with the output of the last sublayer not yet added."""
    torch.manual_seed(0)
    config = config_of(size, read_scale="sum")
    sites = [depth_site(config, site) for site in range(config.num_sublayers + 1)]
    reads = DepthReads(config).double()
    nn.init.normal_(reads.query)
    sublayers = nn.ModuleList(nn.Linear(32, 32) for _ in range(config.num_sublayers)).double()
    embeddings = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    wanted = [embeddings, *reads.parameters(), *sublayers.parameters()]
    found = []
    for schedule in ("grouped", "single"):
        weights, state = read_weights(reads, schedule), sites[0].begin(embeddings)
        for site, sublayer in zip(sites, sublayers, strict=False):
            if site.site == opened:
                state = state.settled()
                assert state.group is None and state.update is None
            h, state, _ = site(state, weights)
            state = site.write(state, sublayer(h).tanh())
        h, _, _ = sites[-1](state.settled() if opened == sites[-1].site else state, weights)
        found.append([h, *torch.autograd.grad(h.square().sum(), wanted)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("skipped", [[1], [2], [3], [1, 2], [1, 3]])
@every_size
def test_layers_can_be_skipped(size, skipped, grouped_reads):
    """The reads of a group are found by site, so one that does not take place changes no other."""
    model, ids = model_of(size), random_ids(2, 7)
    for index in skipped:
        model.model.layers[index].forward = lambda hidden_states, **kwargs: hidden_states
    single = results(model, "single", ids)
    assert not grouped_reads["phase2"]
    assert_equal_results(results(model, "grouped", ids), single)
    assert grouped_reads["phase2"]


@pytest.mark.parametrize("checkpointed", [[0], [1], [2], [4], [0, 1], [1, 3], [0, 1, 2, 3, 4]])
@every_size
def test_some_layers_can_be_checkpointed(size, checkpointed, grouped_reads):
    model, ids = model_of(size), random_ids(2, 7)
    expected = results(model, "single", ids)
    model.gradient_checkpointing_enable()
    for index, layer in enumerate(model.model.layers):
        layer.gradient_checkpointing = index in checkpointed
    states = {}
    for index, layer in enumerate(model.model.layers[:-1]):
        layer.register_forward_hook(lambda layer, args, state, index=index: states.setdefault(index, state))
    assert_equal_results(results(model, "grouped", ids), expected)
    assert grouped_reads["phase2"]
    # What a checkpoint keeps must not grow by the results of a group.
    for index, state in states.items():
        assert index not in checkpointed or (state.group is None and state.update is None), index


@pytest.mark.parametrize(("schedule", "passes_on_groups"), [("grouped", True), ("layer", False), ("single", False)])
def test_groups_can_end_with_each_layer_for_other_forms_of_checkpointing(schedule, passes_on_groups):
    """Torch's own wrapper does not tell the layer that it is checkpointed."""
    model, ids = model_of(1), random_ids(2, 7)
    expected = results(model, "single", ids)
    states = []
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        model.model.layers[index].register_forward_hook(lambda layer, args, state: states.append(state))
    actual = {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in results(model, schedule, ids).items()}
    assert_equal_results(actual, expected)
    assert any(state.group is not None for state in states[: NUM_LAYERS - 1]) == passes_on_groups
    assert any(state.update is not None for state in states[: NUM_LAYERS - 1]) is False


@pytest.mark.parametrize(
    "fields",
    [
        {"query": "input"},
        {"static_mix": True},
        {"depth_window": 2},
        {"num_depth_heads": 2},
        {"depth_activation": "sigmoid"},
        {"key_norm": False},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_reads_with_other_options_are_single_whatever_the_schedule(fields, grouped_reads):
    model, ids = model_of(1, **fields), random_ids(2, 7)
    expected = results(model, "single", ids)
    assert_equal_results(results(model, "grouped", ids), expected)
    assert not grouped_reads["phase1"] and not grouped_reads["phase2"]


def test_carried_tensors_move_together():
    """As accelerate moves them: whatever has a method `to`, and nothing else."""
    reads = read_weights(DepthReads(config_of(1)), "single")
    moved = reads.to("meta", non_blocking=True).value
    assert moved.score_weights.device.type == "meta" and moved.key_norm is None and moved.schedule == "single"
    group = Carried(ReadGroup(3, 2, (torch.ones(4),), (torch.ones(1, 2, 4),), ()))
    moved = group.to("meta").value
    assert (moved.first_site, moved.num_covered, moved.lses) == (3, 2, ())
    assert moved.score_weights[0].device.type == moved.outs[0].device.type == "meta"
    assert group.value.outs[0].device.type == "cpu"


def test_a_layer_used_alone_gets_the_weights_that_its_error_asks_for():
    model, ids = model_of(2).eval(), random_ids(1, 5)
    layer, captured = model.model.layers[0], {}
    layer.register_forward_pre_hook(
        lambda layer, args, kwargs: captured.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    outputs = []
    layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
    with torch.no_grad():
        model(ids)
        kwargs = {name: value for name, value in captured["kwargs"].items() if name != "depth_reads"}
        with pytest.raises(ValueError, match=r"missing at site 0; .*read_weights\(base_model.depth_reads"):
            layer.forward(*captured["args"], **kwargs)
        state = layer.forward(*captured["args"], **kwargs, depth_reads=read_weights(model.model.depth_reads, "auto"))
    torch.testing.assert_close(state.open_block, outputs[0].open_block)


def test_a_recorder_gets_the_weights_of_single_reads(grouped_reads):
    model, ids = model_of(1).eval(), random_ids(1, 5)
    with torch.no_grad():
        weights = model(ids, output_depth_attentions=True).depth_attentions
        assert len(weights) == 2 * NUM_LAYERS + 1 and not grouped_reads["phase2"]
        model(ids)
    # Full AttnRes with groups of 4 sublayers; the first read has a single source and no group.
    assert grouped_reads["phase1"] == [3, 4, 3]


def test_the_schedule_is_an_option_of_a_run(tmp_path):
    config = config_of(2)
    assert config.attn_res_schedule == "auto"
    with pytest.raises(ValueError, match=r"attn_res_schedule.*'both'.*'auto', 'grouped', 'layer', 'single'"):
        config.attn_res_schedule = "both"
    config.attn_res_schedule = "single"
    assert config.attn_res_schedule is AttnResSchedule.SINGLE
    assert copy.deepcopy(config).attn_res_schedule == "single"
    model = DepthAttnForCausalLM(config)
    assert copy.deepcopy(model).config.attn_res_schedule == "single"
    model.save_pretrained(tmp_path)
    assert "schedule" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert DepthAttnForCausalLM.from_pretrained(tmp_path).config.attn_res_schedule == "auto"
    assert DepthAttnConfig.from_pretrained(tmp_path, attn_res_schedule="grouped").attn_res_schedule == "grouped"


def test_a_model_is_loaded_with_a_schedule(tmp_path, grouped_reads):
    model_of(1).save_pretrained(tmp_path)
    loaded = DepthAttnForCausalLM.from_pretrained(tmp_path, attn_res_schedule="single")
    ids = random_ids(1, 5)
    loaded(ids)
    assert loaded.config.attn_res_schedule == "single" and not grouped_reads["phase2"]
    loaded.config.attn_res_schedule = "grouped"
    loaded(ids)
    assert grouped_reads["phase2"]
    with pytest.raises(ValueError, match="attn_res_schedule"):
        DepthAttnForCausalLM.from_pretrained(tmp_path, attn_res_schedule="both")
