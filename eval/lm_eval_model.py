"""The model class of the harness: `--model depthattn`."""

from __future__ import annotations

from functools import partial

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

# Registers the model type `depthattn` with transformers' Auto classes.
import hf_depthattn  # noqa: F401
from hf_depthattn.conversion.checkpoint_files import ConversionError
from hf_depthattn.eval.lm_eval_journal import ResponseJournal, answered


@register_model("depthattn")
class DepthAttnLM(HFLM):
    """lm-eval's class for transformers models, with these differences; its arguments are those of `hf`.

    - No cache is built where only log-likelihoods are wanted: `HFLM` asks for none, and gets one for every layer.
    - Requests that do not fit into the context are refused in one line, which names the option that makes room;
      `HFLM` stops with a bare AssertionError in the middle of the run.
    - Requests that lose the beginning of their prompt are counted; `HFLM` logs every one.

    Right-padded batches are passed without an attention mask, as in `HFLM`: the attention is causal, and MoDA's slots
    and the depth mixes read their own token only, so that padding on the right changes no token before it.
    """

    #: Prompts that were cut at their beginning to fit into the context, so far.
    num_truncated_prompts = 0

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        if attn_mask is not None or labels is not None:
            return super()._model_call(inps, attn_mask=attn_mask, labels=labels)
        with (
            torch.no_grad(),
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            return self.model(inps, use_cache=False).logits

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ConversionError(
                f"max_length={self.max_length}: an answer has {longest} tokens and must fit; give at least {longest} "
                "(--max-length)."
            )
        # One token more than the model reads: the last one is only predicted.
        self.num_truncated_prompts += sum(
            len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests
        )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        if left_truncate_len is not None:
            self.num_truncated_prompts += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)

    def generate_until(self, requests, *args, **kwargs):
        self.need_room([request.args[1] for request in requests])
        return super().generate_until(requests, *args, **kwargs)

    def need_room(self, generations: list[dict]) -> None:
        """Refuse generations whose length leaves no room for a prompt.

        Args:
            generations: `generation_kwargs` of tasks or requests.

        Raises:
            ConversionError: one is as long as the context.
        """
        longest = max((_new_tokens(gen_kwargs, self.max_gen_toks) for gen_kwargs in generations), default=0)
        if longest >= self.max_length:
            raise ConversionError(
                f"max_length={self.max_length}: {longest} tokens are to be generated and leave no room for a prompt; "
                f"give more than {longest} (--max-length), or generate fewer (--max-new-tokens)."
            )


class JournalledDepthAttnLM(DepthAttnLM):
    """The same with every response kept in a file, so that an interrupted run continues.

    Args:
        journal: the file.
        progress: show progress bars on stderr.
        **kwargs: arguments of `HFLM`.
    """

    def __init__(self, journal: ResponseJournal, *, progress: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self._journal, self._disable_tqdm = journal, not progress
        self.set_cache_hook(journal)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        # `HFLM` does not pass the wish of `loglikelihood_rolling` on.
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm or self._disable_tqdm, **kwargs)

    def loglikelihood(self, requests):
        run = partial(super().loglikelihood, disable_tqdm=self._disable_tqdm)
        return answered(self._journal, "loglikelihood", run, requests)

    def loglikelihood_rolling(self, requests):
        run = partial(super().loglikelihood_rolling, disable_tqdm=self._disable_tqdm)
        return answered(self._journal, "loglikelihood_rolling", run, requests)

    def generate_until(self, requests):
        run = partial(super().generate_until, disable_tqdm=self._disable_tqdm)
        return answered(self._journal, "generate_until", run, requests)


def _new_tokens(gen_kwargs: dict, default: int) -> int:
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((gen_kwargs[name] for name in names if gen_kwargs.get(name)), default))
