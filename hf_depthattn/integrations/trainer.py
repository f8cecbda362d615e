"""Training: parameter groups with a separate group for depth parameters, and optimizers for `Trainer` that use them.

The *depth group* contains the parameters of AttnRes reads, of sites, MoDA's gates and value residuals. Sites have the
scales, gates, norms and mixes of the other connections (`branch.scale`, `gate.weight`, `norm.weight`, ..., as listed
in their docstrings) and options of AttnRes (`mix_scores`, `query_proj.weight`). The group has no weight decay, which
would pull reads towards uniform weights, and gates and scales towards zero (`Trainer` itself does decay `query` and
`gate`), and it can have its own learning rate. MoDA's projections of MLP inputs are not in it: they are matrices of
linear layers such as `self_attn.k_proj`, with the dtype and initialisation of the host's, and are trained like those,
weight decay and Muon included.

| parameter                        | learning rate          | weight decay        | Muon                |
|----------------------------------|------------------------|---------------------|---------------------|
| `depth_reads.query`, `.key_norm` | `depth_lr_factor * lr` | 0                   | no                  |
| sites (`*_depth.*`)              | `depth_lr_factor * lr` | 0                   | no                  |
| `attn_depth_kv.gate`             | `depth_lr_factor * lr` | 0                   | no                  |
| `value_residual.*_scale`         | `depth_lr_factor * lr` | 0                   | no                  |
| `mlp_depth_kv.k_proj`, `.v_proj` | like host `k_proj`     | like host `k_proj`  | like host `k_proj`  |
| their biases (`depth_kv_bias`)   | like host biases       | 0                   | no                  |

With `Trainer` or a subclass:

    from hf_depthattn.integrations.trainer import depth_optimizer_cls_and_kwargs

    trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=depth_optimizer_cls_and_kwargs(args))

`args.optim`, `args.learning_rate`, `args.weight_decay` and the learning rate schedule apply as usual.
`muon_optimizer_cls_and_kwargs` is used the same way and trains the weight matrices of linear layers in decoder layers
with Muon. For a custom training loop, `depth_param_groups` returns the groups.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..attn_res_reads import DEPTH_READS
from ..depth_connections import DEPTH_MODULES
from ..moda_slots import DEPTH_KV_MODULES
from ..value_residual import VALUE_RESIDUAL

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

_IN_DECODER_LAYER = re.compile(r"(?:^|\.)layers\.\d+\.")

#: Names of all modules that depth attention adds, to the base model and to its decoder layers.
ADDED_MODULES = (DEPTH_READS, *DEPTH_MODULES, *DEPTH_KV_MODULES, VALUE_RESIDUAL)

_PROJECTIONS = "mlp_depth_kv"

# Keyword arguments of those optimizers of Trainer that select parameters themselves (GaLore, Apollo, LOMO).
_OWN_PARAMETERS = frozenset({"params", "model", "optimizer_dict"})


def is_depth_name(name: str) -> bool:
    """Return whether a parameter or module was added by depth attention: for reads, in a site, in a module of MoDA
    or in a value residual.

    Args:
        name: its name, which may have parts added by wrappers (PEFT, DDP, FSDP).
    """
    return not set(ADDED_MODULES).isdisjoint(name.split("."))


def is_projection_name(name: str) -> bool:
    """Return whether a parameter or module is in MoDA's projections, which are trained like the host's matrices."""
    return _PROJECTIONS in name.split(".")


def is_layer_name(name: str) -> bool:
    """Return whether a parameter or module of a decoder layer is the host's."""
    return _IN_DECODER_LAYER.search(name) is not None and not is_depth_name(name)


