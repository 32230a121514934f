"""`load`: a name or a path -> a model with its weights, configuration and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.data.pull_models import GPT2_TOKENIZER, NAME, WHEELS, pull, pulled
from jlora.data.tokenizer import Tokenizer, find_files
from jlora.formats.gguf_file import GGUFFile, read_gguf
from jlora.formats.lazy import LazyArray
from jlora.formats.names import is_lora_name
from jlora.formats.safetensors_file import (
    lazy_safetensors,
    one_line,
    read_sharded,
)
from jlora.formats.torch_file import lazy_torch
from jlora.models.families import FAMILIES, find_family, gguf_architectures
from jlora.models.random_gpt2 import CONTEXT, SIZES, VOCABULARY
from jlora.models.weights import check_fit, hugging_face_names, load_weights
from jlora.system.console import say
from jlora.system.errors import UserError
from jlora.system.json_files import read_object

#: Sizes in a config.json of GPT-2 or Llama that say how large the weights are.
WEIGHT_SIZES = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim"),
)
SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Checkpoint:
    """Everything that makes a model, before Jittor has seen any of it."""

    source: Path
    config: dict[str, Any]
    config_source: str
    tensors: dict[str, LazyArray]
    tokenizer: Tokenizer | None


def load(name_or_path: str | Path, dtype: str = "float32") -> Any:
    """Load a pretrained model.

    Args:
        name_or_path: a Hugging Face folder (config.json with safetensors or pytorch_model.bin,
            in one piece or several), a .gguf file, a bare GPT-2 .bin file as OpenAI's and
            microsoft/LoRA's downloads are (its size is found from the shapes), or a name: of a
            model pulled before, of one that `jlora pull` knows, or of one on Hugging Face.
        dtype: of the weights; only ``"float32"``, to which smaller kinds are converted.

    Returns:
        The model: ``model(input_ids (B, T) int32)`` -> logits (B, T, V) float32, with
        ``.config``, ``.tokenizer`` (None when the checkpoint has none, see
        `require_tokenizer`), ``.name_or_path``, ``.source`` (the weight file) and
        ``.source_config`` (config.json as it was). It is in eval mode.

    Raises:
        UserError: nothing there, a damaged file, or weights that do not fit the configuration.
    """
    if dtype != "float32":
        raise UserError(f"dtype {dtype!r} is not supported; weights are kept as float32")
    checkpoint = read_checkpoint(find(str(name_or_path)), check=check_before_weights)
    model = build_model(checkpoint.config, checkpoint.config_source)
    tensors = hugging_face_names(checkpoint.tensors, model.family)
    checkpoint.tensors.clear()  # `load_weights` frees them one by one
    load_weights(model, tensors, f"{checkpoint.source} ({checkpoint.config_source})")
    model.tokenizer = checkpoint.tokenizer
    model.name_or_path = str(name_or_path)
    # For whoever writes the model again: see jlora.adapters.export_folder.
    model.source, model.source_config = checkpoint.source.absolute(), checkpoint.config
    model.eval()
    return model


@dataclass
class Outline:
    """What is known of a model before its weights are read.

    Attributes:
        model: the model; its parameters have shapes and names alone. Jittor would make them all if
            anything were computed while it lives: ask it what there is to ask, and let it go.
        source: file or folder of the weights; None: a GPT-2 that is not on this machine.
    """

    model: Any
    source: Path | None


def outline(name_or_path: str | Path) -> Outline:
    """`load` without reading weights.

    Raises:
        UserError: the model is not on this machine and no GPT-2, or as `load`.
    """
    name = str(name_or_path)
    size = SIZES.get(name.rpartition("/")[2])
    source = find_local(name)
    if source is None and size is not None:
        checkpoint = Checkpoint(
            Path(f"{name}-pytorch_model.bin"), gpt2_config(*size), "its name", {}, gpt2_tokenizer()
        )
    else:
        source = source or find(name)
        checkpoint = read_checkpoint(source, check_before_weights)
    model = build_model(checkpoint.config, checkpoint.config_source)
    model.tokenizer, model.name_or_path = checkpoint.tokenizer, name
    return Outline(model, source)


def require_tokenizer(model: Any) -> Tokenizer:
    """The model's tokenizer, or an error that says how to give it one."""
    if model.tokenizer is None:
        path = Path(model.name_or_path)
        folder = path.parent if path.is_file() else path
        raise UserError(
            f"{model.name_or_path} has no tokenizer; put tokenizer.json, vocab.json with "
            f"merges.txt, or GPT-2's encoder.json with vocab.bpe into {folder}"
        )
    return model.tokenizer


