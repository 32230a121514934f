"""A LoRA training step with mlx-lm, as its trainer makes it."""

from __future__ import annotations

from functools import partial

import numpy as np

PAD_TO = 32  # its trainer pads every batch to a multiple of this


def make(spec: dict):
    """One round is one update on the next batch."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import _get_classes

    config = {"n_ctx": 1024, "layer_norm_epsilon": 1e-5, "num_heads": 0, **spec["config"]}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    settings = dict(spec["lora"])
    # Its equivalent of two blocks of rank r is one adapter of rank 2 r, as PEFT's.
    rank = settings["r"] * sum(settings.pop("enable_lora", [1]))
    names = [name for name, _ in model.layers[0].named_modules()]
    keys = [n for n in names if n.rpartition(".")[2] in settings["target_modules"]]
    model.freeze()
    linear_to_lora_layers(
        model, len(model.layers),
        {"rank": rank, "scale": settings["lora_alpha"] / settings["r"], "dropout": 0.1,
         "keys": keys},
    )  # fmt: skip
    optimizer = optim.AdamW(learning_rate=2e-4)
    model.train()
    arrays = np.load(spec["batches"])
    done = 0

    def loss_of(model, ids, targets, mask):
        losses = nn.losses.cross_entropy(
            model(ids).astype(mx.float32), targets, label_smoothing=spec["label_smoothing"]
        )
        return (losses * mask).sum() / mask.sum()

    gradient = nn.value_and_grad(model, loss_of)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(ids, targets, mask):
        loss, grads = gradient(model, ids, targets, mask)
        optimizer.update(model, grads)
        return loss

    def column(name: str, number: int):
        array = arrays[f"{name}{number}"]
        return mx.array(np.pad(array, ((0, 0), (0, -array.shape[1] % PAD_TO))))

    def work():
        nonlocal done
        number = done % int(arrays["count"])
        done += 1
        loss = update(*(column(name, number) for name in ("ids", "targets", "mask")))
        mx.eval(state, loss)
        return {"loss": loss.item()}

    return work
