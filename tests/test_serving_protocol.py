"""Errors, limits and security of `jlora serve`, as HTTP shows them."""

from __future__ import annotations

import json

import pytest
from fake_engine import HI, URL, ask, serving, write_served


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
    assert (first.adapter.split()[0], second.adapter.split()[0]) == ("task", "talker")
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


def nested(depth: int) -> dict:
    found: dict = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize("depth", [100, 300, 900])
def test_nesting_is_refused_or_taken_and_never_a_fault(fresh, depth: int):
    _, send = fresh
    deep = nested(depth)
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    call = {"function": {"name": "f", "arguments": deep}}
    for body in (
        {"tools": [tool], "tool_choice": "none"},
        {"chat_template_kwargs": deep},
        {"messages": [*HI, {"role": "assistant", "tool_calls": [call]}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": deep}}},
        {"logit_bias": deep},
        {"unknown": deep},
    ):
        response = send("POST", "/v1/chat/completions", json={"messages": HI, **body})
        assert response.status_code in (200, 400)


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
