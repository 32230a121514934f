"""The Modelfile for Ollama: its template writes what the Jinja template writes."""

from __future__ import annotations

import re

import pytest
import tiny
from test_gguf_write import WIDE, tokenizer_of
from tiny_models import tiny_llama

import jlora
from jlora.adapters import LoraConfig, get_peft_model
from jlora.adapters.export_gguf import export_gguf
from jlora.adapters.modelfile import modelfile
from jlora.adapters.trained_tokens import TrainedTokens
from jlora.cli import main
from jlora.data.chat_template import ChatTemplate, built_in_names, find_template
from jlora.data.turns import conversation, find_turns
from jlora.formats.gguf_file import read_gguf
from jlora.system.errors import UserError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
#: Forms that models' own templates have, in few lines.
FORMS = {
    "a default system prompt": """{% if messages[0].role != 'system' %}<|im_start|>system
You are a bot.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "Llama 3.2, with a date": """{% if not date_string is defined %}{% set date_string =
strftime_now("%d %b %Y") %}{% endif %}{{ bos_token }}{% set system = messages[0].content if
messages[0].role == 'system' else '' %}<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}

{{ system }}<|eot_id|>{% for m in messages %}{% if m.role != 'system' %}<|start_header_id|>{{
m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt
%}<|start_header_id|>assistant<|end_header_id|>

{% endif %}""",
    "GLM-4": """[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}""",
    "DeepSeek, thinking": """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{
m.content }}{% elif m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>{{
m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt
%}<Assistant><think>
{% endif %}""",
    "Qwen3, not thinking": """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}""",
    "no system prompts": """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{
raise_exception('no system') }}{% endif %}<start_of_turn>{{ m.role }}
{{ m.content }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
    "braces": "{% for m in messages %}{{ '{{' }}{{ m.role }}{{ '}}' }}{{ m.content }};{% endfor %}",
}


def template_of(name: str) -> ChatTemplate:
    if name in FORMS:
        return ChatTemplate(FORMS[name], TOKENS, {"enable_thinking": False})
    return ChatTemplate(find_template(None, name).source, TOKENS)


def parse(text: str) -> dict[str, list[str]]:
    """A Modelfile as Ollama reads it: a command begins a line, a value is quoted or ends it."""
    found: dict[str, list[str]] = {}
    pattern = r'#[^\n]*\n|(FROM|TEMPLATE|SYSTEM|PARAMETER stop) ("""(.*?)"""|"(.*?)"|([^"\n]*))\n'
    rest = re.sub(
        pattern,
        lambda m: found.setdefault(m[1], []).append(m[3] or m[4] or m[5] or "") or ""
        if m[1] else "",
        text,
        flags=re.S,
    )  # fmt: skip
    assert rest == "", rest
    return found


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What the subset of Go's text/template that is written here does."""
    steps = re.split(r"({{.*?}})", template.replace('{{ "{{" }}', "\0"), flags=re.S)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")

    def truth(condition: str, i: int, message: dict[str, str]) -> bool:
        if condition == ".System":
            return bool(system)
        if condition == "not .System":
            return not system
        if condition == "and $.System (eq $i 1)":
            return bool(system) and i == 1
        return re.fullmatch(r'eq .Role "(\w+)"', condition)[1] == message["role"]

    def run(at: int, end: int, i: int, message: dict[str, str]) -> str:
        out = ""
        while at < end:
            step = steps[at].strip("{} ") if steps[at].startswith("{{") else None
            if step is None:
                out += steps[at]
            elif step == ".Content":
                out += message["content"]
            elif step in (".System", "$.System"):
                out += system
            elif step.startswith("range"):
                close, _ = block(at)
                parts = (run(at + 1, close, n, m) for n, m in enumerate(messages))
                out, at = out + "".join(parts), close
            else:
                close, cuts = block(at)
                branches = zip([at, *cuts], [*cuts, close])
                for start, stop in branches:
                    word = steps[start].strip("{} ").removeprefix("else").strip()
                    if not word or truth(word.removeprefix("if "), i, message):
                        out += run(start + 1, stop, i, message)
                        break
                at = close
            at += 1
        return out

    def block(at: int) -> tuple[int, list[int]]:
        """Where a block ends, and where its own else are."""
        depth, cuts = 0, []
        for place in range(at + 1, len(steps)):
            step = steps[place].strip("{} ") if steps[place].startswith("{{") else ""
            if step.startswith(("if", "range")):
                depth += 1
            elif step == "end" and depth == 0:
                return place, cuts
            elif step == "end":
                depth -= 1
            elif step.startswith("else") and depth == 0:
                cuts.append(place)
        raise AssertionError("no end")

    return run(0, len(steps), 0, {}).replace("\0", "{{")


TALKS = [
    conversation("Hello"),
    conversation("Hi {there}", "Yes?\n\n1. a\n2. b", "Go on"),
    conversation("a", "b", "c", "d", "e"),
    conversation("Hello", system="Be brief.\n\nAnd kind."),
    conversation("a", "b", "c", system="S"),
]


@pytest.mark.parametrize("begin", ["", "<s>"])
@pytest.mark.parametrize("name", [*built_in_names(), *FORMS])
def test_ollama_s_template_writes_what_jinja_s_writes(name, begin):
    template = template_of(name)
    found = parse(modelfile("m.gguf", template, ["</s>"], begin))
    assert found["FROM"] == ["./m.gguf"] and found["PARAMETER stop"] == ["</s>"]
    (own,) = found["TEMPLATE"]
    dated = {"date_string": "26 Jul 2024"}
    compared = 0
    for messages in TALKS:
        try:
            expected = template.render(messages, add_generation_prompt=True, **dated)
        except UserError:
            continue
        assert go(own, messages) == expected.removeprefix(begin)
        compared += 1
    assert compared >= 3
    assert found.get("SYSTEM") == (["You are a bot."] if name.startswith("a default") else None)


