"""The model that is served, and its adapters; belongs to the engine's thread."""

from __future__ import annotations

from pathlib import Path

from jlora import engine
from jlora.decoding.native_weights import require_native
from jlora.decoding.rows import AdapterBank, RowDecoder
from jlora.models.hub import require_tokenizer
from jlora.runs.adapter_file import AdapterFile, base_name, open_model, switchable
from jlora.system.errors import UserError


class ServedModel:
    """A base model, prepared for the native decoder, and adapters beside it.

    Args:
        name: as for `jlora.models.hub.load`.
        precision: as for `jlora.engine.prepare`.

    Attributes:
        config, tokenizer: the model's.
        precision: that is used.

    Raises:
        UserError: there is no such model or tokenizer, or the native decoder cannot run it.
    """

    def __init__(self, name: str, precision: str = "auto"):
        if precision == "plain":
            raise UserError(
                "precision plain leaves out the native decoder, without which nothing is served; "
                "take auto, bf16, int8 or fp32"
            )
        model = open_model(name, None)
        self.name, self.config, self.tokenizer = name, model.config, require_tokenizer(model)
        self.precision = engine.prepare(model, precision, keep_weights=False)
        model.eval()
        self._native, self._model = require_native(model), model
        self._peft = switchable(model)
        self._bank = AdapterBank(self._native)

    def new_decoder(self) -> RowDecoder:
        """A decoder without rows."""
        return RowDecoder(self._native, self._model, self._bank)

    def add(self, path: Path) -> int:
        """Load an adapter and give it a slot.

        Raises:
            UserError: it cannot be loaded, is of another base model, or is not plain low rank;
                nothing is changed then.
        """
        adapter = AdapterFile(path)
        base_name(self.name, adapter)  # checks it
        name = str(path)
        adapter.add_to(self._peft, name)
        try:
            return self._bank.add(self._peft.adapter(name))  # has its own copy of the weights
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        finally:
            self._peft.delete_adapter(name)
            engine.release()

    def remove(self, slot: int) -> None:
        """Let go of an adapter that no row has."""
        self._bank.remove(slot)
