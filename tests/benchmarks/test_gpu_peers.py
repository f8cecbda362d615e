"""Rows of the GPU suite for other people's kernels, on a CPU: stand-ins take their place."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
from gpu_suite_tools import dry_run, module, python_path, rows_of
from keyword_ops import attn_res_read_reference


def stand_in(monkeypatch, name: str, **attributes) -> None:
    """A module, and the packages around it."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        package = ".".join(parts[:i])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
            sys.modules[package].__path__ = []
    found = types.ModuleType(name)
    vars(found).update(attributes)
    monkeypatch.setitem(sys.modules, name, found)


def plain_read(sources, query, eps):
    return attn_res_read_reference(list(sources), query.float(), eps=eps)[0]


def rms_norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def peers(monkeypatch) -> None:
    """Stand-ins with the signatures of the originals, computed by the reference."""
    # transformers asks for some of these packages when it is imported, and would take the stand-ins for them.
    module("gpu_suite")

    def fused_attnres(
        query,
        residuals,
        rms_weight,
        output_rms_weight=None,
        rms_eps=1e-6,
        scale=1.0,
        return_weights=False,
        checkpoint_level=1,
    ):
        assert query.dtype == rms_weight.dtype == residuals[0].dtype
        h = plain_read(residuals, query * rms_weight, rms_eps)
        return h if output_rms_weight is None else rms_norm(h, output_rms_weight, rms_eps)

    def liger_attn_res(V, w_query, w_norm, eps=1e-6):
        assert V.dim() == 4
        return plain_read(V.unbind(0), w_query * w_norm, eps)

    def phase_1(values, pseudo_queries, eps):
        outs = torch.stack([plain_read(values.unbind(0), query, eps) for query in pseudo_queries])
        return outs, outs.new_zeros(outs.shape[:-1])

    class BlockAttentionResiduals:
        @staticmethod
        def apply(inputs, pseudo_queries, layers, block_size, eps, *flat_layer_params):
            assert pseudo_queries.dtype == inputs.dtype
            found = [parameter for layer in layers for parameter in layer.parameters()]
            given = list(flat_layer_params)
            assert len(given) == len(layers) and all(a is b for a, b in zip(found, given, strict=False))
            blocks = [inputs]
            for i, layer in enumerate(layers):
                update = layer(plain_read(blocks, pseudo_queries[i], eps))
                blocks = [*blocks, update] if i % block_size == 0 else [*blocks[:-1], blocks[-1] + update]
            return plain_read(blocks, pseudo_queries[-1], eps)

    def attention(q, k, v, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2)

    def parallel_attn(q, k, v, g=None, scale=None, window_size=None, cu_seqlens=None):
        return attention(q, k, v, scale)

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        assert causal
        return attention(q, k, v, softmax_scale)

    stand_in(monkeypatch, "fla.ops.attnres", fused_attnres=fused_attnres)
    stand_in(monkeypatch, "fla.ops.attnres.backends.gluon")
    stand_in(monkeypatch, "attnres", attnres=lambda values, query, eps: plain_read(values, query, eps))
    stand_in(monkeypatch, "liger_kernel.transformers.functional", liger_attn_res=liger_attn_res)
    stand_in(monkeypatch, "flash_attn_res.ops.phase_1", phase_1_batched_attention_triton_op=phase_1)
    stand_in(monkeypatch, "flash_attn_res.experimental.autograd", BlockAttentionResiduals=BlockAttentionResiduals)
    stand_in(monkeypatch, "fla.ops.attn", parallel_attn=parallel_attn)
    stand_in(monkeypatch, "flash_attn_interface", flash_attn_func=flash_attn_func)


@pytest.mark.parametrize("case_name", ["read L=9 d=7168 8192 tokens", "Block L=64 S=8 d=4096 16K"])
def test_calls_of_peers_have_the_reference_s_results(case_name, monkeypatch):
    peers(monkeypatch)
    run = module("gpu_run")
    case = next(case for case in module("gpu_attn_res").cases(tiny=True) if case.name == case_name)
    names = [row.name for row in case.rows if row.kind == "peer" and not row.slow_to_compile]
    assert len(names) == 5
    for row in case.rows:
        if row.name in names:
            found = run.row_parity(row, case, torch.device("cpu"))
            assert found["ok"], (row.name, found)


def test_the_gluon_row_sets_the_variable_for_its_own_calls_only(monkeypatch):
    seen = []

    def fused_attnres(query, residuals, *_, **__):
        seen.append(os.environ.get("FLA_ATTNRES_GLUON"))
        return residuals[0]

    peers(monkeypatch)
    stand_in(monkeypatch, "fla.ops.attnres", fused_attnres=fused_attnres)
    rows = module("gpu_peers")
    sources, query = [torch.zeros(1, 2, 4)], torch.zeros(4)
    for before in (None, "0"):
        monkeypatch.delenv("FLA_ATTNRES_GLUON", raising=False)
        if before is not None:
            monkeypatch.setenv("FLA_ATTNRES_GLUON", before)
        rows.fla_gluon_read(sources, query, None)
        rows.fla_read(sources, query, None)
    assert seen == ["1", None, "1", "0"]


