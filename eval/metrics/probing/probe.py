"""`DepthProbe`: hooks that read and modify the states between the decoder layers of a causal LM.

Metrics are defined in terms of states `z_0 .. z_L` (layer l reads `z_l`, the final norm reads `z_L`) and interventions
on layers. Both depend on what layers pass on. The conventions follow DepthBench (arXiv 2609.32534), with the
differences named below:

|layers pass on  |state z_l                                  |skip layer l                                         |
|----------------|-------------------------------------------|-----------------------------------------------------|
|one stream      |the stream before layer l                  |identity, also if the connection scales or norms it  |
|n streams       |the streams before layer l, as one [B, T,  |identity on the streams                              |
|                |n D]                                       |                                                     |
|more and more   |what layer l's attention site reads,       |adds no sources, block boundaries stay the same      |
|sources         |what the output site reads at l = L        |(`MixSkip`); with numbered sources it adds zeros     |

With MoDA, a skipped layer writes no depth slots (`SlotSkip`). With a value residual, the values of a skipped first
layer stay. A swap of layers moves all their learned weights; with sources, those of the site after a layer instead of
those of its own attention site, and parameters that depend on the number of sources stay.

In DepthBench's Block AttnRes, layers inside a block are summed without depth reads, so its state is the plain output.
Here every sublayer has a depth read, and z_l is always the result of one. The readout of z_l applies what the model
applies after its last layer: the output site to streams, final norm, head, soft-capping, scaling.

States are not taken from `output_hidden_states`, whose last entry is taken after the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....attn_res_reads import DEPTH_READS, DepthReads
from ....configuration_depthattn import DepthAttnConfig
from ....depth_options import DepthConnectionType
from ....depth_state import DepthState
from ....utils.eval_mode import eval_mode
from . import interventions, observation, resume
from .interventions import MixSkip, SlotSkip
from .observation import StateCallback, SublayerCallback
from .sublayers import Sublayer, find_sublayers
from .text import TextBatches
from .token_losses import token_losses


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers: the first `nn.ModuleList` with `num_hidden_layers` entries.

    Raises:
        ValueError: if the model has none.
    """
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if num_layers:
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == num_layers:
                return module
    raise ValueError(
        f"model: {type(model).__name__} has no decoder layers (no nn.ModuleList of num_hidden_layers={num_layers})"
    )


