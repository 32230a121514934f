"""LoRA layers with loralib's names and signatures, and GPT-2's base layer `Conv1D`.

A layer keeps the pretrained weight W0 frozen and learns a low-rank change of it
(arXiv 2106.09685, equation 3):

    h = W0 x + b + (alpha / r) B A dropout(x)

``lora_A`` is ``(r, in)`` and starts random, ``lora_B`` is ``(out, r)`` and starts at zero, so an
untrained layer computes what its base layer computes.

With ``merge_weights=True`` the change is added to the weight by ``eval()`` and taken away again by
``train()``, of the layer or of any model that holds it, as loralib does. `merge` and `unmerge` do
the same on request. What loralib gets wrong is put right here: `MergedLinear` with
``fan_in_fan_out=False`` (microsoft/LoRA#103), `Conv1d` and `Conv3d` with kernels longer than 1,
and merging, whose undoing gives the old weight back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from jlora.errors import UserError
from jlora.runtime import jt

from jittor import nn  # isort: skip  (after jlora.runtime, which prepares Jittor's import)


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
    """

    _engine = None

    def _init_lora(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool):
        if not isinstance(r, int) or isinstance(r, bool) or r < 0:
            raise UserError(f"r must be a whole number of at least 0, not {r!r}")
        if not 0 <= lora_dropout < 1:
            raise UserError(f"lora_dropout must be at least 0 and below 1, not {lora_dropout!r}")
        self.r = r
        self.lora_alpha = lora_alpha
        self.scaling = lora_alpha / r if r else 0.0
        # loralib's layers drop from the start; Jittor's Dropout would wait for train().
        self.lora_dropout = nn.Dropout(lora_dropout, is_train=True) if lora_dropout else _identity
        self.merge_weights = merge_weights
        self.merged = False
        self.adapter_enabled = True
        self._training = True
        self._unmerged = None

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

    def _frozen(self) -> jt.Var:
        """The frozen weight, kept out of the backward pass.

        A ``train()`` of a model that was in ``eval()`` before it got its adapter restarts the
        gradients of the base (Jittor keeps a list from the first ``eval()``), so the weight is
        stopped again at each use.
        """
        if self.has_adapter:
            self.weight.stop_grad()
        return self.weight

    def delta_weight(self) -> jt.Var:
        """The change ``scaling * B A`` in the layout of ``weight``, float32."""
        raise NotImplementedError

    def merge(self) -> None:
        """Add the change to the weight, in float32; nothing happens if it is there already."""
        if self.merged:
            return
        if self.has_adapter:
            with jt.no_grad():
                # A copy is kept: subtracting would leave a rounding error at each round, and would
                # take away the wrong change after lora_A or lora_B were replaced meanwhile.
                self._unmerged = self.weight.clone().stop_grad()
                merged = self.weight.float32() + self.delta_weight()
                self.weight.update(merged.cast(self.weight.dtype))
                self._merged_mark = self.weight.max().stop_grad()
        self.merged = True

    def unmerge(self) -> None:
        """Give the weight back as it was before `merge`; nothing happens if it is not merged.

        When other weights were loaded into the merged layer, the change is subtracted from those,
        as loralib does.
        """
        if not self.merged:
            return
        if self.has_adapter:
            with jt.no_grad():
                if (self._merged_mark == self.weight.max()).item():
                    self.weight.update(self._unmerged)
                else:
                    plain = self.weight.float32() - self.delta_weight()
                    self.weight.update(plain.cast(self.weight.dtype))
            self._unmerged = self._merged_mark = None
        self.merged = False


class _LinearBase(LoRALayer, nn.Linear):
    """What `Linear` and `MergedLinear` share: the frozen product and its two layouts."""

    def _init_linear(self, in_features, out_features, bias, fan_in_fan_out):
        nn.Linear.__init__(self, in_features, out_features, bias=bias)
        self.fan_in_fan_out = fan_in_fan_out
        if fan_in_fan_out:
            self.weight = self.weight.transpose(0, 1).stop_grad().start_grad()

    @classmethod
    def _around(cls, base: nn.Linear | Conv1D):
        """A layer of this class that uses the weight and bias Vars of ``base``."""
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
        layer.weight, layer.bias = base.weight, base.bias
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
        return base

    def _frozen_product(self, x: jt.Var) -> jt.Var:
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
        y = self._frozen_product(x)
        if not self._adds_lora:
            return y
        x = _cast(self.lora_dropout(x), self.lora_A.dtype).reshape(-1, self.in_features)
        # The scaling goes to the (N, r) product, the smallest of the three.
        low = nn.matmul_transpose(x, self.lora_A) * self.scaling
        change = nn.matmul_transpose(low, self._lora_B_matrix())
        return y + _cast(change, y.dtype).reshape(y.shape)


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
        layer = cls._around(base)
        layer._init_lora(r, lora_alpha, lora_dropout, merge_weights)
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
        _kaiming_uniform(self.lora_A)
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
        layer = cls._around(base)
        layer._init_lora(r, lora_alpha, lora_dropout, merge_weights)
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
        _kaiming_uniform(self.lora_A)
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


