"""Outputs of conversions are complete or not there; nothing else is touched; memory does not grow with the weights."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import load, save_stock, weights_of
from tiny_hosts import tiny_host_config
from transformers import AutoModelForCausalLM

from hf_depthattn.conversion import output_folder
from hf_depthattn.conversion.checkpoint_files import INDEX_FILE, ConversionError
from hf_depthattn.conversion.retrofit import retrofit

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "sharded", max_shard_size="20KB")


def test_existing_output_is_refused_and_overwritten_on_request(stock, sharded, tmp_path):
    out = tmp_path / "out"
    retrofit(stock, out, num_blocks=2)
    with pytest.raises(ConversionError, match="exists and is not empty"):
        retrofit(sharded, out)
    assert load(out).config.num_blocks == 2
    (out / "note.txt").write_text("of the old one")
    retrofit(sharded, out, num_blocks=3, overwrite=True)
    assert load(out).config.num_blocks == 3 and len(weights_of(out)) > 2 and not (out / "note.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_is_not_in_the_way(stock, tmp_path):
    (tmp_path / "out").mkdir()
    retrofit(stock, tmp_path / "out")
    load(tmp_path / "out")


def test_overwrite_touches_checkpoints_only(stock, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(b"x")
    with pytest.raises(ConversionError, match="not a checkpoint"):
        retrofit(stock, photos, overwrite=True)
    run = tmp_path / "run"
    (run / "checkpoint-500").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="has folders in it"):
        retrofit(stock, run, overwrite=True)
    with pytest.raises(ConversionError, match="not a folder"):
        retrofit(stock, photos / "one.jpg", overwrite=True)
    assert (photos / "one.jpg").exists() and (run / "checkpoint-500").exists()


def test_output_lies_apart_from_source_and_current_directory(stock, tmp_path, monkeypatch):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    for output in (source, source / "out"):
        with pytest.raises(ConversionError, match="apart from the source"):
            retrofit(source, output, overwrite=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="has folders in it"):
        retrofit(source, tmp_path, overwrite=True)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(ConversionError, match="holds the current directory"):
        retrofit(source, ".")
    assert weights_of(source)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES], ids=["disk full", "no permission"])
@pytest.mark.parametrize("step", ["remote_code.export_model_code", "conversion.retrofit.write_shard", "conversion.retrofit.write_index"])
def test_a_failure_leaves_nothing_behind_and_the_old_output_in_place(code, step, stock, tmp_path, monkeypatch):
    out = tmp_path / "out"
    retrofit(stock, out, num_blocks=2)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(f"hf_depthattn.{step}", fail)
    for output in (out, tmp_path / "new"):
        with pytest.raises(ConversionError) as error:
            retrofit(stock, output, overwrite=True)
        assert os.strerror(code) in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


_KILLED_BEFORE_CONFIG = """
import sys, time
from hf_depthattn.conversion import retrofit as module
from hf_depthattn.configuration_depthattn import DepthAttnConfig
def wait(*args, **kwargs):
    print("waiting", flush=True)
    time.sleep(600)
if sys.argv[3] == "config":
    DepthAttnConfig.save_pretrained = wait
else:
    module.write_shard = wait
module.retrofit(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("step", ["weights", "config"])
def test_a_killed_run_leaves_nothing_that_loads_and_the_next_run_succeeds(step, stock, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", _KILLED_BEFORE_CONFIG, str(stock), str(out), step]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "waiting\n"
            # A run that is still going is left alone.
            output_folder._clear_leftovers(out)
            assert [path.name for path in tmp_path.iterdir()] == [f".out.partial-{process.pid}"]
        finally:
            process.send_signal(signal.SIGKILL)
    for folder in (out, tmp_path / f".out.partial-{process.pid}"):
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
    retrofit(stock, out)
    load(out)
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_moved_aside_by_a_killed_overwrite_comes_back(stock, tmp_path):
    out = tmp_path / "out"
    retrofit(stock, out, num_blocks=2)
    # No process has this number: Linux counts to 2^22.
    os.rename(out, tmp_path / ".out.replaced-9999999")
    (tmp_path / ".out.partial-9999999").mkdir()
    (tmp_path / ".out.partial-notes").mkdir()
    with pytest.raises(ConversionError, match="exists and is not empty"):
        retrofit(stock, out)
    assert load(out).config.num_blocks == 2
    assert sorted(os.listdir(tmp_path)) == [".out.partial-notes", "out"]


_RETROFIT_AND_MEASURE = """
import resource, sys
from hf_depthattn.conversion.retrofit import retrofit
import transformers.models.llama.configuration_llama
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = retrofit(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, report.seconds, report.bytes_linked)
"""


def test_memory_and_time_do_not_grow_with_the_weights(tmp_path):
    """80 layers in 4 shards of 34 GB, as sparse files: headers are real, the data is a hole."""
    source = tmp_path / "large"
    tiny_host_config("llama", num_hidden_layers=80, hidden_size=8192, head_dim=2048).save_pretrained(source)
    num_shards, shape = 4, [2**16, 2**16]
    weight_map = {}
    for shard in range(num_shards):
        header, end = {}, 0
        for layer in range(shard, 80, num_shards):
            # 20 tensors of 1.7 GB.
            header[f"model.layers.{layer}.mlp.up_proj.weight"] = {
                "dtype": "F32",
                "shape": [shape[0], shape[1] // 10],
                "data_offsets": [end, end + shape[0] * (shape[1] // 10) * 4],
            }
            end = header[f"model.layers.{layer}.mlp.up_proj.weight"]["data_offsets"][1]
        text = json.dumps(header).encode()
        path = source / f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + end)
        weight_map |= dict.fromkeys(header, path.name)
    (source / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    command = [sys.executable, "-c", _RETROFIT_AND_MEASURE, str(source), str(tmp_path / "out")]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown_kilobytes, seconds, bytes_linked = map(float, result.stdout.split())
    assert bytes_linked > 1e11
    # Measured: 3 MB and 0.1 s.
    assert grown_kilobytes < 50_000 and seconds < 10, result.stdout
