"""Writes the YAML files of the local MMLU and BIG-Bench Hard, one for each subject, as lm-eval has them.

    python -m hf_depthattn.eval.harness.local_task_files

They differ only in names and in the line of description before the prompt, which is taken from the installed lm-eval.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import yaml

LOCAL_TASKS = Path(__file__).parent.parent / "tasks" / "local"


def local_task_files() -> dict[Path, str]:
    """Path -> content of every generated file."""
    installed = Path(find_spec("lm_eval.tasks").origin).parent
    files: dict[Path, str] = {}
    for path in sorted((installed / "mmlu" / "default").glob("mmlu_*.yaml")):
        upstream = _read(path)
        subject = upstream["dataset_name"]
        files[LOCAL_TASKS / "mmlu" / f"{subject}.yaml"] = _dump(
            include="../_mmlu_template_yaml",
            task=f"mmlu_{subject}_local",
            tag="mmlu_local_subjects",
            description=upstream["description"],
            dataset_kwargs={"subject": subject},
        )
    for path in sorted((installed / "mmlu" / "continuation").glob("mmlu_*.yaml")):
        upstream = _read(path)
        subject = upstream["dataset_name"]
        files[LOCAL_TASKS / "mmlu" / f"{subject}_continuation.yaml"] = _dump(
            include="../_mmlu_continuation_template_yaml",
            task=f"mmlu_{subject}_continuation_local",
            tag="mmlu_continuation_local_subjects",
            description=upstream["description"],
            dataset_kwargs={"subject": subject},
        )
    for path in sorted((installed / "bbh" / "cot_fewshot").glob("[a-z]*.yaml")):
        upstream = _read(path)
        subtask = upstream["dataset_name"]
        files[LOCAL_TASKS / "bbh" / f"{subtask}.yaml"] = _dump(
            include="../_bbh_template_yaml",
            task=f"bbh_cot_fewshot_{subtask}_local",
            tag="bbh_cot_fewshot_local_subtasks",
            description=upstream["description"],
            dataset_kwargs={"subtask": subtask},
        ) + (
            "fewshot_config:\n"
            "  sampler: first_n\n"
            f"  samples: !function hf_depthattn.eval.harness.installed_prompts.bbh_{subtask}\n"
        )
    return files


def _read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _dump(**fields) -> str:
    return yaml.safe_dump(fields, sort_keys=False, width=118, allow_unicode=True)


def main() -> None:
    """Write the files."""
    for path, content in local_task_files().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
