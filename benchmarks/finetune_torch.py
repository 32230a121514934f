"""The training of ``benchmarks.finetune`` with transformers and PEFT, in the environment `peft`.

Prints an object a line: ``{"valid": loss, "after": steps}`` and ``{"step": n, "loss": loss}``.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    get_constant_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

NO_TARGET = -100


#: Tokens of an example, and the place of the first that is trained.
Row = tuple[list[int], int]


def read(file: Path, tokenizer) -> list[Row]:
    """Texts, trained whole, with an end token; or conversations, of which the last answer is."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        if "text" in example:
            rows.append(([*tokenizer(example["text"]).input_ids, tokenizer.eos_token_id], 0))
            continue
        written = partial(tokenizer.apply_chat_template, return_dict=False)
        messages = example["messages"]
        prompt = written(messages[:-1], add_generation_prompt=True)
        rows.append((written(messages), len(prompt)))
    return rows


def batches(rows: list[Row], size: int) -> list[list[Row]]:
    """Rows one after another; an incomplete batch is left out, as mlx-lm does it."""
    return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]


def length(row: Row) -> int:
    return len(row[0])


def training_batches(
    rows: list[Row], size: int, how: str | list[list[int]], order: random.Random
) -> Iterator[list[Row]]:
    """The batches of training, without end.

    Args:
        how: "drawn", as transformers' Trainer does it; "like lengths" together, as mlx-lm does it;
            or the row numbers of each batch.
    """
    while True:
        if isinstance(how, list):
            yield from ([rows[number] for number in batch] for batch in how)
        elif how == "drawn":
            yield from batches(order.sample(rows, len(rows)), size)
        else:
            made = batches(sorted(rows, key=length), size)
            yield from order.sample(made, len(made))


def losses(model, rows: list[Row]) -> torch.Tensor:
    """The loss of every target token, (N,) float32."""
    longest = max(map(length, rows))
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])  # (B, T)
    places = torch.arange(longest)
    real = places < torch.tensor([[len(tokens)] for tokens, _ in rows])  # (B, T)
    trained = real & (places >= torch.tensor([[first] for _, first in rows]))
    logits = (
        model(input_ids=ids, attention_mask=real.long()).logits[:, :-1].float()
    )  # (B, T - 1, V)
    targets = torch.where(trained, ids, NO_TARGET)[:, 1:]
    each = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="none"
    )
    return each[targets.flatten() != NO_TARGET]


def validation_loss(model, rows: list[list[Row]]) -> float:
    with torch.no_grad():
        return torch.cat([losses(model, batch) for batch in rows]).mean().item()


def report(**values) -> None:
    print(json.dumps(values), flush=True)


def main(spec: dict) -> None:
    torch.manual_seed(spec["seed"])
    order = random.Random(spec["seed"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    data, size = Path(spec["data"]), spec["batch_size"]
    train, valid = (read(data / f"{name}.jsonl", tokenizer) for name in ("train", "valid"))
    valid = sorted(valid, key=length)
    valid = [valid[i : i + size] for i in range(0, len(valid), size)]
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    if spec["first"]:
        model = PeftModel.from_pretrained(base, spec["first"], is_trainable=True)
    else:
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **spec["lora"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=0.0)
    warmup, steps = spec["warmup"], spec["steps"]
    if spec["schedule"] == "linear":
        rates = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    else:
        rates = get_constant_schedule_with_warmup(optimizer, warmup)
    report(valid=validation_loss(model, valid), after=0)
    model.train()
    drawn = training_batches(train, size, spec["batches"], order)
    for step in range(1, steps + 1):
        loss = losses(model, next(drawn)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        report(step=step, loss=loss.item())
    model.eval()
    report(valid=validation_loss(model, valid), after=steps)
    model.save_pretrained(spec["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
