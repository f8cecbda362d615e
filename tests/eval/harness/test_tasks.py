"""Tasks are refused before anything is loaded: unknown names, missing data, generated code without permission."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")

from hf_depthattn.errors import UserError
from hf_depthattn.eval.harness.suites import load_suite
from hf_depthattn.eval.harness.tasks import check_local_names, load_tasks


def test_missing_data_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DEPTHATTN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"nowhere: is not a folder.*DEPTHATTN_DATA"):
        load_tasks(None, ["copa_local"])
    monkeypatch.setenv("DEPTHATTN_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"tasks/copa.jsonl: missing; DEPTHATTN_DATA must name"):
        load_tasks(None, ["copa_local"])


@pytest.mark.slow
def test_our_command_refuses_before_anything_is_loaded():
    # No data are there: offline, loading them would be another error.
    with pytest.raises(UserError, match=r"humaneval_subprocess: runs code .* --confirm_run_unsafe_code"):
        load_tasks(None, ["humaneval_subprocess"])
    message = r"humaneval_subprocess, mbpp_subprocess: runs code .*--exclude humaneval_subprocess,mbpp_subprocess"
    with pytest.raises(UserError, match=message):
        load_tasks(load_suite("attnres", local=False), [])


def test_an_unknown_task_is_refused():
    with pytest.raises(UserError, match="--tasks nothing_local: unknown"):
        load_tasks(None, ["nothing_local"])
    with pytest.raises(UserError, match="--tasks nothing_local: unknown"):
        check_local_names(["copa_local", "mmlu_anatomy_local", "nothing_local"])
    # Names of lm-eval's own tasks are known to lm-eval only.
    check_local_names(["copa_local", "mmlu_anatomy_local", "nothing"])
