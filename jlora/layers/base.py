"""The base of every LoRA layer: settings, the frozen weight, merging; and GPT-2's `Conv1D`."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from jlora.formats.names import is_lora_name
from jlora.layers.variant import PLAIN, LoraVariant
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


class Conv1D(nn.Module):
    """GPT-2's linear layer: ``(..., nx) -> (..., nf)``, weight stored as ``(nx, nf)``.

    The name and the transposed weight are those of OpenAI's code and of transformers.
    """

    def __init__(self, nf: int, nx: int):
        self.nf = nf
        self.nx = nx
        self.weight = jt.randn(nx, nf) * 0.02
        self.bias = jt.zeros((nf,))

    def execute(self, x: jt.Var) -> jt.Var:
        return jt.matmul(x, self.weight) + self.bias


class LoRALayer:
    """What all LoRA layers share: settings, the frozen weight, merging.

    Args:
        r: rank; 0 makes the layer a plain base layer.
        lora_alpha: numerator of the scaling ``lora_alpha / r``.
        lora_dropout: probability of dropping an input of the LoRA branch, in training only.
        merge_weights: merge on ``eval()``, unmerge on ``train()``.

    Attributes:
        merged: whether the weight now contains the change.
        adapter_enabled: False makes an unmerged layer compute what its base computes.
        scaling: factor of the change.
        variant: what is done with ``lora_A`` and ``lora_B``; plain LoRA unless an adapter sets it.
        is_frozen: whether nothing of the layer is trained, so that what follows from its parameters
            may be kept.
    """

    variant: LoraVariant = PLAIN
    is_frozen = False
    # A packed copy of the weight (`jlora.engine.FrozenProduct`): called, it gives ``W0 x + b``;
    # its ``with_lora(x, layer)`` gives the layer's whole result, or None where it cannot;
    # ``install(module)`` lets another module of the same weight read it.
    _engine = None

    def _init_lora(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool):
        if not isinstance(r, int) or isinstance(r, bool) or r < 0:
            raise UserError(f"r must be a whole number of at least 0, not {r!r}")
        if not 0 <= lora_dropout < 1:
            raise UserError(f"lora_dropout must be at least 0 and below 1, not {lora_dropout!r}")
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = self.variant.scaling(r, lora_alpha) if r else 0.0
        # loralib's layers drop from the start; Jittor's Dropout would wait for train().
        self.lora_dropout = nn.Dropout(lora_dropout, is_train=True) if lora_dropout else identity
        self.merge_weights = merge_weights
        self.merged = False
        self.adapter_enabled = True
        self._training = True
        self._unmerged = self._unmerged_bias = None

    # Jittor's Module.train() and eval() assign `is_train` on every module below them and call no
    # method of it: the setter is the hook.
    @property
    def is_train(self) -> bool:
        return self._training

    @is_train.setter
    def is_train(self, mode: bool) -> None:
        self._training = mode
        if isinstance(self.lora_dropout, nn.Module):
            self.lora_dropout.is_train = mode
        if not self.merge_weights:
            return
        if mode:
            self.unmerge()
        else:
            self.merge()

    @property
    def has_adapter(self) -> bool:
        """Whether the layer has LoRA parameters at all."""
        return hasattr(self, "lora_A")

    @property
    def _adds_lora(self) -> bool:
        return self.has_adapter and self.adapter_enabled and not self.merged

    @property
    def drops(self) -> bool:
        """Whether the dropout of the LoRA branch is at work."""
        drop = self.lora_dropout
        return isinstance(drop, nn.Module) and drop.is_train and drop.p > 0

    def _frozen(self) -> jt.Var:
        """The frozen weight, kept out of the backward pass.

        A ``train()`` of a model that was in ``eval()`` before it got its adapter restarts the
        gradients of the base (Jittor keeps a list from the first ``eval()``), so the weight is
        stopped again at each use.
        """
        if self.has_adapter:
            self.weight.stop_grad()
        return self.weight

    def adapt(self, variant: LoraVariant) -> None:
        """Make plain LoRA whose parameters have their first values a layer of ``variant``.

        Raises:
            UserError: the variant cannot go on this layer.
            ValueError: its ``parameters`` are not those that its ``init`` makes.
        """
        self.variant = variant
        self.scaling = variant.scaling(self.r, self.lora_alpha) if self.r else 0.0
        if not self.has_adapter:
            return
        before = set(vars(self))
        variant.init(self)
        made = {name for name in set(vars(self)) - before if isinstance(vars(self)[name], jt.Var)}
        if made != set(variant.parameters) or not all(map(is_lora_name, made)):
            raise ValueError(
                f"{type(variant).__name__} makes the parameters {sorted(made)} and lists "
                f"{sorted(variant.parameters)}; both must be the same, and begin with lora_"
            )

    def put_on(self, base: nn.Module) -> None:
        """Take a plain layer's weight and bias, and its packed copy if it has one."""
        self.weight = base.weight
        if hasattr(base, "bias"):
            self.bias = base.bias
        packed = vars(base).get("_packed")
        if packed is not None and packed.fits(base.weight):
            packed.install(self)

    def take_off(self) -> nn.Module:
        """The plain layer again, which this one, not merged now, lets go of until `put_on`."""
        base = self.to_base()
        for name in ("weight", "bias", "_engine"):
            self.__dict__.pop(name, None)
        return base

    def base_output(self, x: jt.Var) -> jt.Var:
        """What the base layer makes of ``x``."""
        raise NotImplementedError

    def low_rank(self, x: jt.Var, dropout: bool = True) -> jt.Var:
        """``scaling * B A dropout(x)``, of the shape of the layer's result.

        Args:
            dropout: False: ``x`` has been through it.
        """
        raise NotImplementedError

    def delta_weight(self) -> jt.Var:
        """The change ``scaling * B A`` in the layout of ``weight``, float32."""
        raise NotImplementedError

    def float_weight(self) -> jt.Var:
        """The weight as it is now, float32, also where an engine keeps it packed alone."""
        weight = self.weight if isinstance(self.weight, jt.Var) else self.weight.unpacked()
        return weight.float32()

    def merge(self) -> None:
        """Put the change into the weight, in float32; nothing happens if it is there already.

        Raises:
            UserError: the variant changes the bias, and there is none.
        """
        if self.merged:
            return
        if self.has_adapter:
            with jt.no_grad():
                bias, merged_bias = getattr(self, "bias", None), self.merged_bias()
                # A copy is kept: subtracting would leave a rounding error at each round, and would
                # take away the wrong change after lora_A or lora_B were replaced meanwhile.
                merged = self.variant.merged_weight(self, self.float_weight())
                merged.sync()  # what can fail has been done before anything is changed
                if merged_bias is not bias:
                    self._unmerged_bias = bias.clone().stop_grad()
                    assign(bias, merged_bias)
                if isinstance(self.weight, jt.Var):
                    self._unmerged = self.weight.clone().stop_grad()
                    self.weight.update(merged.cast(self.weight.dtype))
                else:  # packed alone
                    self._unmerged, self.weight = self.weight, merged.stop_grad()
                self._merged_digest = _digest(self.weight)
        self.merged = True

    def merged_bias(self) -> jt.Var | None:
        """The bias that `merge` gives an unmerged layer.

        Raises:
            UserError: the variant changes the bias, and there is none.
        """
        bias = getattr(self, "bias", None)
        merged = self.variant.merged_bias(self, bias)
        if merged is not bias and bias is None:
            raise UserError(
                f"{type(self.variant).__name__}: the base layer has no bias to merge into, as in "
                "PEFT; keep the adapter unmerged"
            )
        return merged

    def unmerge(self) -> None:
        """Give the weight back as it was before `merge`; nothing happens if it is not merged.

        When other weights were loaded into the merged layer, the change is taken away from those
        (plain LoRA subtracts it, as loralib does).

        Raises:
            UserError: the variant cannot do that.
        """
        if self.merged:
            self.give_back(self.plain_weight())

    def plain_weight(self) -> Any:
        """The weight that `unmerge` gives back; nothing is changed.

        Raises:
            UserError: as `unmerge`.
        """
        if not (self.merged and self.has_adapter):
            return self.weight
        merged = isinstance(self.weight, jt.Var)
        if merged and _digest(self.weight) != self._merged_digest:
            with jt.no_grad():
                plain = self.variant.unmerged_weight(self, self.weight.float32())
                plain.sync()
                return plain.cast(self.weight.dtype)
        return self._unmerged

    def give_back(self, weight: Any) -> None:
        """`unmerge` with the weight that `plain_weight` gave."""
        if self.merged and self.has_adapter:
            with jt.no_grad():
                if isinstance(self.weight, jt.Var) and isinstance(weight, jt.Var):
                    self.weight.update(weight)
                else:  # an engine had packed the weight, or has packed what was merged
                    self.weight = weight
                if self._unmerged_bias is not None:
                    assign(self.bias, self._unmerged_bias)
            self._unmerged = self._merged_digest = self._unmerged_bias = None
        self.merged = False


def _digest(weight: jt.Var) -> bytes:
    """Of all the numbers. A Var's id would not do: start_grad() changes it, writing into it not."""
    return hashlib.sha256(weight.data).digest()


def assign(parameter: jt.Var, values: jt.Var) -> None:
    """Give ``parameter`` new values and leave its being trainable or not as it is.

    Jittor's ``update`` alone would freeze it wherever ``values`` has no gradient.
    """
    stopped = parameter.is_stop_grad()
    parameter.update(values.clone())
    if not stopped:
        parameter.start_grad()


def kaiming_uniform(parameter: jt.Var) -> None:
    """Uniform in +-1/sqrt(columns): what kaiming_uniform gives for a = sqrt(5)."""
    bound = 1 / math.sqrt(parameter.shape[1])
    assign(parameter, (jt.rand(*parameter.shape) * 2 - 1) * bound)


def identity(x: jt.Var) -> jt.Var:
    return x


def cast(x: jt.Var, dtype: str) -> jt.Var:
    return x if x.dtype == dtype else x.cast(dtype)
