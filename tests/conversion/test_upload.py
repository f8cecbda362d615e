"""Mistakes about the repository of `--push-to` are reported before anything is written; pushing is in tests/hub."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from tiny_checkpoints import save_stock

from hf_depthattn import retrofit
from hf_depthattn.cli.main import main
from hf_depthattn.conversion.upload import full_repository_id, upload_checkpoint
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


def test_a_bug_is_no_user_error(monkeypatch):
    def fail(self, *args, **kwargs):
        raise TypeError("a bug")

    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(TypeError, match="a bug"):
        upload_checkpoint(Path("folder"), "user/name", message="message", private=None)


def test_private_needs_a_repository(tmp_path, capsys):
    assert main(["retrofit", "source", str(tmp_path / "out"), "--private"]) == 2
    assert "--private: only allowed with --push-to" in capsys.readouterr().err
