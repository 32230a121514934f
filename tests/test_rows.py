"""Rows of many adapters in one step: each is, bit for bit, what it is alone."""

from __future__ import annotations

import numpy as np
import pytest
from needs import needs_products
from tiny_families import tiny
from tiny_models import randomise_adapter, tiny_gpt2, tiny_llama, wide_gpt2, wide_llama

from jlora import LoraConfig, engine
from jlora.adapters import PeftModel
from jlora.decoding import adapter_bank, rows
from jlora.decoding.adapter_bank import AdapterBank
from jlora.decoding.decoder import Decoder
from jlora.decoding.native_decoder import NativeDecoder
from jlora.decoding.native_weights import native_model
from jlora.decoding.rows import Edits, RowDecoder
from jlora.kernels import packed_linear
from jlora.kernels.branches import pack_branch
from jlora.kernels.topk import Draw, log_softmax_topk_numpy
from jlora.system.errors import UserError
from jlora.system.runtime import jt

GPT2 = [
    {"target_modules": ["c_attn", "c_fc"], "r": 2, "lora_alpha": 8},
    {"target_modules": ["c_attn"], "r": 4, "enable_lora": [True, False, True]},
    {"target_modules": ["c_proj", "c_fc"], "r": 3, "rank_pattern": {"h.0.mlp.c_proj": 9}},
]
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA = [
    {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 8},
    {"target_modules": LAYERS, "r": 3, "rank_pattern": {"layers.1.*down_proj": 8}},
    {"target_modules": ["up_proj", "down_proj"], "r": 5, "use_rslora": True},
]
MODELS = {
    "gpt2": (tiny_gpt2, GPT2),
    "llama": (tiny_llama, LLAMA),
    "wide-gpt2": (wide_gpt2, GPT2),
    "wide-llama": (wide_llama, LLAMA),  # layers are joined, and the gate stays in registers
}
KINDS = [kind for kind in packed_linear.KINDS if kind in ("bf16", "int8", "int4")]
PRECISIONS = [
    "fp32",
    *(pytest.param(kind, marks=needs_products(kind)) for kind in KINDS),
]
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [2], [6, 5, 3, 5], [8, 9]]
TOKENS = np.random.default_rng(0).integers(0, 23, (4, 6))  # what each prompt goes on with


class Served:
    """A model, its adapters in a bank, and what each of them gives by itself."""

    def __init__(self, kind: str, precision: str):
        make, adapters = MODELS[kind]
        self.peft = PeftModel(make())
        for number, settings in enumerate(adapters):
            self.peft.add_adapter(str(number), LoraConfig(**settings))
            self.peft.set_adapter(str(number))
            randomise_adapter(self.peft, number)
        self.peft.set_adapter(None)
        engine.prepare(self.peft.base_model, precision)
        self.native = native_model(self.peft.base_model)
        self.bank = AdapterBank(self.native)
        self.slots = [self.bank.add(self.peft._adapters[str(n)]) for n in range(3)]
        self.adapters = [*self.slots, -1]  # of each prompt

    def decoder(self) -> RowDecoder:
        return RowDecoder(self.native, self.peft.base_model, self.bank)

    def alone(self, number: int, steps: int = 6) -> list[np.ndarray]:
        """The states of a prompt and of the tokens after it."""
        decoder = self.decoder()
        prompt = decoder.begin(PROMPTS[number], self.adapters[number])
        decoder.run([prompt], [len(PROMPTS[number])])
        decoder.enter([prompt])
        found = [decoder.hidden[0]]
        for token in TOKENS[number, :steps]:
            decoder.advance([0], [token])
            found.append(decoder.hidden[0])
        return found


@pytest.fixture(scope="module")
def served():
    made: dict[tuple[str, str], Served] = {}

    def get(kind: str, precision: str) -> Served:
        if (kind, precision) not in made:
            made[kind, precision] = Served(kind, precision)
        return made[kind, precision]

    return get


