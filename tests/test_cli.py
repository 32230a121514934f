"""The command line on a tiny model: the whole way from data to texts, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from jlora.cli import main, parser
from jlora.cli.options import open_recipe, overrides
from jlora.data.tasks import e2e
from jlora.formats.safetensors_file import read_safetensors

ADAPTER = "adapter_model.safetensors"
VERBS = (
    "demo", "doctor", "pull", "run", "finetune", "generate", "merge", "export", "convert",
    "analyze", "evaluate", "rerank", "report", "runs", "sweep", "data", "estimate",
)  # fmt: skip


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, **options
    )


def recipe_of(*argv):
    arguments = parser().parse_args(list(argv))
    return open_recipe(arguments, arguments.recipe)


# Without a model ---------------------------------------------------------------------------------


def test_the_command_line_is_there_at_once():
    """Help and mistakes must not wait for Jittor, nor for numpy."""
    code = "import sys, jlora.cli as c; c.parser(); print(*{'jittor', 'numpy'} & {*sys.modules})"
    assert python("-c", code).stdout.strip() == ""


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"] if verb else ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: jlora" in text
    if verb is None:
        assert all(f"\n    {name} " in text for name in VERBS)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("jlora ")


@pytest.fixture
def scored(tmp_path, capsys):
    """Runs `jlora evaluate` on the given lines; returns what it prints."""

    def run(task, refs, hyps, *more):
        (tmp_path / "refs.txt").write_text(refs)
        (tmp_path / "hyps.txt").write_text(hyps)
        files = ["--refs", str(tmp_path / "refs.txt"), "--hyps", str(tmp_path / "hyps.txt")]
        assert main(["evaluate", task, *files, *more]) == 0
        return capsys.readouterr().out

    return run


def test_evaluate_computes_the_named_metrics(scored):
    texts = ("A b, c\nx y\n\nd e f\n", "a b c\nd e g\n")
    out = scored("e2e", *texts, "--metrics", "TER, multi-BLEU")
    # "a b c" lacks one of four words, of "d e g" one of three is another; no 4-gram is there.
    assert out == "TER        0.2917\nmulti-BLEU 0.0000\n"
    assert json.loads(scored("e2e", *texts, "--metrics", "TER", "--json")) == {
        "TER": pytest.approx((1 / 4 + 1 / 3) / 2)
    }


def test_evaluate_takes_the_metrics_of_the_task(scored, monkeypatch):
    monkeypatch.setattr(
        "jlora.data.tasks.get_task", lambda name: replace(e2e.TASK, metrics=("TER",))
    )
    assert scored("e2e", "a b\n", "a c\n") == "TER      0.5000\n"


def test_evaluate_a_choice(scored, monkeypatch):
    task = replace(e2e.TASK, metrics=("accuracy",), choices=("true", "false"))
    monkeypatch.setattr("jlora.data.tasks.get_task", lambda name: task)
    answers = ("true\nfalse\ntrue\ntrue\n", "True.\nfalse\nI see\nfalse, of course\n")
    scores = json.loads(scored("boolq", *answers, "--json"))
    assert scores["accuracy"] == 0.5
    assert scores["majority"] == 0.75
    assert scores["confusion/true->unparseable"] == scores["unparseable"] == 1
    shown = dict(line.split() for line in scored("boolq", *answers).splitlines())
    assert list(shown) == list(scores)
    assert shown["majority"] == "0.7500"
    assert shown["confusion/true->false"] == "1"


@pytest.mark.parametrize(
    "argv",
    [[], ["tune"], ["run", "x", "--rnak", "8"], ["finetune", "--steps", "1", "--epochs", "1"],
     ["finetune", "--rank", "many"], ["generate", "--model", "m"]],
)  # fmt: skip
def test_what_argparse_refuses(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("jittors", "said"),
    [
        ("[f log.cc:608] Check failed Run cmd failed: g++ x.cc", "a compiler failed"),
        ("Error happend during compilation:\n [Error] source", "a compiler failed"),
        ("*****\nGPU memory is overflow, please reduce", "the GPU's memory ran out; lower train."),
        ("[Reason]: the GPU failed in the card's memory: out of memory", "the GPU's memory ran"),
    ],
)
def test_jittors_errors_that_a_user_can_do_something_about(jittors, said, monkeypatch, capsys):
    def fails(arguments):
        raise RuntimeError(jittors)

    monkeypatch.setattr("jlora.cli.setup.run_doctor", fails)
    assert main(["doctor"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jlora: error: ") and said in line
    with pytest.raises(RuntimeError):
        main(["doctor", "-v"])
    jittors = "Wrong inputs arguments"
    with pytest.raises(RuntimeError, match="Wrong inputs"):
        main(["doctor"])


def test_options_stand_for_settings(tmp_path):
    recipe, run = recipe_of(
        "finetune", "--model", "m", "--data", str(tmp_path), "--task", "jsonl", "--rank", "3",
        "--alpha", "6", "--target-modules", "a, b", "--lr", "1e-5", "--batch-size", "2",
        "--epochs", "1.5", "--seed", "4", "--precision", "fp32", "--set", "train.save_every=7",
    )  # fmt: skip
    assert (recipe.model, recipe.data.folder, recipe.data.task) == ("m", str(tmp_path), "jsonl")
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (3, 6, ["a", "b"])
    assert (recipe.train.optim.lr, recipe.train.batch_size, recipe.train.seed) == (1e-5, 2, 4)
    assert (recipe.train.epochs, recipe.train.steps, recipe.train.save_every) == (1.5, None, 7)
    assert (recipe.precision, str(run)) == ("fp32", "runs/finetune")


def test_options_of_lora():
    recipe, _ = recipe_of("finetune", "--model", "m", "--target-modules", "All-Linear", "--rslora")
    assert (
        recipe.lora.target_modules == "all-linear" and recipe.lora.lora_variant.scaling(4, 8) == 4
    )
    recipe, _ = recipe_of("finetune", "--model", "m", "--dora", "--rslora")
    assert recipe.lora.lora_variant.peft_fields == ("use_dora", "use_rslora")


def test_options_go_before_the_recipe_and_set_before_both():
    recipe, run = recipe_of("finetune", "--recipe", "e2e-smollm2-135m", "--epochs", "2",
                            "--lr", "1", "--set", "train.optim.lr=3")  # fmt: skip
    assert (recipe.train.steps, recipe.train.epochs, recipe.train.optim.lr) == (None, 2, 3)
    assert (recipe.lora.r, str(run)) == (4, "runs/e2e-smollm2-135m")


def test_a_file_as_data_is_the_training_split(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text("")
    arguments = parser().parse_args(["finetune", "--model", "m", "--data", str(path)])
    assert f'data.train="{path}"' in overrides(arguments)
    assert f'data.folder="{tmp_path}"' in overrides(arguments)


# With one ----------------------------------------------------------------------------------------


def test_run_folder(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "loss.png", "report.html", "adapter", "best", "checkpoint",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "valid_loss" in row] == [3, 6]
    assert json.loads((tiny_run / "adapter" / "adapter_config.json").read_text())["r"] == 2
    tensors = read_safetensors(tiny_run / "adapter" / ADAPTER)
    assert len(tensors) == 4 and all(array.any() for array in tensors.values())
    assert not [path for path in tiny_run.rglob("*") if ".tmp" in path.name]


def test_a_run_is_logged_where_the_recipe_says(tmp_path, tiny_model, monkeypatch):
    class Service(types.ModuleType):
        started, logged, finished = [], [], []

        def init(self, **settings):
            self.started.append(settings)
            return self

        def log(self, values, step):
            self.logged.append((step, sorted(values)))

        def finish(self):
            self.finished.append(True)

    monkeypatch.setitem(sys.modules, "wandb", Service("wandb"))
    run = tmp_path / "my-run"
    assert main(
        f"finetune --model {tiny_model} --task restaurants --batch-size 4 --steps 2 "
        "--precision plain --set data.train_limit=40 --set data.valid_stride=50 "
        f"--set train.log_every=1 --log wandb --out {run}".split()
    ) == 0  # fmt: skip
    (started,) = Service.started
    assert (started["name"], started["dir"]) == ("my-run", str(run))
    assert "batch_size: 4" in started["config"]["recipe"]
    trained = ["loss", "lr", "seconds", "tokens_per_s"]
    assert Service.logged == [(1, trained), (2, trained), (2, ["valid_loss"])]
    assert Service.finished == [True]


def rows_of(count):
    row = {"prompt": "name : A | food : B", "completion": "A serves B ."}
    return (json.dumps(row) + "\n") * count


def test_jsonl_without_validation_and_resume(tmp_path, tiny_model, capsys):
    """A folder with train.jsonl alone is enough; a finished run resumes to nothing more."""
    (tmp_path / "train.jsonl").write_text(rows_of(6))
    run = tmp_path / "run"
    argv = ["finetune", "--model", str(tiny_model), "--data", str(tmp_path), "--task", "jsonl"]
    argv += ["--batch-size", "4", "--steps", "2", "--precision", "plain", "--rank", "2"]
    assert main([*argv, "--out", str(run)]) == 0
    said = capsys.readouterr()
    assert "no validation data" in said.err
    assert f"adapter: {run / 'adapter'}" in said.out
    assert not (run / "best").exists()
    before = read_safetensors(run / "adapter" / ADAPTER)
    assert main(["finetune", "--resume", "--out", str(run)]) == 0
    assert "the run began elsewhere" not in capsys.readouterr().err
    after = read_safetensors(run / "adapter" / ADAPTER)
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["threads"] == os.environ["OMP_NUM_THREADS"]
    environment["threads"] = "77"
    (run / "environment.json").write_text(json.dumps(environment))
    assert main(["finetune", "--resume", "--out", str(run)]) == 0
    assert "the run began elsewhere (threads 77 -> " in capsys.readouterr().err


def generate(model, *more):
    return main(
        ["generate", "--model", str(model), "--precision", "plain", "--max-new-tokens", "4", *more]
    )


def test_generate(tiny_model, tiny_run, tmp_path, capsys):
    prompts = ["--prompt", "name : A", "--prompt", "name : B"]
    assert generate(tiny_model, "--method", "greedy", *prompts) == 0
    plain = capsys.readouterr().out
    assert generate(tiny_model, "--method", "greedy", *prompts) == 0
    assert capsys.readouterr().out == plain
    out = tmp_path / "p.jsonl"
    adapter = ["--adapter", str(tiny_run / "best"), "--beams", "3", "--out", str(out)]
    assert generate(tiny_model, *prompts, *adapter) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["name : A", "name : B"]
    again = tmp_path / "again.jsonl"
    assert main(["rerank", str(out), "--length-penalty", "0", "--out", str(again)]) == 0
    ranked = [json.loads(line) for line in again.read_text().splitlines()]
    for row in ranked:
        best = max(row["hypotheses"], key=lambda each: each["logprob"])
        assert row["prediction"] == best["text"]
    assert len(again.with_suffix(".txt").read_text().splitlines()) == 2


def test_report(tiny_run, capsys):
    assert main(["report", str(tiny_run)]) == 0
    assert capsys.readouterr().out.strip() == str(tiny_run / "report.html")


def test_a_process_of_its_own(tmp_path):
    """As the shell sees it: one line, exit code 2, nothing on standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "jlora.cli", "run", "nope"], cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("jlora: error: no recipe nope: no such file; jlora comes with ")


def test_a_reader_that_goes_away(popen):
    code = (
        "import sys, jlora.cli as c, jlora.cli.doctor as d\n"
        "d.main = lambda as_json: print('x' * 100000) or 0\n"
        "sys.exit(c.main(['doctor']))"
    )
    process = popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(60), said) == (0, b"")
