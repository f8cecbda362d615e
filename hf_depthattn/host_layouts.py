"""Layouts of the decoder layers in transformers: one table row per layout, no code per model.

A *host* is a decoder that transformers ships. Its layers consist of two sublayers, attention and MLP, each of the form
``y = scale * dropout(post_norm(module(pre_norm(h))))`` with parts that may be absent. A `HostLayout` contains the
names of the corresponding children of the host's layer. The connection determines `h` and what happens to `y`.
"""

from dataclasses import dataclass, replace

from torch import nn
from transformers.configuration_utils import PreTrainedConfig


@dataclass(frozen=True)
class SublayerLayout:
    """Names of the children and attributes of a host's layer that form one sublayer.

    Attributes:
        module: the attention or MLP module.
        pre_norm: norm of the module's input; `None` if its input is not normalised.
        post_norm: norm of the module's output, before it is added to the residual stream.
        stream_norm: norm of the residual stream after the output was added (Post-LN).
        dropout: dropout module on the output.
        scale: attribute of the layer with the multiplier of the output (Granite's `residual_multiplier`).
        recurrent: module that replaces `module` in layers without attention: linear attention, a state-space mixer or
            a short convolution. It keeps a state in the cache instead of keys and values.
        companion: second module with the same input, whose output is added to that of `module` (shared experts);
            some layers may not have it.
    """

    module: str
    pre_norm: str | None = None
    post_norm: str | None = None
    stream_norm: str | None = None
    dropout: str | None = None
    scale: str | None = None
    recurrent: str | None = None
    companion: str | None = None

    def module_in(self, layer: nn.Module) -> str:
        """Return the name of the layer's main module: `recurrent` if the layer has one, otherwise `module`.

        Args:
            layer: a decoder layer of the host.
        """
        if self.recurrent is not None and getattr(layer, self.recurrent, None) is not None:
            return self.recurrent
        return self.module


