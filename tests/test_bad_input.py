"""Mistakes of users on the command line: a one-line error with advice, exit code 2.

Every case also checks that no traceback is shown and that no file was made, changed or left
half-written.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_formats import LLAMA, keyed, write_gguf

from jlora.cli import main
from jlora.data.tasks import e2e
from jlora.formats.peft_file import CONFIG
from jlora.formats.safetensors_file import read_safetensors, write_safetensors
from jlora.system.lock import lock_run

GOOD = b"name : Blue Spice | area : riverside||Blue Spice is by the river .\n" * 4


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder (None for folders)."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs a command that must fail as it should and leave ``tmp_path`` as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JLORA_DATA", raising=False)

    def run(*argv: object, unchanged: bool = True) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        lines = err.strip().splitlines()
        assert code == 2, err
        assert [line for line in lines if "error" in line.lower()] == lines[-1:], err
        assert lines[-1].startswith("jlora: error: ")
        assert "Traceback" not in out + err
        after = contents(tmp_path)
        assert not [name for name in after if ".tmp" in name or name.endswith(".old")]
        if unchanged:
            assert after == before
        print(lines[-1])  # `pytest -rP` lists the messages
        return lines[-1][len("jlora: error: ") :]

    return run


def finetune(model: Path, *more: object) -> list[object]:
    return ["finetune", "--model", model, "--precision", "plain", "--steps", 2, *more]


def has(message: str, *words: str) -> None:
    for word in words:
        assert word in message, message


# Data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.txt", GOOD + b"name : Caf\xe9||x .\n", [":5: not UTF-8", "iconv"]),
        ("train.txt", b"", ["the file is empty; give one with examples"]),
        ("train.txt", b"\n \n\n", ["the file is empty; give one with examples"]),
        ("train.txt", GOOD + b"name : A | area : B\n", [":5:", "||"]),
        ("train.txt", GOOD + b"name : A|| \n", [":5: no target after `||`", "write"]),
        ("train.csv", b"meaning,words\na,b\n", [":1: no column mr or ref", "meaning, words"]),
        ("train.csv", b"mr,ref\nname[A],b,c\n", [":2: 3 fields", "quotes"]),
        ("train.csv", b'mr,ref\nname[A],"b\n', [":2: broken CSV", "quotes"]),
        ("train.csv", b"mr,ref\n", ["no"]),
        ("train.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', [":2: not JSON"]),
        ("train.jsonl", b'{"prompt": "a"}\n', [":1: no key 'completion'", "found: prompt"]),
        ("train.jsonl", b'["a", "b"]\n', [":1: a JSON list, not an object"]),
        ("train.xlsx", b"PK", ["train.xlsx:1: not a file of E2E data", "CSV", "JSON Lines"]),
    ],
    ids=[
        "broken UTF-8", "empty", "blank lines", "no ||", "no completion", "CSV columns",
        "CSV fields", "CSV quotes", "CSV without rows", "broken JSON", "no key", "no object",
        "unknown kind",
    ],
)  # fmt: skip
def test_training_file(refused, tmp_path, tiny_model, name, content, words):
    (tmp_path / name).write_bytes(content)
    has(refused(*finetune(tiny_model, "--data", tmp_path / name)), name, *words)


def test_no_data_folder(refused, tmp_path, tiny_model):
    message = refused(*finetune(tiny_model, "--data", tmp_path / "nowhere"))
    has(message, "no file or folder", "nowhere", "check --data")


def test_folder_without_data(refused, tmp_path, tiny_model):
    message = refused(*finetune(tiny_model, "--data", tmp_path, "--task", "jsonl"))
    has(message, "no train data for task jsonl", "train.jsonl", "--data")


def test_folder_in_place_of_a_file(refused, tmp_path, tiny_model):
    (tmp_path / "train.txt").mkdir()
    message = refused(*finetune(tiny_model, "--set", f"data.train={tmp_path / 'train.txt'}"))
    has(message, "train.txt", "Is a directory", "give a file")


def test_broken_validation_file_is_not_taken_for_a_missing_one(refused, tmp_path, tiny_model):
    (tmp_path / "train.txt").write_bytes(GOOD)
    (tmp_path / "valid.txt").write_bytes(b"no bars\n")
    has(refused(*finetune(tiny_model, "--data", tmp_path)), "valid.txt:1:", "||")


def test_completion_longer_than_max_length(refused, tmp_path, tiny_model):
    (tmp_path / "train.txt").write_bytes(GOOD + b"name : A||" + b"very good food " * 60 + b"\n")
    message = refused(*finetune(tiny_model, "--data", tmp_path))
    has(message, "example 5", "max_length 128", "raise max_length or drop the example")


# Models ----------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def task(model: Path) -> list[object]:
    return finetune(model, "--task", "restaurants")


def test_no_such_model(refused, tmp_path):
    has(refused(*task(tmp_path / "gpt3")), "gpt3: no such file or folder", "jlora pull")


def test_unknown_model_name(refused):
    has(refused(*task(Path("smollm2 135m"))), "smollm2 135m: no such", "jlora pull")


@pytest.mark.parametrize("length", [4, 200, 2000])
def test_truncated_safetensors(refused, model, length):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    has(refused(*task(model)), "model.safetensors", "again")


def test_corrupt_safetensors_header(refused, model):
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"{" * 50 + data[58:])
    has(refused(*task(model)), "model.safetensors", "again")


class Command:
    """Unpickled carelessly, this makes a file."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return (__import__("os").system, (f"touch {self.proof}",))


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_pickle_that_would_run_a_command(refused, model, tmp_path, layout):
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    data = pickle.dumps({"transformer.wte.weight": Command(tmp_path / "proof")}, protocol=2)
    if layout == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    else:
        file.write_bytes(data)
    message = refused(*task(model))
    has(message, "pytorch_model.bin")
    assert not (tmp_path / "proof").exists()
    if layout == "zip":
        has(message, "system")


