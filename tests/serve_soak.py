"""Soaks `jlora serve`: many random requests at once, and everything that clients do wrong.

    python -m tests.serve_soak --requests 10000

A tiny model with several adapters is served in a process of its own. First a set of requests is
asked one by one: that is what each gets alone. Then many clients at a time draw from the set, leave
in the middle, read slowly, are killed, send malformed bodies, and load, reload and unload adapters.
Every answer must be what the same request got alone, every refusal in OpenAI's form, the memory
flat, the log free of tracebacks and prompts, and SIGTERM must let the running answers finish.
Greedy answers are also compared with the library's: none may be another adapter's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.serve_client import request
from tests import mutate, tiny

COMMAND = [sys.executable, "-m", "jlora"]  # a test has another one
ADAPTERS = ("ada", "bob", "cyd", "dot")
GUEST, SWAP = "guest", "swap"  # comes and goes; has two versions
SECRET = "zanzibar"  # a word of every prompt, which no log may hold
CLIENTS = 24
PATIENCE = 120  # seconds for an answer, however busy the machine is
STARTING = 600  # seconds; operators may have to be compiled
CONTEXT = 512
WARM_UP, GROWTH = 0.3, 1.05  # share of the requests before the memory must be flat; what is flat
PREFIXES = (
    "You are a waiter who knows the menu by heart.",
    "Describe the place in a sentence of plain words, and leave nothing out of what is said of it.",
    "",
)
WORDS = "name food price area near family rating pub cheap river centre Italian high yes no".split()
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2, 3]}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip


@dataclass
class Soak:
    """What has happened so far.

    Attributes:
        known: number of a request -> what it gets alone; of `SWAP` the answers of both versions.
        counts: of everything that was done.
        faults: what went wrong.
        memory: (requests done, resident bytes of the server).
    """

    address: str
    server: subprocess.Popen
    log: Path
    folder: Path
    asked: list[tuple[str, dict]] = field(default_factory=list)
    known: list[list[Any]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def fault(self, what: str) -> None:
        self.faults.append(what)
        print(f"FAULT: {what}", flush=True)


# --- what is served ---


def write_adapter(model: Any, folder: Path, seed: int) -> None:
    from jlora.adapters import LoraConfig, get_peft_model
    from tests.tiny_models import randomise_adapter

    rank = 2 + seed % 3
    targets = [["c_attn"], ["c_attn", "c_proj"], ["c_fc", "c_attn"]][seed % 3]
    tuned = get_peft_model(model, LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=targets))
    randomise_adapter(tuned, seed, 0.25)
    tuned.save_pretrained(folder)
    tuned.unload()


def prepare(folder: Path) -> None:
    """The model in ``folder``/model, the adapters in ``folder``/adapters, versions beside them."""
    from jlora.models.hub import load

    tiny.CONTEXT = CONTEXT
    tiny.write_chat_model(folder / "model", seed=3)
    model = load(folder / "model")
    for seed, name in enumerate((*ADAPTERS, GUEST)):
        write_adapter(model, folder / "adapters" / name, seed)
    for seed in (50, 51):
        write_adapter(model, folder / f"{SWAP}-{seed - 50}", seed)
    shutil.copytree(folder / f"{SWAP}-0", folder / "adapters" / SWAP)


def start_server(folder: Path) -> tuple[subprocess.Popen, str, Path]:
    log = folder / "log"
    command = [*COMMAND, "serve", str(folder / "model"), "--port", "0"]
    command += ["--adapters-dir", str(folder / "adapters"), "--allow-adapter-changes"]
    command += ["--precision", "fp32", "--max-rows", "16", "--queue", "48", "--max-tokens", "40"]
    command += ["--cache-gb", "0.002", "--memory-gb", "0.01", "--max-body-mb", "0.2"]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        until = time.monotonic() + STARTING
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server does not start:\n{log.read_text()}")
            time.sleep(0.05)
    except BaseException:
        server.kill()
        server.wait()
        raise
    return server, found[0], log


# --- requests ---


def make_request(draw: random.Random) -> tuple[str, dict]:
    """A random valid request: its path and body."""
    model = draw.choice(("model", *ADAPTERS, GUEST, SWAP, *ADAPTERS))
    words = [*draw.choices(WORDS, k=draw.choice((1, 3, 9, 40, 120))), SECRET]
    text, prefix = " ".join(words), draw.choice(PREFIXES)
    body: dict[str, Any] = {"model": model, "max_tokens": draw.choice((1, 2, 5, 12, 40))}
    if draw.random() < 0.2:  # nothing that the library could do otherwise
        return "/v1/completions", {**body, "prompt": f"{prefix} {text}".strip()}
    if draw.random() < 0.5:
        path = "/v1/chat/completions"
        messages = [{"role": "system", "content": prefix}] if prefix else []
        for turn in range(draw.choice((0, 0, 1, 2))):
            messages += [{"role": "user", "content": f"{turn} {draw.choice(WORDS)}"},
                         {"role": "assistant", "content": draw.choice(WORDS)}]  # fmt: skip
        body["messages"] = [*messages, {"role": "user", "content": text}]
    else:
        path = "/v1/completions"
        body["prompt"] = draw.choice(
            (f"{prefix} {text}", [draw.randrange(1, 400) for _ in words], [text, "and " + text])
        )
        if draw.random() < 0.2:
            body |= {"echo": True, "logprobs": 2}
    if draw.random() < 0.4:
        body |= {"temperature": draw.choice((0.5, 1.0, 3.0)), "seed": draw.randrange(1000)}
        body |= draw.choice(({}, {"top_p": 0.8}, {"top_k": 7}, {"min_p": 0.05}))
    for name, values in {
        "repetition_penalty": (1.3,), "presence_penalty": (0.7,), "frequency_penalty": (0.5,),
        "logit_bias": ({"17": 5.0, "40": -100},), "stop": (["e", "the "], "o"),
    }.items():  # fmt: skip
        if draw.random() < 0.12:
            body[name] = draw.choice(values)
    kind = draw.random()
    if kind < 0.1 and "temperature" not in body and "stop" not in body and "logprobs" not in body:
        body |= {"num_beams": draw.choice((2, 4))}
        body |= draw.choice(({}, {"no_repeat_ngram_size": 3, "length_penalty": 0.8}))
    elif kind < 0.2:
        body |= {"n": draw.choice((2, 3))}
    elif kind < 0.3:
        body |= {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    elif kind < 0.4 and path.endswith("chat/completions"):
        body |= {"logprobs": True, "top_logprobs": 3}
    return path, body


@dataclass
class Reply:
    """A response: its status, its JSON or its events, and how it ended."""

    status: int
    body: Any = None
    events: list[dict] = field(default_factory=list)
    done: bool = False


async def ask(
    soak: Soak, path: str, data: bytes | None, method: str = "POST", leave_after: int = 10**9,
    pause: float = 0.0,
) -> Reply:  # fmt: skip
    """Send a request; ``leave_after`` events of its answer the client goes away."""
    async with request(soak.address, path, data, method) as (status, lines):
        reply, rest = Reply(status), []
        await asyncio.sleep(pause)
        async for line in lines:
            if line.startswith("data: {"):
                reply.events.append(json.loads(line[6:]))
                if len(reply.events) >= leave_after:
                    return reply
            elif line == "data: [DONE]":
                reply.done = True
            else:
                rest.append(line)
    text = "\n".join(rest).strip()
    if text:
        try:
            reply.body = json.loads(text)
        except ValueError:
            reply.body = text
    return reply


def outcome(reply: Reply) -> Any:
    """What of an answer must always be the same, whether it was streamed or not."""
    events = reply.events or [reply.body]
    choices: dict[int, dict] = {}
    usage = None
    for event in events:
        if event.get("usage"):
            usage = [event["usage"][name] for name in ("prompt_tokens", "completion_tokens")]
        for choice in event["choices"]:
            found = choices.setdefault(choice["index"], {"text": "", "reason": None, "logs": []})
            said = choice.get("message") or choice.get("delta") or {}
            found["text"] += choice.get("text") or said.get("content") or ""
            found["reason"] = choice["finish_reason"] or found["reason"]
            found["logs"] += logs_of(choice.get("logprobs"))
    return [choices[index] for index in sorted(choices)], usage


def logs_of(logprobs: dict | None) -> list:
    """(token, log-probability) of each token, in either route's form."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [(each["token"], each["logprob"]) for each in logprobs["content"] or ()]
    return list(zip(logprobs["tokens"], logprobs["token_logprobs"]))


