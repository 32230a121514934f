"""`jlora serve` as OpenAI's own client sees it, and as sockets do."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import threading
from operator import itemgetter

import openai
import pytest
import tiny
from fake_engine import logprob_of, serving, write_served

try:
    import httpx2 as httpx  # what openai's client has become to use
except ImportError:
    import httpx

from jlora.serving.answers import Inbox
from jlora.serving.tools import CallReader
from jlora.system.errors import UserError

HI = [{"role": "user", "content": "hi"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "y": {"type": "boolean"}},
                "required": ["x", "y"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": true}}\n</tool_call>'
#: As Qwen's and SmolLM2's: tools in the system prompt, calls between marks.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }} <tool_call>{...}</tool_call>"
    "<|im_end|>\n{% endif %}" + tiny.CHATML
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_served(tmp_path_factory.mktemp("served"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TOOL_TEMPLATE}
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder, context=1024, adapters_dir=folder / "adapters") as found:
        yield found


@pytest.fixture
def engine(served):
    """Says "fine" again."""
    engine = served[0]
    engine.script = lambda request: "fine"
    engine.requests.clear()
    return engine


def talk(app, use):
    """What ``use(client)`` returns, with OpenAI's client asking the application in this process."""

    async def run():
        transport = httpx.ASGITransport(app)
        inner = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")
        async with openai.AsyncOpenAI(
            api_key="none", base_url="http://127.0.0.1/v1", http_client=inner, max_retries=0
        ) as client:
            return await use(client)

    return asyncio.run(run())


def chat(app, **options):
    """A conversation's answer; with ``stream`` the list of its chunks."""

    async def use(client):
        found = await client.chat.completions.create(**{"model": "base", "messages": HI, **options})
        return [chunk async for chunk in found] if options.get("stream") else found

    return talk(app, use)


def complete(app, **options):
    """The same for a text to go on with."""

    async def use(client):
        found = await client.completions.create(**{"model": "base", "prompt": "hi", **options})
        return [chunk async for chunk in found] if options.get("stream") else found

    return talk(app, use)


def test_a_chat_answer(engine, served):
    answer = chat(served[1], model="talker")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "fine")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert (answer.object, answer.model) == ("chat.completion", "talker")
    usage = answer.usage
    assert usage.prompt_tokens == len(engine.requests[0].prompt)
    assert usage.completion_tokens == 4  # f, in, e and the end token
    assert usage.total_tokens == usage.prompt_tokens + 4
    assert usage.prompt_tokens_details.cached_tokens == 0
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert engine.tokenizer.decode(engine.requests[0].prompt, False) == rendered


def test_a_chat_answer_in_pieces(engine, served):
    engine.script = lambda request: "the café is nice 😀 and so on"
    chunks = chat(served[1], stream=True, stream_options={"include_usage": True}, n=2)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *chunks, last = chunks
    assert last.choices == [] and last.usage.completion_tokens > 2 * len("the café is")
    assert all(chunk.usage is None for chunk in chunks)
    for index in (0, 1):
        mine = [each.choices[0] for each in chunks if each.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert [each.delta.role for each in mine[1:]] == [None] * (len(mine) - 1)
        pieces = [each.delta.content or "" for each in mine]
        assert "".join(pieces) == "the café is nice 😀 and so on"
        assert "\ufffd" not in "".join(pieces)
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_usage_is_sent_only_when_asked_for(engine, served):
    chunks = chat(served[1], stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    chunks = complete(served[1], stream=True, stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 2 + 4
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "fine"
    assert chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "stop", "shown", "reason"),
    [
        ("one two three", "two", "one ", "stop"),
        ("one two three", ["hree", "two t"], "one ", "stop"),
        ("one two thr", "three", "one two thr", "stop"),  # the end came, not the stop text
        ("a😀b", "😀", "a", "stop"),
        ("aab", "aab", "", "stop"),
        ("aaab", "aab", "a", "stop"),
    ],
)
def test_stop_texts(engine, served, said, stop, shown, reason, stream: bool):
    engine.script = lambda request: said + " " * 60
    if said.endswith("thr"):
        engine.script = lambda request: said
    found = complete(served[1], stop=stop, stream=stream)
    if stream:
        assert "".join(chunk.choices[0].text for chunk in found) == shown
        assert found[-1].choices[0].finish_reason == reason
        return
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason) == (shown, reason)
    engine.wait_until_idle()
    if not said.endswith("thr"):
        # Counted up to the stop text, although the engine may have gone on for a token or two.
        assert found.usage.completion_tokens < len(engine.tokenizer.encode(said)) + 2


