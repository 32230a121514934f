"""A LoRA training step with microsoft/LoRA's own model, loss and optimizer, in float32."""

from __future__ import annotations

import numpy as np

from benchmarks import lora_code


def make(spec: dict):
    """One round is one update on the next batch, or on its first ``rows`` rows.

    ``length`` pads every batch, as microsoft/LoRA's data is (to 512); None: to its longest row. The
    rest of its trainer needs CUDA and is left out.
    """
    import loralib
    import torch

    model, optimizer = lora_code.modules(spec["code"], "model", "optimizer")
    network = model.GPT2LMModel(lora_code.configuration(model, spec["config"], spec["lora"]))
    loralib.mark_only_lora_as_trainable(network)
    adam = optimizer.create_adam_optimizer(network, lr=2e-4, weight_decay=0.01, beta2=0.999)
    network.train()
    arrays = np.load(spec["batches"])
    rows = spec["rows"]
    done = 0

    def column(name: str):
        array = arrays[f"{name}{done % int(arrays['count'])}"][:rows]
        more = max(0, (spec["length"] or 0) - array.shape[1])
        return torch.from_numpy(np.pad(array, ((0, 0), (0, more))))

    def work():
        nonlocal done
        ids, targets, mask = column("ids").long(), column("targets").long(), column("mask")
        done += 1
        _, loss = network(
            ids, lm_labels=targets, lm_mask=mask, label_smooth=spec["label_smoothing"]
        )
        loss.backward()
        adam.step()
        adam.zero_grad()
        return {"loss": loss.item()}

    return work
