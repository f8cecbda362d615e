"""Headers of weight files that safetensors would not read are refused before anything is linked to them."""

import shutil
from pathlib import Path

import pytest
from tiny_checkpoints import save_shard, save_stock

from hf_depthattn.checkpoints.checkpoint_files import SINGLE_FILE
from hf_depthattn.conversion.retrofit import retrofit
from hf_depthattn.errors import UserError


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("stock") / "llama")


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# label -> header, bytes of data
HEADERS = {
    "overlap": ({"a": TENSOR, "b": TENSOR | {"data_offsets": [4, 12]}}, 12),
    "gap": ({"a": TENSOR, "b": TENSOR | {"data_offsets": [12, 20]}}, 20),
    "gap at the start": ({"a": TENSOR | {"data_offsets": [8, 16]}}, 16),
    "reversed": ({"a": TENSOR | {"data_offsets": [8, 0]}}, 0),
    "negative offset": ({"a": TENSOR | {"data_offsets": [-8, 0]}}, 0),
    "negative shape": ({"a": TENSOR | {"shape": [-2]}}, 8),
    "unknown type": ({"a": TENSOR | {"dtype": "F33"}}, 8),
    "type is a list": ({"a": TENSOR | {"dtype": []}}, 8),
    "shape and size differ": ({"a": TENSOR | {"shape": [3]}}, 8),
    "shape is a number": ({"a": TENSOR | {"shape": 2}}, 8),
    "offsets are words": ({"a": TENSOR | {"data_offsets": ["0", "8"]}}, 8),
    "three offsets": ({"a": TENSOR | {"data_offsets": [0, 8, 8]}}, 8),
    "overflow": ({"a": TENSOR | {"shape": [2**40, 2**40]}}, 8),
    "a list": ([], 0),
    "a number for a tensor": ({"a": 3}, 0),
    "metadata of numbers": ({"__metadata__": {"format": 3}, "a": TENSOR}, 8),
}


@pytest.mark.parametrize("header, num_bytes", HEADERS.values(), ids=HEADERS.keys())
def test_a_broken_header_is_refused_in_one_line(header, num_bytes, stock, tmp_path):
    source = Path(shutil.copytree(stock, tmp_path / "source"))
    (source / SINGLE_FILE).unlink()
    save_shard(source / SINGLE_FILE, header, num_bytes)
    with pytest.raises(UserError, match="header") as error:
        retrofit(source, tmp_path / "out")
    assert "\n" not in str(error.value) and SINGLE_FILE in str(error.value)
