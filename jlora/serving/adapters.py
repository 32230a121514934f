"""Adapters that come and go while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.data.readers import shorten
from jlora.serving.errors import ApiError
from jlora.serving.fields import Body
from jlora.serving.service import DEFAULT_NAMES, Service
from jlora.system.console import say, warn
from jlora.system.errors import UserError, one_line

MOST_LETTERS = 128  # of a name


def check_name(name: str) -> None:
    """Check what an adapter is to be called.

    Raises:
        UserError: the name is empty, long, or has white space or control characters.
    """
    if not name or len(name) > MOST_LETTERS or not name.isprintable() or " " in name:
        raise UserError(
            f"{shorten(repr(name))} is no name for an adapter; take up to {MOST_LETTERS} "
            "characters without white space"
        )
    if name in DEFAULT_NAMES:
        raise UserError(f"{name} is a name of the base model; call the adapter otherwise")


def load_first(service: Service) -> None:
    """Load the adapters that the server is started with, before it listens.

    Those that were named must all load; of ``adapters_dir`` those that do not are left out.

    Raises:
        UserError: one that was named cannot be served.
    """
    settings = service.settings
    for name, path in settings.adapters.items():
        _load_now(service, name, path, str(path))
    folder = settings.adapters_dir
    if folder is None:
        return
    if not folder.is_dir():
        raise UserError(f"--adapters-dir {folder}: no such folder")
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_dir() or path.name in settings.adapters:
            continue
        try:
            _load_now(service, path.name, inside(folder, path.name), path.name)
        except (UserError, ApiError) as error:
            service.refused[path.name] = one_line(error)
            warn(f"adapter {path.name} is not served: {one_line(error)}")


def _load_now(service: Service, name: str, path: Path, root: str) -> None:
    check_name(name)
    if name in service.voices:
        raise UserError(f"adapter {name}: a model of that name is served already")
    voice = service.voice_of(name, path, root)
    service.engine.add_adapter(name, path).result()
    service.voices[name] = voice
    say(f"adapter {name}: {path}")


def inside(folder: Path, given: str) -> Path:
    """The place of an adapter in a folder, which no link and no ``..`` leaves.

    Raises:
        ApiError: it is elsewhere, or not there.
    """
    outside = ApiError(
        f"lora_path {shorten(repr(given))} is no folder in the server's --adapters-dir",
        param="lora_path",
    )
    try:
        top = folder.resolve(strict=True)
        path = (top / given).resolve(strict=True)
        if path == top or top not in path.parents or not path.is_dir():
            raise outside
        # Files that are read, of an adapter or of a run's folders.
        files = [*path.iterdir(), *(file for name in ("best", "adapter", "checkpoint")
                                    for file in (path / name).glob("*"))]  # fmt: skip
        if any(top not in file.resolve().parents for file in files):
            raise outside
    except (OSError, ValueError, RuntimeError):  # not there, a NUL character, links in a circle
        raise outside from None
    return path


class AdapterChanges:
    """The routes that load and unload; one change at a time."""

    def __init__(self, service: Service):
        self._service = service
        self._lock = asyncio.Lock()

    def _check_allowed(self) -> None:
        if not self._service.settings.allow_adapter_changes:
            raise ApiError(
                "adapters can't be changed; start the server with --allow-adapter-changes", 403
            )

    async def load(self, values: Mapping[str, Any]) -> str:
        """Load an adapter, or with ``load_inplace`` the new version of one.

        Raises:
            ApiError: it may not be loaded, or cannot.
        """
        self._check_allowed()
        service, body = self._service, Body(values)
        name, given = body.text("lora_name"), body.text("lora_path")
        again = body.flag("load_inplace", False)
        for field, value in (("lora_name", name), ("lora_path", given)):
            if not value:
                raise ApiError(f"{field} is missing", param=field)
        async with self._lock:
            try:
                check_name(name)
                self._check_not_base(name)
                if name in service.voices and not again:
                    raise ApiError(
                        f"the adapter {name} is loaded already; set load_inplace to true to load "
                        "it anew",
                        param="lora_name",
                    )
                path = inside(service.settings.adapters_dir, given)
                voice = await asyncio.to_thread(service.voice_of, name, path, given)
                await asyncio.wrap_future(service.engine.add_adapter(name, path))
            except UserError as error:
                raise ApiError(f"the adapter {name} can't be served: {error}") from None
            service.voices[name] = voice
            service.refused.pop(name, None)
        say(f"adapter {name}: {path}")
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, values: Mapping[str, Any]) -> str:
        """Take an adapter away; requests that run with it finish.

        Raises:
            ApiError: it may not be taken away, or is not there.
        """
        self._check_allowed()
        service, body = self._service, Body(values)
        name = body.text("lora_name")
        if not name:
            raise ApiError("lora_name is missing", param="lora_name")
        async with self._lock:
            self._check_not_base(name)
            if name not in service.voices:
                raise ApiError(
                    f"the adapter {shorten(repr(name))} is not loaded", 404, "lora_name",
                    "model_not_found",
                )  # fmt: skip
            del service.voices[name]
            await asyncio.wrap_future(service.engine.remove_adapter(name))
        say(f"adapter {name} unloaded")
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _check_not_base(self, name: str) -> None:
        if name == self._service.base.name:
            raise ApiError(f"{name} is the base model", param="lora_name")
