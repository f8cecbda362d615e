"""Restore: refused where a depth parameter has moved, exact for shards of every kind."""

from pathlib import Path

import pytest
import torch
from model_checks import is_depth_key, randomise_depth
from safetensors.torch import load_file, save_file
from tiny_checkpoints import edit_config, load, logits, save_stock, weights_of
from tiny_hosts import random_ids

from hf_depthattn.checkpoints.checkpoint_files import SINGLE_FILE, read_weight_files
from hf_depthattn.conversion.restore import restore
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.errors import UserError


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama")


def test_restore_names_the_sites_that_have_moved(stock, tmp_path):
    retrofit(stock, tmp_path / "out")
    model = load(tmp_path / "out")
    reads = model.model.depth_reads
    with torch.no_grad():
        reads.query[3, 3] = 1e-8
        reads.query[6, 0] = float("nan")
        # Without a query this changes nothing.
        reads.key_norm[1, 0] = 2
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError) as error:
        restore(tmp_path / "trained", tmp_path / "restored")
    assert "2 of 7 depth modules have been trained (layers.1.mlp_depth, layers.2.out_depth)" in str(error.value)
    assert not (tmp_path / "restored").exists()


def test_restore_names_only_the_first_sites(stock, tmp_path):
    retrofit(stock, tmp_path / "out")
    model = load(tmp_path / "out")
    randomise_depth(model)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError, match=r"7 of 7 depth modules .*layers\.1\.mlp_depth, \.\.\.\)"):
        restore(tmp_path / "trained", tmp_path / "restored")


def test_restore_looks_at_every_parameter_that_matters(stock, tmp_path):
    for name, fields in {"query_proj.weight": {"query": "input"}, "mix_scores": {"static_mix": True}}.items():
        out = tmp_path / name
        retrofit(stock, out, **fields)
        tensors = load_file(weights_of(out)[-1])
        tensors[f"model.layers.1.attn_depth.{name}"][0, 0] = 1
        save_file(tensors, weights_of(out)[-1])
        with pytest.raises(UserError, match=r"1 of 7 .*\(layers\.1\.attn_depth\)"):
            restore(out, tmp_path / "restored")


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_restore_takes_depth_tensors_out_of_mixed_shards(max_shard_size, stock, tmp_path):
    retrofit(stock, tmp_path / "out")
    load(tmp_path / "out").save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    report = restore(tmp_path / "saved", tmp_path / "restored")
    assert report.bytes_written > 0
    assert not any(is_depth_key(name) for name in read_weight_files(tmp_path / "restored").weight_map)
    ids = random_ids(1, 15)
    assert torch.equal(logits(load(tmp_path / "restored"), ids), logits(load(stock), ids))
    stored = {}
    for path in weights_of(tmp_path / "restored"):
        stored |= load_file(path)
    for name, tensor in load_file(stock / SINGLE_FILE).items():
        assert torch.equal(stored[name], tensor), name


def test_restore_ignores_the_start_of_a_value_residual_that_is_off(stock, tmp_path):
    retrofit(stock, tmp_path / "out")
    edit_config(tmp_path / "out", value_residual_init="resformer")
    assert restore(tmp_path / "out", tmp_path / "restored").num_depth_tensors > 0


def test_restore_refuses_reads_that_are_means(stock, tmp_path):
    retrofit(stock, tmp_path / "out")
    edit_config(tmp_path / "out", read_scale="mean")
    with pytest.raises(UserError, match="read_scale is 'mean'"):
        restore(tmp_path / "out", tmp_path / "restored")


def test_restore_refuses_stock_checkpoints_and_what_retrofit_refuses(stock, tmp_path):
    with pytest.raises(UserError, match="not a depth attention checkpoint"):
        restore(stock, tmp_path / "restored")
    retrofit(stock, tmp_path / "out")
    with pytest.raises(UserError, match="must not contain the source"):
        restore(tmp_path / "out", tmp_path / "out", overwrite=True)
    weights_of(tmp_path / "out")[-1].unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: is missing"):
        restore(tmp_path / "out", tmp_path / "restored")


def test_a_value_residual_starts_as_the_host_and_is_removed_until_it_is_trained(stock, tmp_path):
    report = retrofit(stock, tmp_path / "out", connection="residual", value_residual=True)
    assert report.num_depth_parameters == 4 and report.connection == "plain residual sums"
    ids = random_ids(1, 15)
    model = load(tmp_path / "out")
    assert torch.equal(logits(model, ids), logits(load(stock), ids))
    assert restore(tmp_path / "out", tmp_path / "restored").num_depth_tensors == 4
    assert torch.equal(logits(load(tmp_path / "restored"), ids), logits(load(stock), ids))
    with torch.no_grad():
        model.model.layers[2].value_residual.own_scale.add_(1e-6)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError, match=r"1 of 2 depth modules .*\(layers\.2\.value_residual\)"):
        restore(tmp_path / "trained", tmp_path / "again")
    with pytest.raises(UserError, match=r"value_residual_init: 'resformer' does not reproduce the host .*only 'host'"):
        retrofit(stock, tmp_path / "other", value_residual=True, value_residual_init="resformer")
