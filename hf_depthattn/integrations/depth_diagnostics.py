"""The papers' training diagnostics, logged by `Trainer`: how states, gradients, depth weights and slots develop.

    from hf_depthattn.integrations.depth_diagnostics import DepthDiagnosticsCallback

    trainer.add_callback(DepthDiagnosticsCallback(trainer.log, input_ids, every=100))

They arrive in `trainer.state.log_history`, and wherever Trainer reports to: with `report_to="tensorboard"` as
`train/depth/...`. Layers are averaged in groups, so that a deep model does not have hundreds of curves:

| key                                     | value                                                                     |
|-----------------------------------------|---------------------------------------------------------------------------|
| `depth/output_magnitude/layers_A-B`     | RMS of the state after layer l (that of all n streams), mean over tokens  |
| `depth/gradient_norm/layers_A-B`        | L2 norm of the loss gradient over the host's weights in layer l           |
| `depth/weight_of_newest/attention`      | weight of the newest source in reads before attention (`mlp`: MLPs)       |
| `depth/weight_of_embedding/attention`   | weight of the embedding                                                   |
| `depth/weight_entropy/attention`        | entropy of the weights / log(number of sources); 1 is uniform             |
| `depth/slot_mass/layers_A-B`            | weight of all MoDA slots in the joint softmax, mean over heads and tokens |

Output magnitude and gradient norm are those of Attention Residuals (arXiv 2603.15031, Fig. 5), depth weights those of
its Fig. 8, slot mass that of Mixture-of-Depths Attention (arXiv 2603.15619, Fig. 5). `depthattn report` has the same
quantities per layer and per source, for a finished model. Models without depth weights or slots have no such keys.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..utils.eval_mode import eval_mode
from .trainer import is_depth_name

_SINGLE_SOURCE = 1


def depth_diagnostics(model: nn.Module, input_ids: Tensor, *, max_groups: int = 8) -> dict[str, float]:
    """Measure the diagnostics of this module's table in one forward and one backward pass.

    The model is in eval mode meanwhile, no random number is drawn, and `.grad` of the parameters stays as it is.

    Args:
        model: a model with depth attention; `connection="residual"` for a baseline.
        input_ids: token ids `[B, T]` with T >= 2; memory is that of a training step on them.
        max_groups: maximum number of groups of consecutive layers.

    Returns:
        Key -> value, without values that are not finite.

    Raises:
        ValueError: if the model has no depth connections, or its parameters are sharded (FSDP2, tensor parallelism).
    """
    layers = [module for module in model.modules() if hasattr(module, "attn_depth")]
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no depth connections; for a baseline, use connection='residual'."
        )
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(f"model: the parameters of {type(model).__name__} are sharded; diagnostics need whole ones.")
    ids = input_ids.to(model.get_input_embeddings().weight.device)  # type: ignore[operator]
    magnitudes: list[Tensor] = []
    with eval_mode(model), torch.enable_grad(), _seen_outputs(layers, magnitudes):
        outputs = model(input_ids=ids, labels=ids, use_cache=False, output_depth_attentions=True)
        gradients = _gradient_norms(outputs.loss, layers)
    values = {
        **_by_group("output_magnitude", magnitudes, max_groups),
        **_by_group("gradient_norm", gradients, max_groups),
        # Code that older versions saved has no `embedding_source`: the embedding is its first source.
        **_weight_means(outputs["depth_attentions"], getattr(layers[0].attn_depth, "embedding_source", 0)),
        **_by_group("slot_mass", [_slot_mass(slots) for slots in outputs.get("depth_kv_attentions", ())], max_groups),
    }
    numbers = torch.stack([value.double().cpu() for value in values.values()]).tolist()
    named = zip(values, numbers, strict=True)
    return {f"depth/{key}": number for key, number in named if math.isfinite(number)}


class DepthDiagnosticsCallback(TrainerCallback):
    """Logs `depth_diagnostics` of a fixed batch before the first step, every few steps and after the last one.

    Training is not affected: losses, weights and random numbers are the same without this callback. With several
    processes (DDP) each measures the same batch, so that none waits for another.

    Args:
        log: the method `log` of the Trainer.
        input_ids: token ids `[B, T]`, the same at every measurement; a few sequences of held-out text are enough.
        every: number of optimizer steps between two measurements.
        max_groups: maximum number of groups of consecutive layers.

    Raises:
        ValueError: if `every` or `max_groups` is less than 1.
    """

    def __init__(self, log: Callable[[dict[str, float]], None], input_ids: Tensor, *, every: int, max_groups: int = 8):
        for name, value in (("every", every), ("max_groups", max_groups)):
            if value < 1:
                raise ValueError(f"{name}: {value} must be at least 1.")
        self.log = log
        self.input_ids = input_ids
        self.every = every
        self.max_groups = max_groups

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step == 0:
            self._measure(model, control)

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(model, control)

    def _measure(self, model: Any, control: Any) -> None:
        from accelerate.utils import extract_model_from_parallel

        # Without wrappers: DDP's hooks expect a backward pass into `.grad`.
        whole = extract_model_from_parallel(model)
        should_log = control.should_log
        self.log(depth_diagnostics(whole, self.input_ids, max_groups=self.max_groups))
        # Logging resets the flag, with which Trainer asks itself to log the loss of this step.
        control.should_log = should_log


@contextmanager
def _seen_outputs(layers: list[nn.Module], magnitudes: list[Tensor]) -> Iterator[None]:
    """Append the magnitude of what follows each layer: the streams, or else what the next site reads from it."""

    def see(site: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        streams = args[0].partial
        # n streams `[B, T, n, D]` are the state; one of several sources is not.
        state = streams.flatten(2) if streams.dim() == 4 else output[0]
        magnitudes.append(state.detach().float().square().mean(dim=-1).sqrt().mean())

    with ExitStack() as stack:
        for site in (*(layer.attn_depth for layer in layers[1:]), layers[-1].out_depth):
            stack.enter_context(site.register_forward_hook(see))  # type: ignore[arg-type, union-attr]
        yield


def _gradient_norms(loss: Tensor, layers: list[nn.Module]) -> list[Tensor]:
    """Return the norm for each layer, without those of its depth modules."""
    parameters = [
        [
            parameter
            for name, parameter in layer.named_parameters()
            if parameter.requires_grad and not is_depth_name(name)
        ]
        for layer in layers
    ]
    flat = [parameter for of_layer in parameters for parameter in of_layer]
    gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    norms = []
    for of_layer in parameters:
        found = [gradient for gradient in (next(gradients) for _ in of_layer) if gradient is not None]
        squares = [gradient.float().square().sum().to(loss.device) for gradient in found]
        norms.append(torch.stack(squares).sum().sqrt() if squares else loss.new_tensor(math.nan))
    return norms


def _by_group(name: str, values: Sequence[Tensor | None], max_groups: int) -> dict[str, Tensor]:
    """Average the values of layers, `None` where a layer has none, in groups of consecutive layers."""
    size = max(1, -(-len(values) // max_groups))
    digits = len(str(len(values) - 1))
    means = {}
    for first in range(0, len(values), size):
        group = values[first : first + size]
        known = [value.detach().float().cpu() for value in group if value is not None]
        last = first + len(group) - 1
        label = f"layer_{first:0{digits}}" if size == 1 else f"layers_{first:0{digits}}-{last:0{digits}}"
        if known:
            means[f"{name}/{label}"] = torch.stack(known).mean()
    return means


def _weight_means(weights: tuple[Tensor | None, ...], embedding: int) -> dict[str, Tensor]:
    """Average over the reads of several sources before attention and before MLPs; the output site is left out."""
    means: dict[str, Tensor] = {}
    for kind, of_sites in (("attention", weights[0:-1:2]), ("mlp", weights[1:-1:2])):
        rows: list[Tensor] = []
        for of_site in of_sites:
            if of_site is None or of_site.shape[-1] == _SINGLE_SOURCE:
                continue
            # Sigmoid weights do not sum to one.
            shares = of_site.float() / of_site.float().sum(dim=-1, keepdim=True)
            entropy = torch.special.entr(shares).sum(dim=-1).mean() / math.log(shares.shape[-1])
            rows.append(torch.stack([shares[..., -1].mean(), shares[..., embedding].mean(), entropy]).cpu())
        if rows:
            names = ("weight_of_newest", "weight_of_embedding", "weight_entropy")
            means |= {f"{name}/{kind}": mean for name, mean in zip(names, torch.stack(rows).mean(dim=0), strict=True)}
    return means


def _slot_mass(slots: Tensor | None) -> Tensor | None:
    return None if slots is None else slots.detach().float().sum(dim=-1).mean()
