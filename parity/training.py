"""Training compared with PyTorch: PEFT's model in a plain loop, and jlora's `train`.

A run is one model, one initial adapter (both made by the reference) and one list of token rows,
read in the same order. Each side stores the loss and the learning rate of every step and the last
adapter. Each of the three is a case of its own with its own tolerance; the case of the losses does
the run.

The settings are chosen for stability. Two float32 programs never agree to the last bit, and
training can multiply a difference at every step (the recorded run of microsoft/LoRA in
tests/test_train.py does so at lr 0.02). So learning rates are moderate, and eps is 1e-6 or more:
with 1e-8 AdamW makes steps of full size for gradients that consist of rounding errors. Weights are
drawn five times as large as usual, or the loss would hardly change and agreement would mean little.
The reference checks that the loss falls and that gradients are clipped. Errors are visible: the
other AdamW changes the losses by 4e-2, the other unit of the schedule by 2e-2, no clipping by 4e-2,
beta2 0.98 by 1e-3, and eps 1e-8 changes the adapter by 4e-3.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from parity.case import Case

GPT2 = {
    "model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 3,
    "n_head": 4, "initializer_range": 0.1,
    # microsoft/LoRA's model and jlora's have no dropout but LoRA's own.
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.1,
}  # fmt: skip
TINY = {**GPT2, "vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
TARGETS = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}

DEFAULTS = {
    "steps": 50, "accumulation": 1, "batch": 4, "rows": 42, "longest": 24, "label_smoothing": 0.0,
    "max_grad_norm": 0.0, "lr": 2e-3, "warmup": 5, "unit": "update", "variant": "torch",
    "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.2, "precision": "plain", "lora": {},
    "schedule": "linear", "min_lr_ratio": 0.0, "loraplus": None, "loraplus_embedding": 1e-6,
}  # fmt: skip

PEFT_ROW = "PEFT and torch.optim.AdamW"
PLUS_ROW = "PEFT's LoRA+, cosine to a minimum"
LORALIB_ROW = "microsoft/LoRA's AdamW"
ENGINE_ROW = "fused fp32 engine"


def runs() -> dict[str, tuple[str, dict]]:
    """The runs by name: (row in the table, settings that differ from `DEFAULTS`)."""
    found = {}
    for family, title, config in (("gpt2", "GPT-2", GPT2), ("llama", "Llama", LLAMA)):
        for accumulation in (1, 4):
            for max_grad_norm in (0.0, 0.2):
                name = f"{family}-accumulation-{accumulation}{'-clipped' if max_grad_norm else ''}"
                changes = {"accumulation": accumulation, "max_grad_norm": max_grad_norm}
                found[name] = f"{title}, {PEFT_ROW}", {"config": config, **changes}
    smoothed = {"config": GPT2, "label_smoothing": 0.1}
    found["gpt2-smoothing"] = f"GPT-2, {PEFT_ROW}", smoothed
    # The larger eps and decay are, the more the two AdamWs differ.
    loralib = {"variant": "loralib", "eps": 1e-3, "weight_decay": 0.5}
    found["gpt2-loralib"] = f"GPT-2, {LORALIB_ROW}", {**smoothed, **loralib}
    found["gpt2-loralib-batches"] = (
        f"GPT-2, {LORALIB_ROW}",
        {**smoothed, **loralib, "accumulation": 4, "unit": "batch", "warmup": 18},
    )
    for family, config in (("gpt2", GPT2), ("llama", LLAMA)):
        found[f"{family}-engine"] = ENGINE_ROW, {"config": config, "precision": "fp32"}
    tiny = {"config": TINY, "steps": 20, "rows": 10, "batch": 3, "longest": 10, "warmup": 2}
    tiny.update(accumulation=2, max_grad_norm=0.1, label_smoothing=0.1, lr=1e-2)
    found["gpt2-tiny"] = f"GPT-2, {PEFT_ROW}", tiny
    plus = {"schedule": "cosine", "min_lr_ratio": 0.1, "loraplus": 8.0, "loraplus_embedding": 2e-3}
    plus["lora"] = {"target_modules": ["c_attn", "wpe"], "bias": "all", "modules_to_save": ["ln_f"]}
    found["gpt2-tiny-plus"] = PLUS_ROW, {**tiny, **plus, "lr": 2e-3}
    targets = {"target_modules": ["q_proj", "down_proj"], "use_dora": True}
    dora = {"loraplus": 4.0, "lora": targets, "lr": 1e-3}
    found["llama-plus-dora"] = PLUS_ROW, {"config": LLAMA, **dora, "schedule": "cosine"}
    return found


def cases(seed: int) -> list[Case]:
    losses, rates, adapters = [], [], []
    for number, (run, (row, changes)) in enumerate(runs().items()):
        settings = {**DEFAULTS, **changes, "run": run, "seed": 1000 * seed + number}
        losses.append(
            Case(
                f"loss of every step: {row}",
                run,
                {**settings, "part": "loss"},
                tolerance=1e-4,
                relative_to="each",
                golden=run in ("gpt2-tiny", "gpt2-tiny-plus"),
            )
        )
        part = {"run": run, "part": "lr"}
        rates.append(Case("learning rate of every step", f"{run}-lr", part, 1e-12, "each"))
        part = {"run": run, "part": "adapter"}
        adapters.append(Case("adapter after the last step", f"{run}-adapter", part, 1e-4))
    return [*losses, *rates, *adapters]


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of token ids (N, L) with their lengths and those of their prompts.

    Low ids are more likely than high ones, and every second token is determined by the one before
    it, so that there is something to learn.
    """
    settings = case.settings
    if settings["part"] != "loss":
        return {"none": np.zeros(0, np.int32)}
    rows, longest = settings["rows"], settings["longest"]
    vocabulary = settings["config"]["vocab_size"]
    ids = (vocabulary * rng.random((rows, longest + 1)) ** 2).astype(np.int32)
    for place in range(1, longest + 1, 2):
        ids[:, place] = (3 * ids[:, place - 1] + 1) % vocabulary
    lengths = rng.integers(5, longest + 2, rows).astype(np.int32)
    prompts = rng.integers(1, lengths - 2).astype(np.int32)
    return {"ids": ids, "lengths": lengths, "prompts": prompts}