def depth_parameter_names(model: nn.Module) -> list[str]:
    """Return the names, as in `model.named_parameters()`, of all parameters that depth attention adds.

    Args:
        model: a model with depth attention, possibly wrapped by PEFT, DDP, FSDP or `torch.compile`. Frozen parameters
            are listed too; PEFT keeps a frozen copy of each module that it trains.
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
    """Return parameter groups for an optimizer, with all trainable parameters of a model.

    There are up to three groups, in this order; empty ones are omitted:

    1. host parameters with weight decay, and MoDA's projections,
    2. host parameters without weight decay (norms and biases), and biases of MoDA's projections,
    3. the depth group, parameters of reads, sites, MoDA's gates and value residuals: no weight decay, rate
       `depth_lr_factor * lr`.

    The host comes first because Trainer logs the learning rate of the first group. A group with parameters on several
    device meshes (tensor or expert parallelism) is split by mesh, as in Trainer.

    Args:
        model: the model, wrapped or not.
        lr: learning rate.
        weight_decay: weight decay of the first group.
        depth_lr_factor: learning rate of the depth group divided by `lr`.
        decay_parameter_names: names of the parameters with weight decay, by default the ones that Trainer selects.
            The depth group has no weight decay even if its parameters are named here.

    Returns:
        Groups with `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: if `depth_lr_factor` is negative or not finite.
    """
    if not 0 <= depth_lr_factor < math.inf:
        raise ValueError(f"depth_lr_factor: {depth_lr_factor} must be finite and at least 0.")
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
    """Return `optimizer_cls_and_kwargs` for Trainer: `args.optim` on the groups of `depth_param_groups`.

    Args:
        args: the training arguments of the Trainer.
        depth_lr_factor: learning rate of the depth group divided by `args.learning_rate`; schedules keep the ratio.

    Returns:
        The argument `optimizer_cls_and_kwargs` of Trainer.
    """
    return _as_optimizer_class(_depth_optimizer), {"args": args, "depth_lr_factor": depth_lr_factor}


def _as_optimizer_class(make: Callable[..., torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    # Trainer's annotation leaves out that it also takes a function that returns an optimizer factory.
    return cast(type[torch.optim.Optimizer], lambda: make)


def _depth_optimizer(
    model: "PreTrainedModel", *, args: "TrainingArguments", depth_lr_factor: float
) -> torch.optim.Optimizer:
    from transformers.trainer import Trainer

    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not isinstance(optimizer_class, type) or not _OWN_PARAMETERS.isdisjoint(kwargs):
        raise ValueError(
            f"optim: {str(args.optim)!r} selects parameters itself; use an optimizer that takes parameter groups."
        )
    groups = depth_param_groups(
        model, lr=args.learning_rate, weight_decay=args.weight_decay, depth_lr_factor=depth_lr_factor
    )
    return optimizer_class(groups, **kwargs)


class MuonWithAdamW(torch.optim.Optimizer):
    """An optimizer that uses `torch.optim.Muon` for groups with `use_muon` and `torch.optim.AdamW` for the others.

    It has one state and one list of groups, so that schedulers, checkpoints and FSDP work as with other optimizers.

    Args:
        groups: parameter groups with a bool `use_muon`, as returned by `muon_param_groups`.
        lr: default learning rate.
        betas: coefficients of AdamW's running averages.
        adamw_eps: epsilon of AdamW.
        **muon_options: `momentum`, `nesterov`, `ns_coefficients`, `ns_steps`, `eps` and `adjust_lr_fn` of Muon. The
            default of `adjust_lr_fn` is `"match_rms_adamw"`, with which both optimizers can share a learning rate.
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
        # The constructors above have added the options of each optimizer to its groups.
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for use_muon, part in self._parts.items():
            # Set at every step, since loading a checkpoint replaces state and groups, and FSDP replaces parameters.
            part.state = self.state
            part.param_groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            part.step()
        return loss


def muon_param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, depth_lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Return the groups of `depth_param_groups`, split by `use_muon` for `MuonWithAdamW`.

    Muon optimises the matrices of the host's decoder layers and MoDA's projections. AdamW optimises embeddings, heads,
    one-dimensional parameters, the fused expert tensors of MoE hosts (`torch.optim.Muon` does not support three
    dimensions) and the depth group, which is selected by name because some of its parameters have two dimensions.

    Args:
        model: the model, wrapped or not.
        lr: learning rate of both optimizers.
        weight_decay: weight decay of matrices of linear layers and of embeddings.
        depth_lr_factor: learning rate of the depth group divided by `lr`.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `use_muon`.
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
    """Return `optimizer_cls_and_kwargs` for Trainer: `MuonWithAdamW` on the groups of `muon_param_groups`.

    Args:
        args: the training arguments of the Trainer. `learning_rate`, `weight_decay` and, for AdamW, `adam_*` are used;
            `optim` is ignored.
        depth_lr_factor: learning rate of the depth group divided by `args.learning_rate`.
        **muon_options: options of Muon, as in `MuonWithAdamW`.

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
    # Fused and foreach kernels need all parameters on one mesh; ordinary tensors have none.
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{**group, "params": parameters} for parameters in by_mesh.values()]


def _decay_parameter_names_of_trainer(model: nn.Module) -> list[str]:
    from transformers.trainer import Trainer

    # An instance method that does not use `self`.
    return Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
