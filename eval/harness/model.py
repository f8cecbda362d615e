"""lm-eval model class for this package's models: `--model depthattn`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

# Registers the model type `depthattn` with transformers' Auto classes.
import hf_depthattn  # noqa: F401

from ...checkpoints.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ...checkpoints.adapter_loading import load_adapter
from ...checkpoints.devices import check_device
from ...checkpoints.model_loading import check_token_ids, load_complete
from ...checkpoints.source_folder import find_folder
from ...errors import UserError
from ...errors.messages import one_line
from ..model_folder import is_local
from .journal import ResponseJournal, answered


@register_model("depthattn")
class DepthAttnLM(HFLM):
    """lm-eval's `HFLM` with stricter checks; takes the arguments of `--model hf`.

    - Checkpoints and adapters with missing or unexpected tensors are refused; `HFLM` evaluates them anyway. So are
      unavailable devices, for which `HFLM` uses another one, and token ids outside the vocabulary.
    - Log-likelihoods are computed with `use_cache=False`; `HFLM` leaves the model's default, which builds a cache.
    - Requests that do not fit into the context are refused with a message that names the option to change; `HFLM`
      stops with an AssertionError in the middle of the run.
    - Prompts that are truncated on the left are counted; `HFLM` logs each of them.

    Right-padded batches are passed without an attention mask, as in `HFLM`. This is correct because attention is
    causal and depth reads (AttnRes mixes, MoDA slots) only use the same token: padding on the right changes no earlier
    token.
    """

    #: Number of prompts truncated on the left so far.
    num_truncated_prompts = 0

    def __init__(self, pretrained, *args, device: str | None = None, **kwargs) -> None:
        # lm-eval's command line passes "cuda:0" if no device was given, even without a GPU.
        if device in (None, "cuda:0"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(pretrained, str):
            check_device(device)
            # `HFLM` only accepts "cpu" without a number, and silently replaces names it does not know.
            device = "cpu" if torch.device(device).type == "cpu" else device
        super().__init__(pretrained, *args, device=device, **kwargs)
        if isinstance(pretrained, str) and self._device.type != torch.device(device).type:
            raise UserError(f"device: {device!r} is not supported by lm-eval, which would use {self._device}.")

    @property
    def _called(self) -> str:
        """Name of the checkpoint in messages."""
        return getattr(self.model, "name_or_path", "") or "model"

    def _create_model(self, pretrained, *args, peft: str | None = None, **kwargs) -> None:
        auto_class = self.AUTO_MODEL_CLASS
        # `HFLM` loads transformers models only through this attribute.
        self.AUTO_MODEL_CLASS = _Complete(auto_class)
        try:
            super()._create_model(pretrained, *args, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto_class
        if peft:
            self._model = load_adapter(self._model, _local_adapter(peft, kwargs.get("revision")))

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
        for _, context, continuation in requests:
            check_token_ids((*context, *continuation), self.model, self._called)
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"max_length={self.max_length}: an answer has {longest} tokens and must fit; give at least {longest} "
                "(--max-length)."
            )
        # The last token is predicted but not read, so one more fits.
        self.num_truncated_prompts += sum(
            len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests
        )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        if left_truncate_len is not None:
            self.num_truncated_prompts += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        ids, mask = super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        check_token_ids(ids, self.model, self._called)
        return ids, mask

    def generate_until(self, requests, *args, **kwargs):
        self.need_room([request.args[1] for request in requests])
        return super().generate_until(requests, *args, **kwargs)

    def need_room(self, generations: list[dict[str, Any]]) -> None:
        """Raise an error if the length of generations leaves no room for a prompt.

        Args:
            generations: `generation_kwargs` of tasks or requests.

        Raises:
            UserError: if a generation is as long as the context.
        """
        longest = max((_new_tokens(gen_kwargs, self.max_gen_toks) for gen_kwargs in generations), default=0)
        if longest >= self.max_length:
            raise UserError(
                f"max_length={self.max_length}: {longest} tokens are to be generated and leave no room for a prompt; "
                f"give more than {longest} (--max-length), or generate fewer (--max-new-tokens)."
            )


class JournalledDepthAttnLM(DepthAttnLM):
    """`DepthAttnLM` that stores every response in a journal, from which an interrupted run resumes.

    Args:
        journal: stores the responses.
        progress: as in `utils.progress.progress_bar`.
        **kwargs: arguments of `HFLM`.
    """

    def __init__(self, journal: ResponseJournal, *, progress: bool | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self._journal, self._progress = journal, progress
        self.set_cache_hook(journal)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        # Our own progress bar replaces lm-eval's; `HFLM.loglikelihood_rolling` does not pass `disable_tqdm` on.
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs)

    def loglikelihood(self, requests):
        return self._answered("loglikelihood", super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests):
        return self._answered("loglikelihood_rolling", super().loglikelihood_rolling, requests)

    def generate_until(self, requests):
        return self._answered("generate_until", super().generate_until, requests)

    def _answered(self, method: str, run: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        return answered(self._journal, method, partial(run, disable_tqdm=True), requests, progress=self._progress)


class _Complete:
    """Auto class whose `from_pretrained` raises an error for problems that transformers only logs."""

    def __init__(self, auto_class: Any) -> None:
        self._auto_class = auto_class

    def from_pretrained(self, pretrained: str, **kwargs: Any) -> torch.nn.Module:
        if kwargs.get("gguf_file"):
            return self._auto_class.from_pretrained(pretrained, **kwargs)
        revision, subfolder = kwargs.pop("revision", None), kwargs.pop("subfolder", None) or ""
        folder, _ = find_folder(pretrained, None if is_local(pretrained) else revision)
        return load_complete(self._auto_class, folder / subfolder, name=pretrained, **kwargs)


def _local_adapter(peft: str, revision: str | None) -> str:
    """Return a local folder of an adapter; lm-eval's command line also accepts Hub ids."""
    if is_local(peft):
        return peft
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(peft, revision=revision, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    except Exception as error:
        # The Hub and its cache raise errors of many classes.
        raise UserError(
            f"peft={peft}: is not a folder, and cannot be downloaded from the Hub: {one_line(error)}"
        ) from error


def _new_tokens(gen_kwargs: dict[str, Any], default: int) -> int:
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((gen_kwargs[name] for name in names if gen_kwargs.get(name)), default))
