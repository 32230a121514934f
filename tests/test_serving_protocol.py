"""Fields, errors and limits of `jlora serve`, as HTTP shows them."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest
from fake_engine import serving, write_served

try:
    import httpx2 as httpx  # what openai's client has become to use
except ImportError:
    import httpx

from jlora.serving.errors import ApiError
from jlora.serving.fields import chat_fields, completion_fields, parse_body
from jlora.serving.messages import read_messages
from jlora.serving.settings import ServeConfig
from jlora.system.errors import UserError

HI = [{"role": "user", "content": "hi"}]
URL = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(folder):
    """The engine, and a function that sends one request to the application."""
    with serving(folder, max_body_mb=0.01, adapters_dir=folder / "adapters") as (engine, app):
        yield engine, lambda *args, **options: ask(app, *args, **options)


@pytest.fixture
def fresh(served):
    engine, send = served
    engine.script = lambda request: "fine"
    engine.requests.clear()
    return engine, send


def ask(app, method: str, path: str, **options):
    """One request, in this process; an error must have OpenAI's form."""

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=URL) as client:
            return await client.request(method, path, **options)

    response = asyncio.run(send())
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and "Traceback" not in response.text
    return response


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


def test_unknown_fields_are_named_in_a_header(fresh):
    _, send = fresh
    body = {"prompt": "a", "guidance": 3, "x\r\ny: z": 1, "é" * 99: 1, "user": "me", "": 1, " ": 1}
    response = send("POST", "/v1/completions", json=body)
    assert response.status_code == 200
    header = response.headers["x-jlora-warning"]
    assert header.startswith("ignored unknown fields: 'guidance', 'x\\r\\ny: z', '\\xe9")
    assert header.endswith("', '', ' '") and "user" not in header