def test_an_answer_that_is_cut(engine, served):
    engine.script = lambda request: "a😀b"
    found = complete(served[1], max_tokens=3)
    assert found.choices[0].finish_reason == "length" and found.usage.completion_tokens == 3
    assert found.choices[0].text.startswith("a")
    assert chat(served[1], max_completion_tokens=1).choices[0].finish_reason == "length"


def test_several_prompts_with_several_answers(engine, served):
    texts = iter(["aa", "ab", "ba", "bb"])
    engine.script = lambda request: next(texts)
    found = complete(served[1], prompt=["x", "y y"], n=2)
    assert [(each.index, each.text) for each in found.choices] == [
        (0, "aa"), (1, "ab"), (2, "ba"), (3, "bb"),
    ]  # fmt: skip
    prompts = [len(request.prompt) for request in engine.requests]
    assert prompts[0] == prompts[1] and prompts[2] == prompts[3] > prompts[0]
    assert found.usage.prompt_tokens == prompts[0] + prompts[2]  # each once


def test_log_probabilities_of_a_chat(engine, served):
    engine.script = lambda request: "é fine"
    found = chat(served[1], logprobs=True, top_logprobs=2)
    content = found.choices[0].logprobs.content
    assert b"".join(bytes(each.bytes) for each in content).decode() == "é fine"
    assert content[0].token == "\\xc3" and content[-1].token == "e"
    tokens = engine.tokenizer.encode("é fine")
    assert [each.logprob for each in content] == [logprob_of(token) for token in tokens]
    assert all(len(each.top_logprobs) == 2 for each in content)
    chunks = chat(served[1], logprobs=True, top_logprobs=2, stream=True)
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [each for part in streamed if part for each in part.content] == content


def test_a_stop_text_has_no_log_probabilities(engine, served):
    engine.script = lambda request: "fine two three"
    found = complete(served[1], logprobs=0, stop="two").choices[0]
    assert found.text == "fine " and found.logprobs.top_logprobs is None
    assert found.logprobs.tokens == ["f", "in", "e", " t"]  # a part of the last one is shown
    assert found.logprobs.text_offset == [0, 1, 3, 4]


def as_lm_eval_does(app, prompts, contexts):
    """Sums of log-probabilities and whether each is the likeliest text, of lm_eval's requests."""
    found = complete(
        app, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    sums = []
    choices = sorted(found.model_dump()["choices"], key=itemgetter("index"))
    for choice, context in zip(choices, contexts):
        scores = choice["logprobs"]["token_logprobs"][context:-1]
        tops = choice["logprobs"]["top_logprobs"][context:-1]
        likeliest = all(score == max(top.values()) for score, top in zip(scores, tops))
        sums.append((sum(scores), likeliest))
    return sums, found


def test_echo_with_log_probabilities_as_lm_eval_asks(engine, served):
    encode = engine.tokenizer.encode
    prompts = [[*encode("name"), *encode(" : x")], [9, 8, 16, 24]]
    sums, found = as_lm_eval_does(served[1], prompts, [1, 1])
    expected = [sum(map(logprob_of, prompt[1:])) for prompt in prompts]
    assert [each[0] for each in sums] == pytest.approx(expected)
    assert [each[1] for each in sums] == [False, True]  # 8, 16, 24 are the fake's likeliest
    assert found.choices[0].text == "name : xf"  # and one token of its own
    first = found.choices[0].logprobs
    assert first.token_logprobs[0] is None and first.top_logprobs[0] is None
    assert first.tokens[:2] == ["name", " :"] and first.text_offset[:3] == [0, 4, 6]
    assert [request.prompt_logprobs for request in engine.requests] == [1, 1]
    assert found.usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [False, True])
