"""Decoders with depth attention: any host of transformers, its layers adopted by `DepthAttnDecoderLayer`.

    input_ids -> [ host: embeddings -> masks, rotary, cache -> layer 0 ... layer L-1 -> final norm -> head ] -> logits
                                                                 |    DepthState    |
                                                                 +-- opens    closes+

The host's own `forward` runs: it embeds, makes masks and caches, loops over its layers and applies its head. What its
loop carries from layer to layer is a `DepthState`; the first layer opens it and the last one closes it.
"""

from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils import logging
from transformers.utils.output_capturing import install_output_capuring_hook

from .checkpoint_keys import nest_state_dict, register_key_mapping
from .configuration_depthattn import DepthAttnConfig
from .depth_connections import DEPTH_MODULES, DepthSite
from .depth_kv import DepthGate, depth_kv_tp_plan
from .depth_layer import DepthAttnDecoderLayer, DepthRecorder
from .remote_code import export_beside_config, saved_as_own_class

logger = logging.get_logger(__name__)

register_key_mapping(DepthAttnConfig.model_type, "host.model.")


def _build_host(config: DepthAttnConfig, mapping) -> PreTrainedModel:
    """Build the host from `config.text_config` and let our layers adopt the children of its own.

    The class is called directly instead of through `AutoModel.from_config`, which would build in `text_config.dtype`
    where a stock model follows the default dtype.
    """
    host_class = mapping[type(config.text_config)]
    host = (host_class[0] if isinstance(host_class, tuple | list) else host_class)(config.text_config)
    decoder = _decoder_of(host)
    # A pipeline stage would send one tensor where the depth state is many.
    host._pp_plan = decoder._pp_plan = {}
    for layer_idx, host_layer in enumerate(decoder.layers):
        layer = DepthAttnDecoderLayer(config, host_layer, layer_idx)
        # hidden_states[i] is what layer i reads; the last one is overwritten by the output of the final norm.
        sites = [layer.attn_depth] if layer.out_depth is None else [layer.attn_depth, layer.out_depth]
        for site in sites:
            site.register_forward_hook(_HiddenStateHook())
        decoder.layers[layer_idx] = layer
    prefix = "" if decoder is host else f"{host.base_model_prefix}."
    depth_plan = depth_kv_tp_plan(config, decoder._tp_plan)
    host._tp_plan.update({f"{prefix}{name}": style for name, style in depth_plan.items()})
    return host


class _HiddenStateHook:
    """transformers' hook for `output_hidden_states`, which is a closure, in a form that can be pickled."""

    def __init__(self):
        probe = nn.Identity()
        install_output_capuring_hook(probe, "hidden_states", index=0, capture_initial_hidden_state=False)
        self._hook = next(iter(probe._forward_hooks.values()))

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> None:
        self._hook(module, args, output)

    def __reduce__(self):
        return _HiddenStateHook, ()


def _is_sharded_by_hand(model: PreTrainedModel) -> bool:
    """Whether `fully_shard` was called without transformers knowing, which would then save the shards as they are."""
    if getattr(model.config, "distributed_config", None) is not None:
        return False
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def _decoder_of(host: PreTrainedModel) -> PreTrainedModel:
    return getattr(host, host.base_model_prefix, host)


