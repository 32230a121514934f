"""What `make docs` makes of a page before the generator sees it."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import pytest
import yaml
from doc_commands import ROOT

SPEC = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site_hook.py")
hook = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hook)


def changed(text: str, name: str = "recipes.md") -> str:
    return hook.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(src_uri=name)))


def test_links_that_leave_the_folder_become_their_text():
    assert changed("See [the code](../jlora/runs) and [chat](chat.md#rows).") == (
        "See the code and [chat](chat.md#rows)."
    )
    assert changed("[start](../README.md)") == "[start](index.md)"
    assert changed("[here](https://example.org/x), [there](#rows)") == (
        "[here](https://example.org/x), [there](#rows)"
    )


def test_code_stays_as_it_is():
    text = "    [a](../jlora)\n\n```text\n[b](../jlora)\n```\n"
    assert changed(text) == text


def test_a_dead_link_is_a_warning_which_strict_makes_an_error(caplog):
    changed("[gone](nothing.md)")
    assert "recipes.md: a link to docs/nothing.md, and there is no such file" in caplog.text


@pytest.mark.parametrize(("page", "title"), [("index.md", "# jlora"), ("index.cn.md", "# jlora")])
def test_the_first_page_is_the_readme(page, title):
    text = changed("", page)
    assert text.strip().startswith(title) and "](docs/" not in text and "(report.png)" in text
    assert "README" not in text.splitlines()[0]


def test_every_page_has_a_place_in_both_languages():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings = yaml.safe_load(re.sub(r"!!python/\S+ ", "", text))
    (home, *sections), pages, titles = settings["nav"], [], []
    for section in [home, *sections]:
        for title, entry in section.items():
            titles.append(title)
            for item in [{title: entry}] if isinstance(entry, str) else entry:
                titles += item
                pages += item.values()
    english = [path.name for path in (ROOT / "docs").glob("*.md") if ".cn." not in path.name]
    assert sorted(pages) == sorted(english)
    (i18n,) = (p["i18n"] for p in settings["plugins"] if isinstance(p, dict))
    assert set(titles) == set(i18n["languages"][1]["nav_translations"])
