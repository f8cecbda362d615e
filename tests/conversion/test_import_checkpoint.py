"""The guarantees of an import: all or nothing, little memory, tokenizer and card, and the command."""

import json
import os

import foreign_checkpoints
import pytest
from foreign_models import ForeignModel
from imports_of_checkpoints import edit
from processes import run_python
from repository import ROOT
from safetensors.torch import load_file
from tiny_checkpoints import save_tokenizer
from transformers import AutoTokenizer

from hf_depthattn.cli.main import main
from hf_depthattn.conversion.import_checkpoint import import_checkpoint
from hf_depthattn.conversion.restore import restore
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.errors import UserError
from hf_depthattn.eval.verify.verify import verify


@pytest.fixture
def source(tmp_path):
    """A checkpoint of flash-linear-attention with a tokenizer and a licence."""
    folder = foreign_checkpoints.fla(tmp_path / "source", ForeignModel(sublayers_per_block=4))
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    return folder


def test_command_reports_what_became_of_the_tensors(source, tmp_path, capfd):
    assert main(["import", str(source), str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    assert "(fla)" in printed and "llama, 3 layers" in printed and "Block Attention Residuals" in printed
    num_read, num_written = (len(load_file(f / "model.safetensors")) for f in (source, tmp_path / "out"))
    assert f"{num_read} of the source became {num_written}" in printed
    assert main(["import", str(source), str(tmp_path / "out"), "--overwrite", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["format"], report["num_read"], report["num_written"]) == ("fla", num_read, num_written)
    theirs, ours = (load_file(f / "model.safetensors").keys() for f in (source, tmp_path / "out"))
    assert report["mapped"].keys() == ours
    assert {name for names in report["mapped"].values() for name in names} == theirs
    assert report["mapped"]["model.layers.1.mlp.up_proj.weight"] == ["model.layers.1.mlp.up_proj.weight"]
    queries = [f"model.layers.{i}.{kind}_res_proj.weight" for i in range(3) for kind in ("attn", "mlp")]
    assert report["mapped"]["model.depth_reads.query"] == [*queries, "model.res_proj.weight"]


def test_output_has_the_model_code_a_tokenizer_and_a_card(source, tmp_path):
    import_checkpoint(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DepthAttnForCausalLM"] and config["dtype"] == "float32"
    assert (tmp_path / "out" / f"{config['auto_map']['AutoModelForCausalLM'].partition('.')[0]}.py").is_file()
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "flash-linear-attention" in card and "depthattn import" in card


def test_a_failure_leaves_nothing_behind(source, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_depthattn.conversion.new_tensors.write_shard", full)
    with pytest.raises(UserError, match="No space left on device"):
        import_checkpoint(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


_IMPORT_AND_MEASURE = """
import resource, sys
from hf_depthattn.conversion.import_checkpoint import import_checkpoint
import_checkpoint(sys.argv[1], sys.argv[1] + "-out")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = import_checkpoint(sys.argv[2], sys.argv[2] + "-out")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, report.bytes_written)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_weights(source, tmp_path):
    """An import of a tiny checkpoint has gone before: what it loads and allocates is there."""
    model = ForeignModel(sublayers_per_block=4, vocab_size=300_000)
    large = foreign_checkpoints.fla(tmp_path / "large", model)
    result = run_python("-c", _IMPORT_AND_MEASURE, str(source), str(large), cwd=tmp_path, python_path=str(ROOT))
    assert result.returncode == 0, result.stderr[-3000:]
    grown_kilobytes, bytes_written = map(int, result.stdout.split()[-2:])
    # Embeddings and head in float32.
    assert bytes_written > 2 * 7_200_000 * 4 and grown_kilobytes < 20_000, result.stdout


def test_an_existing_checkpoint_is_only_replaced_on_request(source, tmp_path):
    import_checkpoint(source, tmp_path / "out")
    with pytest.raises(UserError, match="is not empty"):
        import_checkpoint(source, tmp_path / "out")
    with pytest.raises(UserError, match="must not contain the source"):
        import_checkpoint(source, source / "out")
    import_checkpoint(source, tmp_path / "out", overwrite=True)


def test_a_missing_tokenizer_is_an_error_of_the_command(tmp_path, capfd):
    source = foreign_checkpoints.fla(tmp_path / "source", ForeignModel(sublayers_per_block=4))
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    assert "has no tokenizer" in capfd.readouterr().err
    assert main(["import", str(source), str(tmp_path / "out"), "--allow-missing-tokenizer"]) == 0


def test_the_error_about_a_missing_tokenizer_names_the_one_in_the_config(tmp_path, capfd):
    source = foreign_checkpoints.olmo_core(tmp_path / "source", ForeignModel(sublayers_per_block=4))
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    message = capfd.readouterr().err
    assert "has no tokenizer (config.json names 'someone/tokenizer')" in message and "--allow-missing" in message


def test_an_imported_checkpoint_is_never_restored_to_its_host(source, tmp_path):
    import_checkpoint(source, tmp_path / "out")
    with pytest.raises(UserError, match="cannot be restored"):
        restore(tmp_path / "out", tmp_path / "host")


@pytest.mark.parametrize("name", ["fla", "multi_head", "olmo_core"])
def test_retrofit_and_verify_refuse_what_can_be_imported_and_say_so(name, tmp_path):
    model = ForeignModel(sublayers_per_block=1)
    more = {"mode": "full"} if name == "multi_head" else {}
    source = getattr(foreign_checkpoints, name)(tmp_path / "source", model, **more)
    with pytest.raises(UserError, match=r"attnres_(block_size|mode)=.*depthattn import SOURCE OUT"):
        retrofit(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"attnres_(block_size|mode)="):
        verify(source, tmp_path)
    # By the names of its tensors, if the config does not tell.
    (source / "config.json").write_text("{}")
    edit(source, model_type="llama", num_hidden_layers=3, hidden_size=24, num_attention_heads=4)
    with pytest.raises(UserError, match=r"residual scheme .*depthattn import SOURCE OUT"):
        retrofit(source, tmp_path / "out")
    with pytest.raises(UserError, match="residual scheme"):
        verify(source, tmp_path)
