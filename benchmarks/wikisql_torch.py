"""The training of ``benchmarks.wikisql`` with transformers and PEFT, in the environment `peft`.

Prints an object a line: ``{"valid": loss, "after": steps}`` and ``{"step": n, "loss": loss}``.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

NO_TARGET = -100


def read(file: Path, tokenizer) -> list[list[int]]:
    """Tokens of every text, with an end token."""
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    return [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts]


def batches(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    """Rows one after another; an incomplete batch is left out, as mlx-lm does it."""
    return [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]


def training_batches(
    rows: list[list[int]], size: int, how: str | list[list[int]], order: random.Random
) -> Iterator[list[list[int]]]:
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
            made = batches(sorted(rows, key=len), size)
            yield from order.sample(made, len(made))


def losses(model, rows: list[list[int]]) -> torch.Tensor:
    """The loss of every target token, (N,) float32."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # (B, T)
    real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()  # (B, T - 1, V)
    targets = torch.where(real > 0, ids, NO_TARGET)[:, 1:]
    each = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="none"
    )
    return each[targets.flatten() != NO_TARGET]


def validation_loss(model, rows: list[list[list[int]]]) -> float:
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
    valid = batches(sorted(valid, key=len), size)
    dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    if spec["first"]:
        model = PeftModel.from_pretrained(base, spec["first"], is_trainable=True)
    else:
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **spec["lora"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=0.0)
    report(valid=validation_loss(model, valid), after=0)
    model.train()
    steps = training_batches(train, size, spec["batches"], order)
    for step in range(1, spec["steps"] + 1):
        loss = losses(model, next(steps)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report(step=step, loss=loss.item())
    model.eval()
    report(valid=validation_loss(model, valid), after=spec["steps"])
    model.save_pretrained(spec["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