def test_echo_of_a_prompt_alone(engine, served, stream: bool):
    options = {"prompt": "a <|im_end|> é", "echo": True, "max_tokens": 0, "logprobs": 0}
    found = complete(served[1], stream=stream, **options)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    assert "".join(choice.text for choice in choices) == "a <|im_end|> é"
    assert choices[-1].finish_reason == "length"
    scores = choices[0].logprobs
    assert scores.tokens[1:3] == [" ", "<|im_end|>"] and scores.text_offset[2:4] == [2, 12]
    assert len(scores.tokens) == len(engine.requests[0].prompt)
    assert "bytes:\\xc3" in scores.tokens
    plain = complete(served[1], prompt=[5, 6], echo=True, max_tokens=1).choices[0]
    assert plain.text == engine.tokenizer.decode([5, 6]) + "f" and plain.logprobs is None


def test_json_of_a_schema(engine, served):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "y": {"enum": ["red", "green"]}},
        "required": ["x", "y"],
        "additionalProperties": False,
    }
    answer = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    engine.script = lambda request: '{"x": 5, "y": "q'
    for found in chat(served[1], response_format=answer, n=2, max_tokens=90).choices:
        value = json.loads(found.message.content)
        assert value["x"] == 5 and value["y"] in ("red", "green")
    engine.script = lambda request: "sure"
    found = complete(served[1], extra_body={"response_format": {"type": "json_object"}})
    assert isinstance(json.loads(found.choices[0].text), dict)
    plain = chat(served[1], response_format={"type": "text"})
    assert plain.choices[0].message.content == "sure"


@pytest.mark.parametrize(
    "schema",
    [{"type": "nothing"}, {"$ref": "#/a"}, {"not": {}}, {"type": "string", "pattern": "("}],
)
def test_a_schema_that_cannot_be_enforced(engine, served, schema):
    answer = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="response_format can't be honoured"):
        chat(served[1], response_format=answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "text", "calls", "reason"),
    [
        (CALL, None, 1, "tool_calls"),
        (f"Let me see.\n\n{CALL}\n{CALL}", "Let me see.", 2, "tool_calls"),
        ("a < b <tool", "a < b <tool", 0, "stop"),
        ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", 0, "stop"),
        ("x <tool_call>{", "x <tool_call>{", 0, "stop"),
    ],
)
def test_calls_of_tools(engine, served, said, text, calls, reason, stream: bool):
    engine.script = lambda request: said
    found = chat(served[1], tools=TOOLS, stream=stream, max_tokens=400)
    if not stream:
        (choice,) = found.choices
        assert choice.message.content == text and choice.finish_reason == reason
        made = choice.message.tool_calls or []
    else:
        choices = [chunk.choices[0] for chunk in found]
        assert "".join(each.delta.content or "" for each in choices) == (text or "")
        assert choices[-1].finish_reason == reason
        made = [call for each in choices for call in each.delta.tool_calls or []]
        assert [call.index for call in made] == list(range(calls))
    assert len(made) == calls and len({call.id for call in made}) == calls
    for call in made:
        assert call.type == "function" and call.function.name == "add"
        assert json.loads(call.function.arguments) == {"x": 1, "y": True}
    assert '"add"' in engine.tokenizer.decode(engine.requests[0].prompt)


def test_one_call_at_most(engine, served):
    engine.script = lambda request: CALL + CALL
    found = chat(served[1], tools=TOOLS, parallel_tool_calls=False, max_tokens=400).choices[0]
    assert len(found.message.tool_calls) == 1 and found.finish_reason == "tool_calls"


