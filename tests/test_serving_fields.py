"""What the fields of a request may be, and the settings of `jlora serve`."""

from __future__ import annotations

import json

import pytest
from fake_engine import HI

from jlora.serving.body import parse_body
from jlora.serving.errors import ApiError
from jlora.serving.fields import chat_fields, completion_fields
from jlora.serving.messages import read_messages
from jlora.serving.settings import ServeConfig
from jlora.system.errors import UserError


def test_defaults_are_those_of_mlx_lm_and_openai():
    fields = chat_fields({"messages": HI})
    assert (fields.temperature, fields.top_p, fields.top_k, fields.min_p) == (0, 1, 0, 0)
    assert (fields.repetition_penalty, fields.n, fields.seed, fields.stop) == (1, 1, None, ())
    assert (fields.max_tokens, fields.logprobs, fields.num_beams) == (None, None, 1)
    assert fields.tool_choice == "none" and fields.parallel_tool_calls


def test_null_is_the_default():
    fields = chat_fields({"messages": HI, "temperature": None, "stop": None, "tools": None})
    assert fields.temperature == 0 and fields.stop == () and fields.tools == ()


def test_both_names_of_max_tokens():
    both = {"messages": HI, "max_tokens": 7, "max_completion_tokens": 5}
    assert chat_fields(both).max_tokens == 5
    assert completion_fields({"prompt": "a", "max_tokens": 0}).max_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_the_four_forms_of_a_prompt(prompt, found):
    assert completion_fields({"prompt": prompt}).prompts == found


@pytest.mark.parametrize(
    ("logprobs", "top", "found"),
    [
        (None, None, None),
        (0, None, 0),
        (5, None, 5),
        (True, 3, 3),
        (True, None, 0),
        (False, 3, None),
    ],
)
def test_logprobs_of_completions_in_openais_form_and_in_mlx_lms(logprobs, top, found):
    values = {"prompt": "a", "logprobs": logprobs, "top_logprobs": top}
    assert completion_fields(values).logprobs == found


