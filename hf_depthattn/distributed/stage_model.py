"""The model of one pipeline stage: a causal LM with the modules of its stage only, run by the host's own forward.

A stage has the decoder layers of its plan, the first one also the embeddings, the last one the final norm and the
head. Placeholders stand for the other modules, so that layers keep their numbers, and parameters the names of the
whole model. In every stage, the host's forward makes masks and rotary embeddings and loops over its layers:

    first stage    input_ids --> embeddings --> [ layers | placeholders: state leaves ]
    middle stage   tensors ----> [ placeholders: state enters | layers | placeholders: state leaves ]
    last stage     tensors ----> [ placeholders: state enters | layers ] --> norm --> head --> loss

The stacked weights of all AttnRes reads are in every stage, tied embeddings in the first and in the last one
(`shared_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..attn_res_reads import DEPTH_READS, ReadWeights
from ..configuration_depthattn import DepthAttnConfig
from ..depth_layer import DepthTransit
from ..depth_state import Carried, DepthState
from .depth_items import StateItem, depth_state_items, sources_after
from .stage_plan import StagePlan

# Arguments of the loss, which the decoder does not need.
_OF_LOSS = ("num_items_in_batch", "shift_labels")

# Outputs that no stage has as a whole, and arguments of decoding.
_REFUSED = (
    "output_depth_attentions",
    "output_hidden_states",
    "output_attentions",
    "past_key_values",
    "use_cache",
    "inputs_embeds",
)


class AbsentModule(nn.Module):
    """The placeholder of embeddings, a norm or a head that another stage has; it returns its first tensor."""

    def forward(self, *args, **kwargs) -> Tensor | None:
        return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class AbsentLayer(nn.Module):
    """The placeholder of a decoder layer that another stage has.

    Args:
        layer: the layer, whose plain attributes it takes over, since the host's loop may use them.
        is_before: whether the layer comes before those of the stage.
    """

    def __init__(self, layer: nn.Module, is_before: bool):
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.is_before = is_before

    def forward(
        self, hidden_states: Tensor | DepthState, *args, depth_transit: DepthTransit, **kwargs
    ) -> Tensor | DepthState:
        if self.is_before:
            return cast(DepthState, depth_transit.entering)
        if isinstance(hidden_states, DepthState):
            depth_transit.leaving = hidden_states.settled()
            # The host's norm takes a tensor; what it makes of it is not used.
            return _stream(hidden_states.partial)
        return hidden_states


class _HandOver(torch.autograd.Function):
    """The same tensor as the result of a node that is no view: `stage_backward_input` detaches outputs in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def stage_class(base: type[PreTrainedModel], plan: StagePlan) -> type[PreTrainedModel]:
    """Return the class of a stage's model, which `from_pretrained` loads with the stage's tensors only.

    Its forward takes the tensors of `plan.takes` (the first stage: `input_ids` [B, T]) and keyword arguments of the
    host (`attention_mask`, `position_ids`, `labels`, ...), the same in all stages. It returns the tensors of
    `plan.gives`; in the last stage the loss, or the logits without `labels`. With `read_leaves`, tensors equal to the
    results of the module `depth_reads`, the reads use these.

    Args:
        base: `DepthAttnForCausalLM` or a subclass.
        plan: the plan of the stage.
    """

    def __init__(self, config: DepthAttnConfig):
        base.__init__(self, config)
        _remove_other_stages(self, plan)

    def forward(
        self,
        *tensors: Tensor,
        labels: Tensor | None = None,
        read_leaves: tuple[Tensor, ...] = (),
        **kwargs,
    ) -> Tensor | tuple[Tensor, ...]:
        if read_leaves:
            score_weights, *key_norm = read_leaves
            weights = ReadWeights(score_weights, key_norm[0] if key_norm else None, self.config.attn_res_schedule)
            kwargs[DEPTH_READS] = Carried(weights)
        if plan.is_last:
            return _run_last(self, plan, tensors, labels, kwargs, super(cls, self).forward)
        return _run(self, plan, tensors, kwargs)

    def should_save_on_this_rank(self, is_main_process: bool) -> bool:
        # In transformers only the first process of all saves, but every stage has other tensors.
        return is_main_process

    namespace = {
        "__init__": __init__,
        "forward": forward,
        "should_save_on_this_rank": should_save_on_this_rank,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        # Tensors of other stages.
        "_keys_to_ignore_on_load_unexpected": [r".*"],
    }
    cls: type[PreTrainedModel] = type(base.__name__, (base,), namespace)
    return cls


