"""Tensor parallelism with a depth state that is divided among the processes along tokens (arXiv 2603.15031).

Under plain tensor parallelism, every process keeps all sources and computes every read for all tokens. With

    config = DistributedConfig(tp_size=8, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
    shard_tokens(model)

each of P processes keeps the sources of T / P tokens and reads, normalises and writes these only; attention and MLP
run as before, on all tokens and a part of the heads or features:

    plain    x [T] --> attention or MLP --> all-reduce --> y [T]
    sharded  x [T/P] --> all-gather --> attention or MLP --> reduce-scatter --> y [T/P]

The logits and gradients are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.tensor_parallel import RowwiseParallel, replace_layer_number_by_wildcard
from transformers.modeling_utils import PreTrainedModel

from ..host_layouts import HostLayout
from ..parallel_styles import SUMMED_GRADIENTS
from ..summed_gradients import sums_gradients, with_summed_gradients
from ..token_layout import TokenLayout

# Styles of modules that take a DTensor, or whose input comes from such a module.
_TAKE_DTENSOR = {"colwise", "rowwise", SUMMED_GRADIENTS}


def shard_tokens(model: PreTrainedModel) -> None:
    """Divide the depth state of a tensor-parallel model among its processes, along tokens.

    A forward pass keeps the whole state if its number of tokens is 1 (decoding) or not a multiple of the number of
    processes, or if hidden states or depth attentions are requested. Checkpoints are not affected.

    Args:
        model: a model with depth attention, loaded with a tensor-parallel plan.

    Raises:
        ValueError: if the model has no depth attention, is not tensor-parallel, has PEFT adapters, or its tokens are
            sharded already. Adapters that are added later are refused in the next forward pass.
    """
    base = model.base_model
    layers = getattr(base, "layers", None)
    if layers is None or not hasattr(layers[0], "attn_depth"):
        raise ValueError(f"model: {type(model).__name__} is not a model with depth attention of this library.")
    mesh = _tensor_parallel_mesh(model)
    if any(isinstance(hook, TokenShard) for hook in base._forward_pre_hooks.values()):
        raise ValueError("model: its tokens are sharded already.")
    shard = TokenShard(mesh, [getattr(layer, name) for layer in layers for name in _sublayers(layer)])
    shard.refuse_adapters()
    prefix = "" if base is model else f"{model.base_model_prefix}."
    plan = {name.removeprefix(prefix): style for name, style in (model._tp_plan or {}).items()}
    for index, layer in enumerate(layers):
        (attention, mlp), companion = _sublayers(layer), layer.layout.mlp.companion
        readers = {attention: [attention], mlp: [mlp, "mlp_depth_kv", *([companion] if companion else [])]}
        for name, names in readers.items():
            if all(_styles(layer, reader, plan, index) <= _TAKE_DTENSOR for reader in names):
                shard.take_dtensor.add(getattr(layer, name))
        _let_scatter(layer, attention, plan, shard)
        # The output of a companion is added to that of the MLP, and has all tokens.
        if companion is None:
            _let_scatter(layer, mlp, plan, shard)
    base.register_forward_pre_hook(shard, with_kwargs=True)


class TokenShard:
    """A hook of the base model that gives the layers of each forward pass their `TokenLayout`.

    Args:
        mesh: the one-dimensional mesh of the processes.
        sublayers: the attention and MLP modules of all layers.

    Attributes:
        take_dtensor: the attention and MLP modules that take their input as a DTensor.
        scatters: whether rowwise modules that can do so return the tokens of this process only.
    """

    def __init__(self, mesh: DeviceMesh, sublayers: Sequence[nn.Module]):
        self.mesh = mesh
        self.sublayers = sublayers
        self.take_dtensor: set[nn.Module] = set()
        self.scatters = False

    def __call__(self, base: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.refuse_adapters()
        given = inspect.signature(base.forward).bind(*args, **kwargs).arguments
        inputs = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if inputs is None:
            # The host raises an error.
            return None
        num_tokens = inputs.shape[1]
        records = kwargs.get("output_depth_attentions") or kwargs.get("depth_recorder") is not None
        wants_states = kwargs.get("output_hidden_states")
        if records or (base.config.output_hidden_states if wants_states is None else wants_states):
            return None
        if num_tokens == 1 or num_tokens % self.mesh.size():
            return None
        return args, kwargs | {"token_layout": ShardedTokens(self, num_tokens)}

    def refuse_adapters(self) -> None:
        """Refuse the layers of PEFT, which take no DTensor and add outputs with all tokens to those with a part.

        Raises:
            ValueError: if a sublayer has one.
        """
        for sublayer in self.sublayers:
            for name, child in sublayer.named_children():
                # The place of the adapted module in the layers of all tuners of PEFT.
                if "base_layer" in child._modules:
                    raise ValueError(
                        f"model: shard_tokens does not support PEFT adapters, which {type(sublayer).__name__} has in "
                        f"{name}; merge them (`merge_and_unload`), or use the adapter without it."
                    )


class ShardedTokens(TokenLayout):
    """The layout of one forward pass: process p has the tokens p T / P ... (p + 1) T / P - 1.

    Args:
        shard: the processes and the modules.
        num_tokens: T, a multiple of the number P of processes.
    """

    def __init__(self, shard: TokenShard, num_tokens: int):
        self.shard = shard
        self.num_tokens = num_tokens

    @contextmanager
    def in_layer(self, layer: nn.Module) -> Iterator[None]:
        self.shard.scatters = True
        try:
            with sums_gradients(_token_wise_modules(layer), self.shard.mesh.get_group()):
                yield
        finally:
            self.shard.scatters = False

    def own(self, tensor: Tensor) -> Tensor:
        if tensor.shape[1] != self.num_tokens:
            # From a rowwise module that scatters.
            return tensor
        whole = DTensor.from_local(tensor, self.shard.mesh, [Replicate()], run_check=False)
        part = whole.redistribute(placements=[Shard(1)]).to_local()
        # A view would keep all tokens.
        return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()

    def whole(self, tensor: Tensor, module: nn.Module | None = None) -> Tensor:
        part = DTensor.from_local(tensor, self.shard.mesh, [Shard(1)], run_check=False)
        whole = part.redistribute(placements=[Replicate()])
        # The gradient of a DTensor is summed and scattered once, that of a tensor in every module that gets it.
        return whole if torch.is_grad_enabled() and module in self.shard.take_dtensor else whole.to_local()

    def shared(self, tensor: Tensor) -> Tensor:
        return with_summed_gradients([tensor], self.shard.mesh.get_group())[0]


def _tensor_parallel_mesh(model: PreTrainedModel) -> DeviceMesh:
    sharded = (parameter for parameter in model.parameters() if isinstance(parameter, DTensor))
    # transformers 5.16 does not set `model.tp_size`.
    tp_size = model.tp_size or getattr(getattr(model.config, "distributed_config", None), "tp_size", None)
    parameter = next(sharded, None) if (tp_size or 1) > 1 else None
    if parameter is None:
        raise ValueError(
            "model: it is not tensor-parallel; load it with `from_pretrained(..., "
            'distributed_config=DistributedConfig(tp_size=N, tp_plan="auto"))` in N >= 2 processes.'
        )
    mesh = parameter.device_mesh
    return mesh if mesh.ndim == 1 else mesh["tp"]


def _sublayers(layer: nn.Module) -> tuple[str, str]:
    """Return the names of the attention and of the MLP module of a layer."""
    return cast(str, layer.attention_name), cast(HostLayout, layer.layout).mlp.module


def _token_wise_modules(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer that run on the tokens of one process: sites and norms."""
    layout = cast(HostLayout, layer.layout)
    norms = [
        name
        for part in (layout.attention, layout.mlp)
        for name in (part.pre_norm, part.post_norm, part.stream_norm)
        if name
    ]
    modules = [getattr(layer, name) for name in ("attn_depth", "mlp_depth", "out_depth", *norms)]
    return [module for module in modules if module is not None]


