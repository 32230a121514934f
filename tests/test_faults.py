"""A sample of the trials of `python -m tests.faults`, in a process of its own, which forks."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest


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
data: {{task: restaurants, test_limit: 24, train_limit: 60, valid_stride: 30}}
lora: {{r: 2, target_modules: [c_attn]}}
train: {{batch_size: 4, steps: 4, max_length: 128}}
decode: {{num_beams: 3, max_new_tokens: 16, batch_size: 1}}
precision: plain
"""


@pytest.fixture(scope="module")
def whole_run(tiny_model, tmp_path_factory):
    """The command of a run without its folder, and the folder of one that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_model))
    command = [sys.executable, "-m", "jlora.cli", "run", str(folder / "recipe.yaml"), "--out"]
    subprocess.run([*command, str(folder / "run")], check=True, capture_output=True)
    return command, folder / "run"


@pytest.mark.parametrize("sign", ["predictions.jsonl.partial", "predictions.jsonl"])
def test_a_kill_while_decoding_or_scoring_loses_nothing(sign, whole_run, tmp_path, popen):
    command, whole = whole_run
    run = tmp_path / "run"
    process = popen([*command, str(run)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (run / sign).exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (run / "scores.json").exists()
    kept = run / "predictions.jsonl.partial"
    before = kept.read_text() if kept.exists() else ""
    resume = [*command[:4], "--resume", "--out", str(run)]
    done = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "trainable parameters" in done.stderr  # training is looked at, not done again
    for name in ("predictions.jsonl", "predictions.txt", "scores.json", "table.md"):
        assert (run / name).read_text() == (whole / name).read_text(), name
    assert set(before.splitlines()) <= set((run / "predictions.jsonl").read_text().splitlines())
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in whole.iterdir())
