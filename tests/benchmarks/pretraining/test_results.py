"""Results are read back as they were written, and refused if they cannot be compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pretraining_study import made_up_result

from benchmarks.pretraining.results import check_alike, conditions, read_results
from benchmarks.pretraining.runs import Run
from hf_depthattn.errors import UserError

PRENORM = Run("stdlib", 100, "prenorm", 2, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"setting": {"hidden_size": 32}}, "setting hidden_size is 32, but 16"),
        ({"corpus": {"sha256": "1"}}, "corpus stdlib sha256 is '1', but '0'"),
        ({"fields": {"connection": "attn_res"}}, "fields of arm prenorm connection is 'attn_res', but 'residual'"),
        ({"versions": {"torch": "3"}}, "version of torch is '3', but '2'"),
    ],
)
def test_other_conditions_are_refused_with_both_values(change, message):
    first = made_up_result(PRENORM, 1.0)
    second = made_up_result(replace(PRENORM, seed=1), 1.0)
    for name, values in change.items():
        second = replace(second, **{name: {**getattr(second, name), **values}})
    with pytest.raises(UserError, match=message) as caught:
        check_alike((name, conditions(result)) for name, result in (("a.json", first), ("b.json", second)))
    assert str(caught.value).startswith("b.json: ") and "in a.json" in str(caught.value)


def test_another_commit_and_another_corpus_are_allowed():
    first = made_up_result(PRENORM, 1.0)
    second = made_up_result(replace(PRENORM, corpus="books"), 1.0, corpus={"sha256": "1"})
    second = replace(second, versions={**second.versions, "commit": "1"})
    check_alike((name, conditions(result)) for name, result in (("a.json", first), ("b.json", second)))


@pytest.mark.parametrize("content", ["[]", "{}", '{"benchmark": "pretraining"}', '{"benchmark": "other"}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json: "):
        read_results(tmp_path)


def test_a_folder_that_does_not_exist_has_no_results(tmp_path):
    assert read_results(tmp_path / "missing") == {}
