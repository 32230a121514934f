"""Leaf layers whose arithmetic is one operator; parameters and names are the plain layers'."""

from __future__ import annotations

from jlora.kernels import attention, elementwise
from jlora.models import attention as models_attention
from jlora.models import gemma, gpt2, llama, rope
from jlora.system.runtime import nn


class FusedAttention(models_attention.CausalAttention):
    reads_streams = True

    def execute(self, q, k, v, keys=None):
        return attention.causal_attention(q, k, v, keys, self.scale, self.window, self.cap)


class FusedRMSNorm(llama.RMSNorm):
    def execute(self, x):
        return elementwise.rms_norm(x, self.weight, self.eps, self.offset)


class FusedLayerNorm(gpt2.LayerNorm):
    def execute(self, x):
        return elementwise.layer_norm(x, self.weight, self.bias, self.eps)


class FusedSwiGLU(llama.SwiGLU):
    def execute(self, gate, up):
        return elementwise.swiglu(gate, up)


class FusedGEGLU(gemma.GEGLU):
    def execute(self, gate, up):
        return elementwise.geglu(gate, up)


class FusedGELU(gpt2.GELU):
    def execute(self, x):
        return elementwise.gelu(x)


class FusedRotary(rope.Rotary):
    def execute(self, x, cos, sin):
        return elementwise.rotary(x, cos, sin)


class FusedInterleavedRotary(rope.InterleavedRotary):
    def execute(self, x, cos, sin):
        return elementwise.rotary(x, cos, sin, True)


class TrainedEmbedding(nn.Embedding):
    def execute(self, x):
        return elementwise.embedding(self.weight, x.int32())


class StreamAttention(models_attention.CausalAttention):
    """On a GPU: the fused block reads streams; without it, this is the plain layer with a mask."""

    reads_streams = True


FUSED = {
    models_attention.CausalAttention: FusedAttention,
    llama.SwiGLU: FusedSwiGLU,
    gemma.GEGLU: FusedGEGLU,
    gpt2.GELU: FusedGELU,
    rope.Rotary: FusedRotary,
    rope.InterleavedRotary: FusedInterleavedRotary,
    nn.Dropout: elementwise.FusedDropout,
    llama.RMSNorm: FusedRMSNorm,
    gpt2.LayerNorm: FusedLayerNorm,
}
#: On a GPU, where what stands between the products is in the fused block or Jittor's own.
FUSED_ON_GPU = {
    models_attention.CausalAttention: StreamAttention,
    nn.Dropout: elementwise.FusedDropout,
}