def test_unknown_routes_and_methods(fresh):
    _, send = fresh
    assert send("GET", "/v1/nothing").status_code == 404
    assert send("GET", "/../../etc/passwd").status_code == 404
    assert send("POST", "/v1/completions/").status_code == 404
    refused = send("GET", "/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"
    assert send("DELETE", "/v1/models").status_code == 405


def test_a_model_that_is_not_served(fresh):
    _, send = fresh
    body = {"messages": HI, "model": "talkr"}
    response = send("POST", "/v1/chat/completions", json=body)
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found" and error["param"] == "model"
    assert "did you mean talker?" in error["message"]
    assert send("GET", "/v1/models/talkr").status_code == 404
    message = send("GET", "/v1/models/broken").json()["error"]["message"]
    assert "adapter_config.json" in message  # why it was left out at the start


def test_any_content_type_and_the_base_by_default(fresh):
    engine, send = fresh
    for model in ({}, {"model": None}, {"model": "default_model"}, {"model": "base"}):
        raw = json.dumps({"prompt": "a", **model})
        response = send(
            "POST", "/v1/completions", content=raw, headers={"content-type": "text/plain"}
        )
        assert response.json()["model"] == "base"
    assert {request.adapter for request in engine.requests} == {None}


def test_a_body_that_is_too_large(fresh):
    engine, send = fresh
    large = json.dumps({"prompt": "a" * 11_000}).encode()

    async def pieces():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    for content in (large, pieces()):
        response = send("POST", "/v1/completions", content=content)
        assert response.status_code == 413 and "max-body-mb" in response.text
    lie = send("POST", "/v1/completions", content=b"{}", headers={"content-length": "9" * 30})
    assert lie.status_code == 413
    assert engine.requests == []


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": ["a", ""]}, "prompt[1]", "no tokens"),
        ({"prompt": [-1]}, "prompt", "vocabulary"),
        ({"prompt": [402]}, "prompt", "vocabulary"),
        ({"prompt": [10**20]}, "prompt", "vocabulary"),
        ({"prompt": [1] * 129}, "prompt", "context is 128"),
        ({"prompt": [1] * 100, "max_tokens": 30}, "prompt", "30 are asked for"),
        ({"prompt": "a", "logit_bias": {"402": 1}}, "logit_bias", "vocabulary"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit(fresh, body, param: str, text: str):
    engine, send = fresh
    response = send("POST", "/v1/completions", json=body)
    assert response.status_code == 400 and text in response.text
    assert response.json()["error"]["param"] == param
    assert engine.requests == []


def test_the_longest_answer_that_fits(fresh):
    engine, send = fresh
    send("POST", "/v1/completions", json={"prompt": [1] * 100})
    send("POST", "/v1/completions", json={"prompt": [1] * 128, "max_tokens": 0, "echo": True})
    assert [request.max_new_tokens for request in engine.requests] == [29, 0]


def test_all_settings_reach_the_engine(fresh):
    engine, send = fresh
    body = {
        "prompt": [5], "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": -0.3,
        "logit_bias": {"7": -100}, "logprobs": 2, "seed": 11, "no_repeat_ngram_size": 3,
    }  # fmt: skip
    assert send("POST", "/v1/completions", json=body).status_code == 200
    (request,) = engine.requests
    del body["prompt"], body["logprobs"]
    assert request.prompt == (5,) and request.top_logprobs == 2
    assert request.max_new_tokens == body.pop("max_tokens")
    assert request.logit_bias == {7: -100} and body.pop("logit_bias")
    assert {name: getattr(request, name) for name in body} == body
    send("POST", "/v1/completions", json={"prompt": [5], "num_beams": 4, "length_penalty": 0.6})
    assert (engine.requests[1].num_beams, engine.requests[1].length_penalty) == (4, 0.6)


def test_several_answers_have_seeds_of_their_own_each_time_the_same(fresh):
    engine, send = fresh
    for seed in (3, 3, 4, -1):
        send("POST", "/v1/completions", json={"prompt": "a", "n": 3, "seed": seed})
    seeds = [request.seed for request in engine.requests]
    assert seeds[:3] == seeds[3:6] and seeds[0] == 3
    assert len(set(seeds)) == 9 and min(seeds) >= 0
    engine.requests.clear()
    for _ in range(2):
        send("POST", "/v1/completions", json={"prompt": "a"})
    assert len({request.seed for request in engine.requests}) == 2


def test_a_run_of_a_task_is_asked_as_in_training(fresh):
    engine, send = fresh
    send("POST", "/v1/completions", json={"prompt": "name", "model": "task"})
    send("POST", "/v1/completions", json={"prompt": "name", "model": "talker"})
    first, second = engine.requests
    assert first.prompt == (*second.prompt, 0)  # the separator of its recipe
    assert first.eos_token_ids == (0,) and second.eos_token_ids == (401, 0)
    assert (first.adapter, second.adapter) == ("task", "talker")
    refused = send("POST", "/v1/chat/completions", json={"messages": HI, "model": "task"})
    assert refused.status_code == 400
    assert "trained for the task e2e; ask it by /v1/completions" in refused.text


def test_models_with_root_and_parent(fresh):
    _, send = fresh
    data = send("GET", "/v1/models").json()["data"]
    assert [(each["id"], each["parent"]) for each in data] == [
        ("base", None), ("talker", "base"), ("task", "base"),
    ]  # fmt: skip
    assert data[0]["root"].endswith("base") and data[1]["root"] == "talker"
    assert data[2]["jlora"] == {"chat": False, "task": "e2e"}
    assert send("GET", "/v1/models/talker").json() == data[1]


def test_a_fault_of_the_engine_shows_nothing_of_it(fresh, caplog):
    engine, send = fresh
    engine.script = lambda request: [7, ZeroDivisionError("secret place")]
    for stream in (False, True):
        response = send("POST", "/v1/completions", json={"prompt": "a", "stream": stream})
        assert "secret" not in response.text and "its log says why" in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    assert caplog.text.count("ZeroDivisionError: secret place") == 2


def test_a_template_that_refuses(fresh, folder):
    _, send = fresh
    body = {"messages": HI, "chat_template_kwargs": {"x": [["y"]]}}
    assert send("POST", "/v1/chat/completions", json=body).status_code == 200
    body = {"messages": [{"role": "user", "content": "a" * 900}]}
    response = send("POST", "/v1/chat/completions", json=body)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_metrics_count_by_route_status_and_model(folder):
    with serving(folder) as (_, app), serving(folder) as (_, other):
        ask(app, "POST", "/v1/completions", json={"prompt": "a"})
        ask(app, "POST", "/v1/completions", json={"prompt": "a", "model": "../x"})
        ask(app, "GET", "/nothing")
        text = ask(app, "GET", "/metrics").text
        assert "v1/completions" not in ask(other, "GET", "/metrics").text
    counted = 'jlora_requests_total{model="base",route="/v1/completions",status="200"} 1.0'
    assert counted in text
    assert 'route="/v1/completions",status="404"} 1.0' in text and "../x" not in text
    assert 'route="none",status="404"} 1.0' in text
    assert 'jlora_prompt_tokens_total{model="base"} 1.0' in text
    assert 'jlora_generated_tokens_total{model="base"} 4.0' in text
    assert 'jlora_time_to_first_token_seconds_count{model="base"} 1.0' in text
    assert "jlora_rows 0.0" in text and "jlora_cache_bytes 0.0" in text


def test_the_page_is_open_and_prompts_are_not(folder):
    with serving(folder, api_key="sesame") as (_, app):
        page = ask(app, "GET", "/")
        assert page.status_code == 200 and "default-src 'none'" in str(page.headers)
        assert ask(app, "GET", "/health").json() == {"status": "ok"}
        for path in ("/v1/models", "/metrics", "/nothing"):
            assert ask(app, "GET", path).status_code == 401
        for given in ("", "sesame", "Bearer", "Bearer sesam", "Bearer sesame2", "Basic sesame",
                      "Bearer s\xe9same"):  # fmt: skip
            headers = {"authorization": given.encode("latin-1")}
            assert ask(app, "GET", "/v1/models", headers=headers).status_code == 401
        for given in ("Bearer sesame", "bearer  sesame"):
            headers = {"authorization": given, "host": "elsewhere.example"}
            assert ask(app, "GET", "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8080"}, 200), ({"host": "[::1]:8080"}, 200),
        ({"host": "127.0.0.1"}, 200), ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:8080"}, 403), ({"host": "0.0.0.0:8080"}, 403),
        ({"host": "localhost.evil.example"}, 403), ({"host": ""}, 403),
        ({"origin": URL}, 200), ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403), ({"origin": "http://127.0.0.1:9"}, 403),
        ({"origin": "http://friend.example"}, 200),
    ],
)  # fmt: skip
def test_without_a_key_other_pages_of_the_browser_may_not_ask(folder, headers, status: int):
    with serving(folder, cors=("http://friend.example",)) as (_, app):
        response = ask(app, "POST", "/v1/completions", json={"prompt": "a"}, headers=headers)
        assert response.status_code == status
        allowed = response.headers.get("access-control-allow-origin")
        friend = headers.get("origin") == "http://friend.example"
        assert allowed == ("http://friend.example" if friend else None)


