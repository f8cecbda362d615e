"""A small checkpoint, stock and retrofitted, and the answers of the stock one."""

from __future__ import annotations

from pathlib import Path

import pytest

RETROFITS = {
    "attn_res": {"num_blocks": 4},
    "moda": {"connection": "residual", "depth_kv": "attention+mlp"},
    "both": {"num_blocks": 4, "depth_kv": "attention+mlp"},
}


@pytest.fixture(scope="session")
def checkpoints(depthattn_data, tmp_path_factory) -> dict[str, Path]:
    from hf_depthattn import retrofit

    stock = depthattn_data / "stories260K" / "hf"
    folder = tmp_path_factory.mktemp("retrofits")
    for name, options in RETROFITS.items():
        retrofit(stock, folder / name, **options)
    return {"stock": stock, **{name: folder / name for name in RETROFITS}}


@pytest.fixture(scope="session")
def stock_results(checkpoints) -> dict:
    from harness_runs import LIKELIHOOD, model_of, run

    return run(model_of(checkpoints["stock"], batch_size=8), LIKELIHOOD)
