"""`jlora serve`: a base model and its adapters for any program that speaks OpenAI's protocol."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from jlora.cli.chat import is_adapter
from jlora.cli.options import PRECISIONS, Verb, json_object, positive
from jlora.system.errors import UserError

KEY = "JLORA_API_KEY"


def add_serve(verb: Verb) -> None:
    command = verb(
        "serve", run_serve, "Serve a model and many adapters over HTTP, as OpenAI's API does."
    )
    command.add_argument("model", metavar="MODEL", help="name or path of the base model")
    command.add_argument(
        "--adapter", action="append", default=[], type=named_path, metavar="NAME=PATH",
        help="an adapter or run folder, and the name to ask it by; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--adapters-dir", type=Path, metavar="DIR",
        help="a folder of adapter and run folders, which are asked by their names",
    )  # fmt: skip
    command.add_argument(
        "--allow-adapter-changes", action="store_true",
        help="let clients load adapters from --adapters-dir, and unload them",
    )  # fmt: skip
    command.add_argument(
        "--served-model-name", metavar="NAME", help="of the base (default: the end of MODEL)"
    )
    place = command.add_argument_group("where, and for whom")
    place.add_argument("--host", help="address to listen at (default: 127.0.0.1)")
    place.add_argument("--port", type=int, help="0: any that is free (default: 8080)")
    place.add_argument(
        "--api-key", metavar="KEY", help="what clients must send; other users of this machine may "
        f"see it in its list of processes, so better set the environment's {KEY}",
    )  # fmt: skip
    place.add_argument(
        "--cors", nargs="+", metavar="ORIGIN",
        help="web pages that may ask, such as http://localhost:3000, or * (default: none)",
    )  # fmt: skip
    limits = command.add_argument_group("limits")
    for name, kind, unit, text in (
        ("--max-rows", positive, "N", "answers that are written at the same time (default: 64)"),
        ("--queue", int, "N", "requests that may wait; others get a 429 (default: 256)"),
        ("--memory-gb", float, "GB", "for keys and values of running requests (default: 2)"),
        ("--cache-gb", float, "GB", "for beginnings of prompts that may come again (default: 1)"),
        ("--max-body-mb", float, "MB", "of a request (default: 8)"),
        ("--max-tokens", positive, "N", "of an answer, if the request does not say (default: 512)"),
        ("--timeout", float, "SECONDS", "for a request, waiting included (default: 600)"),
    ):
        limits.add_argument(name, type=kind, metavar=unit, help=text)
    command.add_argument("--precision", help=f"{PRECISIONS} (default: auto)")
    command.add_argument(
        "--chat-template", metavar="FILE|NAME", help="instead of the models' and adapters' own"
    )
    command.add_argument(
        "--chat-template-args", type=json_object, metavar="JSON",
        help='variables of the templates, such as \'{"enable_thinking": false}\'',
    )  # fmt: skip
    command.add_argument("--log-prompts", action="store_true", help="print prompts and answers")


def named_path(text: str) -> tuple[str, Path]:
    """``NAME=PATH``"""
    name, sign, path = text.partition("=")
    if not sign or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=PATH")
    return name, Path(path)


def run_serve(arguments: argparse.Namespace) -> int:
    try:
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f'jlora serve needs {error.name}, which is not installed: pip install "jlora[serve]"'
        ) from None
    from jlora.runs.recipe import check_precision
    from jlora.serving.settings import ServeConfig

    if is_adapter(Path(arguments.model)):
        raise UserError(
            f"{arguments.model} is an adapter; name its base model first, and it by --adapter "
            f"NAME={arguments.model}"
        )
    values = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(ServeConfig)
        if getattr(arguments, field.name, None) is not None
    }
    values["adapters"] = adapters(arguments.adapter)
    values["api_key"] = arguments.api_key or os.environ.get(KEY) or None
    values["cors"] = tuple(arguments.cors or ())
    settings = ServeConfig(**values)
    check_precision(settings.precision)

    from jlora.serving.server import serve

    serve(settings)
    return 0


def adapters(named: list[tuple[str, Path]]) -> dict[str, Path]:
    """Adapters by name.

    Raises:
        UserError: two have one name.
    """
    found: dict[str, Path] = {}
    for name, path in named:
        if name in found:
            raise UserError(f"--adapter {name} is given twice; name one of the two otherwise")
        found[name] = path
    return found