def same(first: Any, second: Any) -> bool:
    """Equal; log-probabilities within 1e-4."""
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) < 1e-4
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def in_openais_form(reply: Reply) -> bool:
    error = reply.body.get("error") if isinstance(reply.body, dict) else None
    return (
        isinstance(error, dict)
        and isinstance(error.get("message"), str)
        and bool(error["message"])
        and isinstance(error.get("type"), str)
        and {"param", "code"} <= error.keys()
    )


# --- what clients do ---


def check_refusal(soak: Soak, reply: Reply, what: str, allowed: Sequence[int]) -> None:
    if not in_openais_form(reply):
        soak.fault(f"{what}: status {reply.status}, not in OpenAI's form: {reply.body!r}")
    elif reply.status not in allowed:
        soak.fault(f"{what}: status {reply.status}: {reply.body}")
    soak.counts[f"status {reply.status}"] += 1


async def ask_known(soak: Soak, draw: random.Random, number: int | None = None) -> None:
    """Ask one of the set, streaming or not, reading fast or slowly, to the end or not."""
    number = draw.randrange(len(soak.asked)) if number is None else number
    path, body = soak.asked[number]
    streamed = draw.random() < 0.6
    sent = {**body, "stream": True, "stream_options": {"include_usage": True}} if streamed else body
    leave, pause = 10**9, 0.0
    if streamed and draw.random() < 0.2:
        leave = draw.randrange(1, 12)
    elif streamed and draw.random() < 0.1:
        pause = 0.5
    reply = await ask(soak, path, json.dumps(sent).encode(), leave_after=leave, pause=pause)
    what = f"request {number} ({body['model']})"
    if reply.status != 200:
        # Too many at once, or the guest is out.
        check_refusal(soak, reply, what, (429, 503, 404) if body["model"] == GUEST else (429, 503))
        return
    if any("error" in event for event in reply.events):
        soak.fault(f"{what}: error in the stream: {reply.events[-1]}")
        return
    found = outcome(reply)
    if len(reply.events) >= leave:
        soak.counts["left in the middle"] += 1
        right = any(is_beginning(found[0], known[0]) for known in soak.known[number])
    else:
        soak.counts["streamed" if streamed else "answered"] += 1
        right = any(same(found, known) for known in soak.known[number])
        if streamed and not reply.done:
            soak.fault(f"{what}: no [DONE]")
    if not right:
        soak.fault(f"{what}: {json.dumps(sent)} gave {found}, alone {soak.known[number]}")


