"""What `--perplexity` reads: every text as it is meant, and one line for anything else."""

from __future__ import annotations

import json

import pytest

from hf_depthattn.errors import UserError
from hf_depthattn.eval.text_sources import read_documents, read_domains


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("null", "null"),
        ("3", "a number"),
        ("0.5", "a number"),
        ('["a"]', "a list"),
        ('{"a": 1}', "an object"),
        ("true", "bool"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_texts_that_are_no_strings_are_named(tmp_path, text, kind, ending):
    file = tmp_path / f"items.{ending}"
    lines = ['{"text": "fine"}', f'{{"text": {text}}}']
    file.write_text("\n".join(lines) if ending == "jsonl" else f"[{', '.join(lines)}]")
    with pytest.raises(UserError, match=rf"items.{ending}: (line|item) 2: the text is {kind}, not a string"):
        read_domains([str(file)])


def test_half_a_character_is_named(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    with pytest.raises(UserError, match=r"line 2: the text contains a lone surrogate \(U\+D800\)"):
        read_domains([str(tmp_path / "items.jsonl")])


@pytest.mark.parametrize("line", ["3", "null", '["text"]', '"text"', "{", "[" * 100_000, '{"other": "x"}'])
def test_lines_that_are_no_objects_are_named(tmp_path, line):
    (tmp_path / "items.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(UserError, match="line 2 is not a JSON object with a field 'text'") as caught:
        read_domains([str(tmp_path / "items.jsonl")])
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "second"}\n')
    domains = read_domains([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")])
    assert domains == {"a.txt": ["first"], "b.jsonl": ["second"]}


def test_the_text_of_a_report_has_no_byte_order_mark(tmp_path):
    from hf_depthattn.cli.report import _text

    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst")
    assert _text(tmp_path / "a.txt") == ("first", "a.txt")


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "book.txt").write_text("text")
    assert read_domains(["lr=0.1/book.txt"]) == {"book.txt": ["text"]}
    assert read_domains(["lr=0.1"]) == {"lr=0.1": ["text"]}
    assert read_domains([str(folder / "book.txt")]) == {"book.txt": ["text"]}
    assert read_domains(["mine=lr=0.1/book.txt"]) == {"mine": ["text"]}
    for wrong, message in (
        ("lr=0.2/book.txt", "neither a file of this name nor 0.2/book.txt exists"),
        ("runs/lr=0.1/book.txt", "runs/lr=0.1/book.txt: No such file"),
        ("=lr=0.1/book.txt", "must be SOURCE or NAME=SOURCE"),
        ("name=", "must be SOURCE or NAME=SOURCE"),
        ("~nosuchuser/book.txt", "~nosuchuser/book.txt: no such user"),
    ):
        with pytest.raises(UserError, match=message):
            read_domains([wrong])


@pytest.mark.parametrize(
    "content",
    [["a", "b"], [{"text": "a"}, {"text": "b", "id": 3}], '{"text": "a"}\n{"text": "b"}\n'],
    ids=["strings", "objects", "lines"],
)
def test_json_is_read_as_json(tmp_path, content):
    (tmp_path / "items.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_domains([str(tmp_path / "items.json")]) == {"items.json": ["a", "b"]}


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "3", "[[1]]", "plain text", "{"])
def test_json_without_texts_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json.* field 'text'"):
        read_domains([str(tmp_path / "config.json")])


@pytest.mark.parametrize("name", ["data.csv", "data.PARQUET", "data.jsonl.gz"])
def test_files_that_are_no_text_are_refused(tmp_path, name):
    (tmp_path / name).write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="files are not text"):
        read_domains([str(tmp_path / name)])


def test_folders_read_every_text_and_name_the_rest(tmp_path):
    said: list[str] = []
    files = {
        "A.TXT": "a",
        "b.Md": "b",
        "c.JSONL": '{"text": "c"}\n{"text": "d"}',
        "notes.pdf": "x",
        ".hidden.txt": "y",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert read_domains([f"all={tmp_path}"], said.append) == {"all": ["a", "b", "c", "d"]}
    assert len(said) == 1 and said[0].startswith(f"{tmp_path}: reading 3 of 4 files, those that end in .txt")
    (tmp_path / "notes.pdf").unlink()
    assert read_domains([f"all={tmp_path}"], said.append) and len(said) == 1


def test_documents_of_one_source_with_further_endings(tmp_path):
    said: list[str] = []
    for name, content in {"a.py": "code", "b.txt": "text", "c.rst": "other", "d.md": "\n"}.items():
        (tmp_path / name).write_text(content)
    assert read_documents(str(tmp_path), said.append, endings=(".py",)) == ["code", "text"]
    assert said == [f"{tmp_path}: reading 3 of 4 files, those that end in .txt, .md, .jsonl, .ndjson, .py"]
    with pytest.raises(UserError, match=r"^--text x: contains no text\.$"):
        read_documents(str(tmp_path / "d.md"), name="--text x")
    with pytest.raises(UserError, match=r"^hf:x: must be hf:ID"):
        read_documents("hf:x")


def test_rows_of_a_data_set_are_checked(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": None}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    with pytest.raises(UserError, match=r"--perplexity hf:o/n:test: row 1: the text is null, not a string"):
        read_domains(["hf:o/n:test"])


def test_sources(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "2.md").write_text("two")
    (folder / "deep" / "1.txt").write_text("one")
    (folder / "ignored.bin").write_bytes(b"\xff")
    # A line separator inside a string, an empty line, and Windows' line ends.
    (tmp_path / "items.jsonl").write_bytes('{"text": "x\u2028y"}\r\n\n{"text": "z"}\n'.encode())
    domains = read_domains([str(tmp_path / "a.txt"), f"books={folder}", f"{tmp_path / 'items.jsonl'}"])
    assert domains == {"a.txt": ["first"], "books": ["two", "one"], "items.jsonl": ["x\u2028y", "z"]}


def test_dataset_source(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"text": "a", "page": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_domains(["hf:owner/name:test", "wiki=hf:owner/name@raw:validation:page"]) == {
        "hf:owner/name:test": ["a"],
        "wiki": ["b"],
    }
    assert asked == [(("owner/name", None), {"split": "test"}), (("owner/name", "raw"), {"split": "validation"})]
    monkeypatch.undo()
    with pytest.raises(UserError, match="the data could not be loaded"):
        read_domains(["hf:owner/that-does-not-exist:test"])


def test_bad_sources_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"other": "y"}\n')
    for sources, message in {
        (str(tmp_path / "missing.txt"),): "missing.txt: No such file",
        (str(tmp_path / "empty.txt"),): "empty.txt: contains no text",
        (str(tmp_path / "latin.txt"),): r"latin.txt: not UTF-8 text \(byte 0\)",
        (str(tmp_path / "bad.jsonl"),): "bad.jsonl: line 2 is not a JSON object with a field 'text'",
        (str(tmp_path / "a.txt"), str(tmp_path / "a.txt")): "the name a.txt occurs twice; give NAME=SOURCE",
        ("hf:name",): r"must be hf:ID\[@CONFIG\]:SPLIT\[:COLUMN\]",
    }.items():
        with pytest.raises(UserError, match=message):
            read_domains(sources)