def part_of(case: Case, folder: Path, side: str) -> dict[str, np.ndarray]:
    """The results of a case, from the file that the case of the run's losses has stored."""
    found = load_file(folder.parent / case.settings["run"] / f"run-{side}.safetensors")
    numbers, part = ("loss", "lr"), case.settings["part"]
    if part in numbers:
        return {part: found[part]}
    # The bias of a module of which a copy is trained is not used, and PEFT freezes it.
    return {n: a for n, a in found.items() if n not in numbers and "original_module" not in n}


# The reference -----------------------------------------------------------------------------------


def reference(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    if case.settings["part"] == "loss":
        save_file(
            reference_run(case.settings, arrays, folder), folder / "run-reference.safetensors"
        )
    return part_of(case, folder, "reference")


def reference_run(settings: dict, arrays: dict[str, np.ndarray], folder: Path):
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from transformers import (
        get_cosine_with_min_lr_schedule_with_warmup,
        get_linear_schedule_with_warmup,
    )

    torch.set_num_threads(1)  # such small matrices gain nothing from threads
    base = make_base(settings)
    base.save_pretrained(folder / "base")
    family = settings["config"]["model_type"]
    config = LoraConfig(
        r=4,
        lora_alpha=32,
        fan_in_fan_out=family == "gpt2" and "wpe" not in str(settings["lora"]),
        task_type="CAUSAL_LM",
        **{"target_modules": TARGETS[family], **settings["lora"]},
    )
    model = get_peft_model(base, config)
    model.save_pretrained(folder / "start")
    model.train()

    parameters = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW if settings["variant"] == "torch" else loralib_adamw()
    numbers = {"lr": settings["lr"], "betas": (0.9, settings["beta2"]), "eps": settings["eps"]}
    if settings["loraplus"]:
        optimizer = create_loraplus_optimizer(
            model,
            adamw,
            loraplus_lr_ratio=settings["loraplus"],
            loraplus_lr_embedding=settings["loraplus_embedding"],
            loraplus_weight_decay=settings["weight_decay"],
            **numbers,
        )
    else:
        optimizer = adamw(parameters, weight_decay=settings["weight_decay"], **numbers)
    accumulation, by_batch = settings["accumulation"], settings["unit"] == "batch"
    schedule_length = settings["steps"] * (accumulation if by_batch else 1)
    arguments = (optimizer, settings["warmup"], schedule_length)
    if settings["schedule"] == "cosine":
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            *arguments, min_lr_rate=settings["min_lr_ratio"]
        )
    else:
        scheduler = get_linear_schedule_with_warmup(*arguments)
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # by batch

    order = batches(settings)
    losses, rates, clipped = [], [], 0
    for _ in range(settings["steps"]):
        loss = 0.0
        for last in [*[False] * (accumulation - 1), True]:
            rows = next(order)
            mean = mean_loss(model, arrays, rows, settings["label_smoothing"]) / accumulation
            mean.backward()
            loss += mean.item()
            if by_batch and not last:
                scheduler.step()
        if settings["max_grad_norm"]:
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
            clipped += norm.item() > settings["max_grad_norm"]
        losses.append(loss)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1, f"nothing was learnt: {losses}"
    assert not settings["max_grad_norm"] or clipped / len(losses) > 0.3, clipped
    return {
        "loss": np.array(losses),
        "lr": np.array(rates),
        **{
            plain_name(name): parameter.detach().numpy()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        },
    }  # fmt: skip


