"""Ops that take the fields of their inputs as keyword arguments, like the oracles in the tests."""

from collections.abc import Callable
from functools import wraps

from hf_depthattn import attn_res_ops, moda_attention_ops


def with_keywords(op: Callable, inputs_class: type) -> Callable:
    """Wrap an op so that it takes the fields of its inputs as separate arguments."""

    @wraps(op)
    def run(*tensors, **options):
        fields = {name: options.pop(name) for name in inputs_class._fields if name in options}
        return op(inputs_class(*tensors, **fields), **options)

    return run


attn_res_read = with_keywords(attn_res_ops.attn_res_read, attn_res_ops.AttnResInputs)
attn_res_read_reference = with_keywords(attn_res_ops.attn_res_read_reference, attn_res_ops.AttnResInputs)
moda_attention = with_keywords(moda_attention_ops.moda_attention, moda_attention_ops.ModaInputs)
moda_attention_reference = with_keywords(moda_attention_ops.moda_attention_reference, moda_attention_ops.ModaInputs)
