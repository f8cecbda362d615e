"""What the formats of OLMo-core have in common: the config of a Llama or Qwen3, and names of modules.

The methods are in the fork github.com/keyu-wang-2002/DepthBench. On the Hub, `aspect-ratio-scaling` and `davidgonmar`
have such checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ...errors import UserError
from .config_fields import ConfigFields, build_host
from .foreign_checkpoint import ForeignCheckpoint

PROJECT = "OLMo-core"

#: What comes before the number of a layer.
LAYERS = "blocks."
#: Names of the modules outside layers.
ON_TOP = {"embeddings": "model.embed_tokens", "lm_head.norm": "model.norm", "lm_head.w_out": "lm_head"}
#: The epsilon of a norm whose config has none.
DEFAULT_EPS = 1e-5

_IGNORED_IN_MODEL = (
    "dtype",
    "init_method",
    "init_seed",
    "init_std",
    "embedding_init_std",
    "freeze_params",
)
# Kinds of norms that compute an RMSNorm.
_RMS = ("rms", "fused_rms")


def block_name(foreign: ForeignCheckpoint) -> str | None:
    """Return the kind of residual blocks of an OLMo-core checkpoint, `None` for other checkpoints."""
    model = foreign.config.get("model")
    block = model.get("block") if isinstance(model, dict) and "d_model" in model else None
    if not isinstance(block, dict):
        return None
    name = block.get("name", "default")
    return name if isinstance(name, str) else None


@dataclass(frozen=True)
class OlmoCoreModel:
    """The config of a model.

    Attributes:
        block: the fields of its blocks, of which those of attention, MLP and norms have been read.
        host_type: model type of the host.
        sizes: fields of the host's config, without the epsilon of its norms.
        block_eps: epsilon of the norms of the blocks.
        final_eps: epsilon of the final norm.
        qk_eps: epsilon of the norms of queries and keys; `None` without.
    """

    block: ConfigFields
    host_type: str
    sizes: dict[str, Any]
    block_eps: float
    final_eps: float
    qk_eps: float | None

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        num_layers: int = self.sizes["num_hidden_layers"]
        return num_layers

    def host(self, folder: Any, eps: float) -> PreTrainedConfig:
        """Return the config of the host, with this epsilon of its norms."""
        return build_host(folder, self.host_type, self.sizes | {"rms_norm_eps": eps})


def read_model(foreign: ForeignCheckpoint, last_block: dict[str, Any] | None = None) -> OlmoCoreModel:
    """Read the config of a model.

    Args:
        foreign: the checkpoint.
        last_block: fields of the last block that may have these values instead of those of the others.

    Raises:
        UserError: if it has something that the hosts do not have; the message names the field.
    """
    folder = foreign.folder
    model = ConfigFields(folder, foreign.config["model"], "model.")
    model.only("name", "default")
    model.ignore(*_IGNORED_IN_MODEL)
    num_layers = model.integer("n_layers")
    _check_overrides(model, num_layers, last_block or {})
    block = model.part("block")
    attention = block.part("sequence_mixer" if "sequence_mixer" in foreign.config["model"]["block"] else "attention")
    hidden_size = model.integer("d_model")
    # Of other kinds of layers in the place of attention, such as `gated_delta_net`; old configs do not have it.
    attention.only("type", "attention")
    num_heads = attention.integer("n_heads")
    sizes = {
        "hidden_size": hidden_size,
        "vocab_size": model.integer("vocab_size"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": attention.integer("n_kv_heads", num_heads),
        "head_dim": attention.integer("head_dim", hidden_size // num_heads),
        "rope_parameters": {"rope_type": "default", "rope_theta": _rope_theta(attention)},
        "tie_word_embeddings": False,
        **_tokens(folder, foreign.config),
    }
    attention.only("name", "default")
    attention.ignore("dtype", "backend", "use_flash", "d_attn", "cache", "dropout")
    qk_norm = attention.part("qk_norm")
    qk_eps = None
    if attention.get("qk_norm") is not None:
        qk_eps = _eps(qk_norm)
        if not attention.flag("use_head_qk_norm"):
            raise attention.error("use_head_qk_norm", False, "true: norms of single heads")
    attention.ignore("use_head_qk_norm")
    attention.only("bias", False)
    attention.finish()
    feed_forward = block.part("feed_forward")
    sizes["intermediate_size"] = feed_forward.integer("hidden_size")
    feed_forward.only("name", "default")
    feed_forward.only("activation", "silu")
    feed_forward.only("bias", False)
    feed_forward.ignore("dtype")
    feed_forward.finish()
    for name in ("attention_residual_alpha", "feed_forward_residual_alpha"):
        block.only(name, 1, 1.0)
    block.ignore("name", "dropout")
    head = model.part("lm_head")
    head.only("name", "default")
    head.only("bias", False)
    head.ignore("dtype", "loss_implementation")
    final_eps = _eps(head.part("layer_norm"))
    head.finish()
    model.finish()
    return OlmoCoreModel(
        block, "llama" if qk_eps is None else "qwen3", sizes, _eps(block.part("layer_norm")), final_eps, qk_eps
    )


def _check_overrides(model: ConfigFields, num_layers: int, last_block: dict[str, Any]) -> None:
    """Check that blocks are all alike, but for what may differ in the last one."""
    block = model.get("block")
    for number, own in model.part("block_overrides").items():
        if str(number) == str(num_layers - 1) and isinstance(own, dict):
            of_last = {name for name, value in last_block.items() if own.get(name) == value}
            if all(own.get(name) == block.get(name) for name in (own.keys() | block.keys()) - of_last):
                continue
        raise model.error("block_overrides", {number: "..."}, "blocks that are all alike")


def _rope_theta(attention: ConfigFields) -> float:
    rope = attention.part("rope")
    if attention.get("rope") is None:
        raise attention.error("rope", None, "rotary embeddings")
    # The third kind, `complex`, pairs neighbouring channels.
    rope.only("name", "default", "fused")
    rope.only("partial_rotary_factor", 1, 1.0)
    rope.ignore("full_precision")
    theta = rope.number("theta", 500000.0)
    rope.finish()
    return theta


def _eps(norm: ConfigFields) -> float:
    # The library's default is another norm.
    if norm.get("name") not in _RMS:
        raise norm.error("name", norm.get("name"), " or ".join(map(repr, _RMS)))
    norm.only("elementwise_affine", True)
    norm.only("bias", False)
    norm.ignore("size", "full_precision", "dtype")
    eps = norm.number("eps", DEFAULT_EPS)
    norm.finish()
    return eps


def _tokens(folder: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return the special tokens and the context length, which are in the config of the training data."""
    dataset = ConfigFields(folder, config, "").part("dataset")
    tokenizer = dataset.part("tokenizer")
    found = {name: tokenizer.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = dataset.get("sequence_length")
    return found | ({"max_position_embeddings": length} if isinstance(length, int) else {})


def tokenizer_name(foreign: ForeignCheckpoint) -> str | None:
    """Return the name of the tokenizer, which is not part of the checkpoint; `None` if the config does not have it."""
    dataset = foreign.config.get("dataset")
    tokenizer = dataset.get("tokenizer") if isinstance(dataset, dict) else None
    name = tokenizer.get("identifier") if isinstance(tokenizer, dict) else None
    return name if isinstance(name, str) else None


def eps_overrides(named: dict[str, float | None], eps: float) -> dict[str, Any]:
    """Return the option for norms that have another epsilon than the host's config.

    Args:
        named: epsilon by the names of norms; `None` for those that do not exist.
        eps: epsilon of the host's config.
    """
    own = {name: each for name, each in named.items() if each is not None and each != eps}
    return {"norm_eps_overrides": own} if own else {}


def unsupported_block(foreign: ForeignCheckpoint, name: str) -> UserError:
    """Return the error for a kind of blocks that cannot be imported."""
    return UserError(
        f"{foreign.folder}: model.block.name is {name!r} in config.json; of {PROJECT}'s blocks, 'attnres', 'moda' and "
        "'post_norm_moda' can be imported."
    )