def router_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the indices of the layers whose router logits the loss uses; none without an auxiliary loss.

    Args:
        model: a whole causal LM, maybe on the meta device.

    Raises:
        ValueError: if a layer of the host records several tensors of router logits.
    """
    if not getattr(model.config, "output_router_logits", False):
        return ()
    recorded = (getattr(model.base_model, "_can_record_outputs", None) or {}).get("router_logits", ())
    recorders = recorded if isinstance(recorded, list | tuple) else [recorded]
    routers: list[int] = []
    for index, layer in enumerate(cast(nn.ModuleList, model.base_model.layers)):
        modules = [(f".{name}.", module) for name, module in layer.named_modules()]
        num_routers = sum(_records(each, name, module) for each in recorders for name, module in modules)
        if num_routers > 1:
            raise ValueError(
                "output_router_logits: True is not possible in pipeline stages on "
                f"{model.config.text_config.model_type!r}, whose layers have {num_routers} routers each; only "
                "False is allowed."
            )
        routers += [index] * num_routers
    return tuple(routers)


def _records(recorder: Any, name: str, module: nn.Module) -> bool:
    """Return whether transformers records a module with a name, as `recursively_install_hooks` decides."""
    if not isinstance(module, getattr(recorder, "target_class", recorder)):
        return False
    layer_name = getattr(recorder, "layer_name", None)
    return layer_name is None or f".{layer_name.strip('.')}." in name


def refuse_arguments(config: DepthAttnConfig, kwargs: dict) -> None:
    """Refuse arguments of a causal LM that are not possible in pipeline stages.

    Args:
        config: the model's config.
        kwargs: keyword arguments of the forward of a stage.

    Raises:
        ValueError: for outputs that no stage has as a whole, for arguments of decoding, and if `output_router_logits`
            differs from the config.
    """
    for name in _REFUSED:
        value = kwargs.get(name)
        if value is not None and value is not False:
            shown = value if isinstance(value, bool) else f"a {type(value).__name__}"
            raise ValueError(f"{name}: {shown} is not possible in a pipeline stage, only None.")
    has_routers = bool(getattr(config, "output_router_logits", False))
    if kwargs.get("output_router_logits") not in (None, has_routers):
        raise ValueError(
            f"output_router_logits: {kwargs['output_router_logits']!r} differs from the config's {has_routers}, by "
            "which the stages are planned; set it in the config."
        )


def _remove_other_stages(model: PreTrainedModel, plan: StagePlan) -> None:
    """Replace the modules of other stages by placeholders, and note which parameters other stages have too."""
    decoder = model.base_model
    layers = cast(nn.ModuleList, decoder.layers)
    for index, layer in enumerate(layers):
        if index not in plan.layers:
            layers[index] = AbsentLayer(layer, is_before=index < plan.layers.start)
    tied = set(model.all_tied_weights_keys.values())
    of_all_stages: list[str] = []
    of_both_ends: list[str] = []
    for name, child in decoder.named_children():
        names = [f"{model.base_model_prefix}.{name}.{own}" for own, _ in child.named_parameters()]
        if name == DEPTH_READS:
            of_all_stages += names
        # A norm without parameters may have another use: NanoChat also runs its final one on the embeddings.
        elif name != "layers" and names:
            is_tied = not tied.isdisjoint(names)
            if is_tied and plan.num_stages > 1:
                of_both_ends += names
            is_present = plan.is_last if name.endswith("norm") else plan.is_first
            if not is_present and not (is_tied and plan.is_last):
                setattr(decoder, name, AbsentModule())
    if not plan.is_last:
        for name, child in model.named_children():
            if child is not decoder:
                setattr(model, name, AbsentModule())
        model.all_tied_weights_keys = decoder.all_tied_weights_keys = {}  # type: ignore[assignment]
    # Read by `shared_parameters`. To torch's types, every attribute is a tensor or a module.
    model.parameters_of_all_stages = tuple(of_all_stages)  # type: ignore[assignment]
    model.parameters_of_both_ends = tuple(of_both_ends)  # type: ignore[assignment]


def _run(model: PreTrainedModel, plan: StagePlan, tensors: Sequence[Tensor], kwargs: dict) -> tuple[Tensor, ...]:
    """Run the host's decoder in a stage that is not the last one, and return what the next stage receives."""
    given, transit, inputs = _enter(model, plan, tensors, kwargs)
    routers = [item for item in plan.gives if item.kind == "router_logits" and item not in given]
    if routers:
        inputs["output_router_logits"] = True
    outputs = model.base_model(**{name: value for name, value in inputs.items() if name not in _OF_LOSS})
    assert transit.leaving is not None, "a placeholder follows the last layer of the stage"
    made = _made(cast(DepthAttnConfig, model.config), plan, transit.leaving)
    made |= zip(routers, outputs["router_logits"] if routers else (), strict=True)
    # What only passes through leaves as the leaf that came: its gradient needs no node of the graph.
    return tuple(given[item] if item in given else _HandOver.apply(made[item].contiguous()) for item in plan.gives)