def test_attention_alone_is_called_with_its_layout(monkeypatch):
    peers(monkeypatch)
    moda = module("gpu_moda")
    case = moda.cases(tiny=True)[0]
    problem = case.make(case.setting, torch.float32, torch.device("cpu"))
    rows = {row.name: row for row in case.rows}
    expected = rows["vendor attention alone, flash"].solve(problem)[0]
    for name in ("vendor attention alone, FA3", "FLA's Triton attention alone"):
        torch.testing.assert_close(rows[name].solve(problem)[0], expected)


def test_failing_peer_is_written_down_and_wrong_one_has_no_speed(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("deep inside")

    peers(monkeypatch)
    stand_in(monkeypatch, "fla.ops.attnres", fused_attnres=fails)
    wrong = {"liger_attn_res": lambda V, w_query, w_norm, eps: V.mean(0)}
    stand_in(monkeypatch, "liger_kernel.transformers.functional", **wrong)
    code, result = dry_run("--only", "decode read L=9 d=4096 1", "--parts", "attn_res", output=tmp_path / "r.json")
    rows = rows_of(result, "decode read")
    assert rows["FLA fused_attnres"]["reason"] == "ZeroDivisionError: deep inside"
    assert rows["Liger liger_attn_res"]["status"] == "wrong" and "passes" not in rows["Liger liger_attn_res"]
    assert rows["flash-attn-res, phase 1"]["status"] == "ok"
    # Only our own mistakes fail the run.
    assert code == 0 and result["complete"]


OFFICIAL = '''
import torch

def parallel_moda(q, k, v, g=None, cached_k=None, cached_v=None, scale=None, cu_seqlens=None, moda_group_num=1):
    """The official test's reference, batched: row t G + g of q, row t L + l of the slots."""
    num_tokens = k.shape[1]
    num_slots = cached_k.shape[1] // num_tokens
    q, k, v = q.unflatten(1, (num_tokens, moda_group_num)).float(), k.float(), v.float()
    slot_k, slot_v = (x.unflatten(1, (num_tokens, num_slots)).float() for x in (cached_k, cached_v))
    seq = scale * torch.einsum("btghd,bshd->btghs", q, k)
    seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()[:, None, None]
    depth = scale * torch.einsum("btghd,btlhd->btghl", q, slot_k)
    weights = torch.cat((seq.masked_fill(~seen, -torch.inf), depth), -1).softmax(-1)
    seq, depth = weights.split((num_tokens, num_slots), -1)
    out = torch.einsum("btghs,bshd->btghd", seq, v) + torch.einsum("btghl,btlhd->btghd", depth, slot_v)
    return out.flatten(1, 2).to(torch.bfloat16)
'''


def test_official_kernel_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    package = tmp_path / "repo" / "libs" / "moda_triton" / "fla" / "ops" / "moda"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(OFFICIAL)
    monkeypatch.setenv("PYTHONPATH", python_path())
    arguments = ("--parts", "moda", "--only", "T=4096 G=8 L=64 d=64", "--moda-repo", str(tmp_path / "repo"))
    _, result = dry_run(*arguments, output=tmp_path / "r.json")
    row = rows_of(result, "MoDA")["official kernel (hustvl/MoDA)"]
    assert row["status"] == "ok" and row["parity"]["ok"], row
    assert set(row["passes"]) == {"forward", "forward+backward"}
    assert "fla.ops.moda" not in sys.modules


def test_official_kernel_that_cannot_run_is_listed(tmp_path, monkeypatch):
    official, cases = module("gpu_moda_official"), module("gpu_moda")
    row = official.official_row(tmp_path, torch.device("cpu"))
    answers = iter(
        [
            subprocess.CompletedProcess([], 0, stdout='noise\n{"absent": "no fla/ops/moda"}\n', stderr=""),
            subprocess.CompletedProcess([], -11, stdout="", stderr="Segmentation fault"),
        ]
    )
    monkeypatch.setattr(official.subprocess, "run", lambda *_, **__: next(answers))
    case = cases.cases(tiny=True, official=row)[0]
    found = [module("gpu_run").guarded(lambda: case.rows[-1].elsewhere(case), 10) for _ in range(2)]
    assert found[0] == {"status": "absent", "reason": "no fla/ops/moda"}
    assert found[1]["status"] == "failed" and "Segmentation fault" in found[1]["reason"]
