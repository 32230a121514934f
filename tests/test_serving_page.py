"""The page of `jlora serve` in headless Chromium, against a server that says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.stub_openai import serving

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (PyPI)")
expect = playwright.expect
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian's, or $CHROMIUM)")
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def stub():
    with serving() as stub:
        yield stub


@pytest.fixture
def visit(browser, stub):
    """Opens the page; at the end, no script has failed and nothing went to another server."""
    contexts, said, elsewhere = [], [], []

    def open_page(**options):
        context = browser.new_context(**{"locale": "en-GB", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda m: said.append(m.text) if "Content Security" in m.text else None)
        page.on("request", lambda r: r.url.startswith((stub.address, "data:"))
                or elsewhere.append(r.url))  # fmt: skip
        page.goto(stub.address)
        expect(page.locator("#model0 option")).to_have_count(4)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and elsewhere == []


def write(page, text: str) -> None:
    page.get_by_label("Your text").fill(text)
    page.keyboard.press("Control+Enter")


def texts(page) -> list[str]:
    return page.locator(".text").all_inner_texts()


def settle(page, answers: int) -> None:
    expect(page.locator('.answer[aria-busy="false"]')).to_have_count(answers)


def test_base_and_adapter_stream_side_by_side(visit, stub):
    page = visit()
    stub.gate.clear()
    write(page, "what is there")
    expect(page.locator(".text").nth(0)).to_have_text("smollm2-135m:")
    expect(page.locator(".text").nth(1)).to_have_text("café:")  # neither waits for the other
    expect(page.locator('.answer[aria-busy="true"]')).to_have_count(2)
    stub.gate.set()
    settle(page, 2)
    assert texts(page) == ["smollm2-135m: what is there", "café: what is there"]
    for figures in page.locator(".figures").all_inner_texts():
        assert re.fullmatch(
            r"4 tokens · [\d.]+ tokens/s · first after \d+\.\d\d s · ended", figures
        )
    boxes = [page.locator(".answer").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]
    expect(page.get_by_role("status")).to_contain_text("café: ended")


def test_settings_reach_the_server_and_each_side_keeps_its_own_conversation(visit, stub):
    page = visit()
    page.get_by_label("Compared with").select_option("sql")
    for label, value in {
        "System prompt": "Be short.", "Temperature": "0.7", "top_p": "0.9", "Max tokens": "2",
        "Seed": "5", "Stop texts": "\n\nQ:\n###",
    }.items():  # fmt: skip
        page.get_by_label(label).fill(value)
    write(page, "one two")
    settle(page, 2)
    expect(page.locator(".figures").first).to_contain_text("max tokens reached")
    page.reload()
    write(page, "three")
    settle(page, 4)
    first, last = ({b["model"]: b for b in stub.bodies()[i : i + 2]} for i in (0, 2))
    expected = {
        "model": "smollm2-135m", "stream": True, "stream_options": {"include_usage": True},
        "temperature": 0.7, "top_p": 0.9, "max_tokens": 2, "seed": 5, "stop": ["Q:", "###"],
        "messages": [{"role": "system", "content": "Be short."},
                     {"role": "user", "content": "one two"}],
    }  # fmt: skip
    assert first["smollm2-135m"] == expected and first["sql"] == {**expected, "model": "sql"}
    for model in ("smollm2-135m", "sql"):
        roles = [(m["role"], m["content"]) for m in last[model]["messages"]]
        assert roles == [
            ("system", "Be short."), ("user", "one two"), ("assistant", f"{model}: one"),
            ("user", "three"),
        ]  # fmt: skip


def test_one_model_alone_and_a_text_to_go_on_with(visit, stub):
    page = visit()
    page.get_by_label("Compared with").select_option("nothing")
    page.get_by_label("What you type is").select_option("text")
    write(page, "name : Zizzi")
    settle(page, 1)
    assert stub.asked[-1][0] == "/v1/completions" and stub.bodies()[0]["prompt"] == "name : Zizzi"
    assert "messages" not in stub.bodies()[0] and "seed" not in stub.bodies()[0]
    assert texts(page) == ["smollm2-135m: name : Zizzi"]


def test_a_model_without_a_chat_template_goes_on_with_the_text(visit, stub):
    page = visit()
    page.get_by_label("Compared with").select_option("e2e")
    write(page, "name : Zizzi")
    settle(page, 2)
    paths = {body["model"]: path for path, body, _ in stub.asked if body}
    assert paths == {"smollm2-135m": "/v1/chat/completions", "e2e": "/v1/completions"}


def test_stop_leaves_the_server_and_what_was_said_stays(visit, stub):
    page = visit()
    for stop in ("Escape", "button"):
        stub.gate.clear()
        stub.left.clear()
        write(page, "a long story")
        expect(page.locator('.answer[aria-busy="true"] .text').last).to_have_text("café:")
        if stop == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press(stop)
        settle(page, 2 if stop == "Escape" else 4)
        assert stub.left.wait(10)
        stub.gate.set()
        expect(page.locator(".figures").last).to_contain_text("stopped by you")
        assert texts(page)[-2:] == ["smollm2-135m:", "café:"]
        expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_errors_are_shown_as_the_server_says_them(visit, stub):
    page = visit()
    page.get_by_label("Temperature").fill("1.7")
    write(page, "hot")
    settle(page, 2)
    error = page.locator(".error").first
    expect(error).to_have_text("400: temperature <must> be at most 1.5 & was not")
    page.get_by_label("Temperature").fill("7")  # out of the field's own range: nothing is sent
    write(page, "hotter")
    expect(page.get_by_role("status")).to_have_text("A setting is out of range.")
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert len(stub.bodies()) == 2
    page.get_by_label("Temperature").fill("0")
    write(page, "again")
    settle(page, 4)
    assert [m["content"] for m in stub.bodies()[-1]["messages"]] == ["again"]
    stub.shutdown()
    stub.server_close()
    write(page, "gone")
    settle(page, 6)
    expect(page.locator(".error").last).to_have_text("The server cannot be reached.")


def test_an_answer_that_breaks_off_is_no_answer(visit, stub, monkeypatch):
    from tests import stub_openai

    event = stub_openai.event(index=0, finish_reason=None, delta={"content": "half"})
    said = {"café": [event, 'data: {"error": {"message": "out of <memory>"}}']}
    monkeypatch.setattr(stub_openai.Handler, "stream", lambda _, b: said.get(b["model"], [event]))
    page = visit()
    write(page, "x")
    settle(page, 2)
    expect(page.locator(".error").nth(0)).to_contain_text("The answer broke off")
    expect(page.locator(".error").nth(1)).to_have_text("out of <memory>")
    assert texts(page) == ["half", "half"]


def test_a_key_is_asked_for_and_kept_for_this_tab_alone(visit, stub):
    page = visit()
    stub.key = "sesame"
    write(page, "let me in")
    settle(page, 2)
    expect(page.locator(".error").first).to_have_text("401: the API key is missing or wrong")
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    page.keyboard.type("sesame")
    page.keyboard.press("Tab")
    write(page, "let me in now")
    settle(page, 4)
    assert texts(page)[-1] == "café: let me in now"
    page.reload()
    expect(key).to_have_value("sesame")
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    assert stub.asked[-1][2]["Authorization"] == "Bearer sesame"


def test_what_a_model_writes_is_text(visit, stub):
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>alert(1)</script>"
    stub.answers = {"café": [hostile, "\n<b>bold</b>"]}
    page = visit()
    write(page, hostile)
    settle(page, 2)
    page.reload()
    assert texts(page)[1] == hostile + "\n<b>bold</b>"
    expect(page.locator(".user")).to_have_text(hostile)
    assert page.title() == "jlora serve"
    assert page.locator("main img, main script, main b").count() == 0


def test_the_policy_stops_any_other_script(browser, stub):
    with contextlib.closing(browser.new_page()) as page:
        page.goto(stub.address)
        page.evaluate("""() => {
            document.addEventListener('securitypolicyviolation',
                (event) => { window.stopped = event.effectiveDirective; });
            const script = document.createElement('script');
            script.textContent = "document.title = 'owned'";
            document.body.append(script);
        }""")
        page.wait_for_function("window.stopped")
        assert page.title() == "jlora serve"
        assert page.evaluate("window.stopped") == "script-src-elem"


LONG = "Donaudampfschifffahrtsgesellschaftskapitänsmütze" * 3


def test_a_telephone_needs_no_sideways_scrolling(visit, stub):
    stub.answers = {"café": [LONG, " " + "一个很长的回答" * 20]}
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    write(page, LONG)
    settle(page, 2)
    page.locator("#side summary").click()
    expect(page.get_by_label("Temperature")).to_be_visible()
    wide = """() => [...document.querySelectorAll('body, body *')].filter((e) =>
        e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'hidden'
        && e.clientWidth && !/^(SELECT|INPUT|OPTION)$/.test(e.tagName)).map((e) => e.outerHTML)"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator("#side summary").click()
    for button in page.get_by_role("button").all():
        box = button.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, button.inner_text()
    boxes = [page.locator(".answer").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] < boxes[1]["y"]  # one under the other


