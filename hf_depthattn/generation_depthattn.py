"""`generate` and continuous batching: unsupported options are rejected before generation starts."""

from typing import TYPE_CHECKING

from transformers.generation import GenerationMixin

if TYPE_CHECKING:
    from .configuration_depthattn import DepthAttnConfig

#: Options of a generation config that draft tokens with layers of the model itself, called outside its forward.
_DRAFTS_BY_OWN_LAYERS = ("assistant_early_exit", "use_mtp")
_PAGED_IMPLEMENTATIONS = ("sdpa", "eager")


class DepthGenerationMixin(GenerationMixin):
    """`GenerationMixin` with errors for options that depth attention does not support."""

    # Not at run time, when transformers evaluates the annotations of a model's class.
    if TYPE_CHECKING:
        config: DepthAttnConfig

    def _prepare_generation_config(self, *args, **kwargs):
        # transformers annotates `self` as a full model; this is a mixin.
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)  # type: ignore[misc]
        for option in _DRAFTS_BY_OWN_LAYERS:
            value = getattr(generation_config, option, None)
            if value:
                raise ValueError(
                    f"{option}: {value} drafts tokens with some layers of the model, which is not possible with depth "
                    "attention, because only the last layer returns hidden states. Use an `assistant_model` or "
                    "`prompt_lookup_num_tokens` instead."
                )
        return generation_config, model_kwargs

    # Further arguments differ between versions of transformers.
    def init_continuous_batching(  # type: ignore[override]
        self, generation_config=None, continuous_batching_config=None, **kwargs
    ):
        """Start continuous batching as in transformers; with MoDA it needs `sdpa` or `eager` attention.

        Raises:
            ValueError: if the model has MoDA and another `attn_implementation`.
        """
        arguments = {"generation_config": generation_config, "continuous_batching_config": continuous_batching_config}
        if self.config.depth_kv is None:
            return super().init_continuous_batching(**arguments, **kwargs)
        implementation = self.config._attn_implementation
        if implementation.removeprefix("paged|") not in _PAGED_IMPLEMENTATIONS:
            raise ValueError(
                f"attn_implementation: {implementation!r} does not support continuous batching with MoDA; choose one "
                f"of {', '.join(_PAGED_IMPLEMENTATIONS)}."
            )
        # Otherwise transformers switches to flash attention if it is installed.
        supports_flash_attn, self._supports_flash_attn = self._supports_flash_attn, False
        try:
            return super().init_continuous_batching(**arguments, **kwargs)
        finally:
            self._supports_flash_attn = supports_flash_attn
