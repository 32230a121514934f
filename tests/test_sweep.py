"""`jlora sweep`: cases out of grids and files, runs that go on, one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jlora.cli import main, parser
from jlora.runs import sweep as sweep_module
from jlora.runs.recipe import dump_recipe, load_recipe
from jlora.runs.smoke import smoke
from jlora.runs.sweep import file_cases, grid_cases, sweep
from jlora.system.errors import UserError


def test_a_grid_is_every_combination():
    cases = grid_cases(["lora.r=1,64", "train.seed=110,111"])
    assert list(cases) == ["r-1_seed-110", "r-1_seed-111", "r-64_seed-110", "r-64_seed-111"]
    assert cases["r-64_seed-110"] == ["lora.r=64", "train.seed=110"]


def test_values_are_yaml():
    cases = grid_cases(["lora.target_modules=[q_proj],[q_proj, v_proj]"])
    assert list(cases) == ["target_modules-q_proj", "target_modules-q_proj+v_proj"]
    assert cases["target_modules-q_proj+v_proj"] == ['lora.target_modules=["q_proj", "v_proj"]']
    assert grid_cases(["train.optim.lr=1e-3"]) == {"lr-0.001": ["train.optim.lr=0.001"]}
    # A value cannot leave the sweep's folder.
    assert list(grid_cases(["model=../x/y"])) == ["model-..-x-y"]


@pytest.mark.parametrize("grid", ["lora.r", "=1,2", "lora.r=", "lora.r=[1"])
def test_bad_grids(grid):
    with pytest.raises(UserError, match="--grid"):
        grid_cases([grid])


def test_cases_of_a_file(tmp_path):
    path = tmp_path / "cases.yaml"
    path.write_text("small: {lora.r: 1}\nlarge: {lora.r: 8, lora.enable_lora: null}\n")
    assert file_cases(path) == {
        "small": ["lora.r=1"],
        "large": ["lora.r=8", "lora.enable_lora=null"],
    }
    for text in ("- 1\n", "a: 1\n", "../a: {lora.r: 1}\n", ""):
        path.write_text(text)
        with pytest.raises(UserError):
            file_cases(path)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\n")
    return str(path)


def stub(monkeypatch, codes):
    """Runs that end with the next of ``codes`` and leave scores where it is 0."""
    commands = []

    def run(command, check):
        commands.append(command)
        code = codes.pop(0)
        arguments = parser().parse_args(command[3:])
        out = Path(arguments.out)
        out.mkdir(parents=True, exist_ok=True)
        if not arguments.resume:
            made = load_recipe(arguments.recipe, arguments.set)
            (out / "config.yaml").write_text(dump_recipe(smoke(made) if arguments.smoke else made))
        if code == 0:
            (out / "scores.json").write_text(json.dumps({"after": {"BLEU": 0.5}}))
        return type("Result", (), {"returncode": code})

    monkeypatch.setattr(sweep_module.subprocess, "run", run)
    return commands


def test_a_failed_run_does_not_stop_the_others_and_the_same_command_goes_on(
    tmp_path, monkeypatch, recipe
):
    cases = grid_cases(["lora.r=1,2,4"])
    commands = stub(monkeypatch, [0, 2, 0])
    with pytest.raises(UserError, match="1 of 3 runs failed: r-2"):
        sweep(recipe, cases, ["data.folder=d"], tmp_path / "out")
    settings = ["--set", "data.folder=d", "--set", "lora.r=1"]
    assert len(commands) == 3 and commands[0][-4:] == settings
    commands = stub(monkeypatch, [0])
    finished = sweep(recipe, cases, ["data.folder=d"], tmp_path / "out", processes=2)
    assert list(finished) == ["r-1", "r-2", "r-4"]
    assert len(commands) == 1 and "--resume" in commands[0]
    assert commands[0][commands[0].index("--nproc") + 1] == "2"


def test_finished_is_a_run_with_the_same_settings(tmp_path, monkeypatch, recipe):
    """A sweep after one with --smoke, another --set or another recipe does not take its runs."""
    cases, out = grid_cases(["lora.r=1,2"]), tmp_path / "out"
    stub(monkeypatch, [0, 2])
    with pytest.raises(UserError, match="1 of 2 runs failed"):
        sweep(recipe, cases, [], out, small=True)
    commands = stub(monkeypatch, [0])
    assert list(sweep(recipe, cases, [], out, small=True)) == ["r-1", "r-2"]
    assert len(commands) == 1
    with pytest.raises(UserError, match=r"r-1 holds a run with other settings: data.train_limit"):
        sweep(recipe, cases, [], out)
    with pytest.raises(UserError, match=r"settings: lora.r \(4, and 1 there\); remove the folder"):
        sweep(recipe, {"r-1": ["lora.r=4"]}, [], out, small=True)
    with pytest.raises(UserError, match=r"data.folder \('d', and None there\)"):
        sweep(recipe, cases, ["data.folder=d"], out, small=True)
    Path(recipe).write_text("model: m\nlora: {lora_alpha: 3}\n")
    with pytest.raises(UserError, match="lora.lora_alpha"):
        sweep(recipe, cases, [], out, small=True)
    assert len(commands) == 1  # nothing of these has run


def test_the_command_passes_its_options_to_each_run(tmp_path, monkeypatch, recipe, capsys):
    monkeypatch.setattr("jlora.report.html.write_report", lambda runs, out: out)
    (tmp_path / "mine.jsonl").write_text("")
    commands = stub(monkeypatch, [0])
    argv = ["sweep", recipe, "--grid", "lora.r=1", "--out", str(tmp_path / "out"), "--smoke"]
    argv += ["--data", str(tmp_path / "mine.jsonl"), "--set", "train.seed=3", "--nproc", "2"]
    assert main(argv) == 0
    started = parser().parse_args(commands[0][3:])
    assert (started.smoke, started.nproc) == (True, 2)
    made = load_recipe(recipe, started.set)
    assert (made.data.folder, made.train.seed, made.lora.r) == (str(tmp_path), 3, 1)
    assert made.data.train == str(tmp_path / "mine.jsonl")


def test_cases_that_would_be_one_folder(tmp_path):
    with pytest.raises(UserError, match=r'model="a/b" and model="a-b" would both be called model-'):
        grid_cases(["model=a/b,a-b"])
    assert list(grid_cases(["lora.r=1,1"])) == ["r-1"]
    path = tmp_path / "cases.yaml"
    for name in ("..", ".", ".hidden", "a/b", "a\\\\b", "", "report.html", "a\\nb"):
        path.write_text(f'"{name}": {{lora.r: 1}}\n')
        with pytest.raises(UserError, match="the name becomes a folder's"):
            file_cases(path)
    path.write_text("1: {lora.r: 1}\n'1': {lora.r: 2}\n")
    with pytest.raises(UserError, match="lora.r=1 and lora.r=2 would both be called 1;"):
        file_cases(path)
    path.write_text("1.0: {lora.r: 1}\n1.00: {lora.r: 2}\n")  # one key in Python
    with pytest.raises(UserError, match="cases.yaml:2: not YAML .1.00 stands there twice"):
        file_cases(path)


def test_ctrl_c_stops_the_sweep(tmp_path, monkeypatch, recipe):
    commands = stub(monkeypatch, [130, 0])
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe, grid_cases(["lora.r=1,2"]), [], tmp_path / "out")
    assert len(commands) == 1


def test_a_wrong_setting_is_known_before_anything_runs(tmp_path, monkeypatch, recipe):
    commands = stub(monkeypatch, [])
    with pytest.raises(UserError, match="did you mean lora.r"):
        sweep(recipe, grid_cases(["lora.rr=1,2"]), [], tmp_path / "out")
    assert commands == [] and not (tmp_path / "out").exists()


def test_the_command_wants_a_grid_or_a_file(recipe, capsys):
    assert main(["sweep", recipe]) == 2
    assert "give --grid KEY=VALUE,VALUE or --cases FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_two_real_runs_and_their_report(tmp_path, tiny_model):
    argv = f"sweep demo --grid lora.r=1,2 --smoke --out {tmp_path / 'out'}".split()
    argv += ["--set", f"model={tiny_model}", "--set", "data.task=restaurants"]
    argv += ["--set", "lora.target_modules=[c_attn]", "--set", "data.valid_stride=1"]
    argv += ["--set", "precision=plain"]
    assert main(argv) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "r-1" in page and "r-2" in page
