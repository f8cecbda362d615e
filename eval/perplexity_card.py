"""Perplexities in the form of model cards."""

from __future__ import annotations

from huggingface_hub import EvalResult

from .perplexity_results import PerplexityReport


def card_results(report: PerplexityReport) -> list[EvalResult]:
    """Return bits per byte and perplexity of every text for the metadata of a card.

    Args:
        report: the result of `run_perplexity`.
    """
    settings = f"window {report.settings['window']}, stride {report.settings['stride']}"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric,
            metric_name=f"{shown}, {settings}",
            metric_value=round(getattr(domain, metric), 6),
        )
        for name, domain in report.domains.items()
        for metric, shown in (("bits_per_byte", "bits per byte"), ("perplexity", "perplexity per token"))
    ]