class Embedding(LoRALayer, nn.Embedding):
    """``nn.Embedding`` with LoRA (loralib's ``Embedding``): int ``(...)`` -> ``(..., dim)``.

    Parameters: ``weight (num, dim)`` frozen, ``lora_A (r, num)`` starting at zero,
    ``lora_B (dim, r)`` starting normal.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        padding_idx: int | None = None,
    ):
        self._init_lora(r, lora_alpha, 0.0, merge_weights)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx=padding_idx)
        self._add_lora_parameters()

    @classmethod
    def from_base(
        cls, base: nn.Embedding, r: int, lora_alpha: float = 1, merge_weights: bool = False
    ) -> Embedding:
        """LoRA around an existing embedding, whose weight it shares."""
        layer = cls.__new__(cls)
        layer._init_lora(r, lora_alpha, 0.0, merge_weights)
        layer.num_embeddings, layer.embedding_dim = base.weight.shape
        layer.padding_idx = getattr(base, "padding_idx", None)
        layer.weight = base.weight
        layer._add_lora_parameters()
        layer.is_train = base.is_training()
        return layer

    def to_base(self) -> nn.Embedding:
        """The plain embedding with this layer's weight (merged or not, as it is now)."""
        base = nn.Embedding.__new__(nn.Embedding)
        base.num_embeddings, base.embedding_dim = self.num_embeddings, self.embedding_dim
        base.padding_idx = self.padding_idx
        base.weight = self.weight
        base.is_train = self.is_train
        return base

    def _add_lora_parameters(self):
        if self.r > 0:
            self.lora_A = jt.zeros((self.r, self.num_embeddings))
            self.lora_B = jt.zeros((self.embedding_dim, self.r))
            self.reset_lora_parameters()
            self.weight.stop_grad()

    def reset_lora_parameters(self) -> None:
        """A zero, B standard normal."""
        assign(self.lora_A, jt.zeros(self.lora_A.shape))
        assign(self.lora_B, jt.randn(*self.lora_B.shape))

    def delta_weight(self) -> jt.Var:
        A, B = self.lora_A.float32(), self.lora_B.float32()
        return jt.matmul(A.transpose(0, 1), B.transpose(0, 1)) * self.scaling

    def execute(self, x: jt.Var) -> jt.Var:
        y = self._frozen()[x]
        if not self._adds_lora:
            return y
        rows = self.lora_A.transpose(0, 1)[x]  # (..., r)
        if self.padding_idx is not None:
            # As in PyTorch, the padding entry is looked up but never learns.
            keep = (x != self.padding_idx).float32().unsqueeze(-1)
            rows = rows * keep + rows.detach() * (1 - keep)
        return y + _cast(nn.matmul_transpose(rows * self.scaling, self.lora_B), y.dtype)