def same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_rows_that_come_and_go_are_what_they_are_alone(kind, precision, served):
    """Prompts in pieces beside steps; rows change places, leave and come."""
    made = served(kind, precision)
    expected = [made.alone(number) for number in range(4)]
    decoder = made.decoder()
    prompts = [decoder.begin(p, s) for p, s in zip(PROMPTS, made.adapters)]
    decoder.run([prompts[3], prompts[0]], [2, 3])
    decoder.enter([prompts[3]])
    decoder.advance([0], TOKENS[3, :1], [prompts[0], prompts[2]], [1, 2])
    same(decoder.hidden[0], expected[3][1])
    decoder.run([prompts[2], prompts[1], prompts[0]], [2, 1, 3])
    decoder.enter([prompts[0], prompts[1], prompts[2]])
    live, steps = [3, 0, 1, 2], [1, 0, 0, 0]
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [1, 3, 0], [2, 1], [1], []):
        for row, number in enumerate(live):
            same(decoder.hidden[row], expected[number][steps[row]])
        live, steps = [live[row] for row in order], [steps[row] + 1 for row in order]
        decoder.advance(order, [TOKENS[n, step - 1] for n, step in zip(live, steps)])
    assert decoder.rows == 0 and decoder.hidden.shape[0] == 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_in_the_bank_is_the_adapter_on_the_model(kind, precision, served):
    """Of float32 weights to the bit; beside packed ones A, B and A x are rounded to bf16."""
    made = served(kind, precision)
    for number, name in enumerate(["0", "1", "2", None]):
        found = made.alone(number, 2)
        made.peft.set_adapter(name)
        try:
            own = native_model(made.peft.base_model)
            assert own.is_adapted == (name is not None)
            native, plain = NativeDecoder(own, made.peft.base_model), Decoder(made.peft.base_model)
            native.enter([PROMPTS[number]])
            plain.enter([PROMPTS[number]])
            for step, state in enumerate(found):
                if step:
                    native.advance(np.array([0]), TOKENS[number, step - 1 : step])
                    plain.advance(np.array([0]), TOKENS[number, step - 1 : step])
                if precision == "fp32" or name is None:
                    same(state, native.hidden[0])
                close(state, native.hidden[0], 0.1 if precision in ("fp32", "bf16") else 0.2)
                close(state, plain.hidden.numpy()[0], 2e-4 if precision == "fp32" else 0.2)
        finally:
            made.peft.set_adapter(None)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("enabled", [(True,), (True, False, True), (False, True)])
def test_the_layout_of_a_branch(enabled, narrow):
    """Read back: of float32 the same numbers, of bf16 within half a unit of its last place."""
    random = np.random.default_rng(0)
    blocks, width, r = sum(enabled), 20, 3  # panels of 16 outputs that two blocks share
    A = random.standard_normal((r * blocks, 40)).astype("f")
    B = random.standard_normal((width * blocks, r)).astype("f")
    packed = pack_branch(A, B, 0.5, enabled, narrow)
    lines, panels = packed.A, packed.B
    if narrow:
        lines, panels = ((x.astype(np.uint32) << 16).view("f") for x in (lines, panels))
        panels = panels.transpose(0, 1, 3, 2)
    found_a = lines.transpose(0, 2, 1, 3).reshape(packed.rank, -1)
    panels = panels.reshape(len(panels), packed.reach, 16)
    found_b = np.zeros((16 * len(panels), packed.rank), "f")
    for number, (first, panel) in enumerate(zip(packed.first, panels)):
        if first >= 0:
            columns = slice(first, first + packed.reach)
            found_b[16 * number : 16 * number + 16, columns] = panel.T
    expected = np.zeros((len(enabled) * width, r * blocks), "f")
    for place, block in enumerate(np.flatnonzero(enabled)):
        own = B[place * width : (place + 1) * width]
        expected[block * width : (block + 1) * width, place * r : (place + 1) * r] = own / 2
    tolerance = 2**-8 if narrow else 0
    for found, wanted in ((found_a, A), (found_b, expected)):
        whole = np.zeros_like(found)
        whole[: wanted.shape[0], : wanted.shape[1]] = wanted
        np.testing.assert_allclose(found, whole, rtol=tolerance, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1, 3])
def test_the_pieces_of_a_prompt_change_nothing(size, precision, served):
    for kind in MODELS:
        made = served(kind, precision)
        prompt = np.random.default_rng(1).integers(0, 23, 20).tolist()
        decoder = made.decoder()
        whole, pieces, other = (decoder.begin(prompt, made.slots[1]) for _ in range(3))
        (states,) = decoder.run([whole], [20], every=True)
        found = []
        while pieces.done < 20:
            count = min(size, 20 - pieces.done)
            others = ([other], [1]) if other.done < 20 else ([], [])
            got = decoder.run([*others[0], pieces], [*others[1], count], every=True)
            found.append(got[-1])
        same(np.concatenate(found), states)
        same(pieces.hidden, whole.hidden)
        same(states[-1], whole.hidden)


