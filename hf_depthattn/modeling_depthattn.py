"""Decoders with depth attention: a decoder of transformers (the host), its layers wrapped by `DepthAttnDecoderLayer`.

    input_ids -> [ host: embeddings -> masks, rotary, cache -> layer 0 ... layer L-1 -> final norm -> head ] -> logits
                                                                 |    DepthState    |
                                                              creates         returns hidden states

The host's own `forward` runs: it embeds, creates masks and caches, loops over its layers and applies its head. Its
loop passes a `DepthState` from layer to layer in place of `hidden_states`: the first layer creates it from the
embeddings, and the last layer returns a tensor.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import logging
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, install_output_capuring_hook

from .attn_res_reads import DEPTH_READS, DepthReads, has_depth_reads, read_weights
from .checkpoint_keys import check_no_old_sites, names_in_memory, register_host_renamings, register_old_names
from .configuration_depthattn import DepthAttnConfig
from .connection_base import DepthSite
from .depth_connections import DEPTH_MODULES
from .depth_layer import DepthAttnDecoderLayer, DepthRecorder
from .generation_depthattn import DepthGenerationMixin
from .host_norm import set_norm_eps
from .liger_depthattn import register_with_liger
from .moda_slots import DEPTH_KV_MODULES, DepthGate, depth_kv_tp_plan
from .model_card import tags_of, write_missing_card
from .parallel_styles import sum_gradients_in_plan
from .remote_code import export_model_code, saved_as_own_class, without_code
from .token_layout import ALL_TOKENS, TokenLayout
from .value_residual import VALUE_RESIDUAL, ValueResidual, value_residual_tp_plan

logger = logging.get_logger(__name__)

register_old_names(DepthAttnConfig.model_type, "DepthAttnForQuestionAnswering")
register_with_liger()

# Regular expressions that transformers searches for in parameter names: all our modules but `mlp_depth_kv`.
_FLOAT32_MODULES = [rf"{name}(?!_kv)" for name in DEPTH_MODULES] + ["attn_depth_kv", DEPTH_READS, VALUE_RESIDUAL]
# Every quantizer skips modules whose full name matches `_keep_in_fp32_modules`. Depth modules are few and are trained
# in full, which is not possible with quantised weights.
_UNQUANTISED_MODULES = rf".*\.(?:{'|'.join((*DEPTH_MODULES, *DEPTH_KV_MODULES, DEPTH_READS, VALUE_RESIDUAL))})"

_INITIALISES_ITSELF = (DepthSite, DepthGate, DepthReads, ValueResidual)


def _class_on_host(
    own_class: type[PreTrainedModel], host_class: type[PreTrainedModel], model_type: str
) -> type[PreTrainedModel]:
    """Return a subclass of both one of our classes and the host's class for the same task; created once, then cached.

    Args:
        own_class: `DepthAttnModel`, `DepthAttnForCausalLM` or a user's subclass of them.
        host_class: the host's class for the same task.
        model_type: the host's model type; some model types share classes (EXAONE uses those of Llama).
    """
    key = (own_class, host_class, model_type)
    if key not in _CLASSES_ON_HOSTS:
        _CLASSES_ON_HOSTS[key] = _make_class_on_host(*key)
    return _CLASSES_ON_HOSTS[key]


_CLASSES_ON_HOSTS: dict[tuple[type, type, str], type[PreTrainedModel]] = {}


def _make_class_on_host(
    own_class: type[PreTrainedModel], host_class: type[PreTrainedModel], model_type: str
) -> type[PreTrainedModel]:
    name = name_on_host = f"{own_class.__name__}On{host_class.__name__}"
    if issubclass(own_class, DepthAttnModel):
        # transformers looks up the renamings of checkpoint keys by class name, and they differ between hosts.
        if model_type != host_class.config_class.model_type:
            name = name_on_host = f"{name_on_host}_{model_type}"
        register_host_renamings(name_on_host, host_class, model_type)
    else:
        # Trainer and pipelines recognise heads by class name.
        name = own_class.__name__
    # In the MRO between our class and the host's, so that `super().forward` in a user's subclass reaches it.
    host_forward = {"__module__": own_class.__module__, "forward": _with_depth_attentions(host_class.forward)}
    host_with_depth = type(host_class.__name__, (host_class,), host_forward)
    float32_modules = {*(host_class._keep_in_fp32_modules_strict or ()), *_FLOAT32_MODULES}
    unquantised_modules = {*(host_class._keep_in_fp32_modules or ()), _UNQUANTISED_MODULES}
    namespace = {
        "__module__": own_class.__module__,
        "__qualname__": name_on_host,
        "__doc__": own_class.__doc__,
        "_own_class": own_class,
        "_host_class": host_class,
        "base_model_prefix": host_class.base_model_prefix,
        "_keep_in_fp32_modules": sorted(unquantised_modules),
        "_keep_in_fp32_modules_strict": sorted(float32_modules),
        # Pipeline stages pass on a single tensor, but a depth state has several.
        "_pp_plan": None,
    }
    return type(name, (own_class, host_with_depth), namespace)


def _rebuild(own_class: type[PreTrainedModel], host_class: type[PreTrainedModel], model_type: str) -> PreTrainedModel:
    """Return an uninitialised model of a class that `_class_on_host` creates, for `pickle`."""
    on_host = _class_on_host(own_class, host_class, model_type)
    return PreTrainedModel.__new__(on_host)


class _HiddenStateHook:
    """A picklable form of transformers' hook for `output_hidden_states`, which is a closure."""

    def __init__(self):
        probe = nn.Identity()
        install_output_capuring_hook(probe, "hidden_states", index=0, capture_initial_hidden_state=False)
        self._hook = next(iter(probe._forward_hooks.values()))

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> None:
        self._hook(module, args, output)

    def __reduce__(self):
        return _HiddenStateHook, ()