def find(name: str) -> Path:
    """The file or folder that a name or path means, fetched when it is a known name."""
    found = find_local(name)
    if found is not None:
        return found
    path = Path(name).expanduser()
    # Anything that cannot be a name on a hub is a path with a slip in it.
    is_path = path.suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~"))
    if is_path or not NAME.fullmatch(name):
        raise UserError(f"{name}: no such file or folder; check the path, or `jlora pull` a name")
    return pull(name)


def find_local(name: str) -> Path | None:
    """The file or folder that a name or path means, if it is on this machine.

    A name is also found as the file ``NAME-pytorch_model.bin``, as microsoft/LoRA's download script
    calls it, here or in its folder ``pretrained_checkpoints``.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    folder = pulled(name)
    if folder is not None or not NAME.fullmatch(name) or name in WHEELS:
        return folder
    for place in (Path("."), Path("pretrained_checkpoints")):
        file = place / f"{name}-pytorch_model.bin"
        if file.is_file():
            return file
    return hugging_face_cache(name)


def hugging_face_cache(name: str) -> Path | None:
    """The folder of a model that huggingface_hub has downloaded before, if it is whole."""
    try:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(name, "config.json")
    except Exception:  # the package is absent, or does not take this for a name
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if weight_file(folder) is not None else None


def weight_file(folder: Path) -> Path | None:
    """The file to start reading a folder's weights from; safetensors come first."""
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        if (folder / name).is_file():
            return folder / name
    for pattern in ("*.safetensors", "*.gguf"):
        found = [p for p in sorted(folder.glob(pattern)) if not p.name.startswith("adapter_")]
        if len(found) == 1:
            return found[0]
    return None


def check_before_weights(outline: Checkpoint) -> None:
    """Find what is wrong with a checkpoint without reading its tensors.

    Raises:
        UserError: a configuration that cannot be used or does not fit the shapes of the weights, or
            a tokenizer with more tokens than the model has rows.
    """
    check_sizes(outline)
    model = build_model(outline.config, outline.config_source)
    tokenizer, rows = outline.tokenizer, model.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise UserError(
            f"{outline.source}: the tokenizer has {tokenizer.vocab_size} tokens but the model "
            f"only {rows}; they belong to different models, put the right tokenizer there"
        )
    tensors = hugging_face_names(outline.tensors, model.family)
    source = f"{outline.source} ({outline.config_source})"
    check_fit(model, tensors, source, outline.config, compare=False)


def read_checkpoint(path: Path, check: Callable[[Checkpoint], None] | None = None) -> Checkpoint:
    """Read configuration and tokenizer, and find the weights, of a folder or a file.

    Args:
        check: called with what was found.
    """
    folder = path if path.is_dir() else path.parent
    weights = weight_file(folder) if path.is_dir() else path
    if weights is None:
        hint = "a folder needs config.json with model.safetensors or pytorch_model.bin"
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: load its base model and attach it with --adapter"
        elif list(folder.glob("*.gguf")) or list(folder.glob("*.safetensors")):
            hint = "there are several files without an index.json: give one of them"
        raise UserError(f"{folder}: no model weights found; {hint}")
    tokenizer = Tokenizer.from_folder(folder) if find_files(folder) else None
    if weights.suffix == ".gguf":
        return read_gguf_checkpoint(weights, tokenizer, check)
    config, config_source = None, "config.json"
    if (folder / config_source).is_file():
        config = read_config(folder / config_source)
    tensors = read_weights(weights)
    check_no_adapter(weights, tensors)
    if config is None:
        config = gpt2_config_from_shapes(weights, hugging_face_names(tensors, FAMILIES["gpt2"]))
        config_source = "size found from its shapes"
        if tokenizer is None and config["eos_token_id"] is not None:
            tokenizer = gpt2_tokenizer()
    outline = Checkpoint(weights, config, config_source, tensors, tokenizer)
    if check is not None:
        check(outline)
    return outline


def read_gguf_checkpoint(
    path: Path,
    tokenizer: Tokenizer | None,
    check: Callable[[Checkpoint], None] | None,
) -> Checkpoint:
    """`read_checkpoint` for a GGUF file.

    Args:
        tokenizer: of the file's folder, which comes before the file's own; a file without any
            makes a model without one.
    """

    def checkpoint(file: GGUFFile) -> Checkpoint:
        nonlocal tokenizer
        if tokenizer is None and "tokenizer.ggml.model" in file.metadata:
            tokenizer = Tokenizer.from_gguf(file.metadata, path)
        elif tokenizer is not None and tokenizer.eos_token_id is None:  # a bare tokenizer.json
            tokenizer.eos_token_id = file.config["eos_token_id"]
        return Checkpoint(path, file.config, "its metadata", file.tensors, tokenizer)

    found = checkpoint(read_gguf(path, gguf_architectures()))
    if check is not None:
        check(found)
    return found


