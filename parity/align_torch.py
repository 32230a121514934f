"""PyTorch's side of `parity.align`: ``python -m parity.align_torch OUT off|on``, in `.venv-parity`.

transformers' model, PEFT's adapter, torch's AdamW and a plain loop, in float32. Started again, it
goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from benchmarks.sides import peak_mb
from parity.training import mean_loss


def main(out: Path, name: str) -> None:
    settings = json.loads((out / "settings.json").read_text())
    inputs = load_file(out / "inputs.safetensors")
    folder = out / f"torch-{name}"
    folder.mkdir(exist_ok=True)
    torch.manual_seed(settings["seed"])
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    config = LoraConfig.from_pretrained(out / "start")
    config.lora_dropout = settings["dropout"] if name == "on" else 0.0
    model = PeftModel.from_pretrained(base, out / "start", is_trainable=True, config=config)
    train(model, settings, inputs, folder)
    trained_mb = peak_mb()
    model.save_pretrained(folder / "adapter")
    model.eval()
    valid_loss = validation_loss(model, settings, inputs)
    print(f"torch-{name}: validation loss {valid_loss:.4f}", flush=True)
    answer(model, settings, inputs, folder / "predictions.jsonl")
    result = {
        "valid_loss": valid_loss, "peak_mb": trained_mb, "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    replace(folder / "done.json", json.dumps(result, indent=1) + "\n")


def part(inputs: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: inputs[f"{name}.{key}"] for key in ("ids", "lengths", "prompts")}


def train(model, settings: dict, inputs: dict[str, np.ndarray], folder: Path) -> None:
    """The steps that are not done yet; a line each in metrics.jsonl."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        named.values(), lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )  # fmt: skip
    scheduler = get_linear_schedule_with_warmup(optimizer, settings["warmup"], settings["steps"])
    saved, metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
    lines: list[str] = []
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        lines = metrics.read_text().splitlines(keepends=True)[: state["step"]]
        for name, value in state["adapter"].items():
            named[name].data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
    arrays, starts = part(inputs, "train"), inputs["starts"]
    model.train()
    replace(metrics, "".join(lines))
    with open(metrics, "a") as log:
        for step in range(len(lines), settings["steps"]):
            started = time.monotonic()
            rows = range(starts[step], starts[step + 1])
            loss = mean_loss(model, arrays, rows, settings["label_smoothing"])
            optimizer.zero_grad()
            loss.backward()
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            seconds = round(time.monotonic() - started, 4)
            line = {"step": step + 1, "loss": loss.item(), "lr": rate, "seconds": seconds}
            log.write(json.dumps(line) + "\n")
            if (step + 1) % settings["save_every"] == 0 or step + 1 == settings["steps"]:
                log.flush()
                save(saved, {
                    "step": step + 1,
                    "adapter": {name: p.detach().clone() for name, p in named.items()},
                    "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                    "random": torch.get_rng_state(),
                })  # fmt: skip
                print(f"{folder.name}: step {step + 1}, loss {line['loss']:.4f}", flush=True)


@torch.no_grad()
def validation_loss(model, settings: dict, inputs: dict[str, np.ndarray]) -> float:
    """Mean over all target tokens, without label smoothing."""
    arrays, size = part(inputs, "valid"), settings["valid_batch"]
    counts = arrays["lengths"] - arrays["prompts"]
    order = np.argsort(arrays["lengths"])
    total = 0.0
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        total += mean_loss(model, arrays, rows, 0.0).item() * (counts[rows].sum() + 1e-4)
    return float(total / counts.sum())


@torch.no_grad()
def answer(model, settings: dict, inputs: dict[str, np.ndarray], path: Path) -> None:
    """Greedy answers by `generate`, a JSON line each, in the order of the test inputs."""
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    arrays, end, size = part(inputs, "test"), settings["end_id"], settings["decode_batch"]
    order, texts = np.argsort(arrays["lengths"]), {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = int(arrays["lengths"][rows].max())
        ids = torch.full((len(rows), longest), end)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):  # padded on the left
            length = arrays["lengths"][row]
            ids[place, longest - length :] = torch.from_numpy(arrays["ids"][row, :length]).long()
            mask[place, longest - length :] = 1
        found = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, num_beams=1,
            max_new_tokens=settings["max_new_tokens"], eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
        for row, new in zip(rows, found[:, longest:].tolist()):
            new = new[: new.index(end)] if end in new else new
            texts[int(row)] = {"ids": new, "prediction": tokenizer.decode(new).strip()}
        print(f"{path.parent.name}: {len(texts)} of {len(order)} inputs answered", flush=True)
    lines = [json.dumps(texts[row], ensure_ascii=False) + "\n" for row in range(len(order))]
    replace(path, "".join(lines))


def save(path: Path, state: dict) -> None:
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