def test_truncated_gguf(refused, model):
    for path in ("model.safetensors", "config.json"):
        (model / path).unlink()
    tensors = {"token_embd.weight": np.ones((8, 32), np.float32)}
    file = write_gguf(model / "model.gguf", "llama", keyed("llama", LLAMA), tensors)
    Path(file).write_bytes(Path(file).read_bytes()[:-600])
    has(refused(*task(model)), "model.gguf", "again")


def change_tensors(model: Path, change) -> None:
    tensors = read_safetensors(model / "model.safetensors")
    change(tensors)
    write_safetensors(model / "model.safetensors", tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("transformer.h.1.ln_1.bias"), ["1 missing: transformer.h.1.ln_1.bias"]),
        (
            lambda t: t.update({"transformer.h.2.extra": np.ones(2, np.float32)}),
            ["1 unexpected: transformer.h.2.extra"],
        ),
        (
            lambda t: t.update({"transformer.ln_f.bias": np.ones(7, np.float32)}),
            ["1 misshapen: transformer.ln_f.bias is (7,) instead of (32,)"],
        ),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_keys_and_shapes(refused, model, change, words):
    change_tensors(model, change)
    has(refused(*task(model)), "model.safetensors", "do not fit", "of one model", *words)


def test_tokenizer_larger_than_the_model(refused, model):
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, "vocab_size": 300}))
    change_tensors(
        model, lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:300]})
    )
    message = refused(*task(model))
    has(message, "the tokenizer has 400 tokens but the model only 300", "right tokenizer")


def test_separator_outside_the_vocabulary(refused, tiny_model):
    message = refused(*task(tiny_model), "--set", "data.separator_id=50256")
    has(message, "token id 50256", "vocabulary has 400", "separator_id")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", ["config.json:1: not JSON", "download it again"]),
        ("config.json", '{"model_type": "bert"}', ["model_type 'bert'", "only gpt2"]),
        ("tokenizer.json", "{}", ["tokenizer.json"]),
        ("tokenizer.json", None, ["has no tokenizer", "put tokenizer.json"]),
    ],
    ids=["config not JSON", "another family", "damaged tokenizer", "no tokenizer"],
)
def test_files_beside_the_weights(refused, model, name, content, words):
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_text(content)
    has(refused(*task(model)), *words)


def test_target_modules_that_fit_nothing(refused, tiny_model):
    message = refused(*task(tiny_model), "--target-modules", "c_atn,q_proj")
    has(message, "c_atn", "nearest: c_attn")


# Settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--lr 0", ["lr must be above 0, not 0"]),
        ("--lr nan", ["lr must be above 0, not nan"]),
        ("--rank 0", ["r must be a whole number above 0, not 0"]),
        ("--batch-size 0", ["batch_size must be at least 1, not 0"]),
        ("--precision fp8", ["precision 'fp8' is not one of auto, plain, fp32, bf16"]),
        ("--task e3e", ["no task 'e3e'; did you mean e2e"]),
        ("--set train.lr=1", ["unknown setting train.lr", "known are batch_size"]),
        ("--set train.stepz=1", ["unknown setting train.stepz; did you mean train.steps?"]),
        ("--set steps", ["--set steps: write KEY=VALUE, such as train.steps=100"]),
        ("--set =3", ["write KEY=VALUE"]),
        ("--set train.=3", ["write KEY=VALUE"]),
        ("--set train.steps=[1", ["--set train.steps=[1: not YAML"]),
        ("--set train.steps=many", ["train.steps is 'many': should be a valid integer"]),
        ("--set train.steps=yes", ["train.steps is True; give a value, not true or false"]),
        ("--set model.name=x", ["model is one value"]),
        ("--set train=3", ["train is a group of settings; write train.NAME=VALUE"]),
        ("--set lora.target_modules=3", ["lora.target_modules is 3", "list", "string"]),
        ("--set decode.num_beams=0", ["num_beams is 0, but must be from 1"]),
        ("--set decode.adapter=first", ["decode.adapter 'first' is not one of best, last"]),
        ("--set log=[tensorbord]", ["log 'tensorbord' is not one of wandb, tensorboard, swanlab"]),
        ("--set data.train_limit=0", ["data.train_limit must be at least 1, or null for all"]),
    ],
)
def test_settings(refused, tiny_model, options, words):
    argv = ["finetune", "--model", tiny_model, "--task", "restaurants", *options.split(" ")]
    has(refused(*argv), *words)


def test_a_logger_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr("jlora.training.loggers.services._is_installed", lambda package: False)
    # The model is not even looked for.
    has(refused(*finetune(Path("nowhere"), "--log", "swanlab")), "pip install 'jlora[swanlab]'")
    has(refused("run", "e2e-smollm2-135m", "--log", "wandb"), "pip install 'jlora[wandb]'")


def test_no_model_named(refused):
    has(refused("finetune", "--task", "restaurants"), "no --model given", "smollm2-135m")


def test_unknown_recipe(refused):
    has(refused("run", "e2e-smolm2"), "no recipe e2e-smolm2", "e2e-smollm2-135m")
    has(refused("run"), "no recipe given")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [x\ntrain: {}\n", ["recipe.yaml:2: not YAML"]),
        ("model: x\nmodel: y\n", ["recipe.yaml:2: not YAML (model stands there twice)"]),
        ("- model\n", ["a recipe is a YAML mapping"]),
        ("", ["a recipe is a YAML mapping"]),
        ("train: {steps: 3}\n", ["no model given"]),
        ("modell: x\n", ["unknown setting modell; did you mean model?"]),
        ("model: x\ntrain:\n  steps: 1.5\n", ["train.steps is 1.5: should be a valid integer"]),
        ("model: !!python/object/apply:os.system [ls]\n", ["recipe.yaml:1: not YAML"]),
        ("model: x\x00\n", ["not YAML"]),
    ],
)
def test_recipe_file(refused, tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    has(refused("run", path), "recipe.yaml", *words)


# Run folders -----------------------------------------------------------------------------------


def test_run_folder_that_is_there_already(refused, tmp_path, tiny_run, tiny_model):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    has(refused(*task(tiny_model), "--out", run), "holds a run already; add --resume")


def test_resume_without_a_run(refused, tmp_path):
    message = refused("finetune", "--resume", "--out", tmp_path / "run")
    has(message, "no run to resume there; start it without --resume")
    has(refused("run", "--resume"), "--resume needs the run folder: --out RUN")


def test_resume_with_other_settings(refused, tmp_path, tiny_run):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    message = refused("finetune", "--resume", "--out", run, "--lr", "1")
    has(message, "--resume takes every setting from the run folder")


def test_resume_from_a_damaged_checkpoint(refused, tmp_path, tiny_run):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (run / "checkpoint" / "progress.json").write_text("{")
    message = refused("finetune", "--resume", "--out", run)
    has(message, "no good checkpoint", "run/checkpoint is damaged (progress.json", "copy")


def test_a_run_that_another_process_holds(refused, tmp_path, tiny_run, tiny_model):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    with lock_run(run):
        for command in ("finetune", "run"):
            message = refused(command, "--resume", "--out", run)
            has(message, f"{run} is in use by process {os.getpid()} of ", ", started 2")
        has(refused(*task(tiny_model), "--out", run), "is in use by process")


def test_resume_after_the_data_changed(refused, tmp_path, tiny_run):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("train_limit: 40", "train_limit: 39"))
    message = refused("finetune", "--resume", "--out", run)
    has(message, "belongs to other settings, data or adapter shapes", "new run folder")