WRONG = [
    ("temperature", True), ("temperature", "1"), ("temperature", -1), ("temperature", 10**400),
    ("temperature", 1e999), ("top_p", 2), ("top_k", 1.5), ("top_k", -2), ("min_p", -0.1),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2.5), ("max_tokens", True),
    ("max_tokens", 10**30), ("n", 0), ("n", 129), ("n", "2"), ("seed", 1.5), ("seed", True),
    ("seed", 2**63), ("stop", ""), ("stop", [1]), ("stop", ["a"] * 17), ("stop", {}),
    ("stream", 1), ("stream", "true"), ("logit_bias", [1]), ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 101}), ("logit_bias", {"1": True}), ("logit_bias", {"²": 1}),
    ("logprobs", 1), ("top_logprobs", 21), ("top_logprobs", 2), ("presence_penalty", 2.1),
    ("frequency_penalty", -3), ("repetition_penalty", -1), ("repetition_penalty", 1e-300),
    ("response_format", "json"), ("response_format", {"type": "xml"}), ("response_format", {}),
    ("response_format", {"type": "json_schema"}), ("model", 3), ("num_beams", 0),
    ("num_beams", 65), ("length_penalty", 11), ("no_repeat_ngram_size", -1),
    ("logit_bias", {str(token): 1 for token in range(1001)}),
    ("stream_options", {"include_usage": True}), ("tools", {}), ("tools", [1]),
    ("tools", [{"type": "function", "function": {}}]), ("tool_choice", "required"),
    ("tool_choice", "some"), ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("chat_template_kwargs", []), ("chat_template_kwargs", {"messages": []}),
    ("parallel_tool_calls", 1), ("max_completion_tokens", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_refused_by_its_name(name: str, value):
    with pytest.raises(ApiError) as caught:
        chat_fields({"messages": HI, name: value})
    assert name in str(caught.value) and caught.value.param == name
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("best_of", 2, "n"), ("suffix", "x", "put in"), ("functions", [{}], "tools"),
        ("function_call", {"name": "f"}, "tool_choice"), ("audio", {}, "text"),
        ("modalities", ["text", "audio"], "text"), ("adapters", "a", "model"),
        ("xtc_probability", 0.5, "XTC"), ("repetition_context_size", 20, "whole"),
        ("continue_final_message", True, "completions"), ("min_tokens", 5, "logit_bias"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_with_the_reason(name: str, value, reason: str):
    with pytest.raises(ApiError, match=f"{name} can't be honoured.*{reason}"):
        completion_fields({"prompt": "a", name: value})


def test_what_asks_for_nothing_is_taken():
    values = {"best_of": 1, "suffix": "", "functions": [], "modalities": ["text"], "user": "me"}
    assert completion_fields({"prompt": "a", **values}).ignored == ()


@pytest.mark.parametrize("name", ["n", "temperature", "stop", "response_format", "logprobs"])
def test_beams_refuse_what_they_cannot_do(name: str):
    values = {"n": 2, "temperature": 1, "stop": "a", "response_format": {"type": "json_object"},
              "logprobs": True}  # fmt: skip
    with pytest.raises(ApiError, match=f"{name} can't be honoured with num_beams 2"):
        chat_fields({"messages": HI, "num_beams": 2, name: values[name]})


@pytest.mark.parametrize(
    "prompt", [[], [[]][:0], 3, {}, [1, "a"], [True], [[1], "a"], [[1.5]], [["a"]], [None]]
)
def test_a_prompt_that_is_none(prompt):
    with pytest.raises(ApiError, match="prompt"):
        completion_fields({"prompt": prompt})


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b"null", b"3", b'"a"', b"{'a': 1}", b'{"a": NaN}', b'{"a": -Infinity}',
        b"\xff\xfe", b'{"a": "\xff"}', b"[" * 10_000, b'{"a":' * 10_000, b'{"a": ' + b"9" * 5000,
        b'{"a": "\\ud800"}', b'{"\\udc00": 1}', b'{"a": [{"b": "\\ud83dx"}]}',
        '{"a": "\\ud800"}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_object(raw: bytes):
    with pytest.raises(ApiError) as caught:
        parse_body(raw)
    assert caught.value.code == "invalid_json"
    json.dumps(caught.value.body()).encode()


def test_json_in_any_of_its_encodings_and_whole_surrogate_pairs():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert parse_body('{"a": "é\\ud83d\\ude00"}'.encode(encoding)) == {"a": "é😀"}


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        (None, "messages"), ([], "messages"), ("hi", "messages"), ([1], r"messages\[0\]"),
        ([{}], "role"), ([{"role": "user"}], "content"), ([{"role": "me", "content": ""}], "role"),
        ([{"role": [], "content": ""}], "role"), ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only parts of type text"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "only parts"),
        ([{"role": "user", "content": "a", "name": 1}], "name"),
        ([{"role": "assistant", "content": None}], "content"),
        ([{"role": "assistant", "tool_calls": [{}]}], "function"),
        ([{"role": "assistant", "tool_calls": {}, "content": 1}], "content"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
         "not JSON"),
        ([{"role": "assistant", "function_call": {}}], "tool_calls"),
    ],
)  # fmt: skip
def test_messages_that_are_none(messages, place: str):
    with pytest.raises(ApiError, match=place):
        read_messages(messages)


def test_messages_in_the_form_of_templates():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    found = read_messages(
        [
            {"role": "developer", "content": [{"type": "text", "text": "a"},
                                              {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ]
    )  # fmt: skip
    assert found[0] == {"role": "system", "content": "ab"}
    assert found[1]["content"] == ""
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert found[2] == {"role": "tool", "content": "3", "tool_call_id": "1"}


def test_unknown_options_of_a_stream_are_named_too():
    options = {"include_obfuscation": False, "every": 3}
    fields = completion_fields({"prompt": "a", "stream": True, "stream_options": options, "x": 1})
    assert fields.ignored == ("stream_options.every", "x")


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 65536}, {"port": -1}, {"max_rows": 0}, {"queue": -1}, {"timeout": 0},
        {"max_body_mb": float("nan")}, {"cache_gb": -1}, {"memory_gb": 0}, {"max_tokens": 0},
        {"api_key": ""}, {"api_key": "a b"}, {"api_key": "é"}, {"allow_adapter_changes": True},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        ServeConfig("m", **settings)


def test_a_key_is_not_shown():
    config = ServeConfig("m", api_key="sesame")
    assert "sesame" not in repr(config)
    with pytest.raises(UserError) as caught:
        ServeConfig("m", api_key="open sesame")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("a.localhost", True), ("0.0.0.0", False), ("::", False), ("10.0.0.1", False),
     ("example.com", False), ("localhost.example.com", False), ("127.0.0.1.example.com", False)],
)  # fmt: skip
def test_loopback_addresses(host: str, local: bool):
    assert ServeConfig("m", host=host).local == local
