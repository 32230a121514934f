"""Adapters that come and go while `jlora serve` runs."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from fake_engine import HI, ask, serving, write_served

from jlora.serving import chat
from jlora.system.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_served(tmp_path_factory.mktemp("served"))


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
    names = [name.split()[0] for name in engine.adapters]
    assert names == ["talker", "task", "new"]  # the old one is gone
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
    assert [name.split()[0] for name in engine.adapters] == ["talker", "task"]


def test_a_request_has_the_new_adapter_with_its_template_or_the_old_with_its_own(
    changing, monkeypatch
):
    """An adapter is loaded anew between a request's tokens and its hand-in: it is made again."""
    engine, app = changing
    service = app.user_middleware[-1].args[0]
    plan, planned = chat.plan, []

    def slow_plan(service, fields, voice):
        found = plan(service, fields, voice)
        planned.append(voice)
        if len(planned) == 1:  # as if the other request's end fell in between
            engine.add_adapter("talker 99", voice.root).result()
            service.voices["talker"] = dataclasses.replace(voice, adapter="talker 99")
        return found

    monkeypatch.setattr(chat, "plan", slow_plan)
    body = {"messages": HI, "model": "talker"}
    assert ask(app, "POST", "/v1/chat/completions", json=body).status_code == 200
    assert [voice.adapter for voice in planned] == [planned[0].adapter, "talker 99"]
    assert [request.adapter for request in engine.requests] == ["talker 99"]
    del service.voices["talker"]
    assert ask(app, "POST", "/v1/chat/completions", json=body).status_code == 404


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