def test_beams_of_a_prompt_share_it(served):
    made = served("wide-llama", "fp32")
    decoder = made.decoder()
    prompts = [decoder.begin(p, s) for p, s in zip(PROMPTS[:2], made.slots)]
    decoder.run(prompts, [7, 1])
    decoder.enter(prompts)
    texts = [[], []]
    owner = [0, 1]
    random = np.random.default_rng(2)
    for order in ([0, 0, 1], [1, 0, 1, 2], [3, 0, 2, 0]):  # rows of a prompt apart, too
        tokens = random.integers(0, 23, len(order))
        decoder.advance(order, tokens)
        owner = [owner[row] for row in order]
        texts = [[*texts[row], token] for row, token in zip(order, tokens)]
    for row, (number, text) in enumerate(zip(owner, texts)):
        alone = made.decoder()
        prompt = alone.begin(PROMPTS[number], made.slots[number])
        alone.run([prompt], [len(PROMPTS[number])])
        alone.enter([prompt])
        for token in text:
            alone.advance([0], [token])
        same(decoder.hidden[row], alone.hidden[0])


@pytest.mark.parametrize("kind", ["gpt2", "wide-llama"])
def test_kept_keys_begin_another_prompt(kind, served):
    made = served(kind, "fp32")
    decoder = made.decoder()
    prompt = decoder.begin(PROMPTS[0], made.slots[1])
    decoder.run([prompt], [7])
    decoder.enter([prompt])
    for token in TOKENS[0]:
        decoder.advance([0], [token])
    kept = decoder.keep(0)
    assert kept.tokens == [*PROMPTS[0], *TOKENS[0]] and kept.adapter == made.slots[1]
    assert kept.bytes == decoder.bytes_of(13)
    decoder.advance([], [])  # what was kept does not need the row
    for length in (1, 5, 7, 9, 12):
        tokens = [*kept.tokens[:length], 4, 8]
        fresh, again = (
            decoder.begin(tokens, kept.adapter),
            decoder.begin(tokens, kept.adapter, kept, length),
        )
        assert again.done == length
        decoder.run([fresh, again], [length + 2, 2])
        same(again.hidden, fresh.hidden)
    for adapter, tokens, length in [
        (made.slots[0], kept.tokens + [1], 3),
        (-1, kept.tokens + [1], 3),
        (kept.adapter, [0, 0, 0, 0], 3),
        (kept.adapter, kept.tokens, len(kept.tokens)),
        (kept.adapter, kept.tokens + [1], -1),
        (kept.adapter, kept.tokens + [1, 2], len(kept.tokens) + 1),
    ]:
        with pytest.raises(ValueError, match=r"another adapter|not what was kept"):
            decoder.begin(tokens, adapter, kept, length)


def test_longropes_keys_are_not_taken_beyond_its_limit():
    model = tiny("phi3")  # short angles up to 20 tokens
    engine.prepare(model, "fp32")
    decoder = RowDecoder(native_model(model), model)
    text = np.random.default_rng(3).integers(0, 23, 30).tolist()

    def kept(length):
        prompt = decoder.begin(text[:length])
        decoder.run([prompt], [length])
        decoder.enter([prompt])
        return decoder.keep(decoder.rows - 1)

    for held, length, taken in [(10, 15, 8), (10, 25, 0), (24, 15, 0), (24, 28, 8), (24, 28, 22)]:
        again = decoder.begin(text[:length], kept=kept(held), length=taken or 8)
        assert again.done == taken
        fresh = decoder.begin(text[:length])
        decoder.run([again, fresh], [length - taken, length])
        same(again.hidden, fresh.hidden)
    with pytest.raises(ValueError, match="outgrows"):
        prompt = decoder.begin(text[:20])
        decoder.run([prompt], [20])
        decoder.advance([], [])
        decoder.enter([prompt])
        decoder.advance([0], [1])


