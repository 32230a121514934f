"""Chat templates: where they are found, what they make, and what no template may do.

`tests/test_parity.py` compares texts with transformers.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from datetime import datetime

import pytest

from jlora.data.chat_template import ChatTemplate, built_in_names, find_template
from jlora.system.errors import UserError

ASKED = [{"role": "system", "content": "S"}, {"role": "user", "content": " Hi\n"}]
MESSAGES = [*ASKED, {"role": "assistant", "content": "Yo"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


# Those that come along ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "whole", "prompt"),
    [
        ("chatml",
         "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
         "<|im_start|>assistant\nYo<|im_end|>\n", "<|im_start|>assistant\n"),
        ("llama-3",
         "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
         "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\nYo<|eot_id|>",
         "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma",
         "<s><start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\nYo<end_of_turn>\n",
         "<start_of_turn>model\n"),
        ("mistral", "<s>[INST] S\n\n Hi\n [/INST] Yo</s>", ""),
        ("alpaca", "<s>S\n\n### Instruction:\n Hi\n\n\n### Response:\nYo</s>\n\n",
         "### Response:\n"),
        ("deepseek-r1", "<s>S<｜User｜> Hi\n<｜Assistant｜><think>\n\n</think>\n\nYo</s>",
         "<｜Assistant｜><think>\n"),
    ],
)  # fmt: skip
def test_built_in(name, whole, prompt):
    template = replace(find_template(None, name), tokens=TOKENS)
    assert template.render(MESSAGES) == whole
    asked = template.render(ASKED)
    assert template.render(ASKED, add_generation_prompt=True) == asked + prompt
    assert whole.startswith(asked + prompt)


def test_every_built_in_is_named_and_refuses_unknown_roles_in_words():
    assert built_in_names() == ["alpaca", "chatml", "deepseek-r1", "gemma", "llama-3", "mistral"]
    with pytest.raises(UserError, match="alpaca refuses this: alpaca has no role tool; it has"):
        find_template(None, "alpaca").render([{"role": "tool", "content": "x"}])


def test_deepseek_r1_keeps_thoughts():
    template = find_template(None, "deepseek-r1", {"enable_thinking": False})
    prompt = template.render(ASKED[1:], add_generation_prompt=True)
    assert prompt.endswith("<｜Assistant｜><think>\n\n</think>\n\n")
    thought = {"role": "assistant", "content": "4", "thinking": "2 and 2"}
    text = template.render([*ASKED[1:], thought])
    assert text.endswith("<think>\n2 and 2\n</think>\n\n4")


# Where they are found ----------------------------------------------------------------------------


def write(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_model_without_one(tmp_path):
    assert find_template(tmp_path) is None
    assert find_template(write(tmp_path, eos_token="x")) is None
    assert find_template(tmp_path, "alpaca").tokens == {"eos_token": "x"}


def test_in_tokenizer_config(tmp_path):
    write(tmp_path, chat_template="{{ eos_token }}{{ a }}", eos_token={"content": "<e>"})
    template = find_template(tmp_path, arguments={"a": 1})
    assert template.render([]) == "<e>1" and template.render([], a=2) == "<e>2"
    assert find_template(tmp_path / "model.safetensors").render([]) == "<e>"


def test_tokens_that_only_a_configuration_names(tiny_model):
    template = find_template(tiny_model, "alpaca")
    assert template.tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def test_one_of_its_own_for_tools(tmp_path):
    both = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    template = find_template(write(tmp_path, chat_template=both))
    assert template.render([]) == "d" and template.render([], tools=[{}]) == "t"
    with pytest.raises(UserError, match="no template named default; choose one with --chat-templ"):
        find_template(write(tmp_path, chat_template=both[1:]))


def test_a_file_beside_the_model_goes_first(tmp_path):
    write(tmp_path, chat_template="old")
    (tmp_path / "chat_template.jinja").write_text("new")
    assert find_template(tmp_path).render([]) == "new"
    chosen = tmp_path / "mine.jinja"
    chosen.write_bytes(b"\xef\xbb\xbfmine\r\n")
    assert find_template(tmp_path, str(chosen)).render([]) == "mine"


def test_in_a_gguf_file(tmp_path, monkeypatch):
    from jlora.formats import gguf_file

    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}{{ eos_token }}",
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 9,
    }
    monkeypatch.setattr(gguf_file, "open_gguf", lambda path: None)
    monkeypatch.setattr(gguf_file, "read_metadata", lambda path, reader: metadata)
    assert find_template(tmp_path / "m.gguf").render([]) == "c"


def test_what_a_training_keeps(tmp_path):
    run, adapter = tmp_path / "run", tmp_path / "run" / "best"
    adapter.mkdir(parents=True)
    kept = ChatTemplate("{{ eos_token }}{{ on }}", {"eos_token": "</s>"}, {"on": False}, "x", "t")
    kept.save(run)
    for folder in (run, adapter):
        found = find_template(folder)
        assert (found.source, found.tokens, found.arguments, found.with_tools) == (
            kept.source, kept.tokens, kept.arguments, kept.with_tools,
        )  # fmt: skip
        assert find_template(folder, arguments={"on": True}).render([]) == "</s>True"
    assert find_template(adapter, "chatml").arguments == {"on": False}


def test_no_such_template(tmp_path):
    with pytest.raises(UserError, match="no chat template chatlm: no such file; .* alpaca, chatml"):
        find_template(tmp_path, "chatlm")
    (tmp_path / "t.jinja").write_text("a\n{% if %}")
    with pytest.raises(UserError, match=r"t\.jinja:2: not a Jinja template"):
        find_template(None, str(tmp_path / "t.jinja"))


# What they are given -----------------------------------------------------------------------------


def test_the_date():
    before = datetime.now().strftime("%d %b %Y")
    text = ChatTemplate('{{ strftime_now("%d %b %Y") }}').render([])
    assert text in (before, datetime.now().strftime("%d %b %Y"))


def test_messages_are_not_changed():
    message = {"role": "user", "content": None, "thinking": "t"}
    text = ChatTemplate("{{ messages[0] | tojson(sort_keys=true) }}").render([message])
    assert json.loads(text) == {"role": "user", "thinking": "t", "reasoning_content": "t"}
    assert message == {"role": "user", "content": None, "thinking": "t"}


# Without trust -----------------------------------------------------------------------------------

ENDLESS = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "loop in a macro": "{% macro f(n) %}{% for i in range(n) %}{{ f(n) }}{% endfor %}{% endmacro %}"
    "{{ f(9999) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "adding": "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "squaring": "{% set n = namespace(x=9) %}{% for i in range(60) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "product": "{{ 'a' * 10 ** 11 }}",
    "list": "{{ [1] * 10 ** 11 }}",
    "center": "{{ 'a' | center(10 ** 11) }}",
    "ljust": "{{ 'a'.ljust(10 ** 11) }}",
    "indent": "{{ 'a' | indent(10 ** 11) }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "width of its own": "{{ '%*d' % (10 ** 11, 1) }}",
    "format": "{{ '{:99999999999}'.format(1) }}",
    "format with a width": "{{ '{:{}}'.format('a', 10 ** 11) }}",
    "format with a width of text": "{{ '{:{}}'.format('a', '99999999999') }}",
    "format of a mapping": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10 ** 11}) }}",
    "format filter": "{{ '%99999999999s' | format(1) }}",
    "precision": "{{ '%.99999999999f' % 1 }}",
    "replace": "{{ ('a' * 10 ** 6).replace('a', 'a' * 10 ** 6) }}",
    "replace filter": "{{ ('a' * 10 ** 6) | replace('a', 'a' * 10 ** 6) }}",
    "join": "{{ range(99999) | join('a' * 10 ** 6) }}",
    "join method": "{{ ('a' * 10 ** 6).join('b' * 10 ** 6 | list) }}",
    "join of one text": "{{ (['a' * 10 ** 6] * 10 ** 6) | join }}",
    "tabs": "{{ ('\t' * 10 ** 6).expandtabs(10 ** 6) }}",
    "indented lines": "{{ ('\n' * 10 ** 6) | indent(10 ** 6) }}",
    "wrapped lines": "{{ ('a ' * 10 ** 5) | wordwrap(1, wrapstring='b' * 10 ** 5) }}",
    "translate": "{{ ('a' * 10 ** 6).translate({97: 'b' * 10 ** 6}) }}",
    "lists in lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x == 1 }}",
    "dicts in dicts": "{% set n = namespace(x=1) %}{% for i in range(60) %}"
    "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x | tojson }}",
    "tuples": "{% set n = namespace(x='a') %}{% for i in range(60) %}"
    "{% set n.x = (n.x, n.x) %}{% endfor %}{{ n.x }}",
    "lists times lists": "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}"
    "{{ c }}",
    "lists times lists as JSON": "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}"
    "{{ ([b] * 1000) | tojson }}",
    "sum of lists": "{{ ([[1] * 10 ** 5] * 10 ** 4) | sum(start=[]) | length }}",
    "a list often": "{% set a = ['a' * 10 ** 6] * 10 ** 6 %}{{ '%s' % (a,) }}",
    "a list formatted": "{% set a = ['a' * 10 ** 6] * 10 ** 6 %}{{ '{}'.format(a) }}",
    "a list as text": "{% set a = ['a' * 10 ** 6] * 10 ** 6 %}{{ a ~ '' }}",
    "bytes": "{{ (1).to_bytes(10 ** 11, 'big') }}",
    "tojson": "{{ messages | tojson(indent=10 ** 11) }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
}  # fmt: skip


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_it_comes_to_an_end(source):
    started = time.process_time()
    with pytest.raises(UserError, match="chat template cannot be rendered .*--chat-template$"):
        ChatTemplate(source).render(MESSAGES)
    assert time.process_time() - started < 20  # it would be hours


@pytest.mark.parametrize(
    "source",
    ["{% include '/etc/passwd' %}", "{% import '/etc/passwd' as x %}",
     "{% extends '/etc/passwd' %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
     "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
     "{{ (messages | attr('__class__')).__mro__ }}",
     "{{ '{0.__class__.__mro__}'.format(messages) }}", "{{ raise_exception.__globals__.json }}",
     "{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}",
     "{% set n = namespace(_x=1) %}", "{% set n = namespace() %}{% set n._x = 1 %}",
     "{{ open('/etc/passwd') }}"],
)  # fmt: skip
def test_it_reaches_nothing(source):
    with pytest.raises(UserError, match="no template may|cannot be rendered") as error:
        ChatTemplate(source).render(MESSAGES)
    assert "root:" not in str(error.value)


def test_a_long_conversation_is_no_endless_one():
    letters = "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 50_000}] * 4
    assert len(ChatTemplate(letters).render(messages)) == 200_000
    assert len(ChatTemplate("{{ messages[0].content }}").render(
        [{"role": "user", "content": "x" * 5_000_000}])) == 5_000_000  # fmt: skip


def test_lists_that_grow_with_the_conversation():
    source = (
        "{% set n = namespace(x=[]) %}{% for m in messages %}{% set n.x = n.x + [m] %}{% endfor %}"
        "{{ n.x | length }}{% for m in messages %}{% if m.role in ['user', 'x'] %}.{% endif %}"
        "{% endfor %}{{ n }}"
    )
    text = ChatTemplate(source).render([{"role": "user", "content": "x"}] * 3000)
    assert text == "3000" + "." * 3000 + "<Namespace>"


def test_numbers_in_texts_are_no_widths():
    source = (
        "{{ 1700000000 | string }}{{ 'Nr. 123456: %s' % 'a' }}{{ 'in {}: 100000'.format(5) }}"
        "{{ '{}%s: 123456}'.replace('%s', '') }}{{ '%s: 99999' | format(messages[0].content) }}"
        "{{ '{}'.format(messages[0].content) }}"
    )
    text = "1700000000Nr. 123456: ain 5: 100000{}: 123456}:7654321%*d: 99999:7654321%*d"
    assert ChatTemplate(source).render([{"role": "user", "content": ":7654321%*d"}]) == text
    started = time.process_time()
    colons = [{"role": "user", "content": ":" * 500_000}]
    assert len(ChatTemplate("{{ '{}'.format(messages[0].content) }}").render(colons)) == 500_000
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("source", "message"),
    [("{{ a.b.c }}", "'a' is undefined"), ("{{ 1 + 'a' }}", "unsupported operand"),
     ("{{ 'a' | nothing }}", "1: not a Jinja template .*nothing"),
     ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply")],
)  # fmt: skip
def test_broken_ones(source, message):
    with pytest.raises(UserError, match=message):
        ChatTemplate(source).render([])


def test_messages_stay_one_line():
    with pytest.raises(UserError) as error:
        ChatTemplate("{{ raise_exception('a\\nb\\x1b[31m') }}").render([])
    assert re.fullmatch(r"chat template refuses this: a b \[31m", str(error.value))
