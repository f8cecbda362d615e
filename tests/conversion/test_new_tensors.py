"""Tensors that are put together from those of another checkpoint, as a stream."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_depthattn.checkpoints.checkpoint_files import INDEX_FILE, read_weight_files
from hf_depthattn.conversion import new_tensors
from hf_depthattn.conversion.new_tensors import NewTensor, Piece, write_new_tensors


@pytest.fixture
def source(tmp_path):
    """A checkpoint with a matrix in two dtypes."""
    torch.manual_seed(0)
    matrix = torch.randn(7, 5)
    save_file({"a": matrix, "b": matrix.bfloat16(), "c": matrix.double()}, tmp_path / "model.safetensors")
    return tmp_path


def written(source, **tensors) -> dict[str, torch.Tensor]:
    """Write new tensors and read them."""
    out = source / "out"
    out.mkdir()
    write_new_tensors(out, read_weight_files(source), tensors, progress=False)
    assert read_weight_files(out)
    return {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("chunk_bytes", [1, 37, 2**20])
@pytest.mark.parametrize("name, dtype", [("a", "F32"), ("b", "BF16"), ("c", "F64")])
def test_rows_factors_and_constants(name, dtype, chunk_bytes, source, monkeypatch):
    """With pieces of any size: one row at a time, some, all."""
    monkeypatch.setattr(new_tensors, "CHUNK_BYTES", chunk_bytes)
    stored = load_file(source / "model.safetensors")[name]
    signs = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    found = written(
        source,
        copy=NewTensor(dtype, (7, 5), (Piece(name),)),
        rows=NewTensor(dtype, (3, 5), (Piece(name, 2, 3, signs),)),
        scaled=NewTensor(dtype, (7, 5), (Piece(name, factors=2.0),)),
        stacked=NewTensor("F32", (3, 5), (Piece(constant=1.0, num_values=5), Piece(name, 4, 1), Piece(name, 1, 1))),
    )
    assert torch.equal(found["copy"], stored) and torch.equal(found["scaled"], 2 * stored)
    assert torch.equal(found["rows"], (stored[2:5].double() * signs[:, None]).to(stored.dtype))
    assert torch.equal(found["stacked"], torch.stack([torch.ones(5), stored[4].float(), stored[1].float()]))


def test_large_checkpoints_have_several_shards_and_an_index(source, monkeypatch):
    monkeypatch.setattr(new_tensors, "MAX_SHARD_BYTES", 200)
    tensors = {name: NewTensor("F32", (7, 5), (Piece("a"),)) for name in ("x", "y", "z")}
    found = written(source, **tensors)
    assert len(list((source / "out").glob("*.safetensors"))) == 3
    assert set(json.loads((source / "out" / INDEX_FILE).read_text())["weight_map"]) == {"x", "y", "z"} == set(found)
