"""lm-eval's results in the form of model cards, from a results file with tasks, groups and benchmarks of the Hub."""

from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from hf_depthattn.eval.harness.card_results import benchmark_results, card_results

MEAN = {"exact_match,custom-extract": 0.125, "exact_match_stderr,custom-extract": 0.01, "alias": "mmlu_pro"}
RESULTS = {
    "results": {
        "gsm8k_cot": {"alias": "gsm8k_cot", "exact_match,flexible-extract": 0.5, "exact_match,strict-match": 0.25},
        "wikitext": {"bits_per_byte,none": 1.25, "bits_per_byte_stderr,none": "N/A", "word_perplexity,none": "N/A"},
        "piqa_local": {"acc,none": 0.4, "acc_stderr,none": 0.1},
        "mmlu_pro": MEAN,
        "mmlu_pro_law": {"exact_match,custom-extract": 0.1},
        "mmlu_pro_math": {"exact_match,custom-extract": 0.15},
    },
    "groups": {"mmlu_pro": MEAN},
    "group_subtasks": {"mmlu_pro": ["mmlu_pro_law", "mmlu_pro_math"]},
    "configs": {
        "gsm8k_cot": {"dataset_path": "openai/gsm8k", "dataset_name": "main", "test_split": "test"},
        "wikitext": {"dataset_path": "EleutherAI/wikitext_document_level", "test_split": "test"},
        "piqa_local": {"dataset_path": "json", "validation_split": "validation"},
        "mmlu_pro_law": {"dataset_path": "TIGER-Lab/MMLU-Pro", "dataset_name": "default", "test_split": "test"},
    },
    "n-shot": {"gsm8k_cot": 8, "mmlu_pro_law": 5, "mmlu_pro_math": 5},
    "date": 1764460800.0,
    "lm_eval_version": "0.4.13",
}


def test_every_metric_of_tasks_and_means_of_groups_is_a_result():
    found = {result.metric_name: result for result in card_results(RESULTS)}
    assert {name: result.metric_value for name, result in found.items()} == {
        "gsm8k_cot: exact_match (flexible-extract), percent, 8 shots": 50.0,
        "gsm8k_cot: exact_match (strict-match), percent, 8 shots": 25.0,
        "wikitext: bits_per_byte, 0 shots": 1.25,
        "piqa_local: acc, percent, 0 shots": 40.0,
        "mmlu_pro: exact_match (custom-extract), percent, 5 shots": 12.5,
    }
    task = found["gsm8k_cot: exact_match (strict-match), percent, 8 shots"]
    assert (task.dataset_type, task.dataset_config, task.dataset_split) == ("openai/gsm8k", "main", "test")
    assert task.metric_type == "exact_match"
    group = found["mmlu_pro: exact_match (custom-extract), percent, 5 shots"]
    assert (group.dataset_type, group.dataset_config) == ("TIGER-Lab/MMLU-Pro", None)
    assert found["piqa_local: acc, percent, 0 shots"].dataset_type == "piqa_local", "no data set of the Hub"


def test_two_tasks_on_one_data_set_stay_apart_in_a_card():
    results = {**RESULTS, "results": {name: {"acc,none": 0.5} for name in ("gsm8k", "gsm8k_cot")}, "groups": {}}
    results["configs"] = dict.fromkeys(("gsm8k", "gsm8k_cot"), RESULTS["configs"]["gsm8k_cot"])
    written = card_results(results)
    _, read = model_index_to_eval_results(eval_results_to_model_index("model", written))
    assert read == written


def test_benchmarks_of_the_hub_are_found_by_their_tasks():
    found = benchmark_results(RESULTS)
    assert {name: (e.dataset_id, e.task_id, e.value) for name, e in found.items()} == {
        "gsm8k_cot": ("openai/gsm8k", "gsm8k", 50.0),
        "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", 12.5),
    }
    assert found["gsm8k_cot"].date == "2025-11-30"
    assert found["mmlu_pro"].notes == "lm-eval 0.4.13, task mmlu_pro, 5 shots, exact_match,custom-extract"
