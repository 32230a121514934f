"""`Embedding`: LoRA on a table of vectors."""

from __future__ import annotations

from jlora.layers.base import LoRALayer, assign
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


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
        """LoRA around an existing embedding, whose weight it shares.

        Raises:
            UserError: it limits the norm of its rows, as those of Jittor 2.0 can.
        """
        if getattr(base, "max_norm", None) is not None:
            raise UserError(f"cannot put LoRA around an embedding with max_norm={base.max_norm}")
        layer = cls.__new__(cls)
        layer._init_lora(r, lora_alpha, 0.0, merge_weights)
        layer.num_embeddings, layer.embedding_dim = base.weight.shape
        layer.padding_idx = getattr(base, "padding_idx", None)
        layer.put_on(base)
        layer._add_lora_parameters()
        layer.is_train = base.is_training()
        return layer

    def to_base(self) -> nn.Embedding:
        """The plain embedding with this layer's weight (merged or not, as it is now)."""
        base = nn.Embedding(1, 1)  # with all that this Jittor's has besides
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

    def base_output(self, x: jt.Var) -> jt.Var:
        return self._frozen()[x]

    def execute(self, x: jt.Var) -> jt.Var:
        y = self.base_output(x)
        return self.variant.forward(self, x, y) if self._adds_lora else y

    def low_rank(self, x: jt.Var, dropout: bool = True) -> jt.Var:
        """int ``(...)`` -> ``(..., dim)``; there is no dropout."""
        rows = self.lora_A.transpose(0, 1)[x]  # (..., r)
        if self.padding_idx is not None:
            # As in PyTorch, the padding entry is looked up but never learns.
            keep = (x != self.padding_idx).float32().unsqueeze(-1)
            rows = rows * keep + rows.detach() * (1 - keep)
        return nn.matmul_transpose(rows * self.scaling, self.lora_B)
