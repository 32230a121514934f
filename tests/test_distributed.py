"""Several processes as one run: the same result as one, and an end for all when one dies."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from needs import needs_bf16
from safetensors.numpy import load_file
from tiny_models import ids_of, randomise_adapter, wide_gpt2, wide_llama

from jlora import engine
from jlora.adapters import LoraConfig, get_peft_model
from jlora.data.batches import TokenExample, shares
from jlora.system import distributed
from jlora.system.errors import UserError
from jlora.system.runtime import jt, set_seed
from jlora.training.adamw import AdamW, OptimConfig
from jlora.training.loggers import read_metrics
from jlora.training.loop import batch_loss, make_batch

# `make test` installs MPI; elsewhere, the `mpi` extra may be left out.
PROBLEM = distributed.mpi_problem()
needs_mpi = pytest.mark.skipif(PROBLEM is not None, reason=f"no MPI here: {PROBLEM}")

# --- how a batch is divided ---


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_neighbours_of_like_size(processes):
    lengths = np.random.default_rng(processes).integers(5, 60, 16).tolist()
    found = shares(lengths, processes)
    assert [row for share in found for row in range(16)[share]] == list(range(16))
    sums = [sum(lengths[share]) for share in found]
    assert max(abs(size - sum(lengths) / processes) for size in sums) <= max(lengths)


def test_more_processes_than_examples():
    found = shares([4, 9], 5)
    assert len(found) == 5 and sorted(row for share in found for row in range(2)[share]) == [0, 1]


@pytest.mark.parametrize("precision", ["plain", "fp32", pytest.param("bf16", marks=needs_bf16)])
@pytest.mark.parametrize("make", [wide_gpt2, wide_llama])
def test_the_shares_sum_up_to_the_batch(make, precision):
    """Loss and gradients, with dropout where the seed and the row decide what is dropped."""
    target = "c_attn" if make is wide_gpt2 else "q_proj"
    dropout = 0.0 if precision == "plain" else 0.3
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=[target])
    model = randomise_adapter(get_peft_model(make(), config))
    engine.prepare(model, precision)
    model.train()
    lengths = [9, 14, 20, 7, 31, 12]
    examples = [TokenExample(ids_of((n,), n).tolist(), n // 2) for n in lengths]
    targets = sum(n - n // 2 for n in lengths)
    parameters = [parameter for _, parameter in model.trainable_parameters()]
    optimizer = AdamW(parameters, OptimConfig())

    def of(share: slice) -> list[np.ndarray]:
        set_seed(3)
        batch = make_batch(model, examples, share)
        loss = batch_loss(model, batch, 0.1, targets)
        gradients = [each.copy() for each in optimizer.arrays(jt.grad(loss, parameters))]
        return [loss.numpy(), *gradients]

    whole = of(slice(0, len(examples)))
    for processes in (2, 3):
        parts = [of(share) for share in shares([n - 1 for n in lengths], processes)]
        for name, expected, *found in zip(range(99), whole, *parts):
            np.testing.assert_allclose(
                sum(found), expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=str(name)
            )
    if dropout:  # and the row does decide
        rows = of(slice(1, 3)), of(slice(0, 2))
        assert not np.allclose(rows[0][1], rows[1][1])


def test_equal_seeds_draw_equal_adapters():
    def draw(read_at_once: bool):
        set_seed(11)
        model = get_peft_model(wide_gpt2(), LoraConfig(r=2, target_modules=["c_attn"]))
        if not read_at_once:
            set_seed(12)
        return model.adapter_tensors()

    first, second = draw(True), draw(False)
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])


# --- whole runs ---


SETTINGS = """
model: {model}
data: {{task: restaurants, test_limit: 12, train_limit: 200, valid_stride: 10,
       metrics: [BLEU]}}
lora: {{r: 4, lora_alpha: 32, lora_dropout: 0.1, target_modules: [c_attn]}}
train: {{batch_size: 7, steps: {steps}, valid_every: 4, save_every: 4, log_every: 1,
        max_length: 128, optim: {{lr: 1.0e-2, warmup_steps: 2}}}}
