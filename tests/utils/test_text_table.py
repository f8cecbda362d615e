"""Tables, sizes and lists of names as reports print them."""

import pytest

from hf_depthattn.utils.text_table import few, size, table


def test_columns_are_aligned_and_lines_have_no_blanks_at_the_end():
    assert table([("a", "bb", ""), ("ccc", "d", "e")]) == "a    bb\nccc  d   e"


def test_rows_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        table([("a", "b"), ("c",)])


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (2 * 10**9, "2.0 GB"),
        (3 * 10**15, "3000.0 TB"),
    ],
)
def test_sizes(num_bytes, expected):
    assert size(num_bytes) == expected


def test_few_names_the_first():
    assert few(["a"]) == "a"
    assert few(["a", "b", "c"]) == "3 tensors, first a"
