"""The engine over a tiny GPT-2 and its adapters, by the real rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from needs import needs_bf16
from test_scheduler import some_request
from test_serving_engine import LONG, Answer
from tiny_models import randomise_adapter

from jlora import engine as speed
from jlora.adapters import LoraConfig, get_peft_model
from jlora.decoding.beam import BeamConfig, beam_search
from jlora.decoding.native_weights import require_native
from jlora.decoding.requests import Request
from jlora.decoding.sampling import GenerateConfig, generate
from jlora.models.hub import load
from jlora.runs.adapter_file import AdapterFile, open_model
from jlora.serving.engine import Engine
from jlora.system.errors import UserError

pytestmark = needs_bf16

ADAPTERS = {
    "a": {"target_modules": ["c_attn", "c_fc"], "r": 2, "lora_alpha": 8},
    "b": {"target_modules": ["c_attn"], "r": 4, "enable_lora": [True, False, True]},
    "c": {"target_modules": ["c_proj", "c_fc"], "r": 8, "use_rslora": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model and its adapters."""
    place = tmp_path_factory.mktemp("served")
    found = {"model": tiny.write_model(place / "model")}
    broken = {"dora": {"target_modules": ["c_attn"], "r": 2, "use_dora": True}}
    for seed, (name, settings) in enumerate({**ADAPTERS, **broken}.items()):
        model = get_peft_model(load(found["model"]), LoraConfig(**settings))
        randomise_adapter(model, seed, 0.2).save_pretrained(place / name)
        found[name] = place / name
    return found


def opened(folders, precision, **settings):
    engine = Engine(str(folders["model"]), precision=precision, **settings)
    for name in ADAPTERS:
        engine.add_adapter(name, folders[name]).result(LONG)
    return engine


def told(engine, request):
    answer = Answer()
    engine.submit(request, answer)
    return answer


def result(answer):
    assert answer.wait().last.kind == "end", answer.last.error
    return answer.result, answer.logprobs, answer.tops, answer.prompt


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_mix_gets_bit_for_bit_what_each_gets_alone(precision, folders):
    random = np.random.default_rng(3)
    shared = [random.integers(0, 400, 30) for _ in range(2)]
    requests = []
    for number in range(24):
        request = replace(some_request(random, shared=shared), constraint=None)
        scored = 2 if request.num_beams == 1 and number % 5 == 0 else None
        adapter = [None, *ADAPTERS][number % 4]
        requests.append(replace(request, adapter=adapter, prompt_logprobs=scored))
    with opened(folders, precision, cache_bytes=0, max_rows=8) as engine:
        expected = [result(told(engine, request)) for request in requests]
    with opened(folders, precision, chunk=16, max_rows=24) as engine:
        answers = [told(engine, request) for request in requests]
        assert [result(answer) for answer in answers] == expected
        # And once more some of them, of whose prompts all but the last token is in the cache now.
        for number in (1, 2, 3, 4):
            answer = told(engine, requests[number])
            assert result(answer) == expected[number]
            assert answer.last.usage.cached == len(requests[number].prompt) - 1


def test_equals_generation_with_the_adapter_alone(folders):
    """Greedy, drawn and by beams: `jlora.decoding` with the adapter on the model."""
    prompts = [[5, 6, 7], list(range(40, 70))]
    settings = ({}, {"temperature": 0.9, "top_p": 0.95}, {"num_beams": 3})
    asked, answers = [], []
    with opened(folders, "fp32") as engine:
        for name in (None, *ADAPTERS):
            for setting in settings:
                for prompt in prompts:
                    request = Request(tuple(prompt), name, (0, 9), 8, **setting)
                    asked.append((name, prompt, setting))
                    answers.append(told(engine, request))
        found = {str(key): answer.wait().result for key, answer in zip(asked, answers)}
    for name in (None, *ADAPTERS):
        adapter = None if name is None else AdapterFile(folders[name])
        model = open_model(str(folders["model"]), adapter)
        speed.prepare(model, "fp32")
        model.eval()
        for setting in settings:
            for prompt in prompts:
                if "num_beams" in setting:
                    config = BeamConfig((0, 9), 3, 1.0, 0, 8)
                    best = beam_search(model, [prompt], config)[0][0]
                else:
                    best = generate(model, [prompt], GenerateConfig((0, 9), 8, **setting))[0]
                expected = (best.text_ids, "stop" if best.finished else "length", best.length)
                assert found[str((name, prompt, setting))] == expected


def test_what_cannot_stand_beside_others_is_refused_by_name(folders, tmp_path):
    with opened(folders, "fp32") as engine:
        for path, text in (
            (folders["dora"], "dora.*jlora merge"),
            (tmp_path / "none", "none"),
            (folders["model"], "model"),
        ):
            with pytest.raises(UserError, match=text):
                engine.add_adapter("new", path).result(LONG)
        assert set(engine.adapters()) == set(ADAPTERS)
        assert told(engine, Request((3,), "a", max_new_tokens=2)).wait().last.kind == "end"
        assert engine.tokenizer.decode([40]) and engine.model_config.max_positions == tiny.CONTEXT


def test_a_model_for_its_own_layers_is_refused_with_the_reason(folders):
    with pytest.raises(UserError, match="precision plain leaves out the native decoder"):
        Engine(str(folders["model"]), precision="plain")
    with pytest.raises(UserError, match="model runs on its own layers.*does not take parts that"):
        require_native(load(folders["model"]))