def test_a_file_in_place_of_the_run_folder(refused, tmp_path, tiny_model):
    (tmp_path / "file").write_text("x")
    message = refused(*task(tiny_model), "--out", tmp_path / "file" / "run")
    has(message, "cannot write to", "file/run", "Not a directory", "choose another")


def test_nan_loss_keeps_the_last_good_adapter(refused, tmp_path, tiny_model):
    run = tmp_path / "run"
    message = refused(
        *finetune(tiny_model, "--task", "restaurants", "--lr", "1e30", "--target-modules", "c_attn",
                  "--steps", 5, "--out", run, "--set", "data.train_limit=20",
                  "--set", "data.valid_stride=100", "--set", "train.save_every=1"),
        unchanged=False,
    )  # fmt: skip
    has(message, "the loss is", "at step 2", "the last good adapter is in", "Lower the learning")
    tensors = read_safetensors(run / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(array).all() and abs(array).max() < 1 for array in tensors.values())


# Disks -----------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path):
    """Mounts a file system in memory; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        return folder

    yield make
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_while_training(refused, mount, tiny_model):
    run = mount("size=28k") / "run"
    message = refused(
        *finetune(tiny_model, "--task", "restaurants", "--out", run, "--set", "data.train_limit=20",
                  "--target-modules", "c_attn", "--set", "data.valid_stride=100"),
        unchanged=False,
    )  # fmt: skip
    has(message, "cannot write", str(run), "No space left on device", "; free some space")
    for file in run.rglob("*.safetensors"):  # what is there is whole
        read_safetensors(file)
    for file in run.rglob("*.json"):
        json.loads(file.read_text())


def test_full_disk_without_a_mount(refused, monkeypatch, tmp_path, tiny_run):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))

    def sync(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("jlora.system.files.sync", sync)
    has(refused("report", run), "report.html", "No space left on device; free some space")


def test_read_only_disk(refused, mount, tiny_model):
    run = mount("size=1m,ro") / "run"
    has(refused(*task(tiny_model), "--out", run), "cannot write to", "Read-only file system")


def predictions_file(folder: Path, count: int = 1) -> Path:
    hypotheses = [{"text": "a", "ids": [5, 0], "logprob": -1.0, "length": 2, "finished": True}]
    row = {"prompt": "p", "prediction": "a", "hypotheses": hypotheses}
    path = folder / "predictions.jsonl"
    path.write_text("".join(json.dumps({**row, "prompt": f"p{i}"}) + "\n" for i in range(count)))
    return path


def test_full_disk_while_predictions_are_written(refused, mount, tmp_path):
    disk = mount("size=8k")
    out = disk / "out.jsonl"
    out.write_text("the old ones\n")
    path = predictions_file(tmp_path, 200)
    message = refused("rerank", path, "--length-penalty", 1, "--out", out)
    has(message, "cannot write", "out.jsonl", "No space left")
    assert out.read_text() == "the old ones\n"


def test_full_disk_behind_standard_output(tmp_path):
    import sys

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    path = predictions_file(tmp_path)
    code = (
        "import jlora.cli, jlora.decoding.predictions as p; "
        "p.rerank = lambda *a: print('x') or []; "
        f"raise SystemExit(jlora.cli.main(['rerank', {str(path)!r}, '--length-penalty', '1', "
        f"'--out', {str(tmp_path / 'out.jsonl')!r}]))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.decode().splitlines() == [
        "jlora: error: cannot use the standard output: No space left on device; "
        "free some space or choose another folder"
    ]


# Generation, scoring, reports --------------------------------------------------------------------


def generate(model: Path, *more: object) -> list[object]:
    return ["generate", "--model", model, "--precision", "plain", "--max-new-tokens", 4, *more]


def test_prompt_longer_than_the_context(refused, tmp_path, tiny_model):
    message = refused(*generate(tiny_model, "--prompt", "name : A | " * 60, "--out", "o.jsonl"))
    has(message, "prompt 1", "tokens", "shorten it")


def test_no_adapter_folder(refused, tiny_model):
    has(refused(*generate(tiny_model, "--adapter", "nowhere", "--prompt", "x")), "nowhere")


def test_adapter_of_another_shape(refused, tmp_path, tiny_run):
    other = tiny.write_model(tmp_path / "wide", width=48)
    message = refused(*generate(other, "--adapter", tiny_run / "adapter", "--prompt", "x"))
    has(message, "made for the base model", "load it on its own base")


def test_adapter_of_another_model_of_the_same_shape(refused, tmp_path, tiny_run):
    other = tiny.write_model(tmp_path / "other", seed=1)
    message = refused(*generate(other, "--adapter", tiny_run / "adapter", "--prompt", "x"))
    has(message, "the weights of", "differ")


def test_damaged_adapter(refused, tmp_path, tiny_run, tiny_model):
    adapter = Path(shutil.copytree(tiny_run / "adapter", tmp_path / "adapter"))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    message = refused(*generate(tiny_model, "--adapter", adapter, "--prompt", "x"))
    has(message, "adapter_model.safetensors")


def evaluate(refs: Path, hyps: Path) -> list[object]:
    return ["evaluate", "e2e", "--refs", refs, "--hyps", hyps]


@pytest.fixture
def texts(tmp_path) -> tuple[Path, Path]:
    """References of two inputs and as many hypotheses."""
    (tmp_path / "refs.txt").write_text("a b\nc d\n\ne f\n")
    (tmp_path / "hyps.txt").write_text("a b\ne f\n")
    return tmp_path / "refs.txt", tmp_path / "hyps.txt"


def test_numbers_of_hypotheses_and_references_differ(refused, texts):
    texts[1].write_text("a b\n")
    has(refused(*evaluate(*texts)), "1 hypotheses but 2 groups of references", "one hypothesis")


def test_no_references(refused, texts, tmp_path):
    message = refused(*evaluate(tmp_path / "none.txt", texts[1]))
    has(message, "cannot read", "none.txt: No such file or directory; check the path")


def test_empty_hypotheses(refused, texts):
    texts[1].write_text("")
    has(refused(*evaluate(*texts)), "hyps.txt", "empty")


def test_metrics_that_are_none(refused, texts):
    message = refused(*evaluate(*texts), "--metrics", "TER, multiblue")
    has(message, "no metric 'multiblue'; did you mean multi-BLEU")


def test_scoring_a_task_that_is_none(refused, texts):
    message = refused("evaluate", "e2", "--refs", texts[0], "--hyps", texts[1])
    has(message, "no task 'e2'", "did you mean e2e")


def test_answers_of_a_choice(refused, texts, monkeypatch):
    choice = replace(e2e.TASK, name="yes-no", metrics=("accuracy",), choices=("yes", "no"))
    monkeypatch.setattr("jlora.data.tasks.get_task", {"yes-no": choice}.get)
    command = ["evaluate", "yes-no", "--refs", texts[0], "--hyps", texts[1]]
    has(refused(*command), "refs.txt:1: 'a b' is no answer; write yes or no")
    texts[0].write_text("yes\n")
    has(refused(*command), "2 predicted answers but 1 right ones")
    has(refused(*command, "--metrics", "TER"), "accuracy alone", "leave --metrics out")


def test_no_java(refused, texts, monkeypatch):
    monkeypatch.setattr("jlora.metrics.java._candidates", list)
    has(refused(*evaluate(*texts)), "Java", "pip install")


def test_java_is_looked_for_before_training(refused, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.metrics.java._candidates", list)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"model: {tiny_model}\ndata: {{task: restaurants}}\n")
    has(refused("run", recipe), "Java", "pip install")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n', [":1: no key 'prediction'"]),
        ('{"prompt": "a", "prediction": "b"}\n', ["no hypotheses to rank", "beam search"]),
        ("", ["empty"]),
    ],
)
def test_predictions_that_are_none(refused, tmp_path, content, words):
    (tmp_path / "p.jsonl").write_text(content)
    has(refused("rerank", "p.jsonl", "--length-penalty", 1, "--out", "out.jsonl"), *words)


def test_length_penalty_that_is_no_number(refused, tmp_path):
    path = predictions_file(tmp_path)
    message = refused("rerank", path, "--length-penalty", "nan", "--out", "out.jsonl")
    has(message, "length penalty nan", "as 0.8")


def test_report_of_nothing(refused, tmp_path):
    has(refused("report", tmp_path / "run"), "run")


# Merging, exporting, converting ------------------------------------------------------------------


def test_merge(refused, tmp_path, tiny_model, tiny_run):
    other = tiny.write_model(tmp_path / "other", seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    has(refused("merge", other, tiny_run, "out"), "made for the base model", "--force")
    has(refused("merge", tiny_model, tiny_run, "full"), "full is there already; remove it")
    has(refused("merge", tiny_model, "nowhere", "out"), "nowhere is no folder")
    has(refused("merge", "nowhere.gguf", tiny_run, "out"), "nowhere.gguf: no such file")
    has(refused("merge", tiny_model, tiny_run, "out", "--lora-alpha", 3), "are for loralib's .pt")
    has(refused("merge", tiny_model, "a.pt", "out"), "does not say its lora_alpha", "--lora-alpha")
    has(refused("merge", tiny_model, "a.pt", "out", "--lora-alpha", 3), "cannot read a.pt")
    assert main(["merge", str(other), str(tiny_run), "out", "--force"]) == 0


def test_merge_onto_a_full_disk(refused, tmp_path, tiny_model, tiny_run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jlora.adapters.export_folder.write_tokenizer", full)
    message = refused("merge", tiny_model, tiny_run, "out")
    has(message, "cannot write out: No space left on device", "free some space")


def test_export(refused, tmp_path, tiny_model, tiny_run):
    (tmp_path / "there.gguf").write_text("")
    message = refused("export", tiny_model, "--gguf", "there.gguf")
    has(message, "there.gguf is there already")
    bare = Path(shutil.copytree(tiny_model, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    message = refused("export", bare, "--gguf", "m.gguf", "--adapter", tiny_run)
    has(message, "the model has no tokenizer", "--no-tokenizer")
    message = refused("export", tiny_run / "best", "--gguf", "m.gguf")
    has(message, "this is an adapter", "--adapter")


def test_convert(refused, tmp_path, tiny_model, tiny_run):
    has(refused("convert", tiny_run, "folder"), "give a folder and a .pt file, or")
    has(refused("convert", "a.pt", "b.pt"), "give a folder and a .pt file, or")
    has(refused("convert", "a.pt", "folder", "--lora-alpha", 1), "cannot read a.pt: no such file")
    shutil.copytree(tiny_run / "best", tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / CONFIG).read_text())
    settings = {**settings, "base_model_name_or_path": None}
    (tmp_path / "peft" / CONFIG).write_text(json.dumps(settings))
    has(refused("convert", "peft", "a.pt"), "no --model given")
    assert main(["convert", str(tiny_run), "a.pt"]) == 0
    has(refused("convert", "a.pt", "folder", "--lora-alpha", 1), "no --model given")
    message = refused("convert", tiny_run, "a.pt")
    has(message, "a.pt is there already")
    message = refused("export", "a.pt", "--gguf", "m.gguf")
    has(message, "a.pt: a LoRA adapter and no model", "--adapter a.pt --lora-alpha ALPHA")
    argv = ["convert", "a.pt", "folder", "--model", tiny_model, "--lora-alpha", 1]
    has(refused(*argv, "--enable-lora", "1,0,1"), "no layer is fused in the file")