class DepthAttnPreTrainedModel(PreTrainedModel):
    """Base class: initialisation, float32 parameters, checkpointing form, remote code."""

    config_class = DepthAttnConfig
    config: DepthAttnConfig
    base_model_prefix = "host"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DepthAttnDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Searched for as regular expressions: sites and gates, but not the projections in `mlp_depth_kv`.
    _keep_in_fp32_modules_strict = [rf"{name}(?!_kv)" for name in DEPTH_MODULES] + ["attn_depth_kv"]
    # Every implementation is offered; the nested host refuses what it cannot do, under its own name.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    #: Where the class keeps the host's base model, for the mapping of checkpoint keys.
    _host_base_path: str | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # By class name, as transformers looks mappings up: subclasses of users and of FSDP2 have names of their own.
        if cls._host_base_path is not None:
            register_key_mapping(cls.__name__, cls._host_base_path)

    def __init__(self, config: DepthAttnConfig, *args, **kwargs):
        # Fields set after construction are checked one by one by type only.
        config.validate()
        super().__init__(config, *args, **kwargs)

    def _adopt_host_traits(self, host: PreTrainedModel) -> None:
        """Take over what transformers reads from the outermost model only."""
        for trait in ("_is_stateful", "_can_compile_fullgraph", "_supports_attention_backend"):
            setattr(self, trait, getattr(host, trait))
        if self.config.depth_kv is not None:
            # Backends of other engines (vLLM) give no log-sum-exp.
            self._supports_attention_backend = False
        self.config._attn_implementation_internal = host.config._attn_implementation
        self.config._experts_implementation_internal = host.config._experts_implementation

    @property
    def decoder(self) -> PreTrainedModel:
        """The host's base model, which holds embeddings, layers and final norm."""
        return _decoder_of(self.host)

    def get_decoder(self) -> PreTrainedModel:
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module.

        | parameter                        | value | why                                         | float32 |
        |----------------------------------|-------|---------------------------------------------|---------|
        | `query`, `mix_scores`            | 0     | uniform reads at the start (the paper)      | always  |
        | `query_proj.weight`              | 0     | starts as the static query                  | always  |
        | `key_norm.weight`                | 1     | plain RMSNorm                               | always  |
        | `attn_depth_kv.gate`             | 0     | the host's attention at the start           | always  |
        | `mlp_depth_kv.*_proj.weight`     | host  | like the host's own linear layers           | no      |
        """
        if isinstance(module, DepthSite | DepthGate):
            module.init_parameters(init)
        else:
            super()._init_weights(module)

    def initialize_weights(self) -> None:
        # Initialisation goes by the nearest model above a module. For depth sites that is the nested host, which does
        # not know them, so they go first; a module marked as initialised is skipped afterwards.
        for module in self.modules():
            if isinstance(module, DepthSite | DepthGate) and not getattr(module, "_is_hf_initialized", False):
                self._init_weights(module)
                for submodule in module.modules():
                    submodule._is_hf_initialized = True
        super().initialize_weights()

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs):
        # Every way to switch checkpointing on ends here. The reentrant form does not see tensors inside the
        # DepthState and would lose their gradients without a word.
        options = getattr(gradient_checkpointing_func, "keywords", None)
        if options is not None and options.get("use_reentrant", True):
            if "use_reentrant" in options:
                logger.warning_once(
                    "use_reentrant=True loses the gradients of depth states; checkpointing is switched on with "
                    "use_reentrant=False instead."
                )
            options["use_reentrant"] = False
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in torch; the keys of checkpoints, which have no `host` level, are understood too."""
        # Trainer resumes through this function.
        return super().load_state_dict(nest_state_dict(self, state_dict), strict=strict, assign=assign)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """As in transformers; the model code goes along, so that the folder loads with `trust_remote_code=True`."""
        if kwargs.get("state_dict") is None and _is_sharded_by_hand(self):
            # Not every build of torch has this module.
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            kwargs["state_dict"] = get_model_state_dict(self, options=options)
        with saved_as_own_class(self):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            export_beside_config(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        # `save_pretrained(push_to_hub=True)` uploads before it returns.
        export_beside_config(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


class DepthAttnModel(DepthAttnPreTrainedModel):
    """The base model: a host's decoder with depth attention, without a head.

    Args:
        config (`DepthAttnConfig`): which host, which connection.
    """

    _host_base_path = "host."
    # PEFT's loading of adapters trained on the stock host, beside LoRA matrices (those go through `checkpoint_keys`).
    _checkpoint_conversion_mapping = {r"^(?!host\.)(?:model\.)?": "host."}

    def __init__(self, config: DepthAttnConfig):
        super().__init__(config)
        self.host = _build_host(config, MODEL_MAPPING)
        self._adopt_host_traits(self.host)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_depth_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the host; arguments and output are the host's, with two differences.

        Args:
            output_depth_attentions (`bool`, *optional*):
                Add `depth_attentions` to the output: one tensor `[B, T, num_depth_heads, num_sources]` per site, in
                the order attention 0, MLP 0, attention 1, ..., output site. They are detached, and sum to 1 over the
                sources with a softmax (before `read_scale`). With `depth_kv`, add `depth_kv_attentions` too: one
                tensor `[B, num_attention_heads, T, num_slots]` per layer, the weight of every depth slot in the
                output of a head (gate included); the sum over slots is the mass on depth, and the rest of 1 is the
                sequence's. `None` for layers that read no slots.
            output_hidden_states (`bool`, *optional*):
                `hidden_states[i]` is what layer i reads at its attention site (the embeddings at 0); the last is the
                output of the final norm.
        """
        return _run(
            self.host,
            output_depth_attentions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )


class DepthAttnForCausalLM(DepthAttnPreTrainedModel, GenerationMixin):
    """A host with depth attention and the host's own language-modelling head.

    Soft-capping, logit scaling, tied embeddings and the auxiliary loss of MoE hosts are the host's.

    Args:
        config (`DepthAttnConfig`): which host, which connection.
    """

    _host_base_path = "host.model."
    _checkpoint_conversion_mapping = {r"^(?!host\.)": "host."}  # as in `DepthAttnModel`

    def __init__(self, config: DepthAttnConfig):
        super().__init__(config)
        self.host = _build_host(config, MODEL_FOR_CAUSAL_LM_MAPPING)
        self._adopt_host_traits(self.host)
        self.post_init()

    def __setattr__(self, name: str, value):
        # `nn.Module` registers modules past read-only properties: the new head would never be called.
        if name == "lm_head":
            self.set_output_embeddings(value)
        elif name == "model":
            raise AttributeError("model: belongs to the host; assign to `host.model`.")
        else:
            super().__setattr__(name, value)

    @property
    def model(self) -> PreTrainedModel:
        """The host's base model, under the name it has on stock models."""
        return self.decoder

    @property
    def lm_head(self) -> nn.Module:
        """The host's head, under the name it has on stock models."""
        return self.host.get_output_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.host.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.host.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_depth_attentions: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Run the host and its head; arguments and output are theirs, with the additions of `DepthAttnModel`."""
        return _run(
            self.host,
            output_depth_attentions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, **kwargs
    ):
        # Some hosts have their own (Phi-3 switches rotary factors with the length). transformers looks at the names of
        # the arguments to see whether `inputs_embeds` is supported.
        return self.host.prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


def _run(forward: Callable, output_depth_attentions: bool | None, **kwargs):
    """Call `forward`, and add `depth_attentions` to what it returns if asked for."""
    if not output_depth_attentions:
        return forward(**kwargs)
    recorder = DepthRecorder()
    return_dict = kwargs.pop("return_dict", None)
    outputs = forward(**kwargs, depth_recorder=recorder, return_dict=True)
    outputs["depth_attentions"] = tuple(recorder.weights)
    if recorder.slot_weights:
        outputs["depth_kv_attentions"] = tuple(recorder.slot_weights)
    return outputs.to_tuple() if return_dict is False else outputs


def _with_depth_attentions(forward: Callable) -> Callable:
    """Add the argument `output_depth_attentions` to a forward; its signature stays visible, since Trainer reads it."""

    @wraps(forward)
    def wrapper(self, *args, output_depth_attentions: bool | None = None, **kwargs):
        return _run(partial(forward, self, *args), output_depth_attentions, **kwargs)

    return wrapper


class _HeadOnDepthAttnModel(DepthAttnPreTrainedModel):
    """Shared by the heads that are not the host's: the base model sits at `model`."""

    base_model_prefix = "model"
    _host_base_path = "model.host."
    _checkpoint_conversion_mapping = {r"^model\.(?!host\.)": "model.host."}  # as in `DepthAttnModel`

    def _build_model(self, config: DepthAttnConfig) -> None:
        self.num_labels = config.num_labels
        self.model = DepthAttnModel(config)
        self._adopt_host_traits(self.model.host)

    @property
    def decoder(self) -> PreTrainedModel:
        return self.model.decoder


# transformers' generic heads build their base model through `AutoModel.from_config`, which refuses remote code; each
# `__init__` below is the generic one with the class called directly.


class DepthAttnForSequenceClassification(GenericForSequenceClassification, _HeadOnDepthAttnModel):
    """A host with depth attention and a sequence-classification head (`score`) on the last unpadded token."""

    def __init__(self, config: DepthAttnConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self._build_model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    forward = _with_depth_attentions(GenericForSequenceClassification.forward)


class DepthAttnForTokenClassification(GenericForTokenClassification, _HeadOnDepthAttnModel):
    """A host with depth attention and a token-classification head (`score`)."""

    def __init__(self, config: DepthAttnConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self._build_model(config)
        dropouts = (getattr(config, "classifier_dropout", None), getattr(config, "hidden_dropout", None), 0.1)
        self.dropout = nn.Dropout(next(dropout for dropout in dropouts if dropout is not None))
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    forward = _with_depth_attentions(GenericForTokenClassification.forward)


class DepthAttnForQuestionAnswering(GenericForQuestionAnswering, _HeadOnDepthAttnModel):
    """A host with depth attention and an extractive question-answering head (`qa_outputs`)."""

    def __init__(self, config: DepthAttnConfig):
        super(GenericForQuestionAnswering, self).__init__(config)
        self._build_model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    forward = _with_depth_attentions(GenericForQuestionAnswering.forward)
    # The generic class looks for `embed_tokens` on the base model itself.
    get_input_embeddings = DepthAttnPreTrainedModel.get_input_embeddings
    set_input_embeddings = DepthAttnPreTrainedModel.set_input_embeddings


__all__ = [
    "DepthAttnForCausalLM",
    "DepthAttnForQuestionAnswering",
    "DepthAttnForSequenceClassification",
    "DepthAttnForTokenClassification",
    "DepthAttnModel",
    "DepthAttnPreTrainedModel",
]