EDITS = {
    "none": {},
    "penalties": {
        "penalised": [[3, 3, 22, -1], [], [1, 99]],
        "penalties": np.array([1.5, 1, 0.5], "f"),
    },
    "biases": {"biased": [[4, 4], [22], []], "biases": [[1.5, 2.0], [-100.0], []]},
    "allowed": {"allowed": np.array([[-1], [0b1000100], [0]], np.int32)},
    "banned": {"banned": [[0, 1], list(range(22)), [5]]},
}  # fmt: skip
EDITS["all"] = {name: value for edits in EDITS.values() for name, value in edits.items()}


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("precision", PRECISIONS[:2])
def test_edits_of_each_row(precision, edits, served):
    made = served("wide-llama", precision)
    decoder = made.decoder()
    hidden = np.random.default_rng(4).standard_normal((3, 64)).astype("f")
    with jt.no_grad():
        logits = made.peft.base_model.lm_head_logits(jt.array(hidden)).numpy()
    for k in (1, 5, 23, rows.FUSED_K + 1):
        values, ids = decoder.best_of(hidden, k, Edits(**edits))
        expected, words = log_softmax_topk_numpy(logits, k, **Edits(**edits).arguments())
        close(values, expected, 1e-4)
        same(ids[expected > -np.inf], words[expected > -np.inf])
        if k > rows.FUSED_K:
            continue  # by the model's own logits, of which nothing is promised
        alone = [decoder.best_of(hidden[i : i + 1], k, one(edits, i)) for i in range(3)]
        same(np.concatenate([values for values, _ in alone]), values)


@pytest.mark.parametrize("precision", PRECISIONS[:2])
def test_draws_of_each_row(precision, served):
    made = served("wide-llama", precision)
    decoder = made.decoder()
    hidden = np.random.default_rng(4).standard_normal((3, 64)).astype("f")
    edits = {name: value for name, value in EDITS["all"].items() if name != "allowed"}
    draws = [Draw(0.7, 0.6), Draw(), Draw(1.5, 0.9, top_p=0.95)]
    with jt.no_grad():
        logits = made.peft.base_model.lm_head_logits(jt.array(hidden)).numpy()
    for k in (1, rows.FUSED_K + 1):
        values, ids = decoder.best_of(hidden, k, Edits(**edits), draws)
        plain = Edits(**edits).arguments() | {"draws": draws}
        expected, words = log_softmax_topk_numpy(logits, k, **plain)
        same(ids[:, :2], words[:, :2])
        close(values[:, :2], expected[:, :2], 1e-4)
        alone = [
            decoder.best_of(hidden[i : i + 1], k, one(edits, i), draws[i : i + 1]) for i in range(3)
        ]
        same(np.concatenate([words for _, words in alone]), ids)


def one(edits: dict, row: int) -> Edits:
    return Edits(**{name: value[row : row + 1] for name, value in edits.items()})


def test_edits_that_do_not_fit_are_refused(served):
    decoder = served("wide-llama", "fp32").decoder()
    hidden = np.zeros((2, 64), np.float32)
    for edits in (
        {"banned": [[1]]},
        {"allowed": np.zeros((1, 1), np.int32)},
        {"penalised": [[1], [2]], "penalties": np.ones(3, "f")},
        {"biased": [[1], [2]], "biases": [[1.0, 2.0], [1.0]]},
        {"biased": [[1], [2]], "biases": [[np.inf], [1.0]]},
    ):
        with pytest.raises(ValueError, match=r"edits|finite|broadcast"):
            decoder.best_of(hidden, 1, Edits(**edits))


@pytest.mark.parametrize("precision", PRECISIONS[:2])
def test_log_probabilities_of_given_tokens(precision, served):
    made = served("wide-llama", precision)
    decoder = made.decoder()
    hidden = np.random.default_rng(5).standard_normal((40, 64)).astype("f")
    targets = np.arange(40) % 23
    found = decoder.logprobs_of(hidden, targets)
    values, ids = decoder.best_of(hidden, 23)
    close(found, values[np.arange(40), np.argsort(ids, 1)[np.arange(40), targets]], 1e-5)
    same(found[7:8], decoder.logprobs_of(hidden[7:8], targets[7:8]))
    assert np.isnan(decoder.logprobs_of(hidden[:2], [23, -1])).all()