def _styles(layer: nn.Module, name: str, plan: dict[str, str], index: int) -> set[str | None]:
    """Return the tensor-parallel styles of all modules with parameters within a child of a layer."""
    child = getattr(layer, name, None)
    if child is None:
        return set()
    prefix = f"layers.{index}.{name}"
    names = [f"{prefix}.{inner}" if inner else prefix for inner, module in child.named_modules() if module._parameters]
    return {plan.get(replace_layer_number_by_wildcard(inner)) for inner in names}


def _let_scatter(layer: nn.Module, name: str, plan: dict[str, str], shard: TokenShard) -> None:
    """Let the output projection of an attention or MLP module reduce-scatter its result instead of all-reducing it.

    Modules without a plain linear output projection of their own are left as they are; `ShardedTokens.own` slices
    their output.
    """
    children = getattr(layer, name).named_children()
    outputs = [child for inner, child in children if plan.get(f"layers.*.{name}.{inner}") == "rowwise"]
    if len(outputs) != 1:
        return
    (output,) = outputs
    whole = vars(output).get("forward")
    # transformers' own wrapper, and no other library's.
    if type(output) is not nn.Linear or type(whole) is not FunctionType or hasattr(output, "_hf_hook"):
        return
    del output.forward
    scattered = RowwiseParallel(output_layouts=Shard(1)).install_forward(output, shard.mesh).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (scattered if shard.scatters else whole)(*args, **kwargs)

    output.forward = forward  # type: ignore[method-assign]
