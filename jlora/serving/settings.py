"""What `jlora serve` is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jlora.system.settings import check_least, check_setting


@dataclass(frozen=True)
class ServeConfig:
    """How to serve.

    Attributes:
        model: name or path of the base model.
        served_model_name: what clients call it; None: the last part of ``model``.
        adapters: names of adapters, and run or adapter folders.
        adapters_dir: a folder whose folders are adapters, by their names.
        allow_adapter_changes: whether clients may load what is in ``adapters_dir``, and unload.
        host, port: to listen at; port 0: any that is free.
        api_key: what clients must send; None: nothing.
        cors: origins whose pages may ask.
        precision: see `jlora.engine.prepare`.
        cache_gb: memory for keys and values of prompts that may come again.
        memory_gb: memory for keys and values of running requests.
        max_rows: rows of the running batch; a request takes one, or one for each beam.
        queue: requests that wait for a row; further ones are refused.
        max_body_mb: size of a request.
        max_tokens: of an answer, where the request does not say it.
        timeout: seconds from a request to the end of its answer.
        chat_template, chat_template_args: as for `jlora.runs.chat.find_chat_template`.
        log_prompts: whether prompts and answers are printed.

    Raises:
        UserError: a setting is out of its range.
    """

    model: str
    served_model_name: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    adapters_dir: Path | None = None
    allow_adapter_changes: bool = False
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = field(default=None, repr=False)
    cors: tuple[str, ...] = ()
    precision: str = "auto"
    cache_gb: float = 1.0
    memory_gb: float = 2.0
    max_rows: int = 64
    queue: int = 256
    max_body_mb: float = 8.0
    max_tokens: int = 512
    timeout: float = 600.0
    chat_template: str | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    log_prompts: bool = False

    def __post_init__(self):
        check_least(self, 1, "max_rows", "max_tokens")
        check_least(self, 0, "cache_gb", "queue")
        check_setting(0 <= self.port <= 65535, "port", self.port, "from 0 to 65535")
        for name in ("memory_gb", "max_body_mb", "timeout"):
            check_setting(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        key = self.api_key
        if key is not None:
            plain = bool(key) and all("!" <= letter <= "~" for letter in key)
            check_setting(plain, "api_key", "not usable", "one word of ASCII characters")
        if self.allow_adapter_changes:
            where = self.adapters_dir
            check_setting(
                where is not None, "allow_adapter_changes", "given without adapters_dir",
                "with it: adapters are loaded only from there",
            )  # fmt: skip

    @property
    def name(self) -> str:
        """What clients call the base model."""
        return self.served_model_name or Path(self.model).name or self.model

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: a name or an address, IPv6 in brackets or without."""
    import ipaddress

    host = host.strip("[]").lower().rstrip(".")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