def _for_all_layers(implementation: str | dict, current: str) -> str:
    """Return the attention or experts implementation for the decoder layers, which our config and the host's share.

    Args:
        implementation: a name, or a dict from sub-config to name, in which `""` is the model itself.
        current: the current implementation, returned if a dict has no entry for the layers.
    """
    while isinstance(implementation, dict):
        implementation = implementation.get("text_config", implementation.get("", current))
    return implementation


def _is_sharded_by_hand(model: PreTrainedModel) -> bool:
    """Return whether the user called `fully_shard`; transformers does not know and would save the local shards."""
    if getattr(model.config, "distributed_config", None) is not None:
        return False
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def gathered_state_dict(model: PreTrainedModel, keeps: bool = True) -> dict[str, torch.Tensor]:
    """Return the state dict of a model with whole tensors, gathered one by one if `fully_shard` has sharded it.

    All processes of the model call it; any of them can keep the tensors. (With `full_state_dict=True`, torch returns
    them on the first process of all only, which may have another stage of a pipeline.)

    Args:
        model: the model.
        keeps: whether to return the tensors in this process, on the CPU if they were sharded; otherwise nothing.
    """
    state_dict = {}
    for name, tensor in model.state_dict().items():
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keeps else tensor
        if keeps:
            state_dict[name] = tensor
    for name, source in model.all_tied_weights_keys.items():
        # transformers recognises tied weights by their memory, and saves one of them.
        if name in state_dict and source in state_dict:
            state_dict[name] = state_dict[source]
    return state_dict


