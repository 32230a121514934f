"""`Conv1d`, `Conv2d` and `Conv3d`: LoRA on convolutions, for whoever builds models by hand.

They are here for loralib's sake: language models have no convolutions, so adapters
(`jlora.adapters`) place none, and variants of LoRA do not apply to them.
"""

from __future__ import annotations

from jlora.layers.base import LoRALayer, assign, cast, kaiming_uniform
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


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
        kaiming_uniform(self.lora_A)
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
            weight = weight + cast(self.delta_weight(), weight.dtype)
        return self._convolve(x, weight)

    def _convolve(self, x: jt.Var, weight: jt.Var) -> jt.Var:
        conv = self.conv
        return nn.conv2d(
            x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )


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

    def _convolve(self, x, weight):
        # Group by group: the grouped case of Jittor 1.3.11's own conv3d fails on the CPU.
        conv = self.conv
        inner, outer = x.shape[1] // conv.groups, weight.shape[0] // conv.groups
        parts = [
            nn.conv3d(
                x[:, g * inner : (g + 1) * inner], weight[g * outer : (g + 1) * outer], None,
                conv.stride, conv.padding, conv.dilation,
            )
            for g in range(conv.groups)
        ]  # fmt: skip
        y = jt.concat(parts, dim=1)
        return y if conv.bias is None else y + conv.bias.reshape(1, -1, 1, 1, 1)
