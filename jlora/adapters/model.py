"""`get_peft_model` and `PeftModel`: a base model and its LoRA adapters, one of them on it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from jlora.adapters import base_model, loralib, storage
from jlora.adapters.adapter import Adapter, adapter_names
from jlora.adapters.attach import attach, check_patterns, detach
from jlora.adapters.combine import Part, combine
from jlora.adapters.config import LoraConfig
from jlora.adapters.merging import MergeReport, check_untied, merge_layers
from jlora.adapters.switching import SwitchableModel, check_plain
from jlora.adapters.targets import default_targets
from jlora.formats.peft_file import read_peft, write_peft
from jlora.system.errors import UserError
from jlora.system.runtime import nn

log = logging.getLogger("jlora.adapters")


def get_peft_model(
    model: nn.Module, config: LoraConfig, adapter_name: str = "default"
) -> PeftModel:
    """Put LoRA layers into ``model`` (in place) and freeze everything else.

    Raises:
        UserError: a name or pattern of the settings fits no module, or one that cannot take LoRA.
    """
    config = _completed(config, model)
    check_plain(model)
    check_patterns(model, config)
    return PeftModel(model, config, adapter_name)


def add_adapter(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, set[str]]:
    """What `get_peft_model` does to a model whose weights are unknown: none is read or frozen.

    Returns:
        The settings with what depends on the model filled in, and the names of the parameters to
        be trained.

    Raises:
        UserError: as `get_peft_model`.
    """
    config = _completed(config, model)
    check_patterns(model, config)
    attach(model, config)
    return config, adapter_names(model, config)


class PeftModel(SwitchableModel):
    """A base model with LoRA adapters, of which one is on, or none; called like the base model.

    Its parameters, files and merging are those of the adapter that is on.

    Args:
        model: the base model; changed in place.
        config: of a first adapter; None: none yet.

    Attributes:
        base_model: the model, with the LoRA layers of the adapter that is on in it.
        active_adapter: its name; None: the model is the plain base.
    """

    def __init__(
        self, model: nn.Module, config: LoraConfig | None = None, adapter_name: str = "default"
    ):
        super().__init__(model)
        if config is not None:
            self._adapters[adapter_name] = self._made(_completed(config, model))
            self._switch(adapter_name)

    # --- several adapters ---

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig) -> None:
        """Make a new adapter to be trained; `set_adapter` puts it on.

        Raises:
            UserError: the name is taken, or as `get_peft_model`.
        """
        self._check_new(adapter_name)
        config = _completed(peft_config, self.base_model)
        with self._plain():
            check_patterns(self.base_model, config)
        self._adapters[adapter_name] = self._made(config)

    def load_adapter(
        self,
        folder: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        force: bool = False,
    ) -> None:
        """Load another adapter that PEFT or jlora wrote; `set_adapter` puts it on.

        The base model's weights are not loaded, packed or copied again.

        Raises:
            UserError: the name is taken, or as `from_pretrained`; nothing is changed then.
        """
        self._check_new(adapter_name)
        self._adapters[adapter_name] = self._read(folder, is_trainable, force)

    def hotswap_adapter(
        self, folder: str | Path, adapter_name: str = "default", force: bool = False
    ) -> None:
        """Put the adapter of a folder in the place of a loaded one, under the same name.

        Its targets and ranks may be others. A merged adapter is unmerged before.

        Raises:
            UserError: there is none of that name, or as `from_pretrained`; the old one stays then.
        """
        old = self._find(adapter_name)
        self._check_enabled("hotswap_adapter")
        new = self._read(folder, old.is_trainable, force)
        is_on = adapter_name == self.active_adapter
        if is_on:
            self.set_adapter(None)
        self._adapters[adapter_name] = new
        try:
            if is_on:
                self._switch(adapter_name)
        except BaseException:
            self._adapters[adapter_name] = old
            self._switch(adapter_name)
            raise
        self._forget_plans()

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Make an adapter of several loaded ones, which stay; `set_adapter` puts it on.

        It is not trained.

        Args:
            adapters: their names.
            weights, combination_type, svd_rank: see `jlora.adapters.combine.combine`.

        Raises:
            UserError: a name is unknown or taken, or as `combine`.
        """
        self._check_new(adapter_name)
        parts = []
        with self._plain():
            for name in adapters:
                form = self._find(name).peft_form(self.base_model)
                parts.append(Part(f"adapter {name!r}", *form))
        config, tensors = combine(parts, weights, combination_type, svd_rank)
        named = storage.from_peft_keys(tensors, adapter_name)
        with self._plain():
            config, named = storage.native_config(self.base_model, config, named, {})
        self._adapters[adapter_name] = self._made(config, named, adapter_name, is_trainable=False)

    def _read(self, folder: str | Path, is_trainable: bool, force: bool) -> Adapter:
        """The adapter of a PEFT folder, put aside."""
        with self._plain():
            config, tensors, source = _read_folder(self.base_model, folder, force)
        if is_trainable and config.trainable_token_indices is not None:
            raise UserError(
                f"{folder}: trainable_token_indices is read and not trained here; load it without "
                "is_trainable"
            )
        return self._made(config, tensors, source, is_trainable)

    # --- on, off, merged ---

    def merge_adapter(self) -> MergeReport:
        """Add the changes to the weights, in float32; `unmerge_adapter` takes them away again.

        Raises:
            UserError: a LoRA embedding is the output head as well, which merging would change.
        """
        self.check_mergeable()
        return merge_layers(self.lora_layers())

    def check_mergeable(self) -> None:
        """Raises: UserError: as `merge_adapter`, or this was unloaded."""
        self._check_loaded()
        check_untied(self.base_model, self._current.modules if self._current else {})

    @contextlib.contextmanager
    def merged(self) -> Iterator[MergeReport]:
        """Inside the block the changes are in the weights, whether they were before or not.

        Raises:
            UserError: as `merge_adapter`.
        """
        with self._unmerged():
            report = self.merge_adapter()
            try:
                yield report
            finally:
                self.unmerge_adapter()

    def merge_and_unload(self, quiet: bool = False) -> nn.Module:
        """The plain model with the adapter in its weights; one line says how much they changed.

        This model is empty afterwards and cannot be merged again; its other adapters are gone.

        Raises:
            UserError: it was unloaded before, or a LoRA embedding is the output head as well.
        """
        self.check_mergeable()
        # Counted and reported as one merge, also when some layers were merged before.
        self.unmerge_adapter()
        report = self.merge_adapter()
        if not quiet:
            print(report)
        detach(self.base_model, keep_trained_modules=True)
        base_model.forget_base(self.base_model)
        return self._emptied()

    def unload(self) -> nn.Module:
        """The plain base model as it was before it got adapters."""
        self._check_loaded()
        self.unmerge_adapter()
        self._switch(None)
        return self._emptied()

    def _emptied(self) -> nn.Module:
        self._unloaded = True
        self._adapters, self.active_adapter = {}, None
        self._set_names()
        return self.base_model

    # --- files ---

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter that is on as PEFT does, and what PEFT has no field for beside it.

        Raises:
            UserError: the folder cannot be written, or no adapter is on.
        """
        config, tensors = self._peft_form()
        notes = {"enable_lora": self._on.config.enable_lora, "base_model": self._base_record}
        write_peft(folder, config.to_dict(), tensors, notes)

    def _peft_form(self) -> tuple[LoraConfig, dict[str, np.ndarray]]:
        """Settings and tensors of the adapter that is on as PEFT's files have them."""
        self._check_loaded()
        return storage.peft_form(self.base_model, self._on.config, self.adapter_tensors())

    @property
    def _on(self) -> Adapter:
        """The adapter that is on."""
        if self._current is None:
            raise UserError("no adapter is on; set_adapter(NAME) first")
        return self._current

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        is_trainable: bool = False,
        force: bool = False,
        adapter_name: str = "default",
    ) -> PeftModel:
        """Load an adapter that PEFT or jlora wrote onto its base model.

        Args:
            model: the base model; changed in place.
            folder: holds ``adapter_config.json`` and the weights.
            is_trainable: go on training it; otherwise the model is put in eval mode, as in PEFT.
            force: load it although it was made for another base model.

        Raises:
            UserError: files missing or damaged, settings jlora lacks, another base model, tensors
                that fit no module, are missing or of another shape. ``model`` is unchanged then.
        """
        peft_model = cls(model)
        peft_model._adapters[adapter_name] = peft_model._read(folder, is_trainable, force)
        return peft_model._begun(adapter_name)

    def _begun(self, adapter_name: str) -> PeftModel:
        self._switch(adapter_name)
        if not self._on.is_trainable:
            self.eval()
        return self

    def save_loralib(self, path: str | Path, nested: bool = True) -> float:
        """Write the adapter that is on as a ``.pt`` file of loralib's ``lora_state_dict``.

        Args:
            nested: under the key ``model_state_dict``, as microsoft/LoRA's examples/NLG has it.

        Returns:
            The lora_alpha to load it with, which the file has no place for.

        Raises:
            UserError: the file cannot be written, or the adapter has what loralib lacks:
                modules_to_save, a variant other than plain LoRA, layers whose scalings ask for
                different lora_alpha.
        """
        self._peft_form()
        return loralib.write_loralib(
            path, self._on.config, self.lora_layers(), self.adapter_tensors(), nested
        )

    @classmethod
    def from_loralib(
        cls,
        model: nn.Module,
        path: str | Path,
        lora_alpha: float,
        enable_lora: Sequence[bool] | None = None,
        lora_dropout: float = 0.0,
        is_trainable: bool = False,
        adapter_name: str = "default",
    ) -> PeftModel:
        """Load an adapter from a ``.pt`` file of loralib's ``lora_state_dict`` onto its base.

        Ranks, targets and biases follow from the file.

        Args:
            model: the base model; changed in place.
            lora_alpha: of every layer; microsoft/LoRA's GPT-2 runs have 32.
            enable_lora: which blocks of fused layers have LoRA; GPT-2's ``c_attn`` has
                ``[True, False, True]`` there. Not needed where all have it.
            is_trainable: as for `from_pretrained`.

        Raises:
            UserError: no such file, keys or shapes that do not fit the model or ``enable_lora``.
                ``model`` is unchanged then.
        """
        tensors = loralib.model_names(model, loralib.read_loralib(path))
        config = loralib.loralib_config(
            model, tensors, lora_alpha, enable_lora, lora_dropout, str(path)
        )
        peft_model = cls(model)
        peft_model._adapters[adapter_name] = peft_model._made(
            config, tensors, str(path), is_trainable
        )
        return peft_model._begun(adapter_name)


def _read_folder(
    model: nn.Module, folder: str | Path, force: bool
) -> tuple[LoraConfig, dict[str, np.ndarray], str]:
    """Settings, tensors by parameter name, and the file they came from, of a PEFT folder.

    Raises:
        UserError: as `PeftModel.from_pretrained`.
    """
    files = read_peft(folder)
    source = str(files.path)
    config = LoraConfig.from_dict(files.config, source=str(Path(folder) / "adapter_config.json"))
    if files.notes.get("base_model") and not force:
        base_model.check_base(files.notes["base_model"], model, str(folder))
    elif not force:
        base_model.check_family(config.base_model_name_or_path, model, str(folder))
    config = _completed(config, model)
    tensors = storage.from_peft_keys(files.tensors, source)
    config, tensors = storage.without_head(config, tensors, model, source)
    config, tensors = storage.native_config(model, config, tensors, files.notes)
    storage.check_ranks(config, tensors, model, source)
    return config, tensors, source


def _completed(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The settings with what depends on the model filled in."""
    if config.target_modules is None:
        config = replace(config, target_modules=default_targets(model))
    if config.base_model_name_or_path is None:
        config = replace(config, base_model_name_or_path=getattr(model, "name_or_path", None))
    return config