def is_beginning(choices: list[dict], known: list[dict]) -> bool:
    """Whether texts are beginnings of the known ones."""
    return all(any(k["text"].startswith(c["text"]) for k in known) for c in choices)


async def send_malformed(soak: Soak, draw: random.Random) -> None:
    """A damaged body, or a wrong path, method or model."""
    path, body = soak.asked[draw.randrange(len(soak.asked))]
    kind, method, data = draw.random(), "POST", json.dumps(body).encode()
    if kind < 0.7:
        for _ in range(draw.randrange(1, 4)):
            data = mutate.change(data, draw.choice(mutate.KINDS), draw.getrandbits(32),
                                 draw.getrandbits(32))  # fmt: skip
    elif kind < 0.8:
        path = draw.choice(("/v1/embeddings", "/v1/chat", "/..%2f", "/v1/models/none", "/x" * 900))
    elif kind < 0.9:
        method, data = draw.choice(("GET", "DELETE", "PUT")), None
    elif kind < 0.95:
        data = json.dumps({**body, "model": draw.choice(("none", "../ada", "a" * 3000))}).encode()
    else:
        data = b'{"prompt": "' + b"a" * 300_000
    reply = await ask(soak, path, data, method)
    soak.counts["malformed"] += 1
    if reply.status != 200:
        check_refusal(soak, reply, f"{method} {path[:60]} {data!r:.300}",
                      (400, 403, 404, 405, 408, 413, 414, 429, 503))  # fmt: skip


