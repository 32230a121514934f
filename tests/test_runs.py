"""Reading run folders, whole and broken ones, and the list of them."""

from __future__ import annotations

import json
import os
import re
import time

import pytest

from jlora.cli import main
from jlora.report import listing
from jlora.report.runs import find_runs, group_by_seed, group_name, read_run
from jlora.report.tables import mean_and_deviation
from jlora.system.errors import UserError
from jlora.system.lock import lock_run


def make_run(folder, seed=110, steps=20, done=20, after=None, loss=1.5, **settings):
    """A run folder with ``done`` of ``steps`` made."""
    folder.mkdir(parents=True)
    config = {
        "model": "smollm2-135m",
        "data": {"task": "e2e"},
        "lora": {"r": 4},
        "train": {"seed": seed, "steps": steps},
        **settings,
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    records = [{"step": 1, "loss": 4.0, "seconds": 1.0}, {"step": 5, "valid_loss": loss + 1}]
    records += [{"step": done, "loss": 2.0, "seconds": 9.5}, {"step": done, "valid_loss": loss}]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    if after is not None:
        (folder / "scores.json").write_text(json.dumps({"after": after}))
    return folder


def listed(*arguments):
    assert main(["runs", *map(str, arguments)]) == 0


# One folder --------------------------------------------------------------------------------------


def test_read_run(tmp_path):
    folder = make_run(tmp_path / "one", after={"BLEU": 0.5})
    (folder / "environment.json").write_text(json.dumps({"peak_memory_bytes": 2**30}))
    run = read_run(folder)
    assert (run.name, run.model, run.task, run.method) == ("one", "smollm2-135m", "e2e", "lora r=4")
    assert (run.seed, run.steps, run.total_steps) == (110, 20, 20)
    assert (run.best_valid_loss, run.best_step, run.seconds) == (1.5, 20, 9.5)
    assert run.before == {} and run.after == {"BLEU": 0.5}
    assert run.peak_memory == 2**30 and run.problems == [] and run.state == "finished"
    assert time.time() - 60 < run.modified < time.time() + 1
    assert run.setting("lora.r") == 4
    assert run.setting("lora.r.x") is None and run.setting("none.at.all") is None


@pytest.mark.parametrize("method", ["full", "bitfit", "top-layers"])
def test_other_methods_have_no_rank(tmp_path, method):
    assert read_run(make_run(tmp_path / "run", method=method)).method == method


def test_states(tmp_path):
    assert read_run(make_run(tmp_path / "trained")).state == "finished"
    assert read_run(make_run(tmp_path / "half", done=10)).state == "interrupted"
    with lock_run(tmp_path / "half"):
        assert read_run(tmp_path / "half").state == "running"
    assert read_run(tmp_path / "half").state == "interrupted"
    decoding = make_run(tmp_path / "decoding")
    (decoding / "predictions.jsonl.partial").write_text("")
    assert read_run(decoding).state == "interrupted"
    begun = make_run(tmp_path / "begun")
    (begun / "metrics.jsonl").unlink()
    assert (read_run(begun).state, read_run(begun).steps) == ("interrupted", 0)
    epochs = make_run(tmp_path / "epochs", steps=None)  # how many steps, only the training knows
    assert read_run(epochs).state == "interrupted"
    (epochs / "environment.json").write_text(json.dumps({"total_steps": 20}))
    assert (read_run(epochs).state, read_run(epochs).total_steps) == ("finished", 20)


def test_no_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        read_run(tmp_path / "none")
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "none")


