"""`jlora combine`: adapters in files -> one adapter, without the base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jlora.adapters import LoraConfig
from jlora.adapters.combine import Part, combine
from jlora.adapters.loralib import is_loralib
from jlora.adapters.partial import is_partial
from jlora.adapters.storage import peft_keys
from jlora.formats.peft_file import read_peft, write_peft
from jlora.runs.adapter_file import AdapterFile
from jlora.system.errors import UserError
from jlora.system.files import check_absent


def combine_files(
    adapters: Sequence[str | Path],
    weights: Sequence[float],
    out: str | Path,
    kind: str = "svd",
    rank: int | None = None,
    force: bool = False,
) -> LoraConfig:
    """Write the weighted sum of adapters as a PEFT folder, which is new or empty.

    Args:
        adapters: run folders or adapter folders.
        weights, kind, rank: see `jlora.adapters.combine.combine`.
        force: combine them although they were made for different base models.

    Returns:
        The settings of what was written.

    Raises:
        UserError: an adapter cannot be read, they were made for different base models, they cannot
            be combined, or ``out`` is in use.
    """
    check_absent(out)
    parts, bases = [], []
    for adapter in adapters:
        folder = AdapterFile(Path(adapter)).folder
        if is_loralib(folder) or is_partial(folder):
            raise UserError(f"{adapter} is no PEFT folder; `jlora convert` makes one of a .pt file")
        files = read_peft(folder)
        config = LoraConfig.from_dict(files.config, str(folder / "adapter_config.json"))
        parts.append(Part(str(adapter), config, peft_keys(files.tensors, str(files.path))))
        bases.append((files.notes.get("base_model"), config.base_model_name_or_path))
    if not force:
        check_one_base(adapters, bases)
    config, tensors = combine(parts, weights, kind, rank)
    record = next((record for record, _ in bases if record), None)
    write_peft(out, config.to_dict(), tensors, {"base_model": record})
    return config


def check_one_base(adapters: Sequence[str | Path], bases: Sequence[tuple]) -> None:
    """Compare what the files say of their base models.

    Args:
        bases: jlora's record of each, which PEFT's files lack, and the name that is in them.

    Raises:
        UserError: one was made for another base model than the first.
    """
    (first, first_name), *others = bases
    for adapter, (record, name) in zip(adapters[1:], others):
        if first and record:
            same = first.get("tensors") == record.get("tensors")
        else:
            same = None in (first_name, name) or first_name == name
        if not same:
            raise UserError(
                f"{adapters[0]} was made for the base model {first_name} and {adapter} for {name}, "
                "which are not one; combine adapters of one base, or insist with --force "
                "(force=True)"
            )
