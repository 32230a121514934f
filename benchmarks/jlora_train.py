"""A LoRA training step in jlora, as `jlora.training.loop.train` does it."""

from __future__ import annotations

import numpy as np

from benchmarks.sides import gpu_megabytes


def make(spec: dict):
    """One round is one update on the next batch."""
    from jlora import LoraConfig, engine, get_peft_model
    from jlora.models.hub import build_model
    from jlora.system.runtime import use_gpu

    on_gpu = use_gpu(spec.get("device") == "cuda")
    model = get_peft_model(build_model(spec["config"]), LoraConfig(**spec["lora"]))
    engine.prepare(
        model,
        spec["precision"],
        keep_weights=False,
        checkpoint_activations=spec.get("checkpoint_activations", False),
    )
    update, done = updates(model, spec), 0

    def work():
        nonlocal done
        done += 1
        result = {"loss": update()}
        return {**result, "gpu_mb": gpu_megabytes()} if on_gpu and done % 50 == 5 else result

    return work


def updates(model, spec: dict):
    """A function that makes an update on the next batch and returns its loss."""
    from jlora.system.runtime import jt
    from jlora.training.adamw import AdamW, OptimConfig
    from jlora.training.loop import batch_loss

    parameters = [parameter for _, parameter in model.trainable_parameters()]
    optimizer = AdamW(parameters, OptimConfig())
    arrays = np.load(spec["batches"])
    batches = [batch_of(arrays, i, model.reads_streams) for i in range(int(arrays["count"]))]
    model.train()
    done = 0

    def update() -> float:
        nonlocal done
        loss = batch_loss(model, batches[done % len(batches)], spec["label_smoothing"])
        done += 1
        optimizer.step(optimizer.arrays(jt.grad(loss, parameters)), 2e-4)
        return loss.item()

    return update


def batch_of(arrays, i: int, as_stream: bool):
    """Batch i, padded or as a stream, as `jlora.training.loop.make_batch` would make it."""
    from jlora.data.batches import Batch

    parts = [arrays[f"{name}{i}"] for name in ("ids", "targets", "mask")]
    lengths = arrays[f"lengths{i}"]
    if as_stream:
        real = np.arange(parts[0].shape[1]) < lengths[:, None]
        parts = [part[real][None] for part in parts]
    return Batch(*parts, lengths, is_stream=as_stream)