def test_tools_that_may_not_be_called(engine, served):
    engine.script = lambda request: CALL
    found = chat(served[1], tools=TOOLS, tool_choice="none", max_tokens=400).choices[0]
    assert found.message.tool_calls is None and found.message.content == CALL
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_tools_that_must_be_called(engine, served, choice):
    engine.script = lambda request: "I would rather not"
    found = chat(served[1], tools=TOOLS[:1], tool_choice=choice, max_tokens=400).choices[0]
    (call,) = found.message.tool_calls
    assert call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"x", "y"}


def test_a_template_that_has_calls_written_otherwise(tmp_path, folder):
    for template, text in (
        (tiny.CHATML, "knows no tools"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}" + tiny.CHATML, "not read here"),
        (TOOL_TEMPLATE + "<function=f>", "not read here"),
    ):
        path = tmp_path / "template.jinja"
        path.write_text(template)
        with serving(folder, chat_template=str(path)) as (engine, app):
            with pytest.raises(openai.BadRequestError, match=text):
                chat(app, tools=TOOLS)
            assert engine.requests == []


def test_a_call_reader_shows_the_same_however_the_text_comes():
    said = f"so < it\n {CALL} \n{CALL}  then<tool"
    whole = CallReader()
    expected = [each for each in whole.add(said, last=True) if isinstance(each, str)]
    assert "".join(expected) == "so < it  then<tool"
    for size in (1, 2, 3, 7):
        reader, shown = CallReader(), []
        for start in range(0, len(said), size):
            shown += reader.add(said[start : start + size])
        shown += reader.add("", last=True)
        assert "".join(each for each in shown if isinstance(each, str)) == "".join(expected)
        assert len(reader.calls) == 2


def test_a_full_queue(served, engine):
    engine.gate.clear()
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            complete(served[1], n=9)  # the fake takes 8
    finally:
        engine.gate.set()
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "queue_full"
    engine.wait_until_idle()  # those that were taken are given up


def test_an_error_on_the_way(engine, served):
    engine.script = lambda request: [7, UserError("there is no memory for it")]
    with pytest.raises(openai.BadRequestError, match="no memory"):
        complete(served[1])
    with pytest.raises(openai.APIError, match="no memory"):
        complete(served[1], stream=True)


def test_the_time_of_a_request(folder):
    with serving(folder, timeout=0.05) as (engine, app):
        engine.gate.clear()
        with pytest.raises(openai.InternalServerError, match="time for a request") as caught:
            complete(app)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="time for a request"):
            chat(app, stream=True)
        engine.wait_until_idle()


def test_an_inbox_loses_nothing():
    async def run() -> list[int]:
        inbox, found = Inbox(), []

        def write(first: int) -> None:
            for number in range(first, 2000, 4):
                inbox.put(number)

        threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        while len(found) < 2000:
            found += await inbox.get(20)
        for thread in threads:
            thread.join()
        return found

    found = asyncio.run(run())
    assert sorted(found) == list(range(2000))
    for first in range(4):
        assert [each for each in found if each % 4 == first] == list(range(first, 2000, 4))


class Running:
    """A real server on its own thread, at a port that was free."""

    def __init__(self, app, service):
        from jlora.serving.server import Server, bind

        started = threading.Event()

        class Noting(Server):
            async def startup(self, sockets=None) -> None:
                await super().startup(sockets)
                started.set()

        self._listener = bind(service.settings)
        self.server = Noting(service, self._listener)
        self.address = self._listener.getsockname()[:2]
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        assert started.wait(20)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self._listener.close()
        assert not self.thread.is_alive()


@pytest.fixture
def running(folder):
    with contextlib.ExitStack() as stack:
        engine, app = stack.enter_context(serving(folder, port=0))
        service = app.user_middleware[-1].args[0]
        found = Running(app, service)
        stack.callback(found.close)
        stack.callback(engine.gate.set)
        yield engine, found


