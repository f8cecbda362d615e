"""`select-slots`: it finds the slots that matter, and the checkpoint that it writes reads only those."""

import json
from pathlib import Path

import pytest
import torch
from model_checks import depth_model, randomise_depth
from tiny_checkpoints import load, logits, save_stock, save_tokenizer, weights_of
from tiny_hosts import tiny_stock_model
from transformers import AutoTokenizer

from hf_depthattn.cli.main import main
from hf_depthattn.conversion import kept_weights
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.errors import UserError
from hf_depthattn.eval.metrics.probing.probe import DepthProbe
from hf_depthattn.eval.metrics.probing.text import TextBatches
from hf_depthattn.eval.slot_selection.select_slots import choose_slots, select_slots

NUM_LAYERS, LENGTH, NUM_WINDOWS = 4, 16, 6
FIRST_CHARACTER, NUM_TOKENS = 3, 80


def model_that_reads_an_old_slot() -> torch.nn.Module:
    """Queries are constant, and only the key that the first MLP writes (slot 1) agrees with them."""
    torch.manual_seed(0)
    stock = tiny_stock_model("llama", num_hidden_layers=NUM_LAYERS, attention_bias=True)
    model = depth_model(stock, connection="residual", depth_kv="attention+mlp", depth_kv_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                linear.weight.zero_()
                linear.bias.zero_()
            layer.self_attn.q_proj.bias.fill_(1.0)
            if layer.mlp_depth_kv is not None:
                layer.mlp_depth_kv.k_proj.weight.zero_()
                layer.mlp_depth_kv.k_proj.bias.fill_(4.0 if layer.layer_idx == 0 else -4.0)
                layer.mlp_depth_kv.v_proj.weight.normal_()
        model.lm_head.weight.normal_()
    return model


@torch.no_grad()
def greedy_text(model: torch.nn.Module, tokenizer) -> str:
    """What the model itself writes, in windows that start with different characters."""
    ids = torch.arange(FIRST_CHARACTER, FIRST_CHARACTER + NUM_WINDOWS)[:, None]
    while ids.shape[1] < LENGTH:
        newest = model(ids).logits[:, -1, FIRST_CHARACTER:NUM_TOKENS].argmax(-1) + FIRST_CHARACTER
        ids = torch.cat([ids, newest[:, None]], 1)
    return "".join(tokenizer.convert_ids_to_tokens(ids.flatten().tolist()))


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> tuple[Path, str]:
    """A checkpoint of that model in several shards, and a text."""
    folder = tmp_path_factory.mktemp("old") / "model"
    model = model_that_reads_an_old_slot()
    model.save_pretrained(folder, max_shard_size="20KB")
    save_tokenizer(folder)
    return folder, greedy_text(model, AutoTokenizer.from_pretrained(folder))


def test_selection_beats_the_newest_slots_where_old_ones_matter(old, tmp_path):
    folder, text = old
    report = select_slots(folder, text, budget=1, output_dir=tmp_path / "out", sequence_length=LENGTH)
    assert report.depth_slots == [[], [1], [1], [1]] and report.num_sequences == NUM_WINDOWS
    assert report.kept_mass > 0.9
    assert abs(report.loss_after - report.loss_before) < 0.1
    assert report.loss_newest - report.loss_before > 0.5
    assert (report.num_reads, report.num_present) == ((2 + 4 + 6, 3), (6, 1))
    out = load(tmp_path / "out")
    assert out.config.depth_slots == report.depth_slots
    assert [layer.mlp_depth_kv is not None for layer in out.model.layers] == [True, False, False, False]
    # The losses are of the checkpoints, on the windows that have not selected.
    windows = TextBatches.from_text(AutoTokenizer.from_pretrained(folder), text, sequence_length=LENGTH)
    _, scored = windows.halves()
    with torch.no_grad():
        for model, loss in ((load(folder), report.loss_before), (out, report.loss_after)):
            assert DepthProbe(model).loss(scored) == pytest.approx(loss, abs=1e-6)
    assert "at most 1 chosen in a layer" in (tmp_path / "out" / "README.md").read_text()
    linked = {file.stat().st_ino for file in weights_of(folder)} & {
        file.stat().st_ino for file in weights_of(tmp_path / "out")
    }
    assert linked and report.bytes_linked > 0 and report.bytes_written > 0


def test_without_output_nothing_is_written_and_a_full_budget_changes_nothing(old):
    folder, text = old
    before = sorted(folder.parent.rglob("*"))
    report = select_slots(folder, text, budget=99, sequence_length=LENGTH)
    assert report.loss_after == report.loss_before == report.loss_newest and report.kept_mass == pytest.approx(1.0)
    assert sorted(folder.parent.rglob("*")) == before and report.output_dir is None


def test_a_selection_of_a_selection(old, tmp_path):
    folder, text = old
    first = select_slots(folder, text, budget=2, output_dir=tmp_path / "two", sequence_length=LENGTH)
    second = select_slots(tmp_path / "two", text, budget=1, output_dir=tmp_path / "one", sequence_length=LENGTH)
    assert second.loss_before == pytest.approx(first.loss_after, abs=1e-6)
    assert all(set(new) <= set(old) for new, old in zip(second.depth_slots, first.depth_slots, strict=True))
    ids = torch.arange(3, 19)[None]
    direct = select_slots(folder, text, budget=1, output_dir=tmp_path / "direct", sequence_length=LENGTH)
    assert direct.depth_slots == second.depth_slots
    assert torch.equal(logits(load(tmp_path / "one"), ids), logits(load(tmp_path / "direct"), ids))


def test_gates_count_and_a_model_on_a_hybrid_host_keeps_its_other_weights(tmp_path):
    stock = save_stock(tmp_path / "stock", "kimi_linear")
    retrofit(stock, tmp_path / "depth", connection="residual", depth_kv="attention+mlp")
    text = "def f(x):\n    return x + 1\n" * 8
    with pytest.raises(UserError, match="all slots have a mass of 0, since its gates are zero"):
        select_slots(tmp_path / "depth", text, budget=1, sequence_length=LENGTH)
    model = load(tmp_path / "depth")
    randomise_depth(model)
    model.save_pretrained(tmp_path / "trained")
    save_tokenizer(tmp_path / "trained")
    report = select_slots(
        tmp_path / "trained", text, budget=1, output_dir=tmp_path / "out", sequence_length=LENGTH, copy=True
    )
    assert report.depth_slots == [[], [1], []] and report.loss_after == report.loss_before
    ids = torch.arange(3, 19)[None]
    assert torch.equal(logits(load(tmp_path / "out"), ids), logits(model, ids))


def test_equal_masses_keep_the_newest_slots():
    assert choose_slots([{}, {0: 0.1, 1: 0.1}, {0: 0.3, 1: 0.1, 2: 0.1, 3: 0.1}], 2) == [[], [0, 1], [0, 3]]


def test_mistakes_are_named_and_leave_nothing_behind(old, tmp_path, monkeypatch):
    folder, text = old
    stock = save_stock(tmp_path / "stock")
    retrofit(stock, tmp_path / "attn_res")
    for model, arguments, message in (
        (stock, {}, "is not a depth attention checkpoint"),
        (tmp_path / "attn_res", {}, "has no depth slots"),
        (folder, {"budget": 0}, "--budget 0: must be at least 1"),
        (folder, {"text": "too short"}, "shorter than one window of 16"),
        (folder, {"text": text[:LENGTH]}, "at least two are needed"),
        (folder, {"sequence_length": 1000}, "exceeds the context length"),
        (folder, {"output_dir": folder}, "exists and is not empty"),
    ):
        options = {"text": text, "budget": 1, "output_dir": tmp_path / "out", "sequence_length": LENGTH, **arguments}
        with pytest.raises(UserError, match=message):
            select_slots(model, **options)

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_weights, "place_weights", fails)
    with pytest.raises(UserError, match="No space left on device"):
        select_slots(folder, text, budget=1, output_dir=tmp_path / "out", sequence_length=LENGTH)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attn_res", "stock"]


def test_the_command_prints_the_losses(old, tmp_path, capfd):
    folder, text = old
    (tmp_path / "text.txt").write_text(text)
    arguments = ["select-slots", str(folder), "--text", str(tmp_path / "text.txt"), "--sequence-length", str(LENGTH)]
    assert main([*arguments, "--budget", "2", "--output", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["depth_slots"] == load(tmp_path / "out").config.depth_slots
    assert main([*arguments, "--budget", "2", "--progress"]) == 0
    printed = capfd.readouterr()
    for label in ("loss, all slots", "loss, selected slots", "loss, newest slots", "mass kept"):
        assert label in printed.out
    assert "slots: 4 of 4 (100 %)" in printed.err
    assert main([*arguments, "--budget", "0"]) == 2
    assert "--budget 0: must be at least 1" in capfd.readouterr().err