class DepthAttnPreTrainedModel(PreTrainedModel):
    """Base class of all models: class creation on a host, initialisation, dtypes, gradient checkpointing and saving.

    `DepthAttnModel(config)` and `DepthAttnForCausalLM(config)` return an instance of a class that also inherits from
    the host's class: on a Llama host, `isinstance(model, LlamaForCausalLM)` is true and `super().forward` is the
    forward of Llama. Names of children and parameters, `base_model_prefix`, tied weights and parallel plans are the
    host's.
    """

    config_class = DepthAttnConfig
    config: DepthAttnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DepthAttnDecoderLayer"]
    _keep_in_fp32_modules = [_UNQUANTISED_MODULES]
    _keep_in_fp32_modules_strict = _FLOAT32_MODULES
    # PEFT renames keys of adapters saved by 0.1.0.dev0 with this; `checkpoint_keys` renames their LoRA matrices.
    _checkpoint_conversion_mapping = {r"^host\.": "", r"^model\.host\.": "model."}

    # The auto mapping with the host's class for this task; `None` for heads that are not the host's.
    _host_mapping: Mapping | None = None
    # Set on the classes that `_class_on_host` creates.
    _own_class: type[PreTrainedModel] | None = None
    _host_class: type[PreTrainedModel] | None = None

    def __new__(cls, config: DepthAttnConfig | None = None, *args, **kwargs):
        # There is no config when a model is copied or unpickled.
        if config is None or cls._host_mapping is None:
            return super().__new__(cls)
        if not hasattr(config, "text_config"):
            raise ValueError(
                f"config: {type(config).__name__} is the config of a host; pass one with depth attention, such as "
                "`DepthAttnConfig.attn_res(config)` or `DepthAttnConfig.moda(config)`."
            )
        host_class = cls._host_mapping[type(config.text_config)]
        host_class = host_class[0] if isinstance(host_class, tuple | list) else host_class
        # Not the inherited attribute: a user's subclass of `type(model)` counts as an own class.
        own_class = cls.__dict__.get("_own_class") or cls
        if own_class is cls and cls._host_class not in (None, host_class):
            raise ValueError(
                f"config: {cls.__name__} is a subclass for the host {cls._host_class.__name__}; for a model on "
                f"{host_class.__name__}, subclass {cls._own_class.__name__}."
            )
        on_host = _class_on_host(own_class, host_class, config.text_config.model_type)
        if not issubclass(on_host, cls):
            # `type(model)(config)` with another host: Python calls `__init__` for instances of `cls` only.
            return on_host(config, *args, **kwargs)
        return super().__new__(on_host)

    def __init__(self, config: DepthAttnConfig, *args, **kwargs):
        # Fields that are set after construction have only been checked for their type.
        config.validate()
        # The host's class builds the layers from the host's config.
        super().__init__(config if self._host_class is None else config.host_config, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        # `pickle` does not find classes that are created at run time.
        if type(self).__dict__.get("_host_class") is None:
            return super().__reduce_ex__(protocol)
        model_type = self.config.text_config.model_type
        return _rebuild, (self._own_class, self._host_class, model_type), self.__dict__

    def _layer_kwargs(self, token_layout: TokenLayout) -> dict:
        """Return further keyword arguments of all layers in one forward pass."""
        return {}

    def _take_over(self, config: DepthAttnConfig) -> None:
        """Replace the host's config by ours after the host's class has built the model."""
        self.config = config
        self.name_or_path = config.name_or_path
        # transformers registers recordable outputs by class name, and the base model's class changes after it was
        # built. `dict.__setitem__`, because the registry's own takes names in some versions and models in others.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(self)), self._can_record_outputs)
        config._attn_implementation_internal = config.text_config._attn_implementation
        config._experts_implementation_internal = config.text_config._experts_implementation
        # Cards of `push_to_hub`, Trainer and PEFT have these.
        self.add_model_tags(tags_of(config))
        if config.changes_attention:
            # Attention backends of other engines (vLLM) do not return the log-sum-exp that MoDA needs, and replace the
            # module that a value residual hooks into.
            self._supports_attention_backend = False
        if config.depth_kv is None:
            # vLLM searches for names, not for regular expressions.
            self._keep_in_fp32_modules_strict = [*(self._keep_in_fp32_modules_strict or ()), *DEPTH_MODULES]

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Set the attention implementation of all layers.

        Args:
            attn_implementation: a name, or a dict with the name under `"text_config"` or `""`.
            *args: as in transformers.
            **kwargs: as in transformers.
        """
        implementation = _for_all_layers(attn_implementation, self.config._attn_implementation)
        if self._can_set_attn_implementation():
            # The host's config goes first: otherwise transformers warns that no model belongs to it.
            check = cast(PreTrainedModel, self.base_model)._check_and_adjust_attn_implementation
            allowed = check(implementation, False, *args, **kwargs)
            self.config.text_config._attn_implementation_internal = allowed
        super().set_attn_implementation(implementation, *args, **kwargs)

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        """Set the experts implementation of all layers.

        Args:
            experts_implementation: a name, or a dict with the name under `"text_config"` or `""`.
        """
        super().set_experts_implementation(
            _for_all_layers(experts_implementation, self.config._experts_implementation)
        )
        # The host's modules read it from their own config.
        self.config.text_config._experts_implementation_internal = self.config._experts_implementation

    @classmethod
    def prepare_distribute_model(cls, distributed_config, *args, **kwargs):
        """Prepare the meshes of a distributed model as in transformers; its pipeline parallelism is refused."""
        is_dict = isinstance(distributed_config, dict)
        num_stages = distributed_config.get("pp_size") if is_dict else getattr(distributed_config, "pp_size", None)
        if num_stages is not None and num_stages > 1:
            raise ValueError(
                f"distributed_config: pp_size={num_stages} is not supported, since stages of transformers pass on one "
                "tensor and a depth state has several; allowed is pp_size=1. Use the pipeline stages of "
                "`hf_depthattn.distributed` instead, see docs/pipeline.md."
            )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers inspects the source file of the class, which is this file instead of the host's.
        return cls._host_class is None or cls._host_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls._host_class is None or cls._host_class._can_set_experts_implementation()

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        # With float16, transformers keeps `_keep_in_fp32_modules` in float32; `mlp_depth_kv` has the model's dtype.
        plan = super()._get_dtype_plan(dtype)
        return {pattern: kept for pattern, kept in plan.items() if pattern != _UNQUANTISED_MODULES}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module.

        | parameter                           | value | reason                                     | float32 |
        |-------------------------------------|-------|--------------------------------------------|---------|
        | `depth_reads.query`                 | 0     | initial reads are uniform (the paper)      | always  |
        | `depth_reads.key_norm`              | 1     | plain RMSNorm                              | always  |
        | `mix_scores`                        | 0     | initial reads are uniform                  | always  |
        | `query_proj.weight`                 | 0     | initial query is the static one            | always  |
        | `branch.scale`                      | paper | `branch_scale_init`; 1 is the host         | always  |
        | `gate.weight`                       | 0     | initial highway gates are constant         | always  |
        | `gate.bias`                         | -2    | `highway_bias_init`                        | always  |
        | `norm.weight` (KEEL)                | 1     | plain RMSNorm                              | always  |
        | `mix.stream_scale`                  | 1     | initial stream is the host's (x0 lambdas)  | always  |
        | `mix.embedding_scale`               | 0     | initial stream is the host's (x0 lambdas)  | always  |
        | `weights.mixing` (HC)               | 0, 1  | one stream is read, streams are not mixed  | always  |
        | `weights.post` (HC)                 | 1     | every stream gets the output of a sublayer | always  |
        | `weights.norm_weight` (HC)          | 1     | plain LayerNorm                            | always  |
        | `weights.norm_bias` (HC)            | 0     | plain LayerNorm                            | always  |
        | `weights.proj` (HC, mHC, mHC-lite)  | 0     | initial weights are equal for all tokens   | always  |
        | `weights.scale` (HC, mHC, mHC-lite) | 0.01  | the papers                                 | always  |
        | `weights.base` (mHC, mHC-lite)      | logit | as with HC; a read is 0.9 of one stream    | always  |
        | `average.weight` (DenseFormer)      | 0, 1  | 1 for the newest layer, 0 for others       | always  |
        | `query`, `null`, `gate` (delta)     | 0     | initial reads add nothing to the stream    | always  |
        | `key_norm` (delta)                  | 1     | plain RMSNorm                              | always  |
        | `attn_depth_kv.gate`                | 0     | initial attention is the host's            | always  |
        | `mlp_depth_kv.*_proj.weight`        | host  | initialised like the host's linear layers  | no      |
        | `mlp_depth_kv.*_proj.bias`          | host  | with `depth_kv_bias`; 0 in most hosts      | no      |
        | `value_residual.first_scale`        | 0     | initial values are the host's; or 0.5      | always  |
        | `value_residual.own_scale`          | 1     | (`value_residual_init="resformer"`)        | always  |

        With DeepNorm, `initialize_weights` then scales weights of the host.
        """
        if isinstance(module, _INITIALISES_ITSELF):
            module.init_parameters(init)
        else:
            super()._init_weights(module)

    def initialize_weights(self) -> None:
        # transformers initialises children before their parents, but a site initialises its own children. Sites go
        # first and are marked as initialised: the rest then draws the same random numbers as the host.
        for module in self.modules():
            if isinstance(module, _INITIALISES_ITSELF) and not getattr(module, "_is_hf_initialized", False):
                self._init_weights(module)
                for submodule in module.modules():
                    # To torch's types, every attribute is a tensor or a module.
                    submodule._is_hf_initialized = True  # type: ignore[assignment]
        new_layers = [
            module
            for module in self.modules()
            if isinstance(module, DepthAttnDecoderLayer) and not getattr(module, "_is_hf_initialized", False)
        ]
        super().initialize_weights()
        for layer in new_layers:
            layer.init_sublayers()

    # Here and below: arguments that differ between versions of transformers are in `kwargs`.
    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func=None, **kwargs
    ):
        # All ways to enable checkpointing lead here. Reentrant checkpointing does not see the tensors inside a
        # DepthState and would silently lose their gradients.
        options = getattr(gradient_checkpointing_func, "keywords", None)
        if options is not None and options.get("use_reentrant", True):
            if "use_reentrant" in options:
                logger.warning_once(
                    "use_reentrant=True loses the gradients of depth states; gradient checkpointing uses "
                    "use_reentrant=False instead."
                )
            options["use_reentrant"] = False
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load a state dict as in torch; also accepts checkpoint names (per-expert weights of MoE hosts)."""
        # Trainer calls this function to resume from a checkpoint.
        return super().load_state_dict(names_in_memory(self, state_dict), strict=strict, assign=assign)

    def load_adapter(self, *args, **kwargs):
        """Load a PEFT adapter as in transformers, with an error for one that has queries in sites."""
        info = super().load_adapter(*args, **kwargs)
        # transformers only logs that they do not belong to the model.
        check_no_old_sites(info.unexpected_keys)
        return info

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):  # type: ignore[override]
        """Save the model and its code, so that the folder loads with `trust_remote_code=True`.

        A folder without README.md gets a model card. Arguments are those of `PreTrainedModel.save_pretrained`. All
        processes of a model that `fully_shard` has sharded call it, and the first one writes.
        """
        if kwargs.get("state_dict") is None and _is_sharded_by_hand(self):
            kwargs["state_dict"] = gathered_state_dict(self, keeps=self.should_save_on_this_rank(is_main_process))
        saves_model = is_main_process and not getattr(self, "_hf_peft_config_loaded", False)
        if saves_model:
            os.makedirs(save_directory, exist_ok=True)
            export_model_code(save_directory)
        with saved_as_own_class(self):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if saves_model:
            self._write_missing_card(save_directory, os.path.basename(os.path.abspath(save_directory)))

    def _write_missing_card(self, folder: str | os.PathLike, name: str) -> None:
        own_class = (self._own_class or type(self)).__name__
        write_missing_card(folder, self.config, depth_class=own_class, name=name, tags=self.model_tags or ())

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, **kwargs):  # type: ignore[override]
        if not getattr(self, "_hf_peft_config_loaded", False):
            self._write_missing_card(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, without_code(files_timestamps), **kwargs)


class DepthAttnModel(DepthAttnPreTrainedModel):
    """The base model: a host's decoder with depth attention, without a head.

    `forward` takes the arguments of the host and returns its outputs, with these differences:

    - `output_depth_attentions=True` adds `depth_attentions` to the output: the weights of every read, detached and not
      multiplied by `read_scale`, one tensor `[B, T, num_depth_heads, num_sources]` per site, in the order attention 0,
      MLP 0, attention 1, ..., output site. With a softmax they sum to 1 over the sources. Every entry is `None` with
      connections that have no such weights. With `depth_kv` it also adds `depth_kv_attentions`: one tensor
      `[B, num_attention_heads, T, num_slots]` per layer, the weight of each slot after the gate; weights of the slots
      and of the sequence (`attentions`) sum to 1. `None` for layers that read no slots.
    - With `output_hidden_states=True`, `hidden_states[i]` is the result of the read before attention in layer i (the
      embeddings for layer 0), and the last entry is the output of the final norm.

    Args:
        config (`DepthAttnConfig`): the config, with the host's in `text_config`.
    """

    _host_mapping = MODEL_MAPPING
    layers: nn.ModuleList

    def __init__(self, config: DepthAttnConfig):
        super().__init__(config)
        self._connect_depth(config)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Reached by PEFT and other wrappers too, which ignore tensors that do not belong to the model. Sites of some
        # connections have queries of their own.
        check_no_old_sites(state_dict.keys() - {f"{prefix}{name}" for name, _ in self.named_parameters()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _layer_kwargs(self, token_layout: TokenLayout) -> dict:
        if not hasattr(self, DEPTH_READS):
            return {}
        return {DEPTH_READS: read_weights(self.depth_reads, self.config.attn_res_schedule, token_layout)}

    def _connect_depth(self, config: DepthAttnConfig) -> None:
        """Replace the host's decoder layers by ours, which take over their children."""
        self._take_over(config)
        for layer_idx, host_layer in enumerate(self.layers):
            layer = DepthAttnDecoderLayer(config, host_layer, layer_idx)
            # hidden_states[i] is the read of layer i; transformers replaces the last one by the final norm's output.
            sites = [layer.attn_depth] if layer.out_depth is None else [layer.attn_depth, layer.out_depth]
            for site in sites:
                site.register_forward_hook(_HiddenStateHook())
            self.layers[layer_idx] = layer
        if has_depth_reads(config):
            self.depth_reads = DepthReads(config)
        set_norm_eps(self, config.norm_eps_overrides or {})
        self.post_init()
        assert self._tp_plan is not None, "`post_init` makes it"
        self._tp_plan.update(depth_kv_tp_plan(config, self._tp_plan) | value_residual_tp_plan(config, self._tp_plan))
        self._tp_plan.update(sum_gradients_in_plan(self._tp_plan))


