"""Stages from a checkpoint read their own tensors only; initial weights do not depend on the split."""

import pytest
import torch
import transformers.modeling_utils
from damaged_checkpoints import edit_tensors
from depth_forms import random_model
from pipeline_stages import run, with_weights_of
from tiny_hosts import random_ids, tiny_host_config, tiny_stock_model

from hf_depthattn import DepthAttnConfig, DepthAttnForCausalLM
from hf_depthattn.distributed.stage_building import check_source, routers_of, stage_from_config, stage_from_pretrained
from hf_depthattn.distributed.stage_plan import plan_stages, split_layers
from hf_depthattn.errors import UserError

BOTH = {"sublayers_per_block": 3, "depth_kv": "attention+mlp", "depth_gate": "head"}


def plans_of(config, num_stages: int):
    layers = split_layers(config.host_config.num_hidden_layers, num_stages)
    return plan_stages(config, layers, list(range(num_stages)), routers=routers_of(config))


@pytest.fixture
def read_names(monkeypatch) -> list[str]:
    """The names of all tensors that are read from files."""
    names: list[str] = []

    class Slice:
        def __init__(self, name, stock):
            self.name, self.stock = name, stock

        def __getitem__(self, index):
            names.append(self.name)
            return self.stock[index]

        def __getattr__(self, name):
            return getattr(self.stock, name)

    class File:
        def __init__(self, *args, **kwargs):
            self.stock = stock_open(*args, **kwargs)

        def __enter__(self):
            self.stock.__enter__()
            return self

        def __exit__(self, *error):
            return self.stock.__exit__(*error)

        def get_slice(self, name):
            return Slice(name, self.stock.get_slice(name))

        def __getattr__(self, name):
            return getattr(self.stock, name)

    stock_open = transformers.modeling_utils.safe_open
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", File)
    return names


@pytest.mark.parametrize("host", ["llama", "qwen3_moe", "gemma2"])
def test_a_stage_reads_its_own_tensors_only_and_stages_equal_the_model(tmp_path, read_names, host):
    model = random_model(host, **BOTH)
    model.save_pretrained(tmp_path)
    stages = []
    for plan in plans_of(model.config, 3):
        read_names.clear()
        stages.append(stage_from_pretrained(tmp_path, plan))
        layers = {int(name.split(".")[2]) for name in read_names if ".layers." in name}
        assert layers == set(plan.layers), read_names
        has_embeddings = plan.is_first or (plan.is_last and model.config.tie_word_embeddings)
        assert ("model.embed_tokens.weight" in read_names) == has_embeddings
        assert ("model.norm.weight" in read_names) == plan.is_last
        assert len(set(read_names)) == len(read_names)
    ids = random_ids(2, 9)
    torch.testing.assert_close(run(stages, ids), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("host_fields", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
@pytest.mark.parametrize("connection", ["attn_res", "deepnorm"])
def test_initial_weights_do_not_depend_on_the_split(connection, host_fields):
    fields = BOTH if connection == "attn_res" else {"connection": connection, "norm_position": "post"}
    config = DepthAttnConfig(text_config=tiny_host_config("llama", **host_fields), **fields)
    (whole,) = (stage_from_config(config, plan, seed=3) for plan in plans_of(config, 1))
    stages = [stage_from_config(config, plan, seed=3) for plan in plans_of(config, 3)]
    expected = whole.state_dict()
    found = {name: tensor for stage in stages for name, tensor in stage.state_dict().items()}
    assert found.keys() == expected.keys() == DepthAttnForCausalLM(config).state_dict().keys()
    for stage in stages:
        for name, tensor in stage.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    other = stage_from_config(config, plans_of(config, 1)[0], seed=4).state_dict()
    assert not torch.equal(other["model.layers.1.mlp.up_proj.weight"], expected["model.layers.1.mlp.up_proj.weight"])
    layers = [expected[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(2)]
    assert not torch.equal(*layers)
    ids = random_ids(2, 9)
    torch.testing.assert_close(run(stages, ids), whole(ids), rtol=1e-5, atol=1e-6)


def test_initial_weights_have_the_distribution_of_the_whole_model_and_leave_the_random_state():
    config = DepthAttnConfig(text_config=tiny_host_config("llama", hidden_size=64), **BOTH)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    (stage,) = (stage_from_config(config, plan, seed=0) for plan in plans_of(config, 1))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(0)
    whole = dict(DepthAttnForCausalLM(config).named_parameters())
    for name, parameter in stage.named_parameters():
        assert parameter.dtype == whole[name].dtype, name
        torch.testing.assert_close(parameter.std(), whole[name].std(), rtol=0.15, atol=1e-6, msg=name)
        torch.testing.assert_close(parameter.mean(), whole[name].mean(), rtol=0, atol=5e-3, msg=name)


def test_a_stage_in_bfloat16_keeps_depth_parameters_in_float32():
    config = DepthAttnConfig(text_config=tiny_host_config("llama"), **BOTH)
    for plan in plans_of(config, 3):
        stage = stage_from_config(config, plan, seed=0, dtype=torch.bfloat16)
        assert stage.model.depth_reads.query.dtype == torch.float32
        assert stage.model.layers[plan.layers.start].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert config.dtype != torch.bfloat16


def test_a_users_subclass_keeps_its_methods_and_its_forward():
    class Doubled(DepthAttnForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model = random_model("llama", **BOTH)
    plans = plans_of(model.config, 3)
    last = with_weights_of(model, plans[2])
    doubled = stage_from_config(model.config, plans[2], seed=0, model_class=Doubled)
    doubled.load_state_dict(last.state_dict())
    assert isinstance(doubled, Doubled)
    ids = random_ids(2, 9)
    earlier = [with_weights_of(model, plan) for plan in plans[:2]]
    torch.testing.assert_close(run([*earlier, doubled.eval()], ids), 2 * run([*earlier, last], ids))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a causal LM."""
    model = random_model("llama", **BOTH)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def shorten(tensors) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][1:].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), r"lacks tensors of the model \(model\.lay"),
        (shorten, r"tensors of other shapes than in its config \(model\.layers\.1\.mlp\.up_proj"),
    ],
    ids=["missing", "mismatched"],
)
def test_a_stage_without_its_tensors_is_refused(checkpoint, change, message):
    """The other stages do not need them."""
    edit_tensors(checkpoint, change)
    plans = plans_of(DepthAttnConfig.from_pretrained(checkpoint), 3)
    with pytest.raises(UserError, match=message):
        stage_from_pretrained(checkpoint, plans[1])
    assert stage_from_pretrained(checkpoint, plans[2]) is not None
    with pytest.raises(UserError, match=message):
        check_source(checkpoint)


def test_other_sources_are_refused_by_name(checkpoint, tmp_path):
    model = DepthAttnForCausalLM.from_pretrained(checkpoint)
    model.model.save_pretrained(tmp_path / "base")
    tiny_stock_model("llama").save_pretrained(tmp_path / "stock")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for source, message in {
        model: "source: got a DepthAttnForCausalLM; it must be the folder of a checkpoint",
        tmp_path / "missing": "missing: no such folder",
        tmp_path / "stock": r"stock: is a stock model \(llama\); convert it with `depthattn retrofit`",
        tmp_path / "base": r"base: lacks tensors of the model \(lm_head\.weight\)",
        tmp_path / "adapter": "adapter: is an adapter",
    }.items():
        with pytest.raises(UserError, match=message):
            check_source(source)
    assert check_source(str(checkpoint)).sublayers_per_block == BOTH["sublayers_per_block"]
