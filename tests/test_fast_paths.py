"""The fast paths compute what they know; a block with anything else in it runs its own layers.

Each change is seen by the plain model; a fast path that ignored it would give the old numbers.
"""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs_bf16
from tiny_models import ids_of, randomise_adapter, wide_gpt2, wide_llama

from jlora import engine
from jlora.adapters import LoraConfig, get_peft_model
from jlora.decoding.decoder import Decoder, decoder_of
from jlora.decoding.native_decoder import NativeDecoder
from jlora.engine.parts import PARTS, is_known
from jlora.layers import Linear
from jlora.models import gpt2, llama
from jlora.system.runtime import jt, nn

pytestmark = needs_bf16

IDS = ids_of((2, 9))
KINDS = ("gpt2", "llama")


def adapted(kind, names=None):
    jt.set_global_seed(0)
    base = wide_gpt2() if kind == "gpt2" else wide_llama()
    names = names or (["c_attn", "c_fc"] if kind == "gpt2" else ["q_proj", "up_proj"])
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    return randomise_adapter(model, scale=0.1)


def last_block(model):
    base = model.get_base_model()
    return base.transformer.h[1] if hasattr(base, "transformer") else base.model.layers[1]


def attention_of(block):
    return block.attn if hasattr(block, "attn") else block.self_attn


def norm_of(block):
    return block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm


# --- changes that a newcomer could make; each changes the numbers ---


def scaled_queries(model, monkeypatch):
    """A parameter more in the attention, read by a changed method, as norms of query and key are.

    The class keeps its name: as if the model's file were edited.
    """
    attention = attention_of(last_block(model))
    attention.q_norm = nn.Module()
    attention.q_norm.weight = jt.array(np.full(1, 2, np.float32)).stop_grad()
    plain = type(attention).execute

    def execute(self, x, *others):
        return plain(self, x * self.q_norm.weight if hasattr(self, "q_norm") else x, *others)

    monkeypatch.setattr(type(attention), "execute", execute)


def subclass_of_a_lora_layer(model, monkeypatch):
    class Doubled(Linear):
        def execute(self, x):
            return 2 * super().execute(x)

    mlp = last_block(model).mlp
    (mlp.c_fc if hasattr(mlp, "c_fc") else mlp.up_proj).__class__ = Doubled


def subclass_of_the_mlp(model, monkeypatch):
    block = last_block(model)

    class Doubled(type(block.mlp)):
        def execute(self, x):
            return 2 * super().execute(x)

    block.mlp.__class__ = Doubled


def subclass_of_the_block(model, monkeypatch):
    block = last_block(model)

    class Doubled(type(block)):
        def execute(self, x, *others):
            return 2 * super().execute(x, *others) - x

    block.__class__ = Doubled


def subclass_of_a_plain_layer(model, monkeypatch):
    block = last_block(model)
    layer = block.mlp.c_proj if hasattr(block, "ln_1") else block.mlp.down_proj

    class Doubled(type(layer)):
        def execute(self, x):
            return 2 * super().execute(x)

    layer.__class__ = Doubled


def replaced_method(model, monkeypatch):
    layer = attention_of(last_block(model))
    plain = layer.execute
    layer.execute = lambda *arguments: 2 * plain(*arguments)


def forward_hook(model, monkeypatch):
    last_block(model).mlp.register_forward_hook(lambda module, inputs, result: 2 * result)


def eps_of_one_norm(model, monkeypatch):
    norm_of(last_block(model)).eps = 100.0


CHANGES = (
    scaled_queries,
    subclass_of_a_lora_layer,
    subclass_of_the_mlp,
    subclass_of_the_block,
    subclass_of_a_plain_layer,
    replaced_method,
    forward_hook,
    eps_of_one_norm,
)


def numbers(model):
    """Loss and the adapter's gradients as one vector, of whole rows, as training runs them."""
    model.train()
    hidden = model.hidden_states(jt.array(IDS)).reshape(18, -1)
    loss = model.target_losses(hidden, jt.array(ids_of((18,), seed=1))).mean()
    gradients = jt.grad(loss, [var for _, var in model.trainable_parameters()])
    return loss.item(), np.concatenate([g.numpy().ravel() for g in gradients])


def decoded(decoder):
    decoder.enter([[3, 1, 4, 1, 5], [2, 7]])
    decoder.advance(np.array([0, 1, 1]), np.array([5, 6, 7]))
    return np.array(decoder.hidden)


def difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_the_fast_paths_do_not_know_is_computed_all_the_same(kind, change, monkeypatch):
    model = adapted(kind)
    _, before = numbers(model)
    change(model, monkeypatch)
    loss, gradient = numbers(model)
    assert difference(gradient, before) > 0.1  # the change shows
    model.eval()
    states = decoded(Decoder(model))

    engine.prepare(model, "bf16")
    fast_loss, fast_gradient = numbers(model)
    assert abs(fast_loss - loss) < 3e-3 * loss
    assert difference(fast_gradient, gradient) < 3e-2
    model.eval()
    decoder = decoder_of(model)
    assert type(decoder) is Decoder
    assert difference(decoded(decoder), states) < 2e-2
    engine.restore(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_as_it_is_takes_the_fast_paths(kind):
    """Else the test above would pass with every fast path gone."""
    model = adapted(kind)
    loss, gradient = numbers(model)
    engine.prepare(model, "bf16")
    fast_loss, fast_gradient = numbers(model)
    assert abs(fast_loss - loss) < 3e-3 * loss and difference(fast_gradient, gradient) < 3e-2
    block = last_block(model)
    assert is_known(block) and any(vars(block)["_plans"].values())
    model.eval()
    assert isinstance(decoder_of(model), NativeDecoder)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_came_after_prepare_are_seen_too(kind):
    model = adapted(kind)
    engine.prepare(model, "bf16")
    block = last_block(model)
    assert is_known(block)
    block.gate = jt.ones((1,))
    assert not is_known(block)
    del block.gate
    assert is_known(block)
    attention_of(block).act = block.mlp.act  # a part that is known elsewhere
    assert not is_known(block)


def test_a_norm_of_another_kind_is_not_known():
    model = adapted("gpt2")
    engine.prepare(model, "bf16")
    block = last_block(model)
    block.ln_1 = llama.RMSNorm(64, 1e-5)
    engine.prepare(model, "bf16")
    assert type(block.ln_1) in PARTS and not is_known(block)


def test_a_hook_on_the_head_counts_in_the_loss():
    model = adapted("llama")
    model.head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    loss, gradient = numbers(model)
    engine.prepare(model, "bf16")
    fast_loss, fast_gradient = numbers(model)
    assert abs(fast_loss - loss) < 3e-3 * loss
    assert difference(fast_gradient, gradient) < 3e-2
    assert decoder_of(model.base_model).model.head is None


def test_every_plain_block_has_its_parts_listed():
    """A parameter added to a family's block is added here as well, or its blocks run unfused."""
    for base, kind in ((wide_gpt2(), gpt2.Block), (wide_llama(), llama.Block)):
        engine.prepare(base, "fp32")
        blocks = [module for module in base.modules() if type(module) is kind]
        assert len(blocks) == 2 and all(map(is_known, blocks))
        engine.restore(base)
