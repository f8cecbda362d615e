"""Paths and texts that users name: the home folder, encodings, and links that lead out of a checkpoint."""

import pytest

from hf_depthattn.errors import UserError
from hf_depthattn.utils.paths import check_inside, read_text, user_path


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/model") == tmp_path / "model"
    with pytest.raises(UserError, match="~nobody_of_this_name/model: no such user"):
        user_path("~nobody_of_this_name/model")


def test_texts_are_utf8_with_or_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "text.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("Größe", encoding=encoding)
        assert read_text(file) == "Größe"
    file.write_text("Größe", encoding="latin-1")
    with pytest.raises(UserError, match=r"text.txt: not UTF-8 text \(byte 2\)"):
        read_text(file)
    with pytest.raises(UserError, match=r"missing.txt: No such file"):
        read_text(tmp_path / "missing.txt")


def test_links_out_of_a_checkpoint_are_refused(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (tmp_path / "secret").write_text("secret")
    (checkpoint / "inside").write_text("")
    check_inside(checkpoint / "inside", checkpoint)
    (checkpoint / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"link: is a link to .*secret, outside of"):
        check_inside(checkpoint / "link", checkpoint)


def test_links_of_the_hub_cache_are_its_own(tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    blobs = tmp_path / "models--owner--name" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "123").write_text("")
    (snapshot / "config.json").symlink_to(blobs / "123")
    check_inside(snapshot / "config.json", snapshot)
