"""Training: parameter groups for depth parameters, and optimizers for `Trainer` that use them.

The parameters of depth sites and MoDA's gates are the *depth group*: they are not decayed (decay would pull the reads
back to uniform mixing and the gates shut, and the names by which `Trainer` spares parameters do not cover `query` and
`gate`), and they can have a learning rate of their own. MoDA's projections of MLP inputs are not among them: they are
hidden matrices such as `self_attn.k_proj`, in the model's dtype and with its initialisation, and are trained like
those, weight decay and Muon included.

| parameter                                 | learning rate  | weight decay | Muon          |
|-------------------------------------------|----------------|--------------|---------------|
| depth sites (`query`, `key_norm`, ...)    | times a factor | never        | never         |
| `attn_depth_kv.gate`                      | times a factor | never        | never         |
| `mlp_depth_kv.k_proj`, `.v_proj`          | the host's     | the host's   | as the host's |

With `Trainer` or a subclass:

    from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs

    trainer = Trainer(
        model, args, ..., optimizer_cls_and_kwargs=depth_optimizer_cls_and_kwargs(args, depth_lr_factor=10.0)
    )

`args.optim`, `args.learning_rate`, `args.weight_decay` and the schedule hold as ever. `muon_optimizer_cls_and_kwargs`
is used the same way and trains the host's hidden matrices with Muon. For a loop of your own, `depth_param_groups`
makes the groups.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..depth_connections import DEPTH_MODULES
from ..moda_slots import DEPTH_KV_MODULES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

_IN_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")

#: Leaf names of everything that depth attention adds to a decoder layer.
ADDED_MODULES = (*DEPTH_MODULES, *DEPTH_KV_MODULES)

_PROJECTIONS = "mlp_depth_kv"

# What an optimizer of Trainer brings along when it chooses parameters itself (GaLore, Apollo, LOMO).
_OWN_PARAMETERS = frozenset({"params", "model", "optimizer_dict"})


def is_depth_name(name: str) -> bool:
    """Whether a parameter or module is not the host's: it lies in a depth site or in a module of MoDA.

    By name: wrappers (PEFT, DDP, FSDP) only add parts to it.
    """
    return not set(ADDED_MODULES).isdisjoint(name.split("."))


def is_projection_name(name: str) -> bool:
    """Whether a parameter or module belongs to MoDA's projections, which are trained like the host's matrices."""
    return _PROJECTIONS in name.split(".")


def is_layer_name(name: str) -> bool:
    """Whether a parameter or module lies in a decoder layer of the host, outside what depth attention adds to it."""
    return _IN_DECODER_LAYER.search(name) is not None and not is_depth_name(name)


def depth_parameter_names(model: nn.Module) -> list[str]:
    """The names of all parameters that are not the host's, as `model.named_parameters()` gives them.

    Args:
        model: a model with depth attention, also wrapped by PEFT, DDP, FSDP or `torch.compile`. Frozen parameters are
            listed too; a model under PEFT holds each trained module twice, the original one frozen.
    """
    return [name for name, _ in model.named_parameters() if is_depth_name(name)]


def depth_param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    depth_lr_factor: float = 1.0,
    decay_parameter_names: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: every trainable parameter once, frozen ones not at all.

    In this order, empty groups left out: host parameters and MoDA's projections with weight decay, host parameters
    without (norms and biases), and the parameters of depth sites and gates, which are never decayed and may have a
    learning rate of their own. Since the host comes first, the learning rate that Trainer logs is the host's. A group
    whose parameters lie on several device meshes (tensor or expert parallelism) is split, as Trainer does it.

    Args:
        model: the model, wrapped or not.
        lr: learning rate.
        weight_decay: weight decay of the first group.
        depth_lr_factor: learning rate of depth sites and gates over `lr`.
        decay_parameter_names: names of the parameters to decay, those of Trainer by default. Depth sites and gates
            are not decayed even if they are named here.

    Returns:
        Groups with `params`, `lr` and `weight_decay`.
    """
    if not 0 <= depth_lr_factor < math.inf:
        raise ValueError(f"depth_lr_factor: {depth_lr_factor} must be finite and not negative.")
    if decay_parameter_names is None:
        decay_parameter_names = _decay_parameter_names_of_trainer(model)
    decayed = frozenset(decay_parameter_names)
    host_decayed: dict[str, Any] = {"params": [], "lr": lr, "weight_decay": weight_decay}
    host_undecayed: dict[str, Any] = {"params": [], "lr": lr, "weight_decay": 0.0}
    depth: dict[str, Any] = {"params": [], "lr": lr * depth_lr_factor, "weight_decay": 0.0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = depth if _is_in_depth_group(name) else host_decayed if name in decayed else host_undecayed
        group["params"].append(parameter)
    return [part for group in (host_decayed, host_undecayed, depth) for part in _split_by_mesh(group)]


def _is_in_depth_group(name: str) -> bool:
    return is_depth_name(name) and not is_projection_name(name)


def depth_optimizer_cls_and_kwargs(
    args: "TrainingArguments", *, depth_lr_factor: float = 1.0
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """`Trainer`'s own optimizer (`args.optim`) on the groups of `depth_param_groups`.

    Args:
        args: the arguments that Trainer gets.
        depth_lr_factor: learning rate of depth sites and gates over `args.learning_rate`; schedules keep the ratio.

    Returns:
        The argument `optimizer_cls_and_kwargs` of Trainer.
    """
    return _as_optimizer_class(_depth_optimizer), {"args": args, "depth_lr_factor": depth_lr_factor}


def _as_optimizer_class(make: Callable[..., torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    # Trainer's annotation leaves out that it also takes a function that gives what makes the optimizer.
    return cast(type[torch.optim.Optimizer], lambda: make)


def _depth_optimizer(
    model: "PreTrainedModel", *, args: "TrainingArguments", depth_lr_factor: float
) -> torch.optim.Optimizer:
    from transformers.trainer import Trainer

    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not isinstance(optimizer_class, type) or not _OWN_PARAMETERS.isdisjoint(kwargs):
        raise ValueError(f"optim: {str(args.optim)!r} chooses parameters itself; use one that takes groups.")
    groups = depth_param_groups(
        model, lr=args.learning_rate, weight_decay=args.weight_decay, depth_lr_factor=depth_lr_factor
    )
    return optimizer_class(groups, **kwargs)


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on groups with `use_muon`, `torch.optim.AdamW` on the others; one optimizer to the outside.

    State and groups are those of an ordinary optimizer, so schedulers, checkpoints and FSDP treat it as one.

    Args:
        groups: parameter groups, each with a bool `use_muon`; `muon_param_groups` makes them.
        lr: default learning rate.
        betas, adamw_eps: of AdamW.
        **muon_options: `momentum`, `nesterov`, `ns_coefficients`, `ns_steps`, `eps` and `adjust_lr_fn` of Muon. The
            last is `"match_rms_adamw"` unless given: with it, one learning rate suits both.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        **muon_options,
    ):
        groups = list(groups)
        muon_options.setdefault("adjust_lr_fn", "match_rms_adamw")
        muon_groups = [group for group in groups if group["use_muon"]]
        adamw_groups = [group for group in groups if not group["use_muon"]]
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if muon_groups:
            self._parts[True] = torch.optim.Muon(muon_groups, lr=lr, **muon_options)
        if adamw_groups:
            self._parts[False] = torch.optim.AdamW(adamw_groups, lr=lr, betas=betas, eps=adamw_eps)
        # Each part has entered its own options into its groups.
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for use_muon, part in self._parts.items():
            # Handed over at every step, since loading a checkpoint replaces both and FSDP swaps the parameters.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            part.step()
        return loss


def muon_param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, depth_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """The groups of `depth_param_groups`, split by `use_muon` for `MuonWithAdamW`.

    Muon gets the matrices of the host's decoder layers and MoDA's projections. Embeddings, heads, one-dimensional
    parameters and the fused expert tensors of MoE hosts (three-dimensional, which `torch.optim.Muon` does not take)
    stay with AdamW. So do depth sites and gates, by name: some of their parameters have two dimensions.

    Args:
        model: the model, wrapped or not.
        lr: learning rate of both optimizers.
        weight_decay: weight decay of hidden matrices and embeddings.
        depth_lr_factor: learning rate of depth sites and gates over `lr`.
    """
    matrices = {
        id(p)
        for name, p in model.named_parameters()
        if p.ndim == 2 and (is_layer_name(name) or is_projection_name(name))
    }
    split = []
    for group in depth_param_groups(model, lr=lr, weight_decay=weight_decay, depth_lr_factor=depth_lr_factor):
        for use_muon in (True, False):
            parameters = [p for p in group["params"] if (id(p) in matrices) == use_muon]
            if parameters:
                split.append({**group, "params": parameters, "use_muon": use_muon})
    return split


def muon_optimizer_cls_and_kwargs(
    args: "TrainingArguments", *, depth_lr_factor: float = 1.0, **muon_options
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Muon on hidden matrices (the host's and MoDA's projections), AdamW on the rest; `args.optim` is not used.

    Args:
        args: the arguments that Trainer gets: `learning_rate`, `weight_decay`, and `adam_*` for the AdamW part.
        depth_lr_factor: learning rate of depth sites and gates over `args.learning_rate`.
        **muon_options: see `MuonWithAdamW`.

    Returns:
        The argument `optimizer_cls_and_kwargs` of Trainer.
    """
    return _as_optimizer_class(_muon_optimizer), {"args": args, "depth_lr_factor": depth_lr_factor, **muon_options}


def _muon_optimizer(
    model: nn.Module, *, args: "TrainingArguments", depth_lr_factor: float, **muon_options
) -> MuonWithAdamW:
    groups = muon_param_groups(
        model, lr=args.learning_rate, weight_decay=args.weight_decay, depth_lr_factor=depth_lr_factor
    )
    betas = (args.adam_beta1, args.adam_beta2)
    return MuonWithAdamW(groups, lr=args.learning_rate, betas=betas, adamw_eps=args.adam_epsilon, **muon_options)


def _split_by_mesh(group: dict[str, Any]) -> list[dict[str, Any]]:
    # Fused and foreach kernels take parameters of one mesh only; ordinary tensors have none.
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{**group, "params": parameters} for parameters in by_mesh.values()]


def _decay_parameter_names_of_trainer(model: nn.Module) -> list[str]:
    from transformers.trainer import Trainer

    # An instance method that uses no instance.
    return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
