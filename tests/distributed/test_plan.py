"""The command that plans a training step: its text, its choices and its refusals."""

import json

import pytest
from repository import ROOT
from tiny_hosts import needs_kimi_linear, tiny_host_config

from hf_depthattn.distributed.plan import choose, main, make_config, parse_arguments
from hf_depthattn.errors import UserError

CONFIGS = ROOT / "examples" / "configs"
QWEN, KIMI = CONFIGS / "qwen3_32b", CONFIGS / "kimi_linear_48b_a3b_attn_res"


@pytest.fixture
def tiny(tmp_path):
    host = tiny_host_config("llama", num_hidden_layers=8)
    host.save_pretrained(tmp_path)
    return tmp_path


def chosen(*arguments):
    args = parse_arguments([*map(str, arguments)])
    return choose(make_config(args), args)


@pytest.mark.parametrize(
    "config, num_parameters",
    [
        pytest.param(QWEN, 32.76e9, id="Qwen3-32B"),
        pytest.param(KIMI, 49.12e9, id="Kimi-Linear-48B", marks=needs_kimi_linear),
    ],
)
def test_named_shapes_have_their_sizes(config, num_parameters):
    plan = chosen(config, "--gpus", 64, "--pipeline", 1)
    assert plan.ranks[0].num_parameters == pytest.approx(num_parameters, rel=1e-3)


def test_text_has_axes_traffic_and_memory(tiny, capsys):
    arguments = ["--gpus", "16", "--pipeline", "2", "--sublayers-per-block", "1", "--sequence-length", "8192"]
    assert main([str(tiny), *arguments, "--microbatch-size", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "llama, 8 layers of 32, Full Attention Residuals"
    assert lines[1] == "16 GPUs = pipeline 2 (x 2 stages) x tensor 1 x fsdp 8 x data 1"
    assert lines[2] == (
        "schedule interleaved, 8 microbatches of 64 x 8192 tokens; a step is 33,554,432 tokens, 6% of it idle"
    )
    # 5 sources and the 4 of each later boundary, of 32 MiB each.
    assert lines[5].split() == ["cached", "160", "128", "128", "=", "416"]
    assert lines[6].split() == ["whole", "state", "160", "288", "416", "=", "864"]
    assert [line.split()[0] for line in lines[10:12]] == ["0", "1"]
    assert "~logits" in lines[9]
    assert lines[12] == "The fullest rank fits into 90% of 80 GiB."
    main([str(tiny), *arguments, "--gpu-memory", "1", "--microbatch-size", "640"])
    assert capsys.readouterr().out.splitlines()[-1] == "The fullest rank does NOT fit into 90% of 1 GiB."


def test_router_logits_are_counted_where_the_loss_uses_them(tmp_path):
    sizes = []
    for uses_them in (False, True):
        host = tiny_host_config("qwen3_moe", num_hidden_layers=4, output_router_logits=uses_them)
        host.save_pretrained(tmp_path)
        sizes.append(chosen(tmp_path, "--gpus", 2, "--pipeline", 2, "--virtual", 1).boundaries[0])
    # Two layers with 4 experts each, 4,096 tokens in bfloat16.
    assert sizes[1] - sizes[0] == 2 * 4 * 4096 * 2


def test_fsdp_alone_is_chosen_where_it_fits():
    plan = chosen(QWEN, "--gpus", 64)
    assert (plan.axes.pipeline, plan.idle_share) == (1, 0)
    assert plan.peak < chosen(QWEN, "--gpus", 64, "--pipeline", 2).peak


def test_pipeline_is_the_shortest_that_fits():
    plan = chosen(QWEN, "--gpus", 64, "--virtual", 2)
    assert plan.axes.pipeline > 2
    assert plan.peak <= 0.9 * 80 * 2**30
    half = chosen(QWEN, "--gpus", 64, "--virtual", 2, "--pipeline", plan.axes.pipeline // 2)
    assert half.peak > 0.9 * 80 * 2**30


def test_least_memory_is_chosen_if_nothing_fits():
    plan = chosen(QWEN, "--gpus", 64, "--gpu-memory", 1)
    others = [chosen(QWEN, "--gpus", 64, "--pipeline", length) for length in (4, 64)]
    assert plan.peak == others[1].peak < others[0].peak


@needs_kimi_linear
def test_options_of_depth_attention_replace_those_of_the_file():
    args = parse_arguments([str(KIMI), "--gpus", "64", "--connection", "residual", "--depth-kv", "attention"])
    config = make_config(args)
    assert (config.connection, config.depth_kv) == ("residual", "attention")
    args = parse_arguments([str(KIMI), "--gpus", "64", "--set", "value_residual_init=resformer"])
    assert make_config(args).value_residual_init == "resformer"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--gpus", 6, "--pipeline", 4), "--gpus 6: must be a multiple of pipeline x tensor x fsdp, 4 x 1 x 1"),
        (("--gpus", 8, "--fsdp", 3), "--gpus 8: must be a multiple of pipeline x tensor x fsdp, 1 x 1 x 3"),
        (("--gpus", 3, "--tensor", 2), "--gpus 3: must be a multiple of tensor, 2"),
        (("--gpus", 0), "--gpus 0: must be at least 1"),
        (("--gpus", 16, "--pipeline", 16), "num_stages: 16 must be between 1 and 8"),
        (("--gpus", 8, "--pipeline", 2, "--virtual", 2, "--schedule", "1f1b"), "num_virtual: 2 is not possible"),
        (("--gpus", 8, "--pipeline", 2, "--microbatches", 5), "num_microbatches: 5"),
        (("--gpus", 8, "--num-blocks", 0), "num_blocks: 0 must be between 1 and 16"),
        (("--gpus", 8, "--set", "hidden_size=3"), "--set hidden_size: must be one of"),
    ],
)
def test_impossible_plans_are_refused(tiny, arguments, message):
    with pytest.raises(UserError, match=message):
        chosen(tiny, *arguments)


def test_config_of_no_host_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(UserError, match="'unheard-of' is not known"):
        chosen(tmp_path, "--gpus", 8)
