"""Reading hypotheses and references."""

from __future__ import annotations

import pytest

from jlora.metrics import read_hypotheses, read_references
from jlora.system.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


def test_hypotheses_one_a_line_with_empty_ones(write):
    assert read_hypotheses(write("h.txt", "a b \n\nc\n")) == ["a b", "", "c"]
    assert read_hypotheses(write("h.txt", "a b\r\nc")) == ["a b", "c"]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n\n\n"])
def test_reference_groups(write, end):
    assert read_references(write("r.txt", "a\nb\n\nc" + end)) == [["a", "b"], ["c"]]


def test_references_without_empty_line_are_one_for_each_input(write):
    assert read_references(write("r.txt", "a\nb\nc\n")) == [["a"], ["b"], ["c"]]


def test_csv_groups_consecutive_rows(write):
    first = '"name[A], area[B]","A is in B, yes."'
    table = f'\ufeffmr,ref\n{first}\n\n"name[A], area[B]",Â£5 A\nname[C],C\n'
    assert read_references(write("r.csv", table)) == [["A is in B, yes.", "£5 A"], ["C"]]


def test_quoted_fields_keep_their_line_ends_and_rows_without_text_are_skipped(write):
    table = 'mr,ref\na,"one\ntwo"\n,\n\na," b "\nb,\n'
    assert read_references(write("r.csv", table)) == [["one\ntwo", "b"], [""]]


def test_only_broken_pound_signs_are_mended(write):
    table = "mr,ref\nx,Ł20-25 or Ł 30\nx,Łódź has a café\nx,Â£5 in a cafÃ©\n"
    found = read_references(write("r.csv", table))
    assert found == [["£20-25 or £ 30", "Łódź has a café", "£5 in a café"]]


def test_tsv_with_other_columns(write):
    table = "id\tMeaning_Representations\tReferences\n1\tx\ta\n2\ty\tb\n"
    assert read_references(write("r.tsv", table)) == [["a"], ["b"]]


def test_official_csv_has_630_groups(shared_data):
    paths = sorted((shared_data / "e2e").glob("*test*.csv"))
    if not paths:
        pytest.skip("no E2E test CSV in the development data")
    groups = read_references(paths[0])
    assert len(groups) == 630
    assert sum(map(len, groups)) == 4693


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.txt", "", r"r\.txt: the file is empty"),
        ("r.txt", "\n\n", "only empty lines"),
        ("r.txt", "a\n\n\nb\n", r"r\.txt:3: a group without references"),
        ("r.txt", "\na\n", r"r\.txt:1: a group without references"),
        ("r.txt", b"a\n\xff\n", r"r\.txt:2: not UTF-8"),
        ("r.csv", "", "the file is empty"),
        ("r.csv", "\n\n", "the file is empty"),
        ("r.csv", "mr,ref\n", "a header but no references"),
        ("r.csv", "name[A],text\n", r"r\.csv:1: 0 columns named"),
        ("r.csv", "mr,source,ref\na,b,c\n", r"r\.csv:1: 2 columns named"),
        ("r.csv", "mr,ref\na,b\n\nc,d,e\n", r"r\.csv:4: 3 columns"),
        ("r.csv", 'mr,ref\na,"b\n', r"r\.csv:2: not a readable CSV row"),
    ],
)
def test_bad_references(write, name, content, message):
    with pytest.raises(UserError, match=message):
        read_references(write(name, content))


def test_bad_hypotheses(write, tmp_path):
    with pytest.raises(UserError, match=r"h\.txt: the file is empty"):
        read_hypotheses(write("h.txt", ""))
    with pytest.raises(UserError, match="plain text"):
        read_hypotheses(write("h.csv", "mr,ref\na,b\n"))
    with pytest.raises(UserError, match=r"h\.txt:1: not UTF-8"):
        read_hypotheses(write("h.txt", b"\xe9\n"))
    with pytest.raises(UserError, match=r"none\.txt: No such file"):
        read_hypotheses(tmp_path / "none.txt")