class ConvLoRA(LoRALayer, nn.Module):
    """Shared part of `Conv1d`, `Conv2d` and `Conv3d`: a convolution with a low-rank change.

    The base layer is ``conv`` (its parameters are saved as ``conv.weight`` and ``conv.bias``). As
    in loralib the change is ``B A`` reshaped to the kernel's shape, with
    ``lora_A (r * k, in * k)`` and ``lora_B (out / groups * k^(dims - 1), r * k)``. For `Conv2d`
    these are loralib's shapes; for the others loralib's fit only k = 1, where they agree. There is
    no dropout on the LoRA branch, since there is no separate branch.
    """

    dims: int
    base_class: type

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs,
    ):
        if not isinstance(kernel_size, int):
            raise UserError(f"kernel_size must be one whole number, not {kernel_size!r}")
        self._init_lora(r, lora_alpha, lora_dropout, merge_weights)
        self.conv = self.base_class(in_channels, out_channels, kernel_size, **kwargs)
        if r > 0:
            k = kernel_size
            self.lora_A = jt.zeros((r * k, in_channels * k))
            rows = out_channels // self.conv.groups * k ** (self.dims - 1)
            self.lora_B = jt.zeros((rows, r * k))
            self.reset_lora_parameters()
            self.weight.stop_grad()

    @property
    def weight(self) -> jt.Var:
        return self.conv.weight

    @property
    def bias(self) -> jt.Var | None:
        return self.conv.bias

    def reset_lora_parameters(self) -> None:
        """A uniform in +-1/sqrt(columns) (kaiming_uniform with a = sqrt(5)), B zero."""
        _kaiming_uniform(self.lora_A)
        assign(self.lora_B, jt.zeros(self.lora_B.shape))

    def to_base(self) -> nn.Module:
        """The plain convolution with this layer's weight (merged or not, as it is now)."""
        return self.conv

    def delta_weight(self) -> jt.Var:
        change = jt.matmul(self.lora_B.float32(), self.lora_A.float32()) * self.scaling
        return change.reshape(self.weight.shape)

    def execute(self, x: jt.Var) -> jt.Var:
        weight = self._frozen()
        if self._adds_lora:
            weight = weight + _cast(self.delta_weight(), weight.dtype)
        return self._convolve(x, weight)

    def _convolve(self, x: jt.Var, weight: jt.Var) -> jt.Var:
        conv = self.conv
        function = nn.conv3d if self.dims == 3 else nn.conv2d
        return function(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class Conv1d(ConvLoRA):
    """``(B, in, L) -> (B, out, L')`` (loralib's ``Conv1d``)."""

    dims = 1
    base_class = nn.Conv1d

    def _convolve(self, x, weight):
        # Jittor's own Conv1d is a Conv2d with a last dimension of 1, and so are its settings.
        return super()._convolve(x.unsqueeze(-1), weight.unsqueeze(-1)).squeeze(-1)


class Conv2d(ConvLoRA):
    """``(B, in, H, W) -> (B, out, H', W')`` (loralib's ``Conv2d``)."""

    dims = 2
    base_class = nn.Conv2d


class Conv3d(ConvLoRA):
    """``(B, in, D, H, W) -> (B, out, D', H', W')`` (loralib's ``Conv3d``)."""

    dims = 3
    base_class = nn.Conv3d


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze all but the LoRA parameters and the asked-for biases.

    Args:
        bias: "none"; "all" biases of the model; "lora_only", those of LoRA layers.

    Raises:
        UserError: another value of ``bias``.
    """
    biases = bias_names(model, bias)
    set_trainable(model, {n for n, _ in model.named_parameters() if "lora_" in n} | biases)


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, jt.Var]:
    """The LoRA parameters of ``model`` by name, with the asked-for biases.

    Args and Raises: as `mark_only_lora_as_trainable`.
    """
    biases = bias_names(model, bias)
    return {n: p for n, p in model.state_dict().items() if "lora_" in n or n in biases}


def set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Make exactly the parameters called ``names`` trainable, also across eval() and train().

    Jittor's ``eval()`` notes on each module whose gradients it stopped and ``train()`` restarts
    those: notes made before are dropped here, else the next ``train()`` would un-freeze the base.
    """
    names = set(names)
    for module in model.modules():
        module.__dict__.pop("backup_grad_state", None)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.start_grad()
        else:
            parameter.stop_grad()


def bias_names(model: nn.Module, bias: str) -> set[str]:
    """Names of the biases that "none", "all" or "lora_only" (those of LoRA layers) stands for."""
    if bias == "none":
        return set()
    names = {name for name, _ in model.named_parameters() if "bias" in name}
    if bias == "all":
        return names
    if bias == "lora_only":
        layers = [m for m in model.modules() if isinstance(m, LoRALayer) and m.has_adapter]
        owned = {id(m.bias) for m in layers if getattr(m, "bias", None) is not None}
        return {name for name, parameter in model.named_parameters() if id(parameter) in owned}
    raise UserError(f'bias must be "none", "all" or "lora_only", not {bias!r}')


def assign(parameter: jt.Var, values: jt.Var) -> None:
    """Give ``parameter`` new values and leave its being trainable or not as it is.

    Jittor's ``update`` alone would freeze it wherever ``values`` has no gradient.
    """
    stopped = parameter.is_stop_grad()
    parameter.update(values.clone())
    if not stopped:
        parameter.start_grad()


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


def _kaiming_uniform(parameter: jt.Var) -> None:
    """Uniform in +-1/sqrt(columns): what kaiming_uniform gives for a = sqrt(5)."""
    bound = 1 / math.sqrt(parameter.shape[1])
    assign(parameter, (jt.rand(*parameter.shape) * 2 - 1) * bound)


def _identity(x: jt.Var) -> jt.Var:
    return x


def _cast(x: jt.Var, dtype: str) -> jt.Var:
    return x if x.dtype == dtype else x.cast(dtype)