decode: {{num_beams: 3, max_new_tokens: 12, batch_size: 2}}
precision: {precision}
"""


@pytest.fixture
def start(tiny_model, tmp_path, popen):
    """Starts ``jlora VERB RECIPE --out tmp_path/NAME --nproc N``; the process."""
    started = []
    precision = "plain" if engine.native.problem() else "fp32"

    def begin(name, processes, *options, steps=12, verb="finetune", program=("-m", "jlora.cli")):
        recipe = tmp_path / f"{steps}.yaml"
        recipe.write_text(SETTINGS.format(model=tiny_model, steps=steps, precision=precision))
        given = [] if "--resume" in options else ["--recipe"] * (verb != "run") + [str(recipe)]
        command = [sys.executable, *program, verb, *given, *options]
        command += ["--out", str(tmp_path / name), "--nproc", str(processes)]
        started.append(popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)  # the second ends all at once
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):  # else `popen` kills it
            process.communicate(timeout=30)


def ended(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output + errors


def processes_of(run: Path) -> list[str]:
    """The processes that work on a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(run).encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


def wait_for(what, seconds: float = 120):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    try:
        return sum("loss" in record for record in read_metrics(run / "metrics.jsonl"))
    except UserError:
        return 0


def same_run(run: Path, other: Path) -> None:
    """Losses within 1e-5, and the adapter within what such losses mean."""
    ours, theirs = read_metrics(run / "metrics.jsonl"), read_metrics(other / "metrics.jsonl")
    assert [sorted(record) for record in ours] == [sorted(record) for record in theirs]
    for left, right in zip(ours, theirs):
        for key in {"loss", "valid_loss"} & set(left):
            assert left[key] == pytest.approx(right[key], rel=1e-5), (left["step"], key)
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(other / "adapter" / "adapter_model.safetensors").items():
        np.testing.assert_allclose(adapter[name], tensor, rtol=0, atol=2e-3 * np.abs(tensor).max())


@needs_mpi
def test_two_processes_are_one(start, tmp_path):
    """A whole run: training, validation, decoding; and what was said is said once."""
    one, two = (start(f"of-{n}", n, verb="run") for n in (1, 2))
    said = ended(one), ended(two)
    same_run(tmp_path / "of-2", tmp_path / "of-1")
    texts = [(tmp_path / f"of-{n}" / "predictions.txt").read_text() for n in (1, 2)]
    assert texts[0] == texts[1]
    assert said[0].count("trainable parameters") == said[1].count("trainable parameters") == 1
    left = [sorted(p.name for p in (tmp_path / f"of-{n}").iterdir()) for n in (1, 2)]
    assert left[0] == left[1]


# `jlora ARGUMENTS`, of whose processes the second ends itself before its tenth batch.
KILLED = """
import sys
from jlora.system import distributed
mpirun, code = distributed.mpirun, sys.argv.pop(1)
distributed.mpirun = lambda processes: [*mpirun(processes), "-c", code]
from jlora.cli import main
sys.exit(main(sys.argv[1:]))
"""
KILLS = """
import os, signal, sys
from jlora.system import distributed
here = distributed.join()
from jlora.training import loop
make_batch, made = loop.make_batch, []
def make_or_die(*given):
    made.append(given)
    if len(made) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return make_batch(*given)
if here.rank == 1:
    loop.make_batch = make_or_die
from jlora.cli import main
sys.exit(main(sys.argv[3:-2]))  # without "-m jlora.cli" and "--nproc 2"
"""


