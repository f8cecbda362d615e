"""Templates of the files that `kernel_hub` writes; braces are fields of `str.format`."""

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 6
license = "Apache-2.0"
backends = [{backends}]
{hub}
[torch-noarch]
"""

HUB_SECTION = """
[general.hub]
repo-id = "{repo_id}"
"""

FLAKE_NIX = """\
{
  description = "Triton kernels for Attention Residuals and Mixture-of-Depths Attention";
  inputs = {
    kernel-builder.url = "github:huggingface/kernels";
  };
  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

INIT_PY = '''\
"""Triton kernels for attention over depth; see CARD.md."""

{imports}

__all__ = [
{names}
]
'''

# The file that kernel-builder generates from its own template, with the backend in the name.
OPS_PY = '''\
import torch

_OPS_NAME = "{ops_name}"

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Prefix op by namespace."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''

# `kernels` before 0.11.2 imports a folder with the package's name inside the variant's folder.
COMPATIBILITY_PY = """\
import importlib.util
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parent.parent
_name = f"{package}_{{abs(hash(str(_folder))):x}}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        _name, _folder / "__init__.py", submodule_search_locations=[str(_folder)]
    )
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
__all__ = list(sys.modules[_name].__all__)
globals().update({{name: getattr(sys.modules[_name], name) for name in __all__}})
"""

TEST_PY = '''\
"""Compares the read with its equation, on a GPU, or with TRITON_INTERPRET=1 on a CPU."""

import os

import pytest
import torch
import {package}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def read(sources, query, eps):
    values = torch.stack(sources).double()
    logits = (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * query.double()).sum(-1)
    h = (logits.softmax(0)[..., None] * values).sum(0)
    return h


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), (torch.float16, 2e-3)] + ([] if INTERPRETED else [(torch.bfloat16, 1e-2)]),
)
def test_read_and_its_gradients(dtype, bound):
    torch.manual_seed(0)
    sources = [torch.randn(5, 24, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]
    query = (24**-0.5 * torch.randn(24, device=DEVICE)).requires_grad_()
    out, _ = {package}.attn_res_read_triton(sources, query, eps=1e-6)
    expected = read(sources, query, 1e-6)
    upstream = torch.randn_like(out)
    leaves = [*sources, query]
    results = zip(
        [out, *torch.autograd.grad(out, leaves, upstream)],
        [expected, *torch.autograd.grad(expected, leaves, upstream.double())],
    )
    for actual, exact in results:
        assert (actual.double() - exact).norm() <= bound * exact.norm()
'''

CARD_MD = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernels
- triton
---

# {name}

Triton kernels for attention over the depth of a transformer: the read of Attention Residuals
([arXiv 2603.15031](https://arxiv.org/abs/2603.15031)) and the depth part of Mixture-of-Depths Attention
([arXiv 2603.15619](https://arxiv.org/abs/2603.15619)), forward and backward. The files are copied from the Python
package `hf-depthattn` {package_version}; only the op names differ.

## How to use

```python
# pip install -U kernels
import torch
from kernels import get_kernel

kernel = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
sources = [torch.randn(2, 1024, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(9)]
query = torch.zeros(4096, device="cuda")
out, weights = kernel.attn_res_read_triton(sources, query, eps=1e-6, return_weights=True)
```

Triton compiles the kernels at their first call. They need Python 3.10, torch 2.9 and Triton 3.6 or later. Functions
whose names end in `_limit` take the inputs of an op and return `None` if its kernels support them, and otherwise the
reason why not: a dtype, a size or a device.

## Functions

{functions}

## Speed

Run `benchmarks/gpu_suite.py` of the package to compare the kernels with others on your GPU.
"""
