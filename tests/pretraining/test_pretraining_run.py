"""Folders of runs: nothing is overwritten, other settings are refused, incomplete checkpoints are passed over."""

import pytest

from hf_depthattn.errors import UserError
from hf_depthattn.pretraining.pretraining_run import PretrainingRun, last_checkpoint
from hf_depthattn.pretraining.text_tokenizer import make_tokenizer

SETTINGS = {"steps": 3, "rate": 0.1, "text": ("a", "b")}


def test_a_run_is_started_once_and_resumed_with_the_same_settings(tmp_path):
    run = PretrainingRun(tmp_path / "run")
    run.check_new()
    with pytest.raises(UserError, match="run: contains no run to resume"):
        run.resume(SETTINGS)
    run.start(make_tokenizer("bytes", [], 0, 8), SETTINGS)
    assert len(run.tokenizer()) == 258
    with pytest.raises(UserError, match="run: exists and is not empty; choose another folder, or resume its run"):
        run.check_new()
    assert PretrainingRun(tmp_path / "run").resume(SETTINGS) is None
    with pytest.raises(UserError, match=r"rate: was 0.1 when the run in .* was started, and is 0.2 now"):
        run.resume({**SETTINGS, "rate": 0.2})
    run.model.mkdir()
    with pytest.raises(UserError, match="its run is finished"):
        run.resume(SETTINGS)


def test_the_last_complete_checkpoint_is_found(tmp_path):
    assert last_checkpoint(tmp_path / "missing") is None
    for name, state in {"9": "{}\n", "10": '{"a": {"b": 1}}', "11": '{"a": {"b": 1}', "12": None, "x": "{}"}.items():
        folder = tmp_path / f"checkpoint-{name}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
