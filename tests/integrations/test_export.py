"""Exported models hold no ops of this package: they run where it is not installed, in torch and in ONNX Runtime."""

import importlib.util

import pytest
import torch
from model_checks import depth_model, randomise_depth, relative_max_error
from processes import run_python
from tiny_hosts import random_ids, tiny_stock_model
from torch import Tensor, nn
from torch.export import Dim

from hf_depthattn.moda_depth_ops import moda_depth_merge

COMBINATIONS = {
    "AttnRes": {"num_blocks": 2},
    "MoDA": {"connection": "residual", "depth_kv": "attention+mlp"},
    "both": {"num_blocks": 2, "depth_kv": "attention+mlp", "depth_gate": "head"},
}
OPTIONS = {
    "AttnRes with options": {"sublayers_per_block": 1, "query": "input", "depth_activation": "sigmoid"},
    "static mix": {"num_blocks": 2, "static_mix": True},
    "MoDA, unrotated": {"connection": "residual", "depth_kv": "attention", "depth_key_rope": "none"},
}
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra 'export'",
)


class Logits(nn.Module):
    """Token ids and mask to logits: plain tensors, so that running it takes nothing but torch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def model_with(fields: dict, host: str = "llama") -> Logits:
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2} if host == "llama" else {}
    model = depth_model(tiny_stock_model(host, **layers), **fields)
    randomise_depth(model)
    return Logits(model)


def padded_batch(batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch_size, length, dtype=torch.long)
    mask[0, :2] = 0
    return random_ids(batch_size, length), mask


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    """With any batch size and any length."""
    shape = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return torch.export.export(module, padded_batch(2, 7), dynamic_shapes=(shape, shape))


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    targets = {node.target for module in program.graph_module.modules() for node in module.graph.nodes}
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


def tokens_seen(logits: Tensor, mask: Tensor) -> Tensor:
    return logits[mask.bool()]


@pytest.mark.parametrize(
    "combination", [*COMBINATIONS, *(pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS)]
)
def test_a_program_has_ops_of_torch_only_and_runs_on_other_shapes(combination):
    module = model_with({**COMBINATIONS, **OPTIONS}[combination])
    program = exported(module)
    assert namespaces(program) == {"aten"}
    ids, mask = padded_batch(3, 12)
    found, expected = (tokens_seen(run(ids, mask), mask) for run in (program.module(), module))
    assert relative_max_error(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("host", ["qwen3", "gemma3_text", "gpt_oss"])
def test_hosts_with_norms_windows_and_sinks_export(host):
    module = model_with(COMBINATIONS["both"], host)
    program = exported(module)
    assert "depthattn" not in namespaces(program)
    ids, mask = padded_batch(3, 12)
    found, expected = (tokens_seen(run(ids, mask), mask) for run in (program.module(), module))
    assert relative_max_error(found, expected) < 1e-5


def test_a_saved_program_runs_without_this_package(tmp_path):
    module = model_with(COMBINATIONS["both"])
    torch.export.save(exported(module), tmp_path / "model.pt2")
    ids, mask = padded_batch(3, 12)
    expected = module(ids, mask)
    torch.save((ids, mask, expected), tmp_path / "inputs.pt")
    code = f"""
import sys
for name in ("hf_depthattn", "transformers"):
    sys.modules[name] = None  # importing it raises
import torch
program = torch.export.load({str(tmp_path / "model.pt2")!r}).module()
ids, mask, expected = torch.load({str(tmp_path / "inputs.pt")!r}, weights_only=True)
difference = (program(ids, mask) - expected)[mask.bool()].abs().max()
assert difference < 1e-5 * expected.abs().max(), difference
"""
    result = run_python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_onnx_runtime_agrees(combination, tmp_path):
    import onnxruntime

    module = model_with(COMBINATIONS[combination])
    shape = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    program = torch.onnx.export(module, padded_batch(2, 7), dynamo=True, dynamic_shapes=(shape, shape), verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    ids, mask = padded_batch(3, 12)
    names = [value.name for value in session.get_inputs()]
    (logits,) = session.run(None, dict(zip(names, (ids.numpy(), mask.numpy()), strict=True)))
    found, expected = tokens_seen(torch.from_numpy(logits), mask), tokens_seen(module(ids, mask), mask)
    assert relative_max_error(found, expected) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("name", ["dynamo", "onnx"])
def test_transformers_own_exporters_agree(name, combination):
    module_name = f"transformers.exporters.exporter_{name}"
    if importlib.util.find_spec("transformers.exporters") is None:
        pytest.skip("this version of transformers has no exporters")
    if name == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    exporters = importlib.import_module(module_name)
    exporter, config = {"dynamo": ("DynamoExporter", "DynamoConfig"), "onnx": ("OnnxExporter", "OnnxConfig")}[name]
    model = model_with(COMBINATIONS[combination]).model
    model.config.use_cache = False
    ids, mask = padded_batch(2, 7)
    arguments = {"input_ids": ids, "attention_mask": mask}
    program = getattr(exporters, exporter)().export(model, arguments, config=getattr(exporters, config)(dynamic=True))
    if not callable(program):
        pytest.skip("exports of this version of transformers do not run by themselves")
    ids, mask = padded_batch(3, 12)
    logits = program(input_ids=ids, attention_mask=mask)["logits"]
    expected = tokens_seen(model(ids, attention_mask=mask).logits, mask)
    assert relative_max_error(tokens_seen(torch.as_tensor(logits), mask), expected) < 1e-3


class Merge(nn.Module):
    def forward(self, query, key, value, seq_out, seq_lse):
        return moda_depth_merge(query, [key, 2 * key], [value, -value], seq_out, seq_lse, scale=0.4, softcap=5.0)


def test_the_merge_of_slots_exports_without_its_op():
    """What `flex_attention` uses; its plain form has the op's values and gradients."""
    torch.manual_seed(0)
    shapes = ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 6), (2, 4, 5, 6), (2, 4, 5))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    program = torch.export.export(Merge(), tuple(inputs))
    assert namespaces(program) == {"aten"}
    results = []
    for run in (program.module(), Merge()):
        out, lse = run(*inputs)
        results.append([out, lse, *torch.autograd.grad((out * out.cos()).sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
