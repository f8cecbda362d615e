"""Cost of depth connections in a decoder, forward and backward, relative to the stock host."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from naive_moda import naive_moda_attention
from timing import check_parity, gradient_of, time_in_turn, unrounded_norms
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from hf_depthattn import DepthAttnConfig, DepthAttnModel, attn_res_connection, moda_attention
from hf_depthattn.attn_res_ops import AttnResInputs

PARITY_SEQUENCE_LENGTH = 64
STOCK = "residual host (stock)"


@dataclass(frozen=True)
class Setting:
    """Sizes of a decoder and of its input.

    Attributes:
        num_layers: number of decoder layers.
        hidden_size: D; MLPs have 4 D channels.
        sequence_length: number of tokens; the batch size is 1.
        dtype: dtype of the host's weights and of the input.
        checkpointed: with gradient checkpointing.
        rounds: number of timed runs per row.
    """

    num_layers: int
    hidden_size: int
    sequence_length: int
    dtype: str = "float32"
    checkpointed: bool = False
    rounds: int = 15


def plain_read(inputs: AttnResInputs, **_) -> tuple[Tensor, None]:
    """Compute the paper's pseudo-code (arXiv 2603.15031, Fig. 2), with the norm's weight folded into the query."""
    values = torch.stack(list(inputs.sources))  # [N, B, T, D]
    keys = nn.functional.rms_norm(values, values.shape[-1:], eps=inputs.eps)
    logits = torch.einsum("d,nbtd->nbt", inputs.score_weight, keys)
    return inputs.read_scale * torch.einsum("nbt,nbtd->btd", logits.softmax(0), values), None


@contextlib.contextmanager
def plain_forms() -> Iterator[None]:
    """Replace our ops by their plain forms in the modules where the layers look them up."""
    ours = attn_res_connection.attn_res_read, moda_attention.moda_attention
    attn_res_connection.attn_res_read = plain_read
    # It gives no log-sum-exp, which layers need for weights only.
    moda_attention.moda_attention = naive_moda_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        attn_res_connection.attn_res_read, moda_attention.moda_attention = ours


@dataclass(frozen=True)
class Runner:
    """Runs a model.

    Attributes:
        model: the model.
        plain: with the plain forms in place of our ops.
    """

    model: nn.Module
    plain: bool = False

    def __call__(self, embeddings: Tensor) -> Tensor:
        with plain_forms() if self.plain else contextlib.nullcontext():
            return self.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state


def build(host: LlamaModel, plain: bool = False, schedule: str = "auto", **fields) -> Runner:
    """Build a model that can be run; all share the host's weights and get the same random depth parameters.

    Args:
        host: the stock model.
        plain: use the plain forms instead of our ops.
        schedule: `attn_res_schedule` of the config.
        **fields: fields of `DepthAttnConfig`.
    """
    config = DepthAttnConfig(text_config=copy.deepcopy(host.config), **fields)
    # The plain read replaces single reads.
    config.attn_res_schedule = "single" if plain else schedule
    model = DepthAttnModel(config).train().to(host.dtype)
    # All rows share the host's parameters to save memory, and for equal cache behaviour.
    model.load_state_dict(host.state_dict(keep_vars=True), strict=False, assign=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("depth_reads.query"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "mlp_depth_kv." in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return Runner(model, plain)


def results(run: Runner, embeddings: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Return the output and the gradients of the input and of the depth parameters in float64.

    In float32, rounding errors grow over the depth of the network.
    """
    model = copy.deepcopy(run.model).double()
    embeddings.grad = None
    with unrounded_norms():
        output = Runner(model, run.plain)(embeddings)
    output.backward(cotangent)
    depth = [parameter for name, parameter in model.named_parameters() if "depth" in name]
    return [output.detach(), *(gradient_of(leaf) for leaf in (embeddings, *depth))]


def attn_res_fields(num_layers: int) -> dict[str, dict[str, Any]]:
    """Return the fields of the config by the name of a row with AttnRes."""
    return {
        "Block AttnRes, 8 blocks": {"num_blocks": min(8, 2 * num_layers)},
        "Full AttnRes": {"sublayers_per_block": 1},
    }


def measure(setting: Setting, every_row: bool) -> dict:
    """Check the parity of every row with its plain form, then time the rows.

    Args:
        setting: sizes.
        every_row: also the plain pseudo-code, MoDA, and the residual connection; otherwise AttnRes alone.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, setting.dtype)
    host = LlamaModel(
        LlamaConfig(
            vocab_size=256,
            hidden_size=setting.hidden_size,
            intermediate_size=4 * setting.hidden_size,
            num_hidden_layers=setting.num_layers,
            num_attention_heads=8,
            num_key_value_heads=2,
        )
    )
    host = host.to(dtype).train()
    shape = 1, setting.sequence_length, setting.hidden_size
    embeddings = torch.randn(shape).to(dtype).requires_grad_()
    cotangent = torch.randn(shape).to(dtype)
    stock = Runner(host)
    rows, plain_of = _rows(host, setting.num_layers, every_row)

    short = embeddings[:, :PARITY_SEQUENCE_LENGTH].detach().double().requires_grad_()
    short_cotangent = torch.randn_like(short)
    parity = {
        name: check_parity(name, results(rows[name], short, short_cotangent), results(plain, short, short_cotangent))
        for name, plain in plain_of.items()
    }
    timed = {STOCK: stock, **rows}
    for run in timed.values():
        if setting.checkpointed:
            run.model.gradient_checkpointing_enable()  # type: ignore[operator]

    def step(run: Runner) -> Callable[[], None]:
        def run_once() -> None:
            run(embeddings).backward(cotangent)

        return run_once

    def clear() -> None:
        for run in timed.values():
            run.model.zero_grad(set_to_none=True)
        embeddings.grad = None

    return {
        "setting": {**asdict(setting), "intermediate_size": 4 * setting.hidden_size, "batch_size": 1},
        "parity_relative_error": parity,
        "rows": time_in_turn({name: step(run) for name, run in timed.items()}, setting.rounds, clear),
    }


def _rows(host: LlamaModel, num_layers: int, every_row: bool) -> tuple[dict[str, Runner], dict[str, Runner]]:
    """Return the rows but the first, and for some of them the plain form of the same model."""
    attn_res = attn_res_fields(num_layers)
    ours = {name: build(host, **fields) for name, fields in attn_res.items()}
    plain = {name: build(host, plain=True, **fields) for name, fields in attn_res.items()}
    single = {f"{name}, single reads": build(host, schedule="single", **attn_res[name]) for name in attn_res}
    if not every_row:
        return {**ours, **single}, {**plain, **{f"{name}, single reads": plain[name] for name in attn_res}}
    moda: dict[str, dict[str, Any]] = {
        "MoDA, attention": {"connection": "residual", "depth_kv": "attention"},
        "MoDA, attention and MLP": {"connection": "residual", "depth_kv": "attention+mlp"},
        "Block AttnRes and MoDA": {**attn_res["Block AttnRes, 8 blocks"], "depth_kv": "attention+mlp"},
    }
    rows = {
        "residual connection": build(host, connection="residual"),
        **ours,
        **single,
        "Block, plain pseudo-code": plain["Block AttnRes, 8 blocks"],
        "Full, plain pseudo-code": plain["Full AttnRes"],
        **{name: build(host, **fields) for name, fields in moda.items()},
    }
    plain_of = {
        "residual connection": Runner(host),
        **plain,
        **{f"{name}, single reads": plain[name] for name in attn_res},
        **{name: build(host, plain=True, **fields) for name, fields in moda.items()},
    }
    return rows, plain_of