class DepthAttnModelWithOwnAttention(DepthAttnModel):
    """Another name of `DepthAttnModel`, in the `auto_map` of checkpoints with MoDA or a value residual.

    Engines replace the attention of a model by their own and read from its class alone whether they may. Calling this
    class returns a `DepthAttnModel`.
    """

    _supports_attention_backend = False

    def __new__(cls, config: DepthAttnConfig, *args, **kwargs):
        return DepthAttnModel(config, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # vLLM accepts a model that supports backends or whose implementation can be set.
        return False


class DepthAttnForCausalLM(DepthAttnPreTrainedModel, DepthGenerationMixin):
    """A host with depth attention and the host's own language modeling head.

    Soft-capping, logit scaling, tied embeddings and the auxiliary loss of MoE hosts work as in the host. `forward` has
    the additional arguments and outputs of `DepthAttnModel`.

    Args:
        config (`DepthAttnConfig`): the config, with the host's in `text_config`.
    """

    _host_mapping = MODEL_FOR_CAUSAL_LM_MAPPING

    def __init__(self, config: DepthAttnConfig):
        super().__init__(config)
        # The host's class has built its own base model, which is converted to ours in place.
        decoder = cast(DepthAttnModel, self.base_model)
        on_host = _class_on_host(DepthAttnModel, type(decoder), config.text_config.model_type)
        decoder.__class__ = cast(type[DepthAttnModel], on_host)
        decoder._connect_depth(config)
        self._take_over(config)
        self.post_init()


def _run(forward: Callable, output_depth_attentions: bool | None, **kwargs):
    """Call `forward` and, if requested, add `depth_attentions` to its output."""
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
    """Add the argument `output_depth_attentions` to a forward, keeping its signature, which Trainer inspects."""

    @wraps(forward)
    def wrapper(self, *args, output_depth_attentions: bool | None = None, **kwargs):
        # A pipeline stage passes weights of reads itself.
        kwargs = self._layer_kwargs(kwargs.get("token_layout", ALL_TOKENS)) | kwargs
        return _run(partial(forward, self, *args), output_depth_attentions, **kwargs)

    signature = inspect.signature(forward)
    added = inspect.Parameter(
        "output_depth_attentions", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=bool | None
    )
    *others, last = signature.parameters.values()
    assert last.kind is inspect.Parameter.VAR_KEYWORD, "the host's forward must pass keyword arguments to its layers"
    wrapper.__signature__ = signature.replace(parameters=[*others, added, last])  # type: ignore[attr-defined]
    return wrapper


class _HeadOnDepthAttnModel(DepthAttnPreTrainedModel):
    """Base of the heads that are not the host's: `DepthAttnModel` and one linear layer."""

    # All implementations are accepted here; the base model rejects those that its host does not support.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _build_model(self, config: DepthAttnConfig) -> None:
        self.num_labels = config.num_labels
        model = DepthAttnModel(config)
        setattr(self, self.base_model_prefix, model)
        self.add_model_tags(tags_of(config))
        for trait in ("_is_stateful", "_can_compile_fullgraph", "_supports_attention_backend"):
            setattr(self, trait, getattr(model, trait))


# transformers' generic heads build their base model with `AutoModel.from_config`, which rejects remote code; each
# `__init__` below is the generic one, except that it calls the class directly.


class DepthAttnForSequenceClassification(GenericForSequenceClassification, _HeadOnDepthAttnModel):
    """A host with depth attention and a sequence classification head (`score`) on the last non-padding token.

    Args:
        config (`DepthAttnConfig`): the config, with the host's in `text_config`.
    """

    def __init__(self, config: DepthAttnConfig):
        super(GenericForSequenceClassification, self).__init__(config)
        self._build_model(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    forward = _with_depth_attentions(GenericForSequenceClassification.forward)


class DepthAttnForTokenClassification(GenericForTokenClassification, _HeadOnDepthAttnModel):
    """A host with depth attention and a token classification head (`score`).

    Args:
        config (`DepthAttnConfig`): the config, with the host's in `text_config`.
    """

    def __init__(self, config: DepthAttnConfig):
        super(GenericForTokenClassification, self).__init__(config)
        self._build_model(config)
        dropouts = (getattr(config, "classifier_dropout", None), getattr(config, "hidden_dropout", None), 0.1)
        self.dropout = nn.Dropout(next(dropout for dropout in dropouts if dropout is not None))
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    forward = _with_depth_attentions(GenericForTokenClassification.forward)


class DepthAttnForQuestionAnswering(GenericForQuestionAnswering, _HeadOnDepthAttnModel):
    """A host with depth attention and an extractive question answering head (`qa_outputs`).

    Args:
        config (`DepthAttnConfig`): the config, with the host's in `text_config`.
    """

    def __init__(self, config: DepthAttnConfig):
        super(GenericForQuestionAnswering, self).__init__(config)
        # Some hosts name the base model `transformer` in this head.
        host_class = MODEL_FOR_QUESTION_ANSWERING_MAPPING.get(type(config.host_config), None)
        self.base_model_prefix = getattr(host_class, "base_model_prefix", "model")
        self._build_model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    forward = _with_depth_attentions(GenericForQuestionAnswering.forward)


__all__ = [
    "DepthAttnForCausalLM",
    "DepthAttnForQuestionAnswering",
    "DepthAttnForSequenceClassification",
    "DepthAttnForTokenClassification",
    "DepthAttnModel",
    "DepthAttnPreTrainedModel",
]
