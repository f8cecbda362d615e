"""Local folders in forms that must be converted first; repositories of the Hub are in tests/hub/test_sources.py."""

import pytest

from hf_depthattn.checkpoints.other_forms import check_form_of_folder
from hf_depthattn.errors import UserError

DISTRIBUTED = "is a distributed checkpoint"


@pytest.mark.parametrize(
    "files, words",
    [
        (["config.json", ".metadata"], [DISTRIBUTED, "unshard_checkpoint('{folder}', "]),
        (["config.json", "model_and_optim/.metadata"], [DISTRIBUTED, "unshard_checkpoint('{folder}/model_and_optim'"]),
        ([f"lr{i}/config.json" for i in range(7)], ["no config.json", "(lr0, lr1, lr2, lr3, lr4, ...)"]),
        (["run/step10/config.json"], ["no config.json", "(run/step10)"]),
        (["config.json", "b.pt", "a.pt"], ["only a pickle (a.pt)"]),
    ],
    ids=["distributed", "distributed in a folder", "many runs", "one run", "pickles"],
)
def test_the_message_says_what_to_do(files, words, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(UserError) as error:
        check_form_of_folder(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: ") and "hf download" not in message
    assert all(word.format(folder=tmp_path) in message for word in words), message


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_checkpoint_may_have_other_forms_beside_it(name, tmp_path):
    for file in (name, ".metadata", "a.pt", "original/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    check_form_of_folder(tmp_path)


def test_folders_beside_an_adapter_are_no_checkpoints(tmp_path):
    """Trainer leaves them; the message about the adapter is the right one."""
    (tmp_path / "checkpoint-2").mkdir()
    for file in ("adapter_config.json", "checkpoint-2/config.json"):
        (tmp_path / file).write_bytes(b"{}")
    check_form_of_folder(tmp_path)
