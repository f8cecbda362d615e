"""Run lm-eval's tasks on a small model; needs lm-eval."""

from __future__ import annotations

from pathlib import Path

from hf_depthattn.eval.harness.evaluation import ModelSettings, evaluate
from hf_depthattn.eval.harness.model import DepthAttnLM
from hf_depthattn.eval.harness.tasks import load_tasks

LIMIT = 20
# stories260K has a context of 512 tokens, which is too short for one answer of PIQA.
MAX_LENGTH = 1024

MULTIPLE_CHOICE = ["piqa_local", "openbookqa_local", "winogrande_local", "copa_local", "boolq_local", "arc_easy_local"]
LIKELIHOOD = [*MULTIPLE_CHOICE, "lambada_openai_local", "mmlu_abstract_algebra_local"]


def model_of(checkpoint: Path, max_length: int = MAX_LENGTH, **options) -> DepthAttnLM:
    return DepthAttnLM(pretrained=str(checkpoint), device="cpu", max_length=max_length, **options)


def run(model, names, limit=LIMIT, **options) -> dict:
    settings = ModelSettings(pretrained="as given", batch_size=model.batch_size)
    return evaluate(model, load_tasks(None, names), settings, limit=limit, **options)


def responses(results: dict) -> dict[tuple, float]:
    """Return the log-likelihood by (task, item, index of the answer)."""
    return {
        (task, sample["doc_id"], i): answer[0][0]
        for task, samples in results["samples"].items()
        for sample in samples
        for i, answer in enumerate(sample["resps"])
    }
