"""What each subcommand does. Heavy imports are done where they are needed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from jlora.system.errors import UserError


def adapter_file(arguments: argparse.Namespace):
    """The adapter that a command line names, or None.

    Raises:
        UserError: there is none, but options of one.
    """
    from jlora.runs.adapter_file import AdapterFile

    if arguments.adapter is None:
        refuse(arguments, ("lora_alpha", "enable_lora", "force"), "is for an --adapter")
        return None
    path = Path(arguments.adapter)
    return AdapterFile(path, arguments.lora_alpha, arguments.enable_lora, arguments.force)


def refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuse options that would have no effect.

    Args:
        names: of options whose default is None or false.
        why: what the option is for, or what else decides it.

    Raises:
        UserError: one of them is given.
    """
    for name in names:
        if getattr(arguments, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} {why}; leave it out")


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The recipe settings that the named options stand for."""
    names = {
        "model": "model", "task": "data.task", "rank": "lora.r",
        "alpha": "lora.lora_alpha", "lr": "train.optim.lr", "batch_size": "train.batch_size",
        "steps": "train.steps", "epochs": "train.epochs", "seed": "train.seed",
        "precision": "precision",
        "checkpoint_activations": "checkpoint_activations",
    }  # fmt: skip
    found = []
    for option, key in names.items():
        value = getattr(arguments, option, None)
        if value is not None:
            found.append(f"{key}={json.dumps(value)}")
    if arguments.data is not None:
        folder = Path(arguments.data)
        if folder.is_file():  # of training; the other splits are looked for beside it
            found.append(f"data.train={json.dumps(str(folder))}")
            folder = folder.parent
        found.append(f"data.folder={json.dumps(str(folder))}")
    if getattr(arguments, "epochs", None) is not None:
        found.append("train.steps=null")
    if getattr(arguments, "target_modules", None):
        names = [name.strip() for name in arguments.target_modules.split(",") if name.strip()]
        found.append(f"lora.target_modules={json.dumps(names)}")
    if getattr(arguments, "log", None):
        found.append(f"log={json.dumps(arguments.log)}")
    return found + arguments.set


def open_recipe(arguments: argparse.Namespace, name: str | None):
    """The recipe and the run folder that a command line means."""
    from jlora.runs.recipe import apply_override, find_recipe, load_recipe, make_recipe

    if arguments.resume:
        if overrides(arguments) or getattr(arguments, "smoke", False):
            raise UserError(
                "--resume takes every setting from the run folder; leave the others out"
            )
        out = arguments.out or (f"runs/{Path(name).stem}" if name else None)
        if out is None:
            raise UserError("--resume needs the run folder: --out RUN")
        config = Path(out) / "config.yaml"
        if not config.is_file():
            raise UserError(f"{out}: no run to resume there; start it without --resume")
        return load_recipe(config), Path(out)
    if name:
        recipe = load_recipe(find_recipe(name), overrides(arguments))
    else:
        values: dict = {}
        for override in overrides(arguments):
            apply_override(values, override)
        if "model" not in values:
            raise UserError("no --model given, such as --model smollm2-135m")
        recipe = make_recipe(values, "command line")
    return recipe, Path(arguments.out or f"runs/{Path(name).stem if name else 'finetune'}")


def run_estimate(arguments: argparse.Namespace) -> int:
    from jlora.runs.memory_check import report
    from jlora.runs.recipe import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(arguments.recipe), overrides(arguments))
    text, found = report(recipe)
    print(json.dumps(found, indent=1) if arguments.json else text)
    return 0 if found["fits"] else 1


def run_run(arguments: argparse.Namespace) -> int:
    if not arguments.recipe and not arguments.resume:
        raise UserError("no recipe given; try `jlora run e2e-smollm2-135m`")
    recipe, run = open_recipe(arguments, arguments.recipe)
    from jlora.runs import pipeline
    from jlora.system.lock import lock_run

    if arguments.smoke:
        from jlora.runs.smoke import smoke

        recipe = smoke(recipe)
    check_memory = not (arguments.smoke or arguments.no_memory_check)
    with lock_run(run):
        scores = pipeline.run_recipe(recipe, run, arguments.resume, check_memory)
    return 130 if scores is None else 0


def run_sweep(arguments: argparse.Namespace) -> int:
    from jlora.report.html import write_report
    from jlora.runs import sweep
    from jlora.runs.recipe import find_sweep

    if bool(arguments.grid) == bool(arguments.cases):
        raise UserError("give --grid KEY=VALUE,VALUE or --cases FILE, such as --grid lora.r=1,2,4")
    if arguments.cases:
        cases = sweep.file_cases(find_sweep(arguments.cases))
    else:
        cases = sweep.grid_cases(arguments.grid)
    out = Path(arguments.out or f"runs/sweep-{Path(arguments.recipe).stem}")
    runs = sweep.sweep(
        arguments.recipe, cases, overrides(arguments), out, arguments.smoke, arguments.nproc_of_each
    )
    print(write_report(list(runs.values()), out=out / "report.html"))
    return 0


def run_finetune(arguments: argparse.Namespace) -> int:
    recipe, run = open_recipe(arguments, arguments.recipe)
    from jlora.runs import pipeline
    from jlora.system.lock import lock_run

    with lock_run(run):
        best = pipeline.train_recipe(recipe, run, arguments.resume, not arguments.no_memory_check)
    if best is None:
        return 130
    print(f"adapter: {best}")
    print(f"try it: jlora generate --adapter {run} --prompt ...")
    return 0


#: Options of `jlora generate` -> settings, by the method that they are for.
BEAM_OPTIONS = {
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
}
SAMPLE_OPTIONS = {name: name for name in ("temperature", "top_k", "top_p", "seed")}


def decoding(arguments: argparse.Namespace, trained):
    """The settings that `jlora generate` decodes with.

    Args:
        trained: `decode` of the adapter's run, whose settings are the defaults, or None.

    Raises:
        UserError: a setting is out of its range, or is of another method.
    """
    from jlora.decoding.sampling import GenerateConfig
    from jlora.runs.recipe import DecodeConfig

    def given(options: dict[str, str]) -> dict:
        found = {key: getattr(arguments, name) for name, key in options.items()}
        return {key: value for key, value in found.items() if value is not None}

    trained, method = trained or DecodeConfig(), arguments.method
    shared = given({"max_new_tokens": "max_new_tokens", "batch_size": "batch_size"})
    if method != "sample":
        refuse(arguments, SAMPLE_OPTIONS, f"is for --method sample, not {method}")
    if method != "beam":
        refuse(arguments, BEAM_OPTIONS, f"is for --method beam, not {method}")
        common = ("eos_token_ids", "max_new_tokens", "repetition_penalty", "batch_size")
        base = {name: getattr(trained, name) for name in common}
        base["temperature"] = 1.0 if method == "sample" else 0.0
        return GenerateConfig(**{**base, **shared, **given(SAMPLE_OPTIONS)})
    settings = {**shared, **given(BEAM_OPTIONS)}
    limit = trained.rank_up_to
    if limit is not None and settings.get("length_penalty", limit) > limit:
        settings["rank_up_to"] = None  # the run's shortcut is for smaller penalties
    return replace(trained, **settings)


def run_generate(arguments: argparse.Namespace) -> int:
    from jlora.data.batches import NO_SEPARATOR
    from jlora.data.tasks import get_task
    from jlora.decoding.predictions import check_out
    from jlora.runs.answer import answer
    from jlora.runs.recipe import check_precision

    # All that can be wrong with the command line, and then with the data, before a model is loaded.
    if arguments.raw:
        refuse(arguments, ["separator_id"], "says another token than --raw, which takes none")
    if not arguments.data:
        refuse(arguments, ["task"], "says how --data is read")
    if arguments.out:
        check_out(arguments.out)
    adapter = adapter_file(arguments)
    recipe = adapter and adapter.recipe
    config = decoding(arguments, recipe and recipe.decode)
    check_precision(arguments.precision)
    prompts, keeps = arguments.prompt, None
    if arguments.data:
        task = get_task(arguments.task or "e2e")
        same = recipe is not None and recipe.data.task == task.name
        groups = task.groups(task.read(arguments.data, recipe.data.template if same else None))
        prompts, keeps = [group.prompt for group in groups], [group.keep for group in groups]
    predictions = answer(
        prompts,
        arguments.model,
        adapter,
        config,
        NO_SEPARATOR if arguments.raw else arguments.separator_id,
        arguments.end_id,
        arguments.precision,
        Path(arguments.out) if arguments.out else None,
        keeps,
    )
    if not arguments.out:
        for prediction in predictions:
            print(prediction.prediction)
    return 0


def run_merge(arguments: argparse.Namespace) -> int:
    from jlora.adapters.export_folder import write_merged
    from jlora.runs.adapter_file import open_model
    from jlora.system.files import check_absent

    check_absent(arguments.out)  # before a minute of loading
    model = open_model(arguments.base, adapter_file(arguments))
    print(write_merged(model, arguments.out, arguments.dtype))
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from jlora.adapters.export_gguf import export_gguf
    from jlora.runs.adapter_file import open_model
    from jlora.system.files import check_absent

    check_absent(arguments.gguf)
    model = open_model(arguments.model, adapter_file(arguments))
    print(export_gguf(model, arguments.gguf, arguments.type, not arguments.no_tokenizer))
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    from jlora.adapters.loralib import is_loralib, loralib_note
    from jlora.runs.adapter_file import open_model
    from jlora.system.files import check_absent

    to_file = is_loralib(arguments.out)
    if to_file == is_loralib(arguments.adapter):
        raise UserError("give a folder and a .pt file, or a .pt file and a folder")
    check_absent(arguments.out)
    model = open_model(arguments.model, adapter_file(arguments))
    if to_file:
        print(loralib_note(model.save_loralib(arguments.out), model.lora_layers()))
    else:
        model.save_pretrained(arguments.out)
    print(f"written: {arguments.out}")
    return 0


def run_analyze(arguments: argparse.Namespace) -> int:
    from jlora.adapters.loralib import is_loralib
    from jlora.analysis.figures import write_study
    from jlora.analysis.study import analyze
    from jlora.analysis.tables import tables
    from jlora.runs.adapter_file import AdapterFile
    from jlora.system.files import check_writable

    if arguments.out:
        check_writable(arguments.out)  # before a minute of loading
    paths = [Path(path) for path in (arguments.adapter, arguments.other) if path is not None]
    no_file = not any(is_loralib(path) for path in paths)
    files = []
    for path in paths:
        # The options of .pt files are for those of the two that are such files.
        of_file = (arguments.lora_alpha, arguments.enable_lora)
        settings = of_file if no_file or is_loralib(path) else (None, None)
        files.append(AdapterFile(path, *settings, arguments.force))
    study = analyze(files, arguments.model, arguments.of, arguments.layers)
    print(tables(study))
    if arguments.out:
        written = write_study(study, Path(arguments.out))
        print("written:", *written)
    return 0


def run_evaluate(arguments: argparse.Namespace) -> int:
    from jlora.data.tasks import get_task
    from jlora.metrics import evaluate, read_answers, read_hypotheses, read_references

    task = get_task(arguments.task)
    if task.choices:
        from jlora.metrics.accuracy import accuracy, parse_choice

        if arguments.metrics:
            raise UserError(f"{task.name} is scored by accuracy alone; leave --metrics out")
        texts = read_hypotheses(arguments.hyps)
        answers = [parse_choice(text, task.choices) for text in texts]
        scores = accuracy(answers, read_answers(arguments.refs, task.choices), task.choices)
    else:
        given = (arguments.metrics or "").split(",")
        names = [name.strip() for name in given if name.strip()] or task.metrics
        scores = evaluate(names, read_hypotheses(arguments.hyps), read_references(arguments.refs))
    if arguments.json:
        print(json.dumps(scores))
    else:
        width = max(8, *map(len, scores))
        for name, value in scores.items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"{name:{width}} {shown}")
    return 0


def run_rerank(arguments: argparse.Namespace) -> int:
    from jlora.decoding.predictions import check_out, read_predictions, rerank, save_predictions

    check_out(arguments.out)
    config = Path(arguments.predictions).parent / "config.yaml"
    if config.is_file():
        from jlora.runs.recipe import load_run_recipe

        recipe = load_run_recipe(config)
        limit = recipe and recipe.decode.rank_up_to
        if limit is not None and arguments.length_penalty > limit:
            raise UserError(
                f"this run's search stopped early where no length penalty up to {limit} needed "
                f"more (decode.rank_up_to), so {arguments.length_penalty} cannot be judged; "
                "decode again with a larger rank_up_to, or null"
            )
    predictions = rerank(read_predictions(arguments.predictions), arguments.length_penalty)
    save_predictions(arguments.out, predictions)
    return 0


def run_pull(arguments: argparse.Namespace) -> int:
    from jlora.data.pull_datasets import pull_any

    print(pull_any(arguments.name))
    return 0


def run_split(arguments: argparse.Namespace) -> int:
    from jlora.data.tasks.split import split_file

    for part in split_file(arguments.file, arguments.folder, arguments.sizes, arguments.seed):
        print(f"{part.path}: {part.inputs:,} inputs, {part.rows:,} rows")
    return 0


def run_convert_data(arguments: argparse.Namespace) -> int:
    from jlora.data.tasks.boolq import convert_file

    count = convert_file(arguments.file, arguments.out, arguments.to)
    print(f"{arguments.out}: {count:,} rows")
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    from jlora.report.html import write_report

    print(write_report(arguments.runs, out=arguments.out))
    return 0


def run_runs(arguments: argparse.Namespace) -> int:
    from jlora.report.listing import describe_runs, list_runs, sort_runs
    from jlora.report.runs import find_runs, read_run

    found = sort_runs([read_run(path) for path in find_runs(arguments.folder)], arguments.sort)
    if arguments.json:
        print(json.dumps(describe_runs(found, arguments.group), indent=1))
    elif found:
        print(list_runs(found, arguments.group))
    else:
        print(f"no runs in {arguments.folder}")
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    from jlora.cli import doctor

    return doctor.main(as_json=arguments.json)


def run_demo(arguments: argparse.Namespace) -> int:
    from jlora.cli import demo

    return demo.main(arguments.out, arguments.data)