def plain_name(name: str) -> str:
    """A parameter's name in jlora, from its name in PEFT's model."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    name = name.replace("lora_embedding_", "lora_").replace(".modules_to_save.default.", ".saved.")
    name = name.removesuffix(".default").removesuffix(".default.weight")
    return name.replace(".saved.", ".modules_to_save.")


def make_base(settings: dict):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings["seed"])
    config = dict(settings["config"])
    if config.pop("model_type") == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0))
    return LlamaForCausalLM(LlamaConfig(**config, bos_token_id=0, eos_token_id=0))


def batches(settings: dict):
    """The rows of each batch, epoch after epoch, in the order of the list."""
    while True:
        for start in range(0, settings["rows"], settings["batch"]):
            yield range(start, min(start + settings["batch"], settings["rows"]))


def mean_loss(model, arrays: dict[str, np.ndarray], rows, smoothing: float):
    """Mean over the completions' tokens with microsoft/LoRA's denominator and label smoothing."""
    import torch

    total, count = 0.0, 0
    width = max(arrays["lengths"][row] for row in rows) - 1
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        length = arrays["lengths"][row]
        ids[place, : length - 1] = torch.from_numpy(arrays["ids"][row, : length - 1])
    logits = model(input_ids=ids).logits  # padding is on the right, where no token attends to it
    for place, row in enumerate(rows):
        prompt, length = arrays["prompts"][row], arrays["lengths"][row]
        logs = logits[place, prompt - 1 : length - 1].log_softmax(-1)
        targets = torch.from_numpy(arrays["ids"][row, prompt:length]).long()
        hit = -logs[torch.arange(len(targets)), targets]
        total = total + ((1 - smoothing) * hit - smoothing * logs.mean(-1)).sum()
        count += len(targets)
    return total / (count + 1e-4)


def loralib_adamw():
    """The update rule of microsoft/LoRA's examples/NLG/src/optimizer.py (with --correct_bias)."""
    import torch

    class LoralibAdamW(torch.optim.Optimizer):
        def __init__(self, parameters, **settings):
            super().__init__(parameters, settings)

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                beta1, beta2 = group["betas"]
                for p in group["params"]:
                    state = self.state[p]
                    t = state["t"] = state.get("t", 0) + 1
                    m = state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * p.grad
                    v = state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * p.grad**2
                    rate = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
                    p -= rate * m / (v.sqrt() + group["eps"])
                    p -= group["lr"] * group["weight_decay"] * p

    return LoralibAdamW


# jlora -------------------------------------------------------------------------------------------


def ours(case: Case, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    if case.settings["part"] == "loss":
        save_file(our_run(case.settings, arrays, folder), folder / "run-jlora.safetensors")
    return part_of(case, folder, "jlora")


def our_run(settings: dict, arrays: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    from jlora import engine
    from jlora.adapters import PeftModel
    from jlora.data.batches import TokenExample
    from jlora.models.hub import load
    from jlora.training.adamw import OptimConfig
    from jlora.training.loggers import read_metrics
    from jlora.training.loop import TrainConfig, train

    model = PeftModel.from_pretrained(load(folder / "base"), folder / "start", is_trainable=True)
    engine.prepare(model, settings["precision"])
    examples = [
        TokenExample(ids[:length].tolist(), int(prompt))
        for ids, length, prompt in zip(arrays["ids"], arrays["lengths"], arrays["prompts"])
    ]
    optim = OptimConfig(
        lr=settings["lr"],
        warmup_steps=settings["warmup"],
        schedule_unit=settings["unit"],
        beta2=settings["beta2"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        variant=settings["variant"],
        max_grad_norm=settings["max_grad_norm"],
        schedule=settings["schedule"],
        min_lr_ratio=settings["min_lr_ratio"],
        loraplus_lr_ratio=settings["loraplus"],
        loraplus_lr_embedding=settings["loraplus_embedding"],
    )
    config = TrainConfig(
        batch_size=settings["batch"],
        grad_accumulation=settings["accumulation"],
        steps=settings["steps"],
        label_smoothing=settings["label_smoothing"],
        group_by_length=False,
        shuffle=False,
        log_every=1,
        optim=optim,
    )
    train(model, examples, [], config, folder / "run")
    records = read_metrics(folder / "run" / "metrics.jsonl")
    return {
        "loss": np.array([record["loss"] for record in records]),
        "lr": np.array([record["lr"] for record in records]),
        **model.adapter_tensors(),
    }


STAGES = [("reference", reference), ("jlora", ours)]
