"""The tables of suites, beside the published numbers."""

from __future__ import annotations

import json

from repository import ROOT

from hf_depthattn.eval.harness.suites import load_suite
from hf_depthattn.eval.harness.table import _published_cells, suite_table


def test_table_sets_ours_beside_the_published_pair():
    suite = load_suite("attnres", local=True)
    leaves = ["mmlu_anatomy_local", "mmlu_virology_local"]
    results = {
        "model_name": "m",
        "results": {
            "triviaqa_local": {"exact_match,remove_whitespace": 0.25, "exact_match_stderr,remove_whitespace": 0.1}
        },
        "groups": {"mmlu_local": {"acc,none": 0.5, "acc_stderr,none": 0.0125}},
        "group_subtasks": {"mmlu_local": leaves},
        "n-shot": {"triviaqa_local": 5, **dict.fromkeys(leaves, 5)},
        "n-samples": {name: {"effective": 20} for name in ("triviaqa_local", *leaves)},
        "versions": {"mmlu_local": 2, "triviaqa_local": 3.0},
        "config": {"limit": None, "model_dtype": "torch.float32", "batch_size": 8},
        "lm_eval_version": "0.4.13",
        "transformers_version": "5.23.0",
        "max_length": 512,
    }
    text = suite_table(suite, results)
    assert "| MMLU | mmlu_local | acc | 5 | 40 | 50.00 | 1.25 | 73.5 | 74.6 |" in text
    assert (
        "| TriviaQA | triviaqa_local | exact_match (remove_whitespace) | 5 | 20 | 25.00 | 10.00 | 69.9 | 71.8 |"
        in text
    )
    assert "| CMath | none |  |  |  |  |  | 84.7 | 85.1 |" in text and "CMath, not run: " in text
    assert "lm_eval 0.4.13, transformers 5.23.0, torch " in text and "arXiv 2603.15031" in text
    assert "Only the first" not in text and "BBH |" not in text.split("not run")[0]
    text = suite_table(suite.without(["MMLU"]), results)
    assert "| MMLU | none |  |  |  |  |  | 73.5 | 74.6 |" in text and "MMLU, not run: left out (--exclude)" in text


def test_published_numbers_have_the_decimals_of_their_paper():
    pairs = json.loads((ROOT / "eval" / "harness" / "published_results.json").read_text())["moda"]["pairs"]
    assert _published_cells("OpenBookQA", pairs) == ["35.60", "37.20", "38.80", "41.60"]
    assert _published_cells("unknown", pairs) == ["-"] * 4
