"""`Linear` and `MergedLinear`: LoRA on matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jlora.layers.base import Conv1D, LoRALayer, assign, cast, kaiming_uniform
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


class _LinearBase(LoRALayer, nn.Linear):
    """What `Linear` and `MergedLinear` share: the frozen product and its two layouts."""

    def _init_linear(self, in_features, out_features, bias, fan_in_fan_out):
        nn.Linear.__init__(self, in_features, out_features, bias=bias)
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight = self.weight.transpose(0, 1).stop_grad().start_grad()

    @classmethod
    def _around(cls, base: nn.Linear | Conv1D, r, lora_alpha, lora_dropout, merge_weights):
        """A layer of this class on the weight and bias Vars of ``base``, without lora_A yet."""
        layer = cls.__new__(cls)
        if isinstance(base, Conv1D):
            layer.in_features, layer.out_features = base.nx, base.nf
            layer.fan_in_fan_out = True
        elif isinstance(base, nn.Linear) and not isinstance(base, LoRALayer):
            layer.in_features, layer.out_features = base.in_features, base.out_features
            layer.fan_in_fan_out = False
        else:
            raise UserError(
                f"cannot put LoRA around a {type(base).__name__}; "
                f"{cls.__name__} takes nn.Linear and Conv1D"
            )
        layer._init_lora(r, lora_alpha, lora_dropout, merge_weights)
        layer.put_on(base)
        return layer

    def to_base(self) -> nn.Linear | Conv1D:
        """The plain layer with this layer's weight (merged or not, as it is now) and bias."""
        base = (Conv1D if self.fan_in_fan_out else nn.Linear).__new__(
            Conv1D if self.fan_in_fan_out else nn.Linear
        )
        if self.fan_in_fan_out:
            base.nf, base.nx = self.out_features, self.in_features
        else:
            base.in_features, base.out_features = self.in_features, self.out_features
        base.weight, base.bias = self.weight, self.bias
        base.is_train = self.is_train
        if self._engine is not None and not self.merged:
            self._engine.install(base)
        return base

    def base_output(self, x: jt.Var) -> jt.Var:
        """``W0 x + b``; an engine's packed copy of W0 stands in while the layer is unmerged."""
        if self._engine is not None and not self.merged:
            return self._engine(x)
        weight = self._frozen()
        y = jt.matmul(x, weight) if self.fan_in_fan_out else nn.matmul_transpose(x, weight)
        return y if self.bias is None else y + self.bias

    def _lora_B_matrix(self) -> jt.Var:
        return self.lora_B

    def delta_weight(self) -> jt.Var:
        A, B = self.lora_A.float32(), self._lora_B_matrix().float32()
        if self.fan_in_fan_out:
            return jt.matmul(A.transpose(0, 1), B.transpose(0, 1)) * self.scaling
        return jt.matmul(B, A) * self.scaling

    def execute(self, x: jt.Var) -> jt.Var:
        """``(..., in) -> (..., out)``"""
        if self._adds_lora and self._engine is not None:
            y = self._engine.with_lora(x, self)
            if y is not None:
                return y
        y = self.base_output(x)
        return self.variant.forward(self, x, y) if self._adds_lora else y

    def low_rank(self, x: jt.Var, dropout: bool = True) -> jt.Var:
        """``(..., in) -> (..., out)``"""
        shape = (*x.shape[:-1], self.out_features)
        x = self.lora_dropout(x) if dropout else x
        x = cast(x, self.lora_A.dtype).reshape(-1, self.in_features)
        # The scaling goes to the (N, r) product, the smallest of the three.
        low = nn.matmul_transpose(x, self.lora_A) * self.scaling
        return nn.matmul_transpose(low, self._lora_B_matrix()).reshape(shape)


