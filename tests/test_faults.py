"""A sample of the trials of `python -m tests.faults`, in a process of its own, which forks."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jlora.cli import main


def run_faults(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.faults", *arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_twenty_kills_lose_nothing():
    output = run_faults("--kills", "20", "--only-kills", "--seed", "3")
    assert re.search(r"^20 trials .*: 0 lost$", output, re.MULTILINE), output


@pytest.mark.slow
def test_other_faults_lose_nothing():
    output = run_faults("--kills", "60", "--seed", "4")
    assert ": 0 lost" in output
    for kind in ("No space left", "newest checkpoint damaged", "both checkpoints damaged"):
        assert kind in output


@pytest.mark.slow
def test_the_tool_sees_a_loss():
    """With checkpoints that nobody checks, a damaged one is a loss, and the tool says so."""
    code = """
import sys
import time
from tests import faults
import jlora.training.checkpoint
jlora.training.checkpoint.check_sums = lambda folder: None
sys.exit(faults.main(["--kills", "30", "--seed", "3"]))
"""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "LOST" in done.stdout, done.stdout + done.stderr


RECIPE = """
model: {model}
data: {{task: restaurants, test_limit: 24, train_limit: 60, valid_stride: 30, metrics: [BLEU]}}
lora: {{r: 2, target_modules: [c_attn]}}
train: {{batch_size: 4, steps: 4, max_length: 128}}
decode: {{num_beams: 3, max_new_tokens: 16, batch_size: 1}}
precision: plain
"""
# Waits for ever where it is to be killed: after five answers, or with all of them, before scores.
HELD = """
import sys, threading
from pathlib import Path
from jlora.cli import main
from jlora.decoding.predictions import Unfinished
from jlora.runs import pipeline
where, sign, *arguments = sys.argv[1:]
write = Unfinished.write
def hold(*given):
    Path(sign).touch()
    threading.Event().wait()
def write_five(self, predictions):
    hold() if len(predictions) > 5 else write(self, predictions)
if where == "decoding":
    Unfinished.write = write_five
else:
    pipeline.evaluate_parts = hold
main(arguments)
"""


@pytest.fixture(scope="module")
def whole_run(tiny_model, tmp_path_factory):
    """A recipe, and the folder of its run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_model))
    assert main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "recipe.yaml", folder / "run"


@pytest.mark.parametrize("where", ["decoding", "scoring"])
def test_a_kill_while_decoding_or_scoring_loses_nothing(where, whole_run, tmp_path, popen, capsys):
    recipe, whole = whole_run
    run, sign = tmp_path / "run", tmp_path / "sign"
    command = [sys.executable, "-c", HELD, where, str(sign), "run", str(recipe), "--out", str(run)]
    process = popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not sign.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (run / "scores.json").exists()
    kept = run / "predictions.jsonl.partial"
    before = kept.read_text().splitlines() if kept.exists() else []
    assert len(before) == (5 if where == "decoding" else 0)
    capsys.readouterr()
    assert main(["run", str(recipe), "--resume", "--out", str(run)]) == 0
    assert "trainable parameters" in capsys.readouterr().err  # training is looked at, not repeated
    for name in ("predictions.jsonl", "predictions.txt", "scores.json", "table.md"):
        assert (run / name).read_text() == (whole / name).read_text(), name
    assert set(before) <= set((run / "predictions.jsonl").read_text().splitlines())
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in whole.iterdir())