def test_cors_is_off_unless_named(folder):
    preflight = {"origin": "http://a.example", "access-control-request-method": "POST"}
    with serving(folder) as (_, app):
        response = ask(app, "OPTIONS", "/v1/completions", headers=preflight)
        assert response.status_code == 403
    with serving(folder, api_key="k") as (_, app):
        response = ask(app, "OPTIONS", "/v1/completions", headers=preflight)
        assert response.status_code == 405 and "access-control-allow-origin" not in response.headers
    with serving(folder, api_key="k", cors=("http://a.example",)) as (_, app):
        response = ask(app, "OPTIONS", "/v1/completions", headers=preflight)
        assert response.headers["access-control-allow-origin"] == "http://a.example"


def change(app, verb: str, **body):
    return ask(app, "POST", f"/v1/{verb}_lora_adapter", json=body)


def test_adapters_change_only_where_that_is_allowed(folder):
    with serving(folder, adapters_dir=folder / "adapters") as (_, app):
        assert change(app, "load", lora_name="x", lora_path="talker").status_code == 403
        assert change(app, "unload", lora_name="talker").status_code == 403


@pytest.fixture
def changing(folder):
    options = {"adapters_dir": folder / "adapters", "allow_adapter_changes": True}
    with serving(folder, **options) as (engine, app):
        yield engine, app