async def break_off(soak: Soak, draw: random.Random) -> None:
    """Half a body, or half of the headers, and away."""
    path, body = soak.asked[draw.randrange(len(soak.asked))]
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    port = int(soak.address.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    whole = head.encode() + data
    writer.write(whole[: draw.randrange(1, len(whole))])
    await writer.drain()
    writer.close()
    soak.counts["broken off"] += 1


KILLED = """
import json, socket, sys
s = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
s.sendall(sys.argv[2].encode())
print(s.recv(12).decode(), flush=True)
sys.stdin.read()
"""


async def kill_client(soak: Soak, draw: random.Random) -> None:
    """A client process that is killed when its answer has begun."""
    path, body = soak.asked[draw.randrange(len(soak.asked))]
    data = json.dumps({**body, "stream": True})
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, soak.address.rpartition(":")[2], head + data,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    status = (await process.stdout.readline()).decode().split()[-1:]
    process.kill()
    await process.wait()
    process.stdin.close()
    soak.counts["clients killed" if status == ["200"] else "clients refused and killed"] += 1


async def change_adapter(soak: Soak, draw: random.Random) -> None:
    """Reload the adapter of two versions, or let the guest in or out; one change at a time."""
    async with soak.changing:
        if draw.random() < 0.6:
            version = draw.randrange(2)
            replace_folder(soak.folder / f"{SWAP}-{version}", soak.folder / "adapters" / SWAP)
            names = {"lora_name": SWAP, "lora_path": SWAP, "load_inplace": True}
            reply = await ask(soak, "/v1/load_lora_adapter", json.dumps(names).encode())
            soak.counts["reloads"] += 1
        else:
            listed = await ask(soak, "/v1/models", None, "GET")
            verb = "unload" if GUEST in {each["id"] for each in listed.body["data"]} else "load"
            names = {"lora_name": GUEST, "lora_path": GUEST}
            reply = await ask(soak, f"/v1/{verb}_lora_adapter", json.dumps(names).encode())
            soak.counts[f"guest {verb}ed"] += 1
        if reply.status != 200:
            soak.fault(f"{names}: status {reply.status}: {reply.body}")


def replace_folder(source: Path, target: Path) -> None:
    new, old = target.with_name(".new"), target.with_name(".old")
    shutil.copytree(source, new)
    target.rename(old)
    new.rename(target)
    shutil.rmtree(old)


async def look(soak: Soak, draw: random.Random) -> None:
    path = draw.choice(("/health", "/metrics", "/v1/models", "/"))
    reply = await ask(soak, path, None, "GET")
    soak.counts["looks"] += 1
    if reply.status != 200:
        soak.fault(f"GET {path}: status {reply.status}")


DEEDS = ((ask_known, 0.8), (send_malformed, 0.1), (break_off, 0.03), (change_adapter, 0.03),
         (look, 0.035), (kill_client, 0.005))  # fmt: skip


# --- the course of it ---


async def ask_alone(soak: Soak, number: int, draw: random.Random) -> None:
    """Make a set of requests, and note what each gets when nothing else is asked."""
    while len(soak.asked) < number:
        path, body = make_request(draw)
        replies = [await ask(soak, path, json.dumps(body).encode())]
        if body["model"] == SWAP:
            await swap_to(soak, 1)
            replies.append(await ask(soak, path, json.dumps(body).encode()))
            await swap_to(soak, 0)
        if any(reply.status != 200 for reply in replies):
            soak.fault(f"{json.dumps(body)} alone: status {replies[0].status}: {replies[0].body}")
            return
        soak.asked.append((path, body))
        soak.known.append([outcome(reply) for reply in replies])


async def swap_to(soak: Soak, version: int) -> None:
    replace_folder(soak.folder / f"{SWAP}-{version}", soak.folder / "adapters" / SWAP)
    names = {"lora_name": SWAP, "lora_path": SWAP, "load_inplace": True}
    await ask(soak, "/v1/load_lora_adapter", json.dumps(names).encode())


def check_by_library(soak: Soak) -> int:
    """Compare greedy answers to texts with what `jlora.generate` gives; how many were compared."""
    from jlora.adapters import PeftModel
    from jlora.decoding.sampling import GenerateConfig, generate
    from jlora.models.hub import load

    plain = {"model", "max_tokens", "prompt"}
    compared = 0
    for name in ("model", *ADAPTERS, GUEST):
        numbers = [
            i for i, (_, body) in enumerate(soak.asked)
            if body["model"] == name and body.keys() == plain and isinstance(body["prompt"], str)
        ]  # fmt: skip
        if not numbers:
            continue
        model = load(soak.folder / "model")
        if name != "model":
            model = PeftModel.from_pretrained(model, soak.folder / "adapters" / name)
        model.eval()
        tokenizer = model.tokenizer
        for i in numbers:
            body = soak.asked[i][1]
            ids = tokenizer.encode(body["prompt"])
            config = GenerateConfig((tokenizer.eos_token_id,), body["max_tokens"])
            text = tokenizer.decode(generate(model, [ids], config)[0].ids)
            said = soak.known[i][0][0][0]["text"]
            compared += 1
            if text.strip() != said.strip():
                soak.fault(f"request {i} ({name}): {said!r}, by the library {text!r}")
    return compared


async def run_clients(soak: Soak, requests: int, seed: int) -> None:
    """Let `CLIENTS` clients do so many deeds."""
    process, left = psutil.Process(soak.server.pid), iter(range(requests))
    started, every = time.monotonic(), max(requests // 50, 1)

    async def client(draw: random.Random) -> None:
        for _ in left:
            deed = draw.choices([d for d, _ in DEEDS], [weight for _, weight in DEEDS])[0]
            try:
                await asyncio.wait_for(deed(soak, draw), PATIENCE)
            except asyncio.TimeoutError:
                soak.fault(f"{deed.__name__}: no end after {PATIENCE} s")
            except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
                soak.fault(f"{deed.__name__}: {type(error).__name__}: {error}")
            if soak.server.poll() is not None:
                soak.fault(f"the server ended with code {soak.server.returncode}")
                return
            done = soak.counts["requests"] = soak.counts["requests"] + 1
            if done % every == 0:
                soak.memory.append((done, process.memory_info().rss))
            if done % (requests // 10 or 1) == 0:
                size = process.memory_info().rss / 2**20
                print(f"{done} done, {time.monotonic() - started:.0f} s, {size:.1f} MB", flush=True)

    await asyncio.gather(*(client(random.Random(seed * 1000 + i)) for i in range(CLIENTS)))


def check_memory(soak: Soak, requests: int) -> str:
    """Compare the memory at the end with that after the warm-up (medians of a few samples)."""
    warm = [size for number, size in soak.memory if number >= WARM_UP * requests]
    few = max(len(warm) // 4, 1)
    before, after = np.median(warm[:few]), np.median(warm[-few:])
    if after > GROWTH * before:
        soak.fault(f"the memory grew from {before / 2**20:.1f} to {after / 2**20:.1f} MB")
    return f"{before / 2**20:.1f} MB after the warm-up, {after / 2**20:.1f} MB at the end"


async def check_idle(soak: Soak) -> None:
    """All rows and places must be free again."""
    until = time.monotonic() + PATIENCE
    while True:
        metrics = (await ask(soak, "/metrics", None, "GET")).body
        found = dict(re.findall(r"^jlora_(rows|running|entering|waiting) (.*)$", metrics, re.M))
        busy = {name: value for name, value in found.items() if float(value)}
        if len(found) == 4 and not busy:
            return
        if time.monotonic() > until:
            soak.fault(f"rows are left when nobody asks: {found}")
            return
        await asyncio.sleep(0.05)


async def terminate(soak: Soak, draw: random.Random) -> None:
    """SIGTERM while answers are written: they end right, nothing new is taken, the server ends."""
    guests = {i for i, (_, body) in enumerate(soak.asked) if body["model"] == GUEST}
    numbers = [i for i in range(len(soak.asked)) if i not in guests]
    began = asyncio.Event()

    async def one(number: int) -> None:
        path, body = soak.asked[number]
        sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
        async with request(soak.address, path, json.dumps(sent).encode()) as (status, lines):
            reply = Reply(status)
            async for line in lines:
                if line.startswith("data: {"):
                    began.set()
                    reply.events.append(json.loads(line[6:]))
                elif line.startswith("{"):
                    reply.body = json.loads(line)
                reply.done = reply.done or line == "data: [DONE]"
        if reply.status == 503:  # it came too late
            check_refusal(soak, reply, "after SIGTERM", (503,))
        elif reply.done and any(same(outcome(reply), known) for known in soak.known[number]):
            soak.counts["finished after SIGTERM"] += 1
        else:
            soak.fault(f"request {number} was not finished after SIGTERM: {reply}")

    running = [asyncio.ensure_future(one(draw.choice(numbers))) for _ in range(12)]
    await asyncio.wait_for(began.wait(), PATIENCE)
    soak.server.send_signal(signal.SIGTERM)
    running += [asyncio.ensure_future(one(number)) for number in draw.choices(numbers, k=4)]
    for result in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(result, ConnectionError):  # not even accepted
            soak.counts["refused at the end"] += 1
        elif isinstance(result, BaseException):
            soak.fault(f"after SIGTERM: {type(result).__name__}: {result}")
    try:
        code = await asyncio.to_thread(soak.server.wait, PATIENCE)
    except subprocess.TimeoutExpired:
        soak.fault(f"the server runs {PATIENCE} s after SIGTERM")
        return
    if code != 0:
        soak.fault(f"the server ended with code {code} after SIGTERM")


def check_log(soak: Soak) -> None:
    log = soak.log.read_text(errors="replace")
    for sign in ("Traceback", SECRET, "Error:", "internal_error"):
        if sign in log:
            at = log.index(sign)
            soak.fault(f"the log holds {sign!r}: {log[max(at - 200, 0) : at + 1500]}")


async def course(soak: Soak, requests: int, seed: int) -> None:
    draw = random.Random(seed)
    await ask_alone(soak, min(max(40, requests // 25), 400), draw)
    if soak.faults:
        return
    print(f"{len(soak.asked)} requests asked alone", flush=True)
    compared = await asyncio.to_thread(check_by_library, soak)
    print(f"{compared} of them compared with the library's answers", flush=True)
    await run_clients(soak, requests, seed)
    if soak.server.poll() is None:
        await check_idle(soak)
        await terminate(soak, draw)


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m tests.serve_soak", description=__doc__)
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        server, address, log = start_server(folder)
        soak = Soak(address, server, log, folder)
        try:
            asyncio.run(course(soak, chosen.requests, chosen.seed))
        finally:
            server.kill()
            server.wait()
        check_log(soak)
        memory = check_memory(soak, chosen.requests) if soak.memory else "no memory measured"
    print(", ".join(f"{what}: {count}" for what, count in sorted(soak.counts.items())))
    print(memory)
    print(f"{chosen.requests} requests, seed {chosen.seed}: {len(soak.faults)} faults")
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