def post(server: Running, body: dict, path: str = "/v1/completions") -> http.client.HTTPConnection:
    """A connection over which a request was sent."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request("POST", path, json.dumps(body))
    return connection


def test_a_real_server_streams(running):
    engine, server = running
    engine.gate.clear()
    with contextlib.closing(post(server, {"prompt": "a", "stream": True})) as connection:
        response = connection.getresponse()
        assert response.getheader("content-type") == "text/event-stream; charset=utf-8"
        first = response.readline()  # before the rest has been thought of
        assert json.loads(first[len("data: ") :])["choices"][0]["text"] == "f"
        engine.gate.set()
        assert response.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(running, stream: bool):
    engine, server = running
    engine.gate.clear()
    engine.script = lambda request: "a" * 90
    connection = post(server, {"prompt": "a", "stream": stream, "n": 3})
    if stream:
        connection.getresponse().readline()
    engine.wait_until(3)
    connection.close()
    if stream:
        connection.sock = None
    engine.wait_until_idle()  # while the gate is closed: nothing but the leaving ends them
    assert not engine.gate.is_set() and engine.ended == 3


def test_a_signal_finishes_what_runs_and_refuses_what_comes(running):
    engine, server = running
    engine.gate.clear()
    with contextlib.closing(post(server, {"prompt": "a", "stream": True})) as connection:
        response = connection.getresponse()
        response.readline()
        server.server.handle_exit(signal.SIGTERM, None)
        for path, status in (("/v1/completions", 503), ("/v1/load_lora_adapter", 503)):
            with contextlib.closing(post(server, {"prompt": "b"}, path)) as other:
                refused = other.getresponse()
                assert refused.status == status
                assert json.loads(refused.read())["error"]["code"] == "shutting_down"
        engine.gate.set()
        assert response.read().endswith(b"data: [DONE]\n\n")
    server.thread.join(20)
    assert not server.thread.is_alive()
    assert len(engine.requests) == 1


def test_a_second_signal_ends_what_runs(running):
    engine, server = running
    engine.gate.clear()
    with contextlib.closing(post(server, {"prompt": "a", "stream": True})) as connection:
        response = connection.getresponse()
        response.readline()
        for number in (signal.SIGINT, signal.SIGINT):
            server.server.handle_exit(number, None)
        rest = response.read()
        assert b"shutting_down" in rest and rest.endswith(b"data: [DONE]\n\n")
    server.thread.join(20)
    assert not server.thread.is_alive() and engine.ended == 1


def test_what_is_no_http_harms_nobody(running):
    _, server = running
    for raw in (b"\x16\x03\x01", b"GET / HTTP/9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"
                b"Host: 127.0.0.1\r\nContent-Length: 50\r\n\r\n{"):  # fmt: skip
        with socket.create_connection(server.address, timeout=20) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(4096):
                pass
    with contextlib.closing(post(server, {"prompt": "a"})) as connection:
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == "fine"


@pytest.mark.parametrize("name", [" ", "a" * 39 + " b", "\t", "x,y", "'", "\u2028"])
def test_names_that_are_no_header(running, name: str):
    _, server = running
    with contextlib.closing(post(server, {"prompt": "a", name: 1})) as connection:
        response = connection.getresponse()
        assert response.status == 200 and response.getheader("x-jlora-warning").endswith("'")


def test_a_client_that_sends_too_much_hears_of_it(running):
    _, server = running
    large = {"prompt": "a" * 12_000_000}
    for _ in range(2):
        with contextlib.closing(post(server, large)) as connection:
            assert connection.getresponse().status == 413


def test_an_address_that_is_taken(running, folder):
    from jlora.serving.server import bind
    from jlora.serving.settings import ServeConfig

    _, server = running
    for host, port in ((*server.address,), ("no.such.host.invalid", 0), ("192.0.2.1", 0)):
        with pytest.raises(UserError, match="choose another --host or --port"):
            bind(ServeConfig("m", host=host, port=port))