def test_adapters_come_and_go(changing, folder):
    engine, app = changing
    assert change(app, "load", lora_name="new", lora_path="talker").status_code == 200
    body = {"messages": HI, "model": "new"}
    assert ask(app, "POST", "/v1/chat/completions", json=body).status_code == 200
    again = change(app, "load", lora_name="new", lora_path="talker")
    assert again.status_code == 400 and "load_inplace" in again.text
    whole = str(folder / "adapters" / "task")
    assert change(
        app, "load", lora_name="new", lora_path=whole, load_inplace=True
    ).status_code == 200  # fmt: skip
    assert ask(app, "GET", "/v1/models/new").json()["jlora"]["task"] == "e2e"
    assert change(app, "unload", lora_name="new").status_code == 200
    assert change(app, "unload", lora_name="new").status_code == 404
    assert change(app, "unload", lora_name="base").status_code == 400


def test_an_adapter_that_cannot_be_served_leaves_the_old_one(changing):
    engine, app = changing

    def broken(path):
        raise UserError(f"{path}: rank 3 does not fit")

    engine.broken = broken
    for name, again in (("new", False), ("talker", True)):
        response = change(app, "load", lora_name=name, lora_path="task", load_inplace=again)
        assert response.status_code == 400 and "rank 3 does not fit" in response.text
    assert ask(app, "GET", "/v1/models/new").status_code == 404
    assert ask(app, "GET", "/v1/models/talker").json()["jlora"]["chat"]


@pytest.mark.parametrize(
    "body",
    [
        {}, {"lora_name": "x"}, {"lora_name": "", "lora_path": "talker"},
        {"lora_name": "a b", "lora_path": "talker"}, {"lora_name": "a\n", "lora_path": "talker"},
        {"lora_name": "x" * 129, "lora_path": "talker"}, {"lora_name": 3, "lora_path": "talker"},
        {"lora_name": "base", "lora_path": "talker"},
        {"lora_name": "default_model", "lora_path": "talker"},
        {"lora_name": "x", "lora_path": ["talker"]}, {"lora_name": "x", "lora_path": "broken"},
    ],
)  # fmt: skip
def test_changes_that_are_wrong(changing, body):
    _, app = changing
    assert change(app, "load", **body).status_code == 400


@pytest.mark.parametrize(
    "given",
    ["..", ".", "", "../base", "talker/../../base", "/etc", "~", "nothing", "link", "loop", "a\0b",
     "half", "talker/adapter_config.json", "x" * 5000],
)  # fmt: skip
def test_no_path_leaves_the_folder_of_adapters(tmp_path, folder, given: str):
    shutil.copytree(folder / "adapters", tmp_path / "adapters")
    adapters = tmp_path / "adapters"
    (adapters / "link").symlink_to(folder / "adapters" / "talker")
    (adapters / "loop").symlink_to(adapters / "loop")
    (adapters / "half").mkdir()
    (adapters / "half" / "adapter_config.json").symlink_to(
        folder / "adapters" / "talker" / "adapter_config.json"
    )
    with serving(folder, adapters_dir=adapters, allow_adapter_changes=True) as (_, app):
        response = change(app, "load", lora_name="x", lora_path=given)
        assert response.status_code == 400 and response.json()["error"]["param"] == "lora_path"
        assert "link" not in ask(app, "GET", "/v1/models").text


def test_a_named_adapter_that_is_broken_ends_the_start(folder):
    for name, path, text in (
        ("x", folder / "adapters" / "broken", "adapter_config.json"),
        ("x", folder / "nothing", "no folder"),
        ("base", folder / "adapters" / "talker", "served already"),
        ("a b", folder / "adapters" / "talker", "no name"),
    ):
        with pytest.raises(UserError, match=text), serving(folder, adapters={name: path}):
            pass


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


def test_prompts_are_printed_only_when_asked_for(folder, capsys, caplog):
    for asked in (False, True):
        with serving(folder, log_prompts=asked) as (_, app):
            ask(app, "POST", "/v1/completions", json={"prompt": "my secret"})
        captured = capsys.readouterr()
        assert ("my secret" in captured.err + captured.out) == asked
    assert "secret" not in caplog.text


def test_more_answers_than_ever_fit(folder):
    with serving(folder, max_rows=2, queue=3) as (engine, app):
        response = ask(app, "POST", "/v1/completions", json={"prompt": ["a", "b"], "n": 3})
        assert response.status_code == 413 and "takes 5 at once" in response.text
        assert engine.requests == []