@dataclass(frozen=True)
class HostLayout:
    """The layout of a decoder layer: a descriptive name, the two sublayers, and the model types that have it."""

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
            "aria_text",
            "axk1",
            "axk2",
            "bailing_hybrid",
            "bitnet",
            "cwm",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "diffllama",
            "dots1",
            "dots3_note_text",
            "ernie4_5",
            "ernie4_5_moe",
            "exaone",
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
            "internlm3",
            "iquestcoder",
            "jais2",
            "kimi_linear",
            "laguna",
            "llama",
            "mellum",
            "mimo_v2_flash",
            "minimax_m2",
            "minimax_m3_vl_text",
            "ministral",
            "ministral3",
            "mistral",
            "mixtral",
            "nanochat",
            "nemotron",
            "olmo",
            "olmoe",
            "phimoe",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "sarvam_mla",
            "sarvam_moe",
            "seed_oss",
            "smollm3",
            "solar_open",
            "starcoder2",
            "youtu",
        ),
    ),
    HostLayout(
        name="pre-norm, linear attention in some layers",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", recurrent="linear_attn"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm"),
        model_types=("lara_mini", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
    ),
    HostLayout(
        name="pre-norm, state-space mixers in some layers",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", recurrent="mamba"),
        mlp=SublayerLayout("feed_forward", pre_norm="pre_ff_layernorm"),
        model_types=("jamba",),
    ),
    HostLayout(
        name="pre-norm, short convolutions in some layers",
        attention=SublayerLayout("self_attn", pre_norm="operator_norm", recurrent="conv"),
        mlp=SublayerLayout("feed_forward", pre_norm="ffn_norm"),
        model_types=("lfm2", "lfm2_moe"),
    ),
    HostLayout(
        name="sandwich norm, short convolutions in some layers",
        attention=SublayerLayout(
            "self_attn", pre_norm="operator_norm", post_norm="post_operator_norm", recurrent="conv"
        ),
        mlp=SublayerLayout("feed_forward", pre_norm="ffn_norm", post_norm="post_ffn_norm"),
        model_types=("lfm3",),
    ),
    HostLayout(
        name="pre-norm, host-specific name of the attention",
        attention=SublayerLayout("self_attention", pre_norm="input_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm"),
        model_types=("jetmoe",),
    ),
    HostLayout(
        name="pre-norm, host-specific names of attention and norms",
        attention=SublayerLayout("attn", pre_norm="attn_norm"),
        mlp=SublayerLayout("mlp", pre_norm="mlp_norm"),
        model_types=("modernbert-decoder",),
    ),
    HostLayout(
        name="pre-norm, host-specific norm names",
        attention=SublayerLayout("self_attn", pre_norm="attention_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="feedforward_layernorm"),
        model_types=("apertus", "apertus1p5_text"),
    ),
    HostLayout(
        name="pre-norm, host-specific name of the MLP norm",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="pre_feedforward_layernorm"),
        model_types=("vaultgemma",),
    ),
    HostLayout(
        name="pre-norm with residual dropout",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", dropout="resid_attn_dropout"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm", dropout="resid_mlp_dropout"),
        model_types=("phi3", "phi4_multimodal"),
    ),
    HostLayout(
        name="pre-norm with MLP dropout",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm", dropout="dropout"),
        model_types=("persimmon", "stablelm"),
    ),
    HostLayout(
        name="pre-norm with residual scale",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", scale="residual_scale"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm", scale="residual_scale"),
        model_types=("minicpm3",),
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
        name="pre-norm with residual multiplier, MoE and shared expert",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", scale="residual_multiplier"),
        mlp=SublayerLayout(
            "block_sparse_moe",
            pre_norm="post_attention_layernorm",
            scale="residual_multiplier",
            companion="shared_mlp",
        ),
        model_types=("granitemoe_swa", "granitemoeshared"),
    ),
    HostLayout(
        name="pre-norm with residual multiplier, state-space mixers in some layers, MLP and MoE",
        attention=SublayerLayout(
            "self_attn", pre_norm="input_layernorm", scale="residual_multiplier", recurrent="mamba"
        ),
        mlp=SublayerLayout(
            "shared_mlp",
            pre_norm="post_attention_layernorm",
            scale="residual_multiplier",
            companion="block_sparse_moe",
        ),
        model_types=("granitemoehybrid",),
    ),
    HostLayout(
        name="sandwich norm with residual multiplier",
        attention=SublayerLayout(
            "self_attn", pre_norm="input_layernorm", post_norm="post_norm1", scale="residual_multiplier"
        ),
        mlp=SublayerLayout(
            "mlp", pre_norm="post_attention_layernorm", post_norm="post_norm2", scale="residual_multiplier"
        ),
        model_types=("hyperclovax",),
    ),
    HostLayout(
        name="sandwich norm",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", post_norm="post_attention_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
        model_types=("gemma2", "gemma3_text"),
    ),
    HostLayout(
        name="sandwich norm, host-specific names of the MLP norms",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", post_norm="post_attention_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="pre_mlp_layernorm", post_norm="post_mlp_layernorm"),
        model_types=("afmoe",),
    ),
    HostLayout(
        name="sandwich norm, host-specific norm names",
        attention=SublayerLayout("self_attn", pre_norm="input_layernorm", post_norm="post_self_attn_layernorm"),
        mlp=SublayerLayout("mlp", pre_norm="post_attention_layernorm", post_norm="post_mlp_layernorm"),
        model_types=("glm4", "kolibri1"),
    ),
    HostLayout(
        name="norm of the sublayer output (OLMo 2)",
        attention=SublayerLayout("self_attn", post_norm="post_attention_layernorm"),
        mlp=SublayerLayout("mlp", post_norm="post_feedforward_layernorm"),
        model_types=("exaone4", "flex_olmo", "olmo2", "olmo3"),
    ),
)

_LAYOUT_OF_MODEL_TYPE = {model_type: layout for layout in HOST_LAYOUTS for model_type in layout.model_types}

# Model type -> config field that makes attention and MLP parallel.
_PARALLEL_SWITCHES: dict[str, str] = {"stablelm": "use_parallel_residual"}

_PARALLEL = "attention and MLP read the same input in parallel instead of one after the other"
_ENCODER_DECODER = "it is an encoder-decoder model, or the decoder of one; depth attention needs a decoder-only host"
_ENCODER = "its layers are those of an encoder (BERT), which add the residual inside nested modules"
_OWN_STREAMS = "it has a residual scheme of its own, which a depth connection would replace"
_MIXED_LAYERS = "its layers do not consist of attention followed by an MLP (state-space or convolution layers)"
_NESTED_RESIDUAL = "its layers add the residual, or apply their norms, inside nested modules"
_NO_MLP_MODULE = "the linear layers of its MLP are direct children of the decoder layer, without an MLP module"
_NO_LAYERS = "its decoder layers are named `h` instead of `layers`"
_REPEATED = "it runs its layers several times, or several stacks of them, in one forward pass"
_SPEECH = "it is part of a speech or music model, which generates several streams of tokens"
_WRAPPER = "it is a multimodal wrapper; pass the config of its language model (`config.text_config`) as the host"
_FUSED_WRAPPER = "it is a multimodal model, and transformers has no causal language model for its text part alone"
_READS_OTHERS = "it is a draft model whose attention reads the keys of another model"