class Linear(_LinearBase):
    """``nn.Linear`` with LoRA (loralib's ``Linear``).

    Args:
        fan_in_fan_out: the weight is stored as ``(in, out)``, as in `Conv1D`.

    Parameters: ``weight`` frozen, ``bias``, ``lora_A (r, in)``, ``lora_B (out, r)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        bias: bool = True,
    ):
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights)
        self._init_linear(in_features, out_features, bias, fan_in_fan_out)
        self._add_lora_parameters()

    @classmethod
    def from_base(
        cls,
        base: nn.Linear | Conv1D,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
    ) -> Linear:
        """LoRA around an existing layer, whose weight and bias it shares."""
        layer = cls._around(base, r, lora_alpha, lora_dropout, merge_weights)
        layer._add_lora_parameters()
        layer.is_train = base.is_training()
        return layer

    def _add_lora_parameters(self):
        if self.r > 0:
            self.lora_A = jt.zeros((self.r, self.in_features))
            self.lora_B = jt.zeros((self.out_features, self.r))
            self.reset_lora_parameters()
            self.weight.stop_grad()

    def reset_lora_parameters(self) -> None:
        """A uniform in +-1/sqrt(in) (kaiming_uniform with a = sqrt(5)), B zero."""
        kaiming_uniform(self.lora_A)
        assign(self.lora_B, jt.zeros(self.lora_B.shape))


class MergedLinear(_LinearBase):
    """Several linear layers stored as one, some of them with LoRA (loralib's ``MergedLinear``).

    GPT-2's ``c_attn`` makes query, key and value in one product: ``enable_lora=[True, False,
    True]`` adapts query and value. Output block i is changed by its own B_i A_i only.

    Args:
        enable_lora: one flag per block; their number must divide ``out_features``.
        fan_in_fan_out: the weight is stored as ``(in, out)``, as in `Conv1D`.

    Parameters: ``lora_A (r * enabled, in)``, ``lora_B (out / blocks * enabled, r)``, the enabled
    blocks one after the other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        bias: bool = True,
    ):
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights)
        self._init_linear(in_features, out_features, bias, fan_in_fan_out)
        self._add_lora_parameters(enable_lora)

    @classmethod
    def from_base(
        cls,
        base: nn.Linear | Conv1D,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        merge_weights: bool = False,
    ) -> MergedLinear:
        """LoRA around an existing layer, whose weight and bias it shares."""
        layer = cls._around(base, r, lora_alpha, lora_dropout, merge_weights)
        layer._add_lora_parameters(enable_lora)
        layer.is_train = base.is_training()
        return layer

    def _add_lora_parameters(self, enable_lora):
        self.enable_lora = [bool(flag) for flag in enable_lora]
        blocks, enabled = len(self.enable_lora), sum(self.enable_lora)
        if blocks == 0 or self.out_features % blocks:
            raise UserError(
                f"enable_lora has {blocks} entries, which do not divide the "
                f"{self.out_features} outputs into equal blocks"
            )
        if self.r == 0 or enabled == 0:
            return
        block_size = self.out_features // blocks
        self.lora_A = jt.zeros((self.r * enabled, self.in_features))
        self.lora_B = jt.zeros((block_size * enabled, self.r))
        self._index = _block_index(self.enable_lora, block_size, self.r)
        self.reset_lora_parameters()
        self.weight.stop_grad()

    def reset_lora_parameters(self) -> None:
        """A uniform in +-1/sqrt(in) (kaiming_uniform with a = sqrt(5)), B zero."""
        kaiming_uniform(self.lora_A)
        assign(self.lora_B, jt.zeros(self.lora_B.shape))

    def _lora_B_matrix(self) -> jt.Var:
        """B as one ``(out, r * enabled)`` matrix, zero where output block and A's rows differ."""
        # One operator, the same compiled code for every pattern and rank: row i, column j is
        # lora_B[row[i], column[j]] where both belong to the same enabled block.
        return self.lora_B.reindex(
            [self.out_features, self.lora_A.shape[0]],
            ["@e0(i0)", "@e1(i1)"],
            overflow_conditions=["@e2(i0)!=@e3(i1)"],
            extras=self._index,
        )


def _block_index(enable_lora: list[bool], block_size: int, r: int) -> list[jt.Var]:
    """Four int32 index Vars: B's row for each output and column for each row of A; their blocks."""
    order = np.where(enable_lora, np.cumsum(enable_lora) - 1, -1)  # block -> place among enabled
    row_block = np.repeat(order, block_size)  # (out,)
    row = np.where(row_block < 0, 0, row_block * block_size)
    row = row + np.tile(np.arange(block_size), len(enable_lora))
    column_block = np.repeat(np.arange(sum(enable_lora)), r)  # (r * enabled,)
    column = np.tile(np.arange(r), sum(enable_lora))
    arrays = (row, column, row_block, column_block)
    return [jt.array(a.astype(np.int32)).stop_grad() for a in arrays]
