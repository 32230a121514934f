"""Every layer of `jlora.layers` compared with loralib 0.1.2.

Where loralib fails, the comparison is with its corrected mathematics:

* `MergedLinear` with no block enabled has no adapter and must equal its base layer; loralib's
  forward uses the missing adapter and fails.
* `Conv1d` and `Conv3d` with kernels longer than 1: loralib's A and B do not multiply to the
  kernel's size there. With jlora's shapes the change is B A in the kernel's shape, as for `Conv2d`.

(loralib 0.1.1 computed `MergedLinear` wrongly for fan_in_fan_out=False, microsoft/LoRA#103; 0.1.2,
which is used here, is right.)
"""

from __future__ import annotations

import itertools

import numpy as np

from parity.case import Case

IN, OUT, BATCH = 10, 12, (3, 4)
KEEP = 0.75  # 1 - dropout
RANKS = (1, 4, 8)
PATTERNS = list(itertools.product([False, True], repeat=3))
CONVS = {
    # kind, kernel, settings
    "conv1d-1": ("Conv1d", 1, {}),
    "conv1d-3": ("Conv1d", 3, {"stride": 2, "padding": 1}),
    "conv2d-1": ("Conv2d", 1, {"stride": 2}),
    "conv2d-3": ("Conv2d", 3, {"padding": 1}),
    "conv2d-3-groups": ("Conv2d", 3, {"groups": 2, "stride": 2, "padding": 2}),
    "conv2d-3-dilation": ("Conv2d", 3, {"dilation": 2, "bias": False}),
    "conv3d-1": ("Conv3d", 1, {"padding": 1}),
    "conv3d-2-groups": ("Conv3d", 2, {"groups": 2, "stride": 2}),
}
CHANNELS = {"in": 4, "out": 6}
# A larger tolerance: a gradient of rank 1 has four entries here, and where terms of both signs
# almost cancel in all four, rounding errors are relatively large.
CONV_TOLERANCE = 3e-5


def cases(seed: int) -> list[Case]:
    found = []
    for r, layout, drop in itertools.product(RANKS, (False, True), (False, True)):
        end = f"r{r}-{'in_out' if layout else 'out_in'}-{'dropout' if drop else 'plain'}"
        settings = {"r": r, "fan_in_fan_out": layout, "dropout": drop, "lora_alpha": 2 * r + 3}
        golden = (r, drop) == (4, True)
        found.append(Case("Linear", f"linear-{end}", {"kind": "Linear", **settings}, golden=golden))
        for pattern in PATTERNS:
            name = "".join("1" if flag else "0" for flag in pattern)
            chosen = {"kind": "MergedLinear", "enable_lora": list(pattern), **settings}
            row = "MergedLinear, all 8 patterns"
            kept = golden and name in ("101", "011")
            found.append(Case(row, f"merged-{name}-{end}", chosen, golden=kept))
    for r, padding in itertools.product(RANKS, (None, 2)):
        settings = {"kind": "Embedding", "r": r, "lora_alpha": 5, "padding_idx": padding}
        end = f"r{r}-{'plain' if padding is None else 'padding'}"
        found.append(Case("Embedding", f"embedding-{end}", settings, golden=r == 4))
    for (name, (kind, kernel, more)), r in itertools.product(CONVS.items(), RANKS):
        settings = {"kind": kind, "kernel": kernel, "r": r, "lora_alpha": 3, "more": more}
        golden = name.endswith("-groups") and r == 4
        found.append(Case(kind, f"{name}-r{r}", settings, CONV_TOLERANCE, golden=golden))
    return found