DAMAGED = [
    ("metrics.jsonl", b'{"step": 1\n{"step": 2}\n', r"metrics\.jsonl:1: .*JSON"),
    ("metrics.jsonl", b'{"step": 1, "loss": "x"}\n{}\n', r"metrics\.jsonl:1: .*`loss`"),
    ("metrics.jsonl", b'{"step": 1, "seconds": 1' + b"0" * 400 + b"}\n{}\n", "`seconds`"),
    ("metrics.jsonl", b'{"step": 1' + b"0" * 400 + b"}\n{}\n", "`step`"),
    ("metrics.jsonl", b"[" * 100_000 + b"\n", "nested too deeply"),
    ("metrics.jsonl", b"\xff\xfe\n\n{}\n", r"metrics\.jsonl:1"),
    ("config.yaml", b"a: 1\nb: [1, 2\n", r"config\.yaml:\d: not YAML"),
    ("config.yaml", b"a: \xff\n", r"config\.yaml:1: not UTF-8"),
    ("config.yaml", b"a: 2026-99-99\n", r"config\.yaml: not YAML"),
    ("config.yaml", b"- a\n", r"config\.yaml: not a mapping"),
    ("config.yaml", b"", r"config\.yaml: not a mapping"),
    ("config.yaml", b"a: &a [1]\nb: [*a, *a]\n", "alias"),
    ("config.yaml", b"[" * 1000, r"config\.yaml"),
    ("scores.json", b'{"after":\n oops}', r"scores\.json:2: not JSON"),
    ("scores.json", b"[1]", r"scores\.json: not"),
    ("scores.json", b'{"after": 3}', r"scores\.json: not"),
    ("scores.json", b"[" * 100_000, "nested too deeply"),
    ("environment.json", b"{\n", r"environment\.json:\d: not JSON"),
    ("environment.json", b"[]", r"environment\.json: not a JSON object"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_damaged_folders_are_listed_with_what_is_wrong(tmp_path, capsys, name, content, message):
    folder = make_run(tmp_path / "bad", after={"BLEU": 0.5})
    (folder / name).write_bytes(content)
    run = read_run(folder)
    assert run.state == "damaged" and len(run.problems) == 1
    assert re.search(message, run.problems[0]) and "\n" not in run.problems[0]
    make_run(tmp_path / "good", after={"BLEU": 0.5})
    listed(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"damaged: {run.problems[0]}"
    assert "damaged" in lines[2] and "finished" in lines[3] and "BLEU 50.0" in lines[3]
    listed(tmp_path, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [one["state"] for one in found] == ["damaged", "finished"]
    assert found[0]["problems"] == run.problems


def test_folders_in_place_of_files_and_dead_links(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "scores.json").mkdir()
    os.symlink(tmp_path / "nowhere", folder / "environment.json")
    assert [problem.split(":")[0] for problem in read_run(folder).problems] == [
        f"cannot read {folder / 'scores.json'}",
        f"cannot read {folder / 'environment.json'}",
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert read_run(empty).state == "damaged"


def test_odd_but_readable_values(tmp_path, capsys):
    folder = make_run(tmp_path / "odd", model=["a"], data=3, lora=None, method=7)
    (folder / "config.yaml").write_text('{"model": ["a"], "data": 3, "train": {"seed": "x"}}')
    (folder / "metrics.jsonl").write_text(
        '{"step": 3, "loss": NaN, "seconds": 1e999}\n{"step": 2, "valid_loss": Infinity}\n'
    )
    (folder / "scores.json").write_text(
        '{"after": {"BLEU": NaN, "NIST": 1' + "0" * 400 + ', "CIDEr": true, "TER": 0.5}, "x": 1}'
    )
    (folder / "environment.json").write_text('{"peak_memory_bytes": "much", "total_steps": []}')
    run = read_run(folder)
    assert run.problems == [] and run.after == {"TER": 0.5} and run.steps == 3
    assert run.model is run.task is run.seed is run.best_valid_loss is run.peak_memory is None
    assert run.seconds is None
    listed(tmp_path, "--group")
    assert "TER 0.50" in capsys.readouterr().out


def test_names_cannot_drive_the_terminal(tmp_path, capsys):
    make_run(tmp_path / "a\x1b[2Jb", model="m\x1b[31m\nx")
    listed(tmp_path)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "m\\x1b[31m x" in out and "a\\x1b[2Jb" in out


# Many folders ------------------------------------------------------------------------------------


def test_find_runs_looks_three_levels_deep_and_not_into_runs(tmp_path):
    places = ["b", "a/x", "a/y/z", "a/y/q/deep", "b/wandb/files", ".hidden/run"]
    for place in places:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "config.yaml").write_text("model: m")
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == ["a/x", "a/y/z", "b"]
    assert find_runs(tmp_path / "b") == [tmp_path / "b"]
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    assert len(find_runs(tmp_path)) >= 3  # it ends


def test_group_by_seed(tmp_path):
    one = make_run(tmp_path / "lora-s1", seed=1)
    two = make_run(tmp_path / "lora-s2", seed=2)
    again = make_run(tmp_path / "again", seed=2)
    other = make_run(tmp_path / "other", seed=3, precision="fp32")
    half = make_run(tmp_path / "half", seed=4, done=10)
    bare = make_run(tmp_path / "bare", seed=5)
    (bare / "config.yaml").unlink()
    groups = group_by_seed([read_run(path) for path in (one, other, two, again, half, bare)])
    names = [[run.name for run in group] for group in groups]
    assert names == [["lora-s1", "lora-s2"], ["other"], ["again"], ["half"], ["bare"]]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lora-seed1", "lora-seed2"], "lora"),
        (["lora-seed110", "lora-seed111"], "lora"),
        (["e2e-r4-s1", "e2e-r4-s2", "e2e-r4-s10"], "e2e-r4"),
        (["r4_110", "r4_120"], "r4"),
        (["lora", "lora-seed-2"], "lora"),
        (["seed-1", "seed-2"], "seed-1"),
        (["first", "second"], "first"),
    ],
)
def test_group_name(tmp_path, names, expected):
    runs = [read_run(make_run(tmp_path / name, seed=seed)) for seed, name in enumerate(names)]
    assert group_name(runs) == expected


def test_mean_and_sample_deviation():
    assert mean_and_deviation([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, (7 / 3) ** 0.5))
    assert mean_and_deviation([3.0]) == (3.0, None)


def test_list_of_runs(tmp_path, capsys):
    low, high = {"BLEU": 0.69, "NIST": 8.6}, {"BLEU": 0.71, "NIST": 8.8}
    make_run(tmp_path / "lora-1", seed=1, after=low, loss=1.25)
    make_run(tmp_path / "lora-2", seed=2, after=high, loss=1.15)
    old = make_run(tmp_path / "zero", done=10, loss=0.9)
    for path in old.iterdir():
        os.utime(path, (time.time() - 3 * 86_400,) * 2)
    listed(tmp_path)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == "run state task model method steps valid. loss scores age".split()
    assert rows[0].split()[1:] == (
        "finished e2e smollm2-135m lora r=4 20/20 1.250 BLEU 69.0, NIST 8.60 now".split()
    )
    assert rows[2].split()[1:] == "interrupted e2e smollm2-135m lora r=4 10/20 0.900 – 3 d".split()

    listed(tmp_path, "--group")
    rows = capsys.readouterr().out.splitlines()[2:]
    # Sample standard deviations: sqrt(2) of half the differences.
    assert "lora (2 seeds)" in rows[0] and "1.200 ± 0.071" in rows[0]
    assert "BLEU 70.0 ± 1.4, NIST 8.70 ± 0.14" in rows[0] and len(rows) == 2

    for order, first in (("age", "lora"), ("loss", "zero"), ("name", "lora-1")):
        listed(tmp_path, "--sort", order)
        assert first in capsys.readouterr().out.splitlines()[2]

    listed(tmp_path, "--group", "--json")
    group = json.loads(capsys.readouterr().out)[0]
    assert group["n"]["BLEU"] == 2 and group["mean"]["BLEU"] == pytest.approx(0.70)
    assert group["deviation"]["valid_loss"] == pytest.approx(0.1 / 2**0.5)
    assert [run["seed"] for run in group["runs"]] == [1, 2]


def test_accuracy_is_listed_with_its_interval(tmp_path, capsys):
    scores = {"accuracy": 0.718, "accuracy_low": 0.676, "accuracy_high": 0.754, "majority": 0.62}
    make_run(tmp_path / "run", after={**scores, "confusion/true->false": 3.0})
    listed(tmp_path)
    assert "Accuracy 71.8 [68, 75], Majority answer 62.0" in capsys.readouterr().out


def test_nothing_to_list(tmp_path, capsys):
    listed(tmp_path)
    assert capsys.readouterr().out == f"no runs in {tmp_path}\n"
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_age():
    ages = [listing.age(seconds) for seconds in (-5, 59, 60, 3599, 7200, 200_000)]
    assert ages == ["now", "now", "1 min", "60 min", "2 h", "2 d"]