def test_logits_that_only_the_model_computes(served):
    made = served("wide-llama", "fp32")
    hidden = np.random.default_rng(6).standard_normal((3, 64)).astype("f")
    usual, other = (
        made.decoder(),
        RowDecoder(native_model(made.peft.base_model), made.peft.base_model),
    )
    other._native.head = None
    for found, expected in zip(other.best_of(hidden, 5), usual.best_of(hidden, 5)):
        close(found, expected, 1e-5)
    close(other.logprobs_of(hidden, [1, 2, 3]), usual.logprobs_of(hidden, [1, 2, 3]), 1e-5)


def test_slots_are_taken_again_and_grow_under_live_rows(served):
    made = served("llama", "fp32")
    bank = AdapterBank(made.native)
    first = bank.add(made.peft._adapters["1"])
    decoder = RowDecoder(made.native, made.peft.base_model, bank)
    prompt = decoder.begin(PROMPTS[1], first)
    decoder.run([prompt], [1])
    decoder.enter([prompt])
    slots = [bank.add(made.peft._adapters[str(n % 3)]) for n in range(20)]  # the tables move
    assert slots == list(range(1, 21)) and bank.bytes_of(slots[0]) > 0
    for step in range(3):
        same(decoder.hidden[0], made.alone(1)[step])
        decoder.advance([0], [TOKENS[1, step]])
    bank.remove(slots[4])
    with pytest.raises(ValueError, match="no adapter in slot 5"):
        decoder.begin([1], slots[4])
    assert bank.add(made.peft._adapters["0"]) == slots[4]
    for slot in (-2, 21):
        with pytest.raises(ValueError, match="no adapter in slot"):
            decoder.begin([1], slot)


REFUSED = {
    "dora": ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA|Dora"),
    "biases": ({"target_modules": ["q_proj"], "bias": "all"}, "biases"),
    "copies": ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "ModulesToSave at"),
    "head": ({"target_modules": ["lm_head"]}, "lm_head, outside the blocks"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "Embedding at"),
    "lora-bias": ({"target_modules": ["q_proj"], "lora_bias": True}, "not plain LoRA"),
}


@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_what_is_not_plain_low_rank_is_refused(settings, message):
    peft = PeftModel(tiny_llama(attention_bias=True))
    engine.prepare(peft.base_model, "fp32")
    bank = AdapterBank(native_model(peft.base_model))
    peft.add_adapter("other", LoraConfig(**{"r": 2, **settings}))
    with pytest.raises(UserError, match=f"({message})(.|\n)*jlora merge"):
        bank.add(peft._adapters["other"])


def test_an_adapter_without_branches_in_the_blocks_is_seen_on_the_base():
    peft = PeftModel(tiny_llama())
    peft.add_adapter("head", LoraConfig(**REFUSED["head"][0], r=2))
    peft.set_adapter("head")
    engine.prepare(peft.base_model, "fp32")
    with pytest.raises(UserError, match="take it off"):
        AdapterBank(native_model(peft.base_model))
    with peft.disable_adapter():
        AdapterBank(native_model(peft.base_model))


def test_an_adapter_that_is_on_and_a_gpu_are_refused(served, monkeypatch):
    made = served("llama", "fp32")
    made.peft.set_adapter("0")
    on = native_model(made.peft.base_model)
    made.peft.set_adapter(None)
    with pytest.raises(UserError, match="take it off"):
        RowDecoder(on, made.peft.base_model)
    for module in (rows, adapter_bank):
        monkeypatch.setattr(module, "on_gpu", lambda: True)
    for refuse in (lambda: AdapterBank(made.native), made.decoder):
        with pytest.raises(UserError, match="JLORA_DEVICE=cpu"):
            refuse()


def test_misuse_is_refused(served):
    decoder = served("llama", "fp32").decoder()
    with pytest.raises(ValueError, match="without tokens"):
        decoder.begin([])
    prompt = decoder.begin([1, 2, 3])
    for counts in ([0], [4], [-1]):
        with pytest.raises(ValueError, match="tokens left"):
            decoder.run([prompt], counts)
    with pytest.raises(ValueError, match="twice"):
        decoder.run([prompt, prompt], [1, 1])
    with pytest.raises(ValueError, match="not all run"):
        decoder.enter([prompt])
    assert prompt.done == 0 and decoder.rows == 0
