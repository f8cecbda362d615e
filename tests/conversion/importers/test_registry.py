"""Which format a checkpoint has."""

import foreign_checkpoints
import pytest
import torch
from foreign_models import ForeignModel
from imports_of_checkpoints import check_refused
from tiny_checkpoints import save_stock

from hf_depthattn import retrofit
from hf_depthattn.conversion.foreign_formats import FORMATS
from hf_depthattn.conversion.import_checkpoint import import_checkpoint
from hf_depthattn.conversion.importers.registry import IMPORTERS
from hf_depthattn.errors import UserError


def test_the_names_of_formats_are_those_of_the_importers():
    assert tuple(IMPORTERS) == FORMATS


def test_the_format_can_be_given_and_must_be_right(tmp_path):
    source = foreign_checkpoints.fla(tmp_path / "source", ForeignModel(sublayers_per_block=4))
    with pytest.raises(UserError, match=r"is not of the format 'kimi' but of 'fla'"):
        import_checkpoint(source, tmp_path / "out", format="kimi")
    with pytest.raises(UserError, match=r"format: 'keras' is not one of auto, fla, .*blagpt-moda"):
        import_checkpoint(source, tmp_path / "out", format="keras")
    assert import_checkpoint(source, tmp_path / "out", format="fla").format == "fla"


def test_other_checkpoints_are_refused_with_what_to_do(tmp_path):
    stock = save_stock(tmp_path / "stock")
    check_refused(stock, tmp_path / "new", "no depth parameters", "depthattn retrofit")
    retrofit(stock, tmp_path / "out")
    check_refused(tmp_path / "out", tmp_path / "new", "already a checkpoint of this package")


# Model type of Inkling 2, OLMo-core's mHC and the names of mHC in transformers.
@pytest.mark.parametrize(
    "model_type, name",
    [
        ("llama", "model.layers.0.hc.alpha"),
        ("inkling2", "model.layers.0.attention_input.query"),
        ("llama", "model.layers.0.attention_hyper_connection.residual_bias"),
        ("deepseek_v4", "model.layers.0.attn_hc.base"),
    ],
    ids=["hyper-connections", "Inkling 2", "mHC", "mHC of DeepSeek V4"],
)
def test_residual_schemes_of_no_format_are_refused_by_the_name_of_their_tensors(model_type, name, tmp_path):
    config = {"model_type": model_type, "num_hidden_layers": 1}
    source = foreign_checkpoints.save(tmp_path / "source", config, {name: torch.ones(2)})
    check_refused(source, tmp_path / "new", f"{name!r}", "not known here", "docs/importing.md")