NOT_ALIKE = {
    "numbered turns": "{% for m in messages %}[{{ loop.index }}] {{ m.content }}{% endfor %}",
    "today": "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.role }}:{{ m.content }}\n"
    "{% endfor %}",
    "shouting": "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",
    "the last question alone": "<q>{{ messages[-1].content }}",
    "short answers": "{% for m in messages %}{{ m.role }}: {{ m.content[:17] }}\n{% endfor %}",
    "refused": "{{ raise_exception('never') }}",
}


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_a_template_without_an_equal_form_is_left_to_ollama(name):
    template = ChatTemplate(NOT_ALIKE[name], TOKENS)
    assert find_turns(template) is None
    text = modelfile("m.gguf", template, ["</s>"])
    assert "no equal form in Ollama's language" in text
    assert parse(text).keys() == {"FROM", "PARAMETER stop"}


def test_what_a_modelfile_cannot_quote_is_left_out():
    source = '{% for m in messages %}"""{{ m.role }}: {{ m.content }}\n{% endfor %}'
    text = modelfile("m.gguf", ChatTemplate(source), ['a"""b', "x\x00", 'say "', "\n"])
    assert parse(text) == {"FROM": ["./m.gguf"], "PARAMETER stop": ['say "', "\n"]}


# The export ----------------------------------------------------------------------------------


def exported(folder, own_template=None, name="m.gguf", **options):
    model = tiny_llama(**WIDE, vocab_size=410)
    model.tokenizer = tokenizer_of("llama3", own_template)
    model.tokenizer.end_token_ids = options.pop("ends", ())
    written = export_gguf(model, folder / name, **options)
    return read_gguf(folder / name).metadata, written


def test_template_and_every_end_token_go_into_the_file_and_the_modelfile(tmp_path):
    """The template ends turns with <user>, a token of its own; the files name two more."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<user>{% endfor %}"
    metadata, written = exported(tmp_path, template, ends=(0, 7))
    assert metadata["tokenizer.chat_template"] == template
    keys = ("eos", "eot", "eom")
    assert [metadata[f"tokenizer.ggml.{key}_token_id"] for key in keys] == [0, 7, 400]
    assert metadata["tokenizer.ggml.eos_token_ids"] == [0, 7, 400]
    again = jlora.load(tmp_path / "m.gguf").tokenizer
    assert (again.eos_token_id, again.end_token_ids) == (0, (0, 7, 400))
    assert again.chat_template == template
    found = parse((tmp_path / "Modelfile").read_text())
    stops = [again.decode([index], skip_special_tokens=False) for index in (0, 7, 400)]
    assert found["PARAMETER stop"] == stops and stops[2] == "<user>"
    assert go(found["TEMPLATE"][0], TALKS[0]) == "user: Hello<user>"
    assert f"ollama create NAME -f {tmp_path}/Modelfile" in str(written)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "m.gguf"]


def test_the_templates_of_the_training_go_before_the_models(tmp_path):
    own = ChatTemplate(
        "{% for m in messages %}{{ m.content }};{% endfor %}", {}, {"a": 1}, "t", "x"
    )
    metadata, written = exported(tmp_path, "the model's", template=own)
    assert metadata["tokenizer.chat_template"] == own.source
    assert metadata["tokenizer.chat_template.tool_use"] == "x"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert "--chat-template-kwargs '{\"a\": 1}'" in str(written)
    assert ";" in parse((tmp_path / "Modelfile").read_text())["PARAMETER stop"]


def test_a_model_of_a_task_continues_its_prompt(tmp_path):
    """The separator of the training stands behind the prompt, as in generate."""
    metadata, _ = exported(tmp_path, "the base's", trained=TrainedTokens(0, 5), template=None)
    assert metadata["tokenizer.chat_template"] == "the base's"
    found = parse((tmp_path / "Modelfile").read_text())
    assert found["TEMPLATE"] == ["{{ .Prompt }}" + tiny.END]
    assert metadata["tokenizer.ggml.eos_token_ids"] == [5, 0]  # the base's ends one too
    assert len(found["PARAMETER stop"]) == 2


def test_a_second_file_in_a_folder_gets_a_modelfile_of_its_own_name(tmp_path):
    exported(tmp_path)
    exported(tmp_path, name="n.gguf")
    assert parse((tmp_path / "n.Modelfile").read_text())["FROM"] == ["./n.gguf"]
    (tmp_path / "n.gguf").unlink()
    with pytest.raises(UserError, match=r"n.Modelfile is there already; remove it"):
        exported(tmp_path, name="n.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "m.gguf", "n.Modelfile"]


def test_without_a_tokenizer_there_is_no_modelfile(tmp_path):
    exported(tmp_path, tokenizer=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_the_command_takes_the_template_of_the_adapter(tmp_path, tiny_model):
    model = get_peft_model(jlora.load(tiny_model), LoraConfig(r=2, target_modules=["c_attn"]))
    model.save_pretrained(tmp_path / "adapter")
    source = "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
    ChatTemplate(source).save(tmp_path / "adapter")
    out = tmp_path / "out"
    out.mkdir()
    argv = ["export", tiny_model, "--gguf", out / "m.gguf", "--adapter", tmp_path / "adapter"]
    assert main([str(argument) for argument in argv]) == 0
    assert read_gguf(out / "m.gguf").metadata["tokenizer.chat_template"].strip() == source.strip()
    (own,) = parse((out / "Modelfile").read_text())["TEMPLATE"]
    assert go(own, TALKS[0]) == "(user) Hello\n"