class DepthProbe:
    """Hooks into one model. All changes are made by context managers and undone on exit.

    Args:
        model: a causal language model of transformers. A compiled model is unwrapped, since it ignores hooks that are
            added after compilation.
        on_forward: called after every forward pass, for progress bars.

    Attributes:
        layers: the decoder layers.
        num_layers: L.
        family: how layers are connected: the name of the connection, with "+moda" if there are depth slots; "residual"
            for stock models, "moda" for slots beside the residual stream.
        num_forwards: number of forward passes so far.
        num_backwards: number of backward passes so far.
        on_forward: called after every forward pass, for progress bars.
    """

    def __init__(self, model: PreTrainedModel, on_forward: Callable[[], None] | None = None):
        self.model: PreTrainedModel = getattr(model, "_orig_mod", model)
        self.layers = find_layers(self.model)
        self.num_layers = len(self.layers)
        self.family = self._family()
        self.num_forwards = 0.0
        self.num_backwards = 0.0
        self.on_forward = on_forward
        self._share = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel | DepthProbe) -> DepthProbe:
        """Return a probe of a model, or the given probe itself."""
        return model if isinstance(model, DepthProbe) else cls(model)

    @property
    def has_depth_sites(self) -> bool:
        """Whether the layers belong to this package and pass on a `DepthState`."""
        return hasattr(self.layers[0], "attn_depth")

    @property
    def depth_config(self) -> DepthAttnConfig:
        """The config of a model with `has_depth_sites`; one with remote code has a copy of the class."""
        return cast(DepthAttnConfig, self.model.config)

    @property
    def mixes_sources(self) -> bool:
        """Whether layers read weighted sums of sources (AttnRes)."""
        return self._connection == DepthConnectionType.ATTN_RES

    @property
    def has_slots(self) -> bool:
        """Whether attention reads depth slots (MoDA)."""
        return self.has_depth_sites and self.depth_config.depth_kv is not None

    @property
    def maps_states(self) -> bool:
        """Whether a layer maps z_l to z_{l+1}: it passes on one stream or n streams, not a growing set of sources."""
        return not self._state_form.grows

    @property
    def has_streams(self) -> bool:
        """Whether layers pass on n streams."""
        return self._state_form.has_streams

    @cached_property
    def depth_reads(self) -> DepthReads | None:
        """The module with the queries of all AttnRes sites, if any; remote code has a copy of the class."""
        named = (module for name, module in self.model.named_modules() if name.rpartition(".")[2] == DEPTH_READS)
        return cast("DepthReads | None", next(named, None))

    @cached_property
    def sublayers(self) -> list[Sublayer]:
        """Sublayers in execution order; raises `ValueError` for unsupported layers."""
        return find_sublayers(self.model.config, self.layers)

    @cached_property
    def knows_sublayers(self) -> bool:
        """Whether `sublayers` is available for this model."""
        try:
            return bool(self.sublayers)
        except ValueError:
            return False

    @property
    def device(self) -> torch.device:
        return cast(Tensor, self.model.get_input_embeddings().weight).device

    def run(self, ids: Tensor, **kwargs: bool) -> Any:
        """Run one forward pass of `ids` [B, T] and return the model output."""
        output = self._forward(ids, **kwargs)
        self.num_forwards += self._share
        if self.on_forward is not None:
            self.on_forward()
        return output

    def _forward(self, ids: Tensor, **kwargs: bool) -> Any:
        # States between layers then hold no results for later sites, which a change of those would not reach.
        with interventions.single_reads(self.model.config):
            return self.model(ids.to(self.device), use_cache=False, **kwargs)

    def logits(self, ids: Tensor) -> Tensor:
        """Run one forward pass of `ids` [B, T] and return the logits [B, T, V]."""
        return cast(Tensor, self.run(ids).logits)

    def loss(self, text: TextBatches) -> float:
        """Return the mean next-token cross-entropy in nats."""
        total = sum(token_losses(self.logits(ids), ids).double().sum().item() for ids in text)
        return total / (text.num_sequences * (text.sequence_length - 1))

    def losses(
        self, text: TextBatches, changes: Sequence[tuple[int, Callable[[], AbstractContextManager[None]]]]
    ) -> tuple[float, list[float]]:
        """Return the loss of the model, and its loss under each of several changes.

        The states of all layers are kept for one batch, so that layers before a change do not run again.

        Args:
            text: the text.
            changes: for each change, the first layer that it affects and a function that returns a context manager.

        Returns:
            The loss of the model, and the loss under each change.
        """
        totals = [0.0] * (len(changes) + 1)
        for ids in text:
            with self.recorded() as inputs:
                totals[-1] += token_losses(self.logits(ids), ids).double().sum().item()
            for number, (first, change) in enumerate(changes):
                with change(), self.resumed_at(first, inputs):
                    totals[number] += token_losses(self.logits(ids), ids).double().sum().item()
        num_predictions = text.num_sequences * (text.sequence_length - 1)
        *changed, loss = (total / num_predictions for total in totals)
        return loss, changed

    @contextmanager
    def recorded(self) -> Iterator[list[Any]]:
        """Record the inputs of all layers during one pass, for `resumed_at`."""
        if not self._can_resume:
            yield []
            return
        with resume.recorded_inputs(self.layers) as inputs:
            yield inputs

    @contextmanager
    def resumed_at(self, layer: int, inputs: list[Any]) -> Iterator[None]:
        """Start passes at a layer, with inputs from `recorded`; earlier states and sublayers are not observed.

        Args:
            layer: the first layer that runs.
            inputs: recorded inputs of the layers; if empty, all layers run.
        """
        if not inputs or not layer:
            yield
            return
        share, self._share = self._share, 1.0 - layer / self.num_layers
        try:
            with resume.resumed_at(self.layers, layer, inputs, as_tuple=self._layers_return_tuples):
                yield
        finally:
            self._share = share

    @cached_property
    def _can_resume(self) -> bool:
        def logits(ids: Tensor) -> Tensor:
            return cast(Tensor, self._forward(ids).logits)

        with torch.no_grad():
            return resume.can_resume(self.layers, logits, as_tuple=self._layers_return_tuples)

    def readout(self, state: Tensor) -> Tensor:
        """Return the logits [B, T, V] of the model with a state z_l in place of z_L.

        Args:
            state: [B, T, D], or [B, T, n D] with n streams.
        """
        ids = torch.zeros(state.shape[:2], dtype=torch.long, device=self.device)
        if self.has_streams:
            streams = state.unflatten(-1, (-1, self.depth_config.hidden_size))
            site = interventions.right_boundary(self.layers, self.num_layers - 1)
            state = site(DepthState(sources=(), partial=streams))[0]
        with interventions.without_layers(self.layers, state, as_tuple=self._layers_return_tuples):
            return cast(Tensor, self.model(ids, use_cache=False).logits)

    @cached_property
    def _state_form(self) -> _StateForm:
        """The form of the depth states, from the writes of the first layer."""
        if not self.has_depth_sites:
            return _StateForm(grows=False, has_streams=False)
        weight = cast(Tensor, self.model.get_input_embeddings().weight)
        nothing = torch.zeros(1, 1, self.depth_config.hidden_size, dtype=weight.dtype, device=weight.device)
        layer = interventions.own_layers(self.layers)[0]
        with torch.no_grad():
            before = layer.attn_depth.begin(nothing)
            if before.partial.dim() == 4:
                return _StateForm(grows=False, has_streams=True)
            after = layer.mlp_depth.write(layer.attn_depth.write(before, nothing), nothing)
        return _StateForm(grows=len(after.sources) > len(before.sources), has_streams=False)

    @cached_property
    def _layers_return_tuples(self) -> bool:
        """Whether layers return tuples, as in older remote code."""
        seen: list[bool] = []

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append(isinstance(output, tuple))

        with self.layers[-1].register_forward_hook(see):
            self.logits(torch.zeros(1, 2, dtype=torch.long))
        return seen[0]

    def observe_states(self, callback: StateCallback) -> AbstractContextManager[None]:
        """Call `callback(l, z_l)` for every state, l = 0 .. L, in each forward pass."""
        if self.has_streams:
            observe = observation.streams
        elif self.has_depth_sites:
            observe = observation.reads
        else:
            observe = observation.stream
        return observe(self.layers, callback)

    def observe_sublayers(self, callback: SublayerCallback) -> AbstractContextManager[None]:
        """Call `callback(sublayer, h, y)` with input and output of every sublayer in each forward pass."""
        return observation.sublayers(self.sublayers, callback)

    def skip(
        self, layer: int, *, slots: SlotSkip = SlotSkip.ZERO, mix: MixSkip = MixSkip.REMIX
    ) -> AbstractContextManager[None]:
        """Skip a layer.

        Args:
            layer: index of the layer.
            slots: how later layers see its MoDA slots.
            mix: what the site after it reads, with AttnRes.
        """
        self._check_layer(layer)
        if self.has_depth_sites:
            return interventions.skip_depth_layer(self.depth_config, self.layers, layer, slots, mix)
        return interventions.replace_layer(self.layers[layer], lambda state: state)

    def replace_layer(
        self, layer: int, function: Callable[[Tensor], Tensor], *, slots: SlotSkip = SlotSkip.ZERO
    ) -> AbstractContextManager[None]:
        """Replace a layer by `z_{l+1} = function(z_l)`.

        Args:
            layer: index of the layer.
            function: [B, T, D] to [B, T, D], or with n streams [B, T, n D] to [B, T, n D].
            slots: how later layers see its MoDA slots.

        Raises:
            ValueError: if layers pass on more and more sources, so that z_{l+1} is not a function of z_l.
        """
        self._check_layer(layer)
        self.check_maps_states()
        if self.has_depth_sites:
            return interventions.replace_depth_layer(self.depth_config, self.layers, layer, function, slots)
        return interventions.replace_layer(self.layers[layer], function)

    def check_maps_states(self) -> None:
        """Raise ValueError if a layer does not map z_l to z_{l+1}; the message names the connection."""
        if not self.maps_states:
            raise ValueError(
                f"level: 'layer' needs layers that map one state to the next, but with connection="
                f"{self._connection!r} they add sources that all later layers read; use 'sublayer'"
            )

    def replace_sublayer(
        self, sublayer: Sublayer, function: Callable[[Tensor], Tensor]
    ) -> AbstractContextManager[None]:
        """Replace a sublayer by `y = function(h)`; the slots that it writes stay unchanged.

        Args:
            sublayer: one of `sublayers`.
            function: [B, T, D] to [B, T, D].
        """
        return interventions.replace_sublayer(sublayer, function)

    def swap(self, first: int, second: int) -> AbstractContextManager[None]:
        """Swap the learned weights of two layers; attention patterns stay in place.

        Args:
            first, second: indices of two layers for which `can_swap` is true.
        """
        self._check_layer(first)
        self._check_layer(second)
        return interventions.swap_layers(
            self.layers, first, second, self.depth_reads, moves_reads=not self.maps_states
        )

    def can_swap(self, first: int, second: int) -> bool:
        """Return whether two layers have weights with the same names, shapes and dtypes."""
        return interventions.signature(self.layers[first]) == interventions.signature(self.layers[second])

    def evaluation(self) -> AbstractContextManager[None]:
        """Set eval mode and restore the mode of every module on exit."""
        return eval_mode(self.model)

    @property
    def _connection(self) -> str:
        return str(self.depth_config.connection if self.has_depth_sites else DepthConnectionType.RESIDUAL)

    def _family(self) -> str:
        if not self.has_slots:
            return self._connection
        return "moda" if self._connection == DepthConnectionType.RESIDUAL else f"{self._connection}+moda"

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be between 0 and {self.num_layers - 1}, got {layer}")


class _StateForm(NamedTuple):
    """The form of depth states.

    Attributes:
        grows: whether there are more sources after a layer than before it.
        has_streams: whether layers pass on n streams [B, T, n, D].
    """

    grows: bool
    has_streams: bool
