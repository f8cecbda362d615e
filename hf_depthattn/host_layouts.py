"""How the decoder layers of transformers' models are laid out: one row of data per layout, no code per model.

A *host* is a decoder that transformers ships. Its layer consists of two sublayers, attention and MLP, and each of
them is ``y = scale * dropout(post_norm(module(pre_norm(h))))`` with parts that may be absent. A `HostLayout` names the
children of the host's layer that play these roles. A connection then decides what `h` is and where `y` goes.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SublayerLayout:
    """Names of the children (or attributes) of a host layer that make up one sublayer.

    Attributes:
        module: the attention or MLP module.
        pre_norm: norm of the module's input, `None` when the module reads the residual stream as it is.
        post_norm: norm of the module's output, inside the residual branch.
        stream_norm: norm of the residual stream after the sublayer's output was added (Post-LN).
        dropout: dropout module on the output.
        scale: attribute of the layer holding the multiplier of the output (Granite's `residual_multiplier`).
    """

    module: str
    pre_norm: str | None = None
    post_norm: str | None = None
    stream_norm: str | None = None
    dropout: str | None = None
    scale: str | None = None


@dataclass(frozen=True)
class HostLayout:
    """One sublayer layout: a name for people, the two sublayers, and the model types that use it."""

    name: str
    attention: SublayerLayout
    mlp: SublayerLayout
    model_types: tuple[str, ...]


HOST_LAYOUTS: tuple[HostLayout, ...] = (
    HostLayout(
        name="pre-norm",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm"),
        model_types=(
            "arcee",
            "bitnet",
            "cwm",
            "deepseek_v2",
            "deepseek_v3",
            "diffllama",
            "dots1",
            "ernie4_5",
            "ernie4_5_moe",
            "exaone_moe",
            "flint",
            "gemma",
            "glm",
            "glm4_moe",
            "glm4_moe_lite",
            "gpt_oss",
            "helium",
            "hunyuan_v1_dense",
            "hunyuan_v1_moe",
            "hy_v3",
            "jais2",
            "kimi_linear",
            "laguna",
            "llama",
            "mellum",
            "mimo_v2_flash",
            "minimax_m2",
            "ministral",
            "ministral3",
            "mistral",
            "mixtral",
            "nanochat",
            "olmo",
            "olmoe",
            "phimoe",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "seed_oss",
            "smollm3",
            "solar_open",
            "starcoder2",
            "youtu",
        ),
    ),
    HostLayout(
        name="pre-norm, own norm names",
        attention=SublayerLayout("self_attn", pre_norm="attention_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="feedforward_layernorm"),
        model_types=("apertus",),
    ),
    HostLayout(
        name="pre-norm, own name of the MLP norm",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="pre_feedforward_layernorm"),
        model_types=("vaultgemma",),
    ),
    HostLayout(
        name="pre-norm with residual dropout",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", dropout="resid_attn_dropout"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm", dropout="resid_mlp_dropout"),
        model_types=("phi3",),
    ),
    HostLayout(
        name="pre-norm with residual multiplier",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", scale="residual_multiplier"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm", scale="residual_multiplier"),
        model_types=("granite", "granite_swa"),
    ),
    HostLayout(
        name="pre-norm with residual multiplier, MoE",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", scale="residual_multiplier"),
        mlp=SublayerLayout("block_sparse_moe", pre_norm="post_attention_layernorm", scale="residual_multiplier"),
        model_types=("granitemoe",),
    ),
    HostLayout(
        name="sandwich norm",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", post_norm="post_attention_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
        model_types=("gemma2", "gemma3_text"),
    ),
    HostLayout(
        name="sandwich norm, own names of the MLP norms",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", post_norm="post_attention_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="pre_mlp_layernorm", post_norm="post_mlp_layernorm"),
        model_types=("afmoe",),
    ),
    HostLayout(
        name="sandwich norm, own norm names",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", post_norm="post_self_attn_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm", post_norm="post_mlp_layernorm"),
        model_types=("glm4", "kolibri1"),
    ),
    HostLayout(
        name="post-sublayer norm",
        attention=SublayerLayout("self_attn", post_norm="post_attention_layernorm"),
        mlp=SublayerLayout("mlp", post_norm="post_feedforward_layernorm"),
        model_types=("exaone4", "flex_olmo", "olmo2", "olmo3"),
    ),
)

_LAYOUT_OF_MODEL_TYPE = {model_type: layout for layout in HOST_LAYOUTS for model_type in layout.model_types}

_PARALLEL = "attention and MLP read the same input in parallel, so the layer is one residual site, not two"
_ENCODER_DECODER = "it is an encoder-decoder model; depth attention needs a decoder-only host"
_OWN_STREAMS = "it has a residual scheme of its own, which a depth connection would replace"
_MIXED_LAYERS = "its layers are not attention followed by MLP (state-space or convolution layers of another shape)"
_WRAPPER = "it is a multimodal wrapper; pass the config of its language model (`config.text_config`) as the host"

#: Why a known model type cannot be a host. Unknown ones get a general sentence.
REFUSED_HOSTS: dict[str, str] = {
    **dict.fromkeys(("cohere", "cohere2", "phi", "gptj", "gpt_neox", "falcon", "codegen", "stablelm"), _PARALLEL),
    **dict.fromkeys(("t5", "bart", "mbart", "pegasus", "marian", "whisper", "t5gemma"), _ENCODER_DECODER),
    **dict.fromkeys(
        ("inkling2_text", "deepseek_v4", "gemma3n_text", "minimax", "hy_v4", "beam", "zaya"), _OWN_STREAMS
    ),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "zamba", "zamba2", "falcon_h1", "recurrent_gemma"), _MIXED_LAYERS),
    **dict.fromkeys(("gemma3", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mllama"), _WRAPPER),
}


def supported_hosts() -> tuple[str, ...]:
    """Model types that can be a host, sorted."""
    return tuple(sorted(_LAYOUT_OF_MODEL_TYPE))


def host_layout(model_type: str, *, is_wrapper: bool = False) -> HostLayout:
    """The layout of a host.

    Args:
        model_type: `config.model_type` of the host.
        is_wrapper: its config holds that of a language model beside others.

    Raises:
        ValueError: when the model type has no row, with the reason and the list of supported hosts.
    """
    layout = _LAYOUT_OF_MODEL_TYPE.get(model_type)
    if layout is None:
        reason = REFUSED_HOSTS.get(model_type, _WRAPPER if is_wrapper else None)
        if reason is None:
            reason = f"no sublayer layout is known for it. Supported hosts: {', '.join(supported_hosts())}"
        raise ValueError(f"text_config: model_type {model_type!r} cannot be a host: {reason}.")
    return layout


def post_norm_layout(layout: HostLayout) -> HostLayout | None:
    """A pre-norm layout with its norms moved behind the residual sums (Post-LN); `None` for any other layout.

    Args:
        layout: the host's layout.
    """
    sublayers = (layout.attention, layout.mlp)
    if any(sublayer.pre_norm is None or sublayer.post_norm is not None for sublayer in sublayers):
        return None
    attention, mlp = (replace(sublayer, pre_norm=None, stream_norm=sublayer.pre_norm) for sublayer in sublayers)
    return replace(layout, name=f"{layout.name}, moved behind the residual sum", attention=attention, mlp=mlp)