def test_it_speaks_the_readers_language(visit, stub):
    page = visit(locale="zh-CN")
    expect(page.get_by_label("输入内容")).to_be_focused()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert not re.search(r"\b(Send|Settings|Seed|Copy)\b", page.inner_text("body"))
    page.keyboard.type("你好")
    page.keyboard.press("Control+Enter")
    settle(page, 2)
    expect(page.locator(".figures").first).to_contain_text("正常结束")
    page.get_by_role("button", name="English").click()
    expect(page.locator(".figures").first).to_contain_text("ended")
    page.reload()
    expect(page.get_by_label("Your text")).to_be_visible()
    words = page.evaluate("[Object.keys(WORDS.en), Object.keys(WORDS.zh)]")
    assert words[0] == words[1]


def test_dark_and_light_follow_the_system_and_a_switch(visit, stub):
    page = visit(color_scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(colour)
    assert dark != light
    for name, expected in (("Theme: system", light), ("Theme: light", dark)):
        page.get_by_role("button", name=name).click()
        assert page.evaluate(colour) == expected
    page.reload()
    assert page.evaluate(colour) == dark


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(visit, stub):
    page = visit()
    write(page, "x")
    settle(page, 2)
    nameless = """[...document.querySelectorAll('button, input, select, textarea')].filter((e) =>
        !e.textContent.trim() && !e.labels?.[0]?.innerText.trim()).length"""
    assert page.evaluate(nameless) == 0
    page.get_by_role("button", name="中文").focus()
    seen = ["language"]
    name = "((e) => e.id || `${e.tagName}.${e.className}`)(document.activeElement)"
    while seen[-1] != "copy" and len(seen) < 40:
        page.keyboard.press("Tab")
        seen.append(page.evaluate(name))
    assert seen == [
        "language", "theme", "SUMMARY.", "form", "system", "temperature", "top_p", "max_tokens",
        "seed", "stop", "key", "turns", "BUTTON.plain", "BUTTON.plain", "model0", "model1",
        "message", "send", "clear", "copy",
    ]  # fmt: skip


def test_copy_and_clear(visit, stub):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    write(page, "hello")
    settle(page, 2)
    page.get_by_role("button", name="Copy all").click()
    expect(page.get_by_role("status")).to_have_text("Copied")
    copied = "> hello\n\n[smollm2-135m]\nsmollm2-135m: hello\n\n[café]\ncafé: hello"
    assert page.evaluate("navigator.clipboard.readText()") == copied
    page.locator(".answer button").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == "café: hello"
    for kept, answer in ((2, "dismiss"), (0, "accept")):
        page.once("dialog", lambda dialog, answer=answer: getattr(dialog, answer)())
        page.get_by_role("button", name="Clear").click()
        expect(page.locator(".answer")).to_have_count(kept)
    page.reload()
    expect(page.locator(".empty")).to_be_visible()


def test_damaged_storage_and_an_unloaded_adapter_are_survived(visit, stub):
    page = visit()
    for turns in ("{", "7", '[{"user": 1}]', '[{"user": "a", "answers": [null]}]'):
        page.evaluate("text => localStorage.setItem('jlora.turns', text)", turns)
        page.evaluate("""() => { localStorage.setItem('jlora.model1', '"gone"');
            localStorage.setItem('jlora.settings', '{"seed": {}, "other": "1", "top_p": "0.5"}');
            localStorage.setItem('jlora.theme', '"pink"');
            localStorage.setItem('jlora.language', '5'); }""")
        page.reload()
        expect(page.locator(".empty")).to_be_visible()
        expect(page.get_by_label("Compared with")).to_have_value("café")
        expect(page.get_by_label("top_p")).to_have_value("0.5")


@pytest.mark.slow
def test_the_real_server_behind_the_page(browser, tmp_path):
    """Two adapters and the base of a tiny model; texts as the API gives them."""
    pytest.importorskip("jlora.serving.app", reason="no jlora[serve]")
    from benchmarks.serve_client import stream
    from tests import serve_soak

    serve_soak.prepare(tmp_path)
    server, address, _ = serve_soak.start_server(tmp_path)
    try:
        with contextlib.closing(browser.new_page(locale="en-GB")) as page:
            page.goto(address)
            page.get_by_label("Compared with").select_option("ada")
            page.get_by_label("Max tokens").fill("12")
            write(page, "the river")
            expect(page.locator('.answer[aria-busy="false"]')).to_have_count(2, timeout=60_000)
            for figures in page.locator(".figures").all_inner_texts():
                assert re.search(r"^\d+ tokens? · .*(ended|max tokens reached)$", figures)
            shown = page.locator(".text").all_text_contents()
        messages = [{"role": "user", "content": "the river"}]

        def ask(model: str) -> str:
            body = {"model": model, "messages": messages, "max_tokens": 12, "stream": True}
            return asyncio.run(stream(address, body, "/v1/chat/completions")).text

        with ThreadPoolExecutor(1) as pool:  # playwright has a loop in this thread
            said = list(pool.map(ask, ("model", "ada")))
        assert shown == said and said[0] != said[1]
    finally:
        server.kill()
        server.wait()