@needs_mpi
def test_a_killed_process_ends_all_and_another_number_goes_on(start, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    other = start("whole", 1, steps=14)
    process = start("run", 2, steps=14, program=["-c", KILLED, KILLS])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert "process 1 of 2 was ended by signal 9 (killed, most often for want of memor" in errors
    assert re.search(r"it was process \d+ on ", errors) and "--resume" in errors
    assert not processes_of(run)
    assert 0 < steps_of(run) < 14
    ended(start("run", 3, "--resume"))
    ended(other)
    same_run(run, whole)


@needs_mpi
def test_ctrl_c_saves_and_says_how_to_go_on(start, tmp_path):
    run = tmp_path / "run"
    process = start("run", 2, steps=5000)
    wait_for(lambda: steps_of(run) >= 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "everything is saved. Go on with: jlora finetune --resume" in errors
    progress = json.loads((run / "checkpoint" / "progress.json").read_text())
    assert progress["step"] == steps_of(run)


@needs_mpi
def test_what_all_processes_find_wrong_is_said_once(start):
    process = start("run", 2, "--set", "train.max_length=3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.count("jlora: error:") == 1 and "MPI" not in errors


FAILS = """
import sys
from jlora.system import distributed
here = distributed.join()
from jlora.runs import pipeline
if here.rank == 1:
    def build(*args): raise ZeroDivisionError("only here")
    pipeline.build = build
from jlora.cli import main
sys.exit(main(sys.argv[1:]))
"""


@needs_mpi
def test_a_bug_in_one_process_is_shown_with_its_name(tiny_model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SETTINGS.format(model=tiny_model, steps=4, precision="plain"))
    command = [*distributed.mpirun(2), "-c", FAILS, "finetune", "--recipe", str(recipe)]
    found = subprocess.run(
        [*command, "--out", str(tmp_path / "run")], capture_output=True, text=True, timeout=120
    )
    assert found.returncode != 0
    assert "process 1 of 2 on " in found.stderr and "ZeroDivisionError: only here" in found.stderr


PMIX = {"PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
ONE = [
    {},
    {"PMIX_RANK": "0"},  # left over from something else
    {"PMIX_RANK": "3", "SLURM_STEP_NUM_TASKS": "4"},
    {"OMPI_COMM_WORLD_SIZE": "1", **PMIX},  # mpirun -n 1, of Open MPI
    {"PMI_SIZE": "1"},  # of MPICH
    {**PMIX, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},  # srun --pty in a job of four
]
SEVERAL = [
    {"OMPI_COMM_WORLD_SIZE": "2"},
    {"OMPI_COMM_WORLD_SIZE": "2", **PMIX, "SLURM_STEP_NUM_TASKS": "1"},  # mpirun in srun --pty
    {"PMI_SIZE": "4"},
    {**PMIX, "SLURM_STEP_NUM_TASKS": "4"},
    {**PMIX, "PMIX_RANK": "1"},
]


@pytest.fixture
def without_variables(monkeypatch):
    for name in (*distributed.MARKS, "PMIX_NAMESPACE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("environment", SEVERAL)
def test_mpirun_around_a_command_for_one_process_is_refused(without_variables, environment, capsys):
    from jlora.cli import main

    for name, value in environment.items():
        without_variables.setenv(name, value)
    assert distributed.started_by_mpi()
    assert main(["runs"]) == 2
    assert "leave mpirun out" in capsys.readouterr().err


@pytest.mark.parametrize("environment", ONE)
def test_one_process_of_mpi_s_is_one_process(without_variables, environment, tmp_path):
    from jlora.cli import main

    for name, value in environment.items():
        without_variables.setenv(name, value)
    assert not distributed.started_by_mpi()
    assert main(["runs", str(tmp_path)]) == 0
    launched = []
    without_variables.setattr(distributed, "launch", lambda *given: launched.append(given) or 0)
    assert main(["run", "demo", "--nproc", "2"]) == 0
    assert launched == [(2, ["run", "demo", "--nproc", "2"])]


def test_where_the_number_is_unknown_mpi_is_asked(without_variables, tmp_path):
    """A launcher that is neither mpirun nor srun: its process 0 may do what one process does."""
    from jlora.cli import main

    for name, value in PMIX.items():
        without_variables.setenv(name, value)
    assert distributed.started_by_mpi()
    assert main(["runs", str(tmp_path)]) == 0


def test_a_program_that_takes_no_part_gets_none_of_mpi_s_variables(without_variables):
    for name, value in {**PMIX, "OMPI_COMM_WORLD_SIZE": "2", "PMI_SIZE": "2"}.items():
        without_variables.setenv(name, value)
    assert not [name for name in distributed.without_mpi() if name.startswith(("OMPI", "PMI"))]


def test_without_mpi_it_is_said_what_to_install(monkeypatch, capsys):
    from jlora.cli import main

    monkeypatch.setattr(distributed, "find_mpirun", lambda: None)
    assert main(["run", "demo", "--nproc", "2"]) == 2
    assert "mpirun not found; run `pip install 'jlora[mpi]'`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", "demo", "--nproc", "0"])
    assert "not a whole number above 0" in capsys.readouterr().err
