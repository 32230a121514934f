"""Seeded splits: every input in one part, rows as they were, all files or none."""

from __future__ import annotations

import json

import pytest

from jlora.cli import main
from jlora.data.tasks import get_task
from jlora.data.tasks.split import split_file
from jlora.system.errors import UserError


def pairs_file(tmp_path, inputs=20):
    """Three rows an input, far apart from each other."""
    path = tmp_path / "in.jsonl"
    rows = [
        {"prompt": f"p{n}", "completion": f"c{k}", "x": "é"}
        for k in range(3)
        for n in range(inputs)
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_inputs_stay_together_and_lines_as_they_were(tmp_path):
    path = pairs_file(tmp_path)
    parts = split_file(path, tmp_path / "out", [12, 3, 5], seed=0)
    assert [(part.path.name, part.inputs, part.rows) for part in parts] == [
        ("train.jsonl", 12, 36), ("valid.jsonl", 3, 9), ("test.jsonl", 5, 15)
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        part.path.name for part in parts
    )
    found = [lines(part.path) for part in parts]
    assert sorted(sum(found, [])) == sorted(line for line in lines(path) if line)
    inputs = [{json.loads(line)["prompt"] for line in part} for part in found]
    assert [len(part) for part in inputs] == [12, 3, 5]
    assert len(set().union(*inputs)) == 20
    first = [json.loads(line) for line in found[0][:3]]
    assert [row["completion"] for row in first] == ["c0", "c1", "c2"]


def test_a_split_is_a_function_of_file_and_seed(tmp_path):
    path = pairs_file(tmp_path)

    def train(name, seed):
        return lines(split_file(path, tmp_path / name, [10, 10], seed)[0].path)

    assert train("a", 0) == train("b", 0) != train("c", 1)
    assert sorted(train("d", 0)) != sorted(train("e", 1))
    # On every Python: random.random() is promised to stay.
    order = [json.loads(line)["prompt"] for line in train("f", 0)[::3]]
    assert order == ["p15", "p3", "p12", "p7", "p5", "p2", "p8", "p11", "p4", "p9"]


def test_text_pairs(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("a || x \nb||y\na||z \nc||w\n")
    train, test = split_file(path, tmp_path / "out", [2, 1])
    assert sorted(lines(train.path) + lines(test.path)) == ["a || x ", "a||z ", "b||y", "c||w"]
    prompts = [{line[0] for line in lines(part.path)} for part in (train, test)]
    assert len(prompts[0]) == 2 and not prompts[0] & prompts[1]


@pytest.mark.parametrize(
    ("name", "file", "sizes"),
    [
        ("boolq", "dev.jsonl", [2400, 400, 470]),
        ("webnlg", "dev.json", [671, 100, 100]),
        ("dart", "dev.json", [2321, 200, 200]),
        ("e2e", "valid.txt", [400, 47, 100]),
    ],
)
def test_the_real_files(shared_data, tmp_path, name, file, sizes):
    path = shared_data / name / file
    if not path.is_file():
        pytest.skip(f"{name}/{file} is not in the development data")
    split_file(path, tmp_path / "out", sizes)
    task = get_task(name)
    parts = [task.load(tmp_path / "out", split) for split in ("train", "valid", "test")]
    whole = task.read(path)
    assert sorted(sum(parts, []), key=str) == sorted(whole, key=str)
    prompts = [{each.prompt for each in part} for part in parts]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    if name == "webnlg":
        document = json.loads((tmp_path / "out" / "valid.json").read_text(encoding="utf-8"))
        keys = [key for entry in document["entries"] for key in entry]
        assert keys == [str(number) for number in range(1, len(keys) + 1)]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([15, 5, 1], r"in.jsonl has 20 distinct inputs, fewer than the 21 asked for \(15 \+ 5"),
        ([5], "sizes 5: give two or three"),
        ([5, 0], "sizes 5,0: give two or three"),
        ([1, 1, 1, 1], "give two or three"),
    ],
)
def test_bad_sizes(tmp_path, sizes, message):
    path = pairs_file(tmp_path)
    with pytest.raises(UserError, match=message):
        split_file(path, tmp_path / "out", sizes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prose\n", "not of a kind that can be split"),
        ("mr,ref\nname[A],b\n", "not of a kind that can be split"),
        ("", "the file is empty"),
        ('{"prompt": "a"}\n{"prom\n', "in:2: not JSON"),
        ('{"entries": [{"1": {}}]}', "in: entry 1 has not the shape"),
        ("[3]", "in: entry 1 has not the shape"),
        ("[3\n", "in:2: not JSON"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "in"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        split_file(path, tmp_path / "out", [1, 1])
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path):
    path = pairs_file(tmp_path)
    with pytest.raises(UserError, match="is there already"):
        split_file(path, tmp_path, [2, 2])
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_commands(tmp_path, capsys):
    path = pairs_file(tmp_path)
    assert main(f"data split {path} {tmp_path / 'out'} --sizes 12,8".split()) == 0
    assert "train.jsonl: 12 inputs, 36 rows" in capsys.readouterr().out
    (tmp_path / "glue.jsonl").write_text('{"question": "q", "passage": "t -- p", "label": true}\n')
    out = tmp_path / "original.jsonl"
    assert main(f"data convert {tmp_path / 'glue.jsonl'} {out} --to original".split()) == 0
    row = {"question": "q", "title": "t", "answer": True, "passage": "p"}
    assert json.loads(out.read_text()) == row
    assert main(f"data split {path} {tmp_path / 'out'} --sizes 12,8".split()) == 2
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(f"data split {path} {tmp_path / 'more'} --sizes 12,x".split())
    assert "'12,x' is not of the form" in capsys.readouterr().err
