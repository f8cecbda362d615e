"""Items of GPQA with choices in one order, so that lm-eval can tell an item among its own examples."""

from __future__ import annotations

import random

from datasets import Dataset


def process_docs(dataset: Dataset) -> Dataset:
    """lm-eval's items; every call shuffles their choices alike."""
    from lm_eval.tasks.gpqa.n_shot import utils

    # lm-eval goes on with one generator, so that items and examples differ.
    utils.rng = random.Random(42)
    return utils.process_docs(dataset)
