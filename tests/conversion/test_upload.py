"""Mistakes about the repository of `--push-to` are reported before anything is written; pushing is in tests/hub."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from tiny_checkpoints import save_stock

from hf_depthattn import retrofit
from hf_depthattn.cli.main import main
from hf_depthattn.conversion.upload import REPLACED, full_repository_id, upload_checkpoint, upload_command
from hf_depthattn.errors import UserError


@pytest.fixture
def known_user(monkeypatch):
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "user"})


@pytest.mark.parametrize("repository", ["", "a/b/c", "a b", "x..y", "https://huggingface.co/a/b"])
def test_an_invalid_id_is_refused_before_the_hub_is_asked(repository):
    with pytest.raises(UserError, match=f"push_to: '{repository}' is not the id of a repository"):
        full_repository_id(repository)


def test_the_owner_is_that_of_the_token(known_user):
    assert full_repository_id("name") == "user/name"
    assert full_repository_id("team/name") == "team/name"


def test_nothing_is_written_without_access_to_the_hub(tmp_path, monkeypatch):
    """The tests are offline."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    source = save_stock(tmp_path / "stock")
    with pytest.raises(UserError, match=r"push_to: name: cannot upload: .*offline"):
        retrofit(source, tmp_path / "out", push_to="name")
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_leaves_the_complete_folder_and_says_so(tmp_path, known_user):
    source = save_stock(tmp_path / "stock")
    with pytest.raises(UserError, match=r"out: is complete, but was not uploaded to user/name: .*offline"):
        retrofit(source, tmp_path / "out", push_to="name")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_failed_upload_names_the_command_that_repeats_it(tmp_path, known_user):
    with pytest.raises(UserError) as error:
        upload_checkpoint(tmp_path / "my model", "user/name", message="message", private=True)
    command = str(error.value).rpartition("To upload it: ")[2]
    assert command == upload_command(str(tmp_path / "my model"), "user/name", private=True)
    words = shlex.split(command)
    assert words[:5] == ["hf", "upload", "user/name", str(tmp_path / "my model"), "."]
    assert "--private" in words and words.count("--delete") == len(REPLACED)


def test_an_interrupt_during_an_upload_does_not_say_that_nothing_was_left_behind(
    tmp_path, known_user, monkeypatch, capsys
):
    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_repo", interrupt)
    source = save_stock(tmp_path / "stock")
    arguments = [str(source), str(tmp_path / "out"), "--allow-missing-tokenizer", "--push-to", "name"]
    assert main(["retrofit", *arguments]) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"hf upload name {tmp_path / 'out'}" in message and "nothing" not in message


@pytest.mark.parametrize("is_private", [True, False])
def test_a_public_repository_is_refused_for_a_private_upload(known_user, monkeypatch, is_private):
    monkeypatch.setattr(HfApi, "model_info", lambda self, repository: SimpleNamespace(private=is_private))
    assert full_repository_id("name", private=None) == "user/name"
    if is_private:
        assert full_repository_id("name", private=True) == "user/name"
        return
    with pytest.raises(UserError, match="private: user/name exists and is public"):
        full_repository_id("name", private=True)


def test_a_bug_is_no_user_error(monkeypatch):
    def fail(self, *args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(TypeError, match="a bug"):
        upload_checkpoint(Path("folder"), "user/name", message="message", private=None)


def test_private_needs_a_repository(tmp_path, capsys):
    assert main(["retrofit", "source", str(tmp_path / "out"), "--private"]) == 2
    assert "--private: only allowed with --push-to" in capsys.readouterr().err
