"""The Modelfile from which `ollama create` takes a GGUF file: template, stops, system prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jlora.data.chat_template import ChatTemplate
from jlora.data.turns import Turns, find_turns
from jlora.system.errors import UserError

NAME = "Modelfile"


def modelfile_path(gguf: Path) -> Path:
    """Where the Modelfile of a GGUF file goes: ``Modelfile`` beside it, or ``NAME.Modelfile`` where
    another file has one.

    Raises:
        UserError: both are there.
    """
    for path in (gguf.parent / NAME, gguf.parent / f"{gguf.stem}.{NAME}"):
        if not os.path.lexists(path):
            return path
    raise UserError(f"{path} is there already; remove it, or write to another folder")


def modelfile(
    gguf: str,
    template: ChatTemplate | None,
    stops: Sequence[str],
    begin: str = "",
    separator: str = "",
) -> str:
    """The text of a Modelfile.

    Args:
        gguf: name of the file beside it.
        template: of its conversations; None: a prompt is continued as it stands.
        stops: texts that end an answer.
        begin: the begin token, if Ollama puts it before every prompt by itself.
        separator: a token between prompt and answer, where there is no template.
    """
    lines = [f"FROM ./{gguf}"]
    if template is None:
        lines.append("TEMPLATE " + quoted("{{ .Prompt }}" + literal(separator)))
    else:
        lines += template_lines(template, begin)
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in stops if can_quote(stop)]
    return "\n".join(lines) + "\n"


def template_lines(template: ChatTemplate, begin: str) -> list[str]:
    """TEMPLATE and SYSTEM, or a comment that says why there is none."""
    turns = find_turns(template)
    text = None if turns is None else go_template(turns, begin)
    if turns is None or text is None or not can_quote(text):
        return [
            "# The model's chat template has no equal form in Ollama's language: without TEMPLATE,",
            "# Ollama goes by the template in the GGUF file.",
        ]
    lines = ["# From the model's chat template; tools and thoughts are left out."]
    if "date_string" in template.source:
        lines.append("# The date in it is the template's own: Ollama has no equal to today's.")
    lines.append("TEMPLATE " + quoted(text))
    if turns.default is not None and can_quote(turns.default):
        lines.append("SYSTEM " + quoted(turns.default))
    return lines


def go_template(turns: Turns, begin: str) -> str:
    """Ollama's form (Go's text/template) of a conversation; ``begin`` is left out at its start."""
    start, none = literal(turns.start.removeprefix(begin)), literal(turns.no_system)
    user, assistant = map(literal, turns.user), map(literal, turns.assistant)
    system = folded = ""
    if turns.system is not None:
        system = "{{ if .System }}" + "{{ .System }}".join(map(literal, turns.system))
        system += ("{{ else }}" + none if none else "") + "{{ end }}"
    elif turns.folded is not None:
        # The messages begin with the system prompt, if there is one.
        inside = "{{ $.System }}".join(map(literal, turns.folded))
        folded = "{{ if and $.System (eq $i 1) }}" + inside + "{{ end }}"
        system = "{{ if not .System }}" + none + "{{ end }}" if none else ""
    else:
        system = none
    return (
        start
        + system
        + '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}'
        + (folded + "{{ .Content }}").join(user)
        + '{{ else if eq .Role "assistant" }}'
        + "{{ .Content }}".join(assistant)
        + "{{ end }}{{ end }}"
        + literal(turns.answer)
    )


def literal(text: str) -> str:
    """A text as it stands in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def quoted(text: str) -> str:
    """A value in a Modelfile, which knows no escapes."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def can_quote(text: str) -> bool:
    """Whether a Modelfile can hold a text: Ollama drops what is not printable."""
    return '"""' not in text and all(c.isprintable() or c in "\n\t" for c in text)