def inputs(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Weights, adapter, input and the gradient of the output."""
    settings = case.settings
    shapes = {**shapes_of(settings)}
    arrays = {name: rng.standard_normal(shape).astype("f") for name, shape in shapes.items()}
    if settings["kind"] == "Embedding":
        arrays["x"] = rng.integers(0, 9, BATCH).astype(np.int32)
    if settings.get("dropout"):
        arrays["mask"] = (rng.random((*BATCH, IN)) < KEEP).astype("f") / np.float32(KEEP)
    return arrays


def shapes_of(settings: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of those of ``weight``, ``bias``, ``lora_A``, ``lora_B`` and ``x`` that exist."""
    kind, r = settings["kind"], settings["r"]
    if kind == "Embedding":
        return {"weight": (9, 6), "lora_A": (r, 9), "lora_B": (6, r)}
    if kind in ("Linear", "MergedLinear"):
        enabled = sum(settings["enable_lora"]) if kind == "MergedLinear" else 1
        blocks = len(settings["enable_lora"]) if kind == "MergedLinear" else 1
        shapes = {
            "weight": (IN, OUT) if settings["fan_in_fan_out"] else (OUT, IN),
            "bias": (OUT,),
            "x": (*BATCH, IN),
        }
        if enabled:
            shapes["lora_A"] = (r * enabled, IN)
            shapes["lora_B"] = (OUT // blocks * enabled, r)
        return shapes
    dims, k, more = int(kind[4]), settings["kernel"], settings["more"]
    groups, inner, outer = more.get("groups", 1), CHANNELS["in"], CHANNELS["out"]
    shapes = {
        "weight": (outer, inner // groups, *[k] * dims),
        "lora_A": (r * k, inner * k),
        "lora_B": (outer // groups * k ** (dims - 1), r * k),
        "x": (2, inner, *[7, 6, 5][:dims]),
    }
    if more.get("bias", True):
        shapes["bias"] = (outer,)
    return shapes


# The reference -----------------------------------------------------------------------------------


def reference(case: Case, arrays: dict[str, np.ndarray], folder) -> dict[str, np.ndarray]:
    import torch

    settings = case.settings
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    adapted = "lora_A" in given
    dims = int(settings["kind"][4]) if settings["kind"].startswith("Conv") else 0
    corrected = dims in (1, 3) and settings["kernel"] > 1
    layer = corrected_conv(settings, dims) if corrected else loralib_layer(settings, adapted)
    with torch.no_grad():
        weight = layer.conv.weight if dims else layer.weight
        weight.copy_(given["weight"])
        if "bias" in given:
            (layer.conv if dims else layer).bias.copy_(given["bias"])
        if adapted:
            layer.lora_A.copy_(given["lora_A"])
            layer.lora_B.copy_(given["lora_B"])
    if "mask" in given:
        layer.lora_dropout = lambda x: x * given["mask"]
    x = given["x"].long() if settings["kind"] == "Embedding" else given["x"].requires_grad_()
    y = layer(x)
    wanted = {"lora_A": layer.lora_A, "lora_B": layer.lora_B} if adapted else {}
    if settings["kind"] != "Embedding":
        wanted["x"] = x
    gradients = torch.autograd.grad((y * output_gradient(y.shape, torch)).sum(), wanted.values())
    layer.eval()
    merged = layer(x)
    merged_weight = weight.clone()
    layer.train()
    found = {
        "forward": y,
        **{f"gradient of {name}": g for name, g in zip(wanted, gradients)},
        "merged forward": merged,
        "merged weight": merged_weight,
        "unmerged forward": layer(x),
        "weight after 100 rounds": given["weight"],
    }
    return {name: value.detach().numpy() for name, value in found.items()}


def loralib_layer(settings: dict, adapted: bool):
    import loralib

    kind, shared = settings["kind"], {"lora_alpha": settings["lora_alpha"]}
    r = settings["r"] if adapted else 0
    if kind == "Embedding":
        return loralib.Embedding(9, 6, r=r, padding_idx=settings["padding_idx"], **shared)
    if kind.startswith("Conv"):
        sizes = (CHANNELS["in"], CHANNELS["out"], settings["kernel"])
        return getattr(loralib.layers, kind)(*sizes, r=r, **shared, **settings["more"])
    shared.update(r=r, fan_in_fan_out=settings["fan_in_fan_out"])
    if kind == "MergedLinear":
        shared["enable_lora"] = settings["enable_lora"]
    return getattr(loralib, kind)(IN, OUT, **shared)


def corrected_conv(settings: dict, dims: int):
    """torch's own convolution with B A added to its kernel."""
    import torch
    from torch import nn

    class Corrected(nn.Module):
        def __init__(self):
            super().__init__()
            kind = getattr(nn, settings["kind"])
            sizes = (CHANNELS["in"], CHANNELS["out"], settings["kernel"])
            self.conv = kind(*sizes, **settings["more"])
            shapes = shapes_of(settings)
            self.lora_A = nn.Parameter(torch.zeros(shapes["lora_A"]))
            self.lora_B = nn.Parameter(torch.zeros(shapes["lora_B"]))
            self.scaling = settings["lora_alpha"] / settings["r"]

        def change(self):
            return (self.lora_B @ self.lora_A).view(self.conv.weight.shape) * self.scaling

        def train(self, mode: bool = True):
            if mode != self.training:
                self.conv.weight.data += -self.change() if mode else self.change()
            return super().train(mode)

        def forward(self, x):
            weight = self.conv.weight + self.change() if self.training else self.conv.weight
            return self.conv._conv_forward(x, weight, self.conv.bias)

    return Corrected()


def output_gradient(shape, library):
    """A gradient that differs at every output and is the same on both sides."""
    count = int(np.prod(shape))
    values = np.sin(np.arange(count, dtype=np.float32)).reshape(tuple(shape))
    return library.from_numpy(values) if hasattr(library, "from_numpy") else library.array(values)


# jlora -------------------------------------------------------------------------------------------


def ours(case: Case, arrays: dict[str, np.ndarray], folder) -> dict[str, np.ndarray]:
    from jlora.layers import assign
    from jlora.system.runtime import jt

    settings = case.settings
    given = {name: jt.array(array) for name, array in arrays.items()}
    layer = jlora_layer(settings)
    adapted = layer.has_adapter
    for name in ("weight", "bias", "lora_A", "lora_B"):
        if name in given:
            assign(getattr(layer, name), given[name])
    if adapted:
        layer.weight.stop_grad()
    if "mask" in given:
        layer.lora_dropout = lambda x: x * given["mask"]
    x = given["x"]
    y = layer(x)
    wanted = {"lora_A": layer.lora_A, "lora_B": layer.lora_B} if adapted else {}
    if settings["kind"] != "Embedding":
        wanted["x"] = x
    gradients = jt.grad((y * output_gradient(y.shape, jt)).sum(), list(wanted.values()))
    layer.eval()
    merged, merged_weight = layer(x).numpy(), layer.weight.numpy()
    layer.train()
    unmerged = layer(x).numpy()
    for _ in range(100):
        layer.eval()
        layer.train()
    return {
        "forward": y.numpy(),
        **{f"gradient of {name}": g.numpy() for name, g in zip(wanted, gradients)},
        "merged forward": merged,
        "merged weight": merged_weight,
        "unmerged forward": unmerged,
        "weight after 100 rounds": layer.weight.numpy(),
    }


def jlora_layer(settings: dict):
    from jlora import layers

    kind, shared = settings["kind"], {"r": settings["r"], "lora_alpha": settings["lora_alpha"]}
    if kind == "Embedding":
        return layers.Embedding(9, 6, padding_idx=settings["padding_idx"], **shared)
    if kind.startswith("Conv"):
        sizes = (CHANNELS["in"], CHANNELS["out"], settings["kernel"])
        return getattr(layers, kind)(*sizes, **shared, **settings["more"])
    shared["fan_in_fan_out"] = settings["fan_in_fan_out"]
    if kind == "MergedLinear":
        shared["enable_lora"] = settings["enable_lora"]
    return getattr(layers, kind)(IN, OUT, **shared)


STAGES = [("reference", reference), ("jlora", ours)]