def gpt2_tokenizer() -> Tokenizer | None:
    """GPT-2's tokenizer, fetched where it is not there; None without a network."""
    try:
        return Tokenizer.from_folder(pull(GPT2_TOKENIZER))
    except UserError as error:
        say(f"GPT-2's tokenizer is missing: {error}")
        return None


def read_weights(path: Path) -> dict[str, LazyArray]:
    """Tensors of a weight file, or of the files that an index names, to be read."""
    if path.name.endswith(".safetensors.index.json"):
        return read_sharded(path, lazy_safetensors)
    if path.name.endswith(".bin.index.json"):
        return read_sharded(path, lazy_torch)
    if path.suffix == ".safetensors":
        return lazy_safetensors(path)
    if path.suffix in (".bin", ".pt", ".pth"):
        return lazy_torch(path)
    raise UserError(
        f"{path}: not a kind of file that weights are read from; give {', '.join(SUFFIXES)} or a "
        "Hugging Face folder"
    )


def check_no_adapter(path: Path, tensors: Mapping[str, Any]) -> None:
    """Raises: UserError: the weights are an adapter's, or have one in them (microsoft/LoRA#138)."""
    lora = [name for name in tensors if is_lora_name(name)]
    if not lora:
        return
    if all(is_lora_name(name) or "bias" in name for name in tensors):
        what = "a LoRA adapter and no model"
    else:
        what = "a model with an unmerged LoRA adapter inside"
    way = f"--adapter {path} --lora-alpha ALPHA" if path.suffix in (".pt", ".pth", ".bin") else ""
    if (path.parent / "adapter_config.json").is_file():
        way = f"--adapter {path.parent}"
    raise UserError(
        f"{path}: {what} (it has {lora[0]}); load its base model and attach this with "
        f"{way or '--adapter and its folder'}"
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dictionary."""
    config = read_object(path, "download it again")
    if "model_type" not in config:
        raise UserError(f"{path}: not a model's config.json (no model_type)")
    return config


def check_sizes(checkpoint: Checkpoint) -> None:
    """Check that a configuration's sizes can be those of the weights, before memory is filled.

    Raises:
        UserError: one is no whole number above 0, or beyond all that the weights are.
    """
    tensors = len(checkpoint.tensors)
    values = sum(array.size for array in checkpoint.tensors.values())
    for key in WEIGHT_SIZES:
        size = checkpoint.config.get(key)
        if size is None:
            continue
        where = f"{checkpoint.config_source}: {key} is {size!r}"
        if type(size) is not int or size < 1:
            raise UserError(f"{where}, no whole number above 0; this model cannot be used")
        if size > (tensors if key in ("n_layer", "num_hidden_layers") else values):
            raise UserError(
                f"{where}, and {checkpoint.source} has only {tensors} tensors of {values:,} "
                "numbers; take both from one model"
            )


def gpt2_config_from_shapes(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a bare GPT-2 checkpoint; every size of GPT-2 has heads of 64."""
    names = "wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"
    shapes = [tensors[name].shape for each in names if (name := f"transformer.{each}") in tensors]
    layers = [re.match(r"transformer\.h\.(\d+)\.", name) for name in tensors]
    numbers = [int(match.group(1)) for match in layers if match]
    if list(map(len, shapes)) != [2, 2, 2] or not numbers:
        raise UserError(
            f"{path}: a bare file is understood only for GPT-2; put the model's config.json "
            f"beside it in {path.parent}"
        )
    (vocabulary, width), (context, _), (_, inner) = shapes
    if width % 64:
        raise UserError(
            f"{path}: embedding size {width} is no multiple of GPT-2's head size 64; put "
            f"the model's config.json beside it in {path.parent}"
        )
    return {
        **gpt2_config(width, max(numbers) + 1, vocabulary, context),
        "n_inner": inner,
    }


def gpt2_config(
    width: int, layers: int, vocabulary: int = VOCABULARY, context: int = CONTEXT
) -> dict[str, Any]:
    """config.json of a GPT-2."""
    end = 50256 if vocabulary == 50257 else None  # another vocabulary has another end
    return {
        "model_type": "gpt2",
        "bos_token_id": end,
        "eos_token_id": end,
        "vocab_size": vocabulary,
        "n_positions": context,
        "n_embd": width,
        "n_layer": layers,
        "n_head": width // 64,
        "tie_word_embeddings": True,
    }


def build_model(config: dict[str, Any], source: str = "config.json") -> Any:
    """A model of the right family, its parameters still to be given.

    Jittor makes arrays when they are asked for, so initial values that are replaced first cost
    nothing.
    """
    model_type = config.get("model_type")
    family = find_family(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(
            f"{source}: model_type {model_type!r} is not supported; only {', '.join(FAMILIES)}"
        )
    try:
        return family.model(family.config.from_dict(config))
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise UserError(f"{source}: {one_line(error)}; this model cannot be used") from error
