"""The decoder layer with depth connections, built from the children of a host's decoder layer."""

import inspect
from functools import partial
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_name import CACHE_NAME
from .configuration_depthattn import DepthAttnConfig
from .depth_connections import depth_site
from .depth_options import AttnResSchedule
from .depth_state import Carried, DepthState
from .host_layouts import SublayerLayout
from .moda_attention import use_moda_attention
from .moda_slots import LayerDepthKV, depth_kv_modules
from .token_layout import ALL_TOKENS, TokenLayout
from .value_residual import prepare_values, share_values, value_layers, value_residual_module

if TYPE_CHECKING:
    from .connection_base import DepthSite

# Arguments of the host's layer that it does not pass on to a recurrent sublayer.
_NOT_FOR_RECURRENT = ("position_ids", "position_embeddings", "use_cache")


class DepthRecorder:
    """Collects the weights of every read, and of MoDA's slots in every layer, during one forward pass.

    It is passed to the layers as a keyword argument. It is not a list, because hooks that move keyword arguments
    between devices copy lists, and the caller would not see what the layers append.
    """

    def __init__(self):
        self.weights: list[Tensor | None] = []
        self.slot_weights: list[Tensor | None] = []


class DepthTransit:
    """Where the state of a pipeline stage enters the host's loop over its layers, and where it leaves it.

    It is passed to the layers as a keyword argument. The loop itself passes tensors between the modules of the stage,
    which has placeholders for the layers of other stages (`hf_depthattn.distributed.stage_model`).

    Args:
        entering: the state before the first layer of the stage; `None` in the first stage.
        last_site: the last site of the stage, after which no group of reads continues; `None` in the last stage.

    Attributes:
        leaving: the settled state after the last layer of the stage; set by the loop, but not in the last stage.
    """

    def __init__(self, entering: DepthState | None, last_site: int | None):
        self.entering = entering
        self.last_site = last_site
        self.leaving: DepthState | None = None