def _run_last(
    model: PreTrainedModel,
    plan: StagePlan,
    tensors: Sequence[Tensor],
    labels: Tensor | None,
    kwargs: dict,
    forward: Callable,
) -> Tensor:
    """Run the host's causal LM in the last stage, and return its loss or logits."""
    given, _, inputs = _enter(model, plan, tensors, kwargs)
    earlier = tuple(given[item] for item in plan.takes if item.kind == "router_logits")

    def with_earlier_routers(decoder: nn.Module, args: tuple, outputs: Any) -> Any:
        outputs["router_logits"] = (*earlier, *(outputs.get("router_logits") or ()))
        return outputs

    hook = model.base_model.register_forward_hook(with_earlier_routers) if earlier else None
    try:
        outputs = forward(**inputs, labels=labels)
    finally:
        if hook is not None:
            hook.remove()
    return outputs.logits if labels is None else outputs.loss


def _enter(
    model: PreTrainedModel, plan: StagePlan, tensors: Sequence[Tensor], kwargs: dict
) -> tuple[dict[StateItem, Tensor], DepthTransit, dict]:
    """Return the tensors that the stage begins with, by item, its transit, and the arguments of the host's forward."""
    config = cast(DepthAttnConfig, model.config)
    refuse_arguments(config, kwargs)
    last_site = None if plan.is_last else 2 * plan.layers.stop - 1
    inputs = {**kwargs, "use_cache": False}
    if plan.is_first:
        (inputs["input_ids"],) = tensors
        inputs["depth_transit"] = transit = DepthTransit(None, last_site)
        return {}, transit, inputs
    given = dict(zip(plan.takes, tensors, strict=True))
    state = _entering_state(config, plan, given)
    inputs["depth_transit"] = transit = DepthTransit(state, last_site)
    # Of these, the host's forward only uses the shape, dtype and device.
    inputs["inputs_embeds"] = _stream(state.partial).detach()
    return given, transit, inputs


def _entering_state(config: DepthAttnConfig, plan: StagePlan, given: dict[StateItem, Tensor]) -> DepthState:
    """Return the state at the entry of a stage; slots that neither it nor the next one needs are `None`."""
    items = depth_state_items(config, plan.layers.start)
    keys, values = (
        tuple(given[item].transpose(1, 2) if item in given else None for item in slots)
        for slots in (items.depth_keys, items.depth_values)
    )
    return DepthState(
        sources=tuple(given[item] for item in items.sources),
        partial=given[items.partial],
        # To torch's types there is a tensor at every place; only those of slots that a layer reads are used.
        depth_keys=cast(tuple[Tensor, ...], keys),
        depth_values=cast(tuple[Tensor, ...], values),
        first_value=None if items.first_value is None else given.get(items.first_value),
    )


def _made(config: DepthAttnConfig, plan: StagePlan, state: DepthState) -> dict[StateItem, Tensor]:
    """Return the tensors of the state after a stage, by item."""
    items = depth_state_items(config, plan.layers.stop)
    made = dict(zip(sources_after(config, plan.layers), state.sources, strict=True))
    made[items.partial] = state.partial
    slots = ((items.depth_keys, state.depth_keys), (items.depth_values, state.depth_values))
    for names, tensors in slots:
        # Heads follow tokens on the way, since P2P refuses tensors that are not contiguous.
        pairs = zip(names, tensors, strict=True)
        made |= {name: tensor.transpose(1, 2) for name, tensor in pairs if tensor is not None}
    if items.first_value is not None and state.first_value is not None:
        made[items.first_value] = state.first_value
    return made


def _stream(partial: Tensor) -> Tensor:
    """Return one stream `[B, T, D]` of a partial sum, which has several with some connections."""
    return partial if partial.dim() == 3 else partial[..., 0, :]