#: Model type -> why it cannot be a host. Unknown model types get a general message.
REFUSED_HOSTS: dict[str, str] = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "phi"), _PARALLEL),
    **dict.fromkeys(("codegen", "falcon", "gpt_neox", "gptj"), _PARALLEL),
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian"), _ENCODER_DECODER),
    **dict.fromkeys(("mbart", "mvp", "pegasus", "plbart", "prophetnet", "t5", "t5gemma"), _ENCODER_DECODER),
    **dict.fromkeys(("trocr", "whisper"), _ENCODER_DECODER),
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), _ENCODER),
    **dict.fromkeys(("ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm"), _ENCODER),
    **dict.fromkeys(("roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"), _ENCODER),
    **dict.fromkeys(("beam", "deepseek_v4", "doge", "dory", "gemma3n_text", "gemma4_text"), _OWN_STREAMS),
    **dict.fromkeys(("gemma4_unified_text", "hy_v4", "inkling2_loop_text", "inkling2_text"), _OWN_STREAMS),
    **dict.fromkeys(("minimax", "qwen4_exp_text", "zaya"), _OWN_STREAMS),
    **dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), _MIXED_LAYERS),
    **dict.fromkeys(("recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"), _MIXED_LAYERS),
    **dict.fromkeys(("bloom", "cpmant", "ctrl", "dbrx", "gpt_neox_japanese", "mpt"), _NESTED_RESIDUAL),
    **dict.fromkeys(("openai-gpt", "reformer", "xlnet"), _NESTED_RESIDUAL),
    **dict.fromkeys(("biogpt", "opt", "xglm"), _NO_MLP_MODULE),
    **dict.fromkeys(("gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo"), _NO_LAYERS),
    **dict.fromkeys(("blt", "hrm_text"), _REPEATED),
    **dict.fromkeys(("moshi", "musicgen", "musicgen_melody"), _SPEECH),
    **dict.fromkeys(("dots3_note", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2"), _WRAPPER),
    **dict.fromkeys(
        ("llama4", "llava", "mistral3", "mllama", "moss_transcribe_diarize", "qwen2_5_vl", "qwen2_vl"), _WRAPPER
    ),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen4_exp"), _WRAPPER),
    **dict.fromkeys(("emu3", "git"), _FUSED_WRAPPER),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _READS_OTHERS),
    "bamba": "its layers return attention weights together with the hidden states",
    "depthattn": "it already has depth attention; pass the config of its host (`config.text_config`)",
    "glm_moe_dsa": "its layers pass the indices of selected keys to the next layer, together with the hidden states",
    "inkling_text": "a convolution with a state of its own follows every sublayer",
    "llama4_text": "the name of its decoder in its causal language model is not the class's base_model_prefix",
    "longcat_flash": "its layers have two attention modules and a shortcut between them",
    "olmo_hybrid": "its linear attention layers have their norms in other positions than its attention layers",
}


def supported_hosts() -> tuple[str, ...]:
    """Return the model types of transformers that can be a host, sorted."""
    return tuple(sorted(_LAYOUT_OF_MODEL_TYPE))


def host_layout(model_type: str, *, is_wrapper: bool = False) -> HostLayout:
    """Return the layout of a host.

    Args:
        model_type: `config.model_type` of the host.
        is_wrapper: whether the model is multimodal, i.e. its config has a `text_config`.

    Raises:
        ValueError: if the model type cannot be a host; the message contains the reason.
    """
    layout = _LAYOUT_OF_MODEL_TYPE.get(model_type)
    if layout is None:
        reason = REFUSED_HOSTS.get(model_type, _WRAPPER if is_wrapper else None)
        if reason is None:
            reason = f"the layout of its decoder layers is not known. Supported hosts: {', '.join(supported_hosts())}"
        raise ValueError(f"text_config: model_type {model_type!r} cannot be a host: {reason}.")
    return layout


def require_sequential(config: PreTrainedConfig) -> None:
    """Check that a host's config does not make attention and MLP parallel.

    Args:
        config: the host's config.

    Raises:
        ValueError: if it does; the message names the field.
    """
    switch = _PARALLEL_SWITCHES.get(config.model_type)
    if switch is not None and getattr(config, switch):
        raise ValueError(
            f"text_config: model_type {config.model_type!r} cannot be a host with {switch}=True: {_PARALLEL}."
        )


def post_norm_layout(layout: HostLayout) -> HostLayout | None:
    """Return a pre-norm layout with its norms moved after the residual sums (Post-LN), or `None` for other layouts.

    Args:
        layout: the host's layout.
    """
    sublayers = (layout.attention, layout.mlp)
    if any(sublayer.pre_norm is None or sublayer.post_norm is not None for sublayer in sublayers):
        return None
    attention, mlp = (replace(sublayer, pre_norm=None, stream_norm=sublayer.pre_norm) for sublayer in sublayers)
    return replace(layout, name=f"{layout.name}, moved after the residual sum", attention=attention, mlp=mlp)