class RecurrentArguments:
    """Selects the arguments of a recurrent sublayer (linear attention, ...) from those of the host's layer.

    Args:
        module: the sublayer.
    """

    def __init__(self, module: nn.Module):
        parameters = inspect.signature(module.forward).parameters
        self.names = frozenset(parameters)
        self.takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        # Before transformers 5.24, some sublayers have another name for the cache than their layer.
        self.cache_name = "cache_params" if "cache_params" in parameters else CACHE_NAME

    def __call__(self, kwargs: dict) -> dict:
        """Return the arguments that the sublayer takes.

        Args:
            kwargs: the keyword arguments of the layer.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_RECURRENT}
        kwargs[self.cache_name] = kwargs.pop(CACHE_NAME, None)
        return kwargs if self.takes_any else {name: value for name, value in kwargs.items() if name in self.names}


class DepthAttnDecoderLayer(GradientCheckpointingLayer):
    """A host's decoder layer whose two sublayers have depth connections instead of residual connections.

    The children of the host's layer (`self_attn`, `mlp`, norms) keep their names, so checkpoints, LoRA targets and
    parallel plans for the host remain valid. The layer adds the sites `attn_depth`, `mlp_depth` and, in the last
    layer, `out_depth`; with MoDA also `attn_depth_kv` and `mlp_depth_kv`, and with a value residual `value_residual`,
    where the layer needs them.

    Args:
        config: the model's config.
        host_layer: the host's layer; its children become children of this layer.
        layer_idx: index of the layer.
    """

    def __init__(self, config: DepthAttnConfig, host_layer: nn.Module, layer_idx: int):
        super().__init__()
        # Plain attributes too (`block_type`, `residual_multiplier`, ...): the host's loop over layers may use them.
        for name, value in vars(host_layer).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, child in host_layer.named_children():
            self.add_module(name, child)
        self.layer_idx = layer_idx
        self.layout = config.host_layout
        self.is_first = layer_idx == 0
        self.attention_name = self.layout.attention.module_in(host_layer)
        is_linear = getattr(host_layer, "block_type", None) == "linear_attention"
        is_recurrent = is_linear or self.attention_name != self.layout.attention.module
        self.recurrent_arguments = RecurrentArguments(self._attention) if is_recurrent else None
        self.attn_depth = depth_site(config, 2 * layer_idx)
        self.mlp_depth = depth_site(config, 2 * layer_idx + 1)
        is_last = layer_idx == config.text_config.num_hidden_layers - 1
        self.out_depth = depth_site(config, 2 * layer_idx + 2) if is_last else None
        self.depth_kv = None
        self.attn_depth_kv = self.mlp_depth_kv = None
        if config.depth_kv is not None:
            self.depth_kv = LayerDepthKV(config, self._attention, layer_idx)
            if self.depth_kv.takes_part:
                use_moda_attention(self._attention, config.host_config)
            for name, module in depth_kv_modules(config, layer_idx).items():
                setattr(self, name, module)
        self.value_residual = value_residual_module(config, layer_idx)
        self.shares_values = layer_idx in value_layers(config)
        if self.shares_values:
            prepare_values(cast(nn.Module, self._attention.v_proj))

    def forward(
        self,
        hidden_states: Tensor | DepthState,
        *,
        depth_recorder: DepthRecorder | None = None,
        depth_reads: Carried | None = None,
        token_layout: TokenLayout = ALL_TOKENS,
        depth_transit: DepthTransit | None = None,
        **kwargs,
    ) -> Tensor | DepthState:
        """Run both sublayers with their reads and writes.

        Args:
            hidden_states: the embeddings `[B, T, D]` in the first layer, the `DepthState` in all others.
            depth_recorder: collects the weights of reads and slots.
            depth_reads: the weights of all reads (`attn_res_reads.ReadWeights`), which the base model passes.
            token_layout: which tokens of the state this process has.
            depth_transit: in a pipeline stage, where its state enters and leaves.
            **kwargs: the arguments that the host's model passes to its layers (cache, masks, rotary embeddings, ...).

        Returns:
            The new `DepthState`; in the last layer the input `[B, T, D]` of the host's final norm.
        """
        with token_layout.in_layer(self):
            return self._forward(hidden_states, depth_recorder, depth_reads, token_layout, depth_transit, kwargs)

    def _forward(
        self,
        hidden_states: Tensor | DepthState,
        depth_recorder: DepthRecorder | None,
        depth_reads: Carried | None,
        tokens: TokenLayout,
        depth_transit: DepthTransit | None,
        kwargs: dict,
    ) -> Tensor | DepthState:
        state = self.attn_depth.begin(tokens.own(cast(Tensor, hidden_states))) if self.is_first else hidden_states
        if not isinstance(state, DepthState):
            raise RuntimeError(
                f"Layer {self.layer_idx} got a {type(state).__name__} instead of the previous layer's DepthState. "
                "Run tools that call layers one by one (GPTQ, AutoRound) within "
                "`hf_depthattn.integrations.layerwise.layers_that_pass_tensors(model)`. If this happens with "
                "gradient checkpointing, enable it on the outermost model or with use_reentrant=False."
            )
        ends_groups = self._ends_groups(depth_reads)
        last_site = None if depth_transit is None else depth_transit.last_site
        if ends_groups:
            last_site = (self.out_depth or self.mlp_depth).site
        read = partial(self._read, depth_reads, last_site, depth_recorder)
        h, state = read(self.attn_depth, state)
        x = tokens.whole(self.attn_depth.enter(self._normed(self.layout.attention, h)), self._attention)
        exchange = self._open_exchange(state, kwargs, x.shape[1], depth_recorder)
        output, state = self._attend(x, state, self._attention_kwargs(exchange, kwargs))
        y = self._run(self.layout.attention, tokens.own(_first(output)))
        state = self._write_slot(state, exchange, x, kwargs, depth_recorder)
        state = self._write(self.attn_depth, self.layout.attention, state, y)

        h, state = read(self.mlp_depth, state)
        mlp = getattr(self, self.layout.mlp.module)
        x = tokens.whole(self.mlp_depth.enter(self._normed(self.layout.mlp, h)), mlp)
        y = self._run(self.layout.mlp, tokens.own(self._mlp(x)))
        if self.mlp_depth_kv is not None:
            state = self.depth_kv.write_mlp(state, self.mlp_depth_kv, self._attention, x, kwargs)
        state = self._write(self.mlp_depth, self.layout.mlp, state, y)
        if self.out_depth is not None:
            return tokens.whole(read(self.out_depth, state)[0])
        return state.settled() if ends_groups else state

    def init_sublayers(self) -> None:
        """Let the connection change the initial weights of both sublayers."""
        self.attn_depth.init_sublayer(self.attention_modules)
        self.mlp_depth.init_sublayer(self.mlp_modules)

    @property
    def attention_modules(self) -> list[nn.Module]:
        """The modules whose outputs are summed in the attention sublayer: attention, or what replaces it."""
        return [self._attention]

    @property
    def mlp_modules(self) -> list[nn.Module]:
        """The modules whose outputs are summed in the MLP sublayer: the MLP, and its companion if there is one."""
        names = (self.layout.mlp.module, self.layout.mlp.companion)
        modules = [getattr(self, name) for name in names if name is not None]
        return [module for module in modules if module is not None]

    def _ends_groups(self, depth_reads: Carried | None) -> bool:
        """Return whether no group of reads may continue after this layer.

        A checkpointed layer keeps its input for the backward pass, so the layer before must not pass on the results of
        a group. A layer cannot see other wrappers than transformers' own; with those the user selects the schedule.
        """
        if depth_reads is not None and depth_reads.value.schedule == AttnResSchedule.LAYER:
            return True
        return self.gradient_checkpointing and self.training

    @property
    def _attention(self) -> nn.Module:
        return getattr(self, self.attention_name)

    def _attend(self, x: Tensor, state: DepthState, kwargs: dict) -> tuple[Tensor | tuple, DepthState]:
        attend = partial(self._attention, x, **kwargs)
        if self.shares_values:
            return share_values(attend, self._attention, state, self.value_residual)
        return attend(), state

    def _mlp(self, x: Tensor) -> Tensor:
        layout = self.layout.mlp
        output = _first(getattr(self, layout.module)(x))
        companion = None if layout.companion is None else getattr(self, layout.companion)
        return output if companion is None else output + _first(companion(x))

    def _open_exchange(self, state: DepthState, kwargs: dict, num_tokens: int, recorder: DepthRecorder | None):
        if self.depth_kv is None:
            return None
        return self.depth_kv.open(
            state, self._attention, self.attn_depth_kv, kwargs, num_tokens, return_weights=recorder is not None
        )

    def _write_slot(
        self, state: DepthState, exchange, x: Tensor, kwargs: dict, recorder: DepthRecorder | None
    ) -> DepthState:
        if self.depth_kv is None:
            return state
        if recorder is not None:
            recorder.slot_weights.append(None if exchange is None else exchange.weights)
        return self.depth_kv.write_attention(state, exchange, self._attention, x, kwargs)

    def _attention_kwargs(self, exchange, kwargs: dict) -> dict:
        if self.recurrent_arguments is not None:
            return self.recurrent_arguments(kwargs)
        return kwargs if exchange is None else {"depth_exchange": exchange, **kwargs}

    @staticmethod
    def _read(
        depth_reads: Carried | None,
        last_site: int | None,
        recorder: DepthRecorder | None,
        site: "DepthSite",
        state: DepthState,
    ) -> tuple[Tensor, DepthState]:
        h, state, weights = site(state, depth_reads, last_site, return_weights=recorder is not None)
        if recorder is not None:
            recorder.weights.append(weights)
        return h, state

    def _write(self, site: "DepthSite", sublayer: SublayerLayout, state: DepthState, output: Tensor) -> DepthState:
        state = site.write(state, output)
        if sublayer.stream_norm is None:
            return state
        return state._replace(partial=getattr(self, sublayer.stream_norm)(state.open_block), update=None)

    def _normed(self, sublayer: SublayerLayout, h: Tensor) -> Tensor:
        return h if sublayer.pre_norm is None else getattr(self, sublayer.pre_norm)(h)

    def _run(self, sublayer: SublayerLayout, y: Tensor) -> Tensor:
        if sublayer.post_norm is not None:
            y = getattr(self, sublayer.post_norm)(y)
        if sublayer.dropout is not None:
            y = getattr(self, sublayer.dropout)(y)
        return y if sublayer.scale is None else y * getattr(self, sublayer.scale)


def _first(output: Tensor | tuple) -> Tensor:
    """Return the output of a module; attention also returns weights, and some MoE blocks return router scores."""
    return output[0] if isinstance(output, tuple) else output
