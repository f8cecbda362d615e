"""Run with TRITON_INTERPRET=1: rows of the GPU suite that call our kernels directly have the reference's results."""

import gpu_attn_res
import gpu_run
import torch

# bfloat16 is wrong in the interpreter.
gpu_run.PARITY_DTYPES = gpu_run.PARITY_STACK_DTYPES = (torch.float32,)
DIRECT = {"ours, fused norm", "ours, fused reads", "ours, two phases", "ours, pull backward"}

seen = set()
for case in gpu_attn_res.cases(tiny=True):
    # Tiny cases of one kind are the same.
    kind = case.name.split()[0]
    for row in case.rows:
        if row.name in DIRECT and (kind, row.name) not in seen:
            seen.add((kind, row.name))
            found = gpu_run.guarded(lambda row=row, case=case: gpu_run.row_parity(row, case, torch.device("cpu")), 60)
            print(f"{kind}: {row.name}: {found['status']}, {found.get('ok', found.get('reason'))}")
