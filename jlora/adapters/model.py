"""`get_peft_model` and `PeftModel`: a base model with LoRA layers in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapters import base_model, loralib, storage
from jlora.adapters.attach import (
    ModulesToSave,
    attach,
    check_patterns,
    detach,
    has_tied_head,
    tied_head_error,
)
from jlora.adapters.config import LoraConfig
from jlora.adapters.targets import default_targets
from jlora.adapters.tuned import TunedModel
from jlora.formats.names import is_lora_name
from jlora.formats.peft_file import read_peft, write_peft
from jlora.formats.torch_write import write_torch
from jlora.layers import Embedding, LoRALayer, MergedLinear, assign, bias_names, set_trainable
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


@dataclass(frozen=True)
class MergeReport:
    """What merging did to the weights.

    Attributes:
        layers: number of layers merged.
        largest_change: largest absolute change of a single weight, in the layer ``layer``.
        rounding_error: largest part of a change that was lost because weights are stored in a
            narrower type than float32; 0 for float32.
    """

    layers: int
    largest_change: float
    layer: str
    rounding_error: float

    def __str__(self) -> str:
        text = (
            f"merged {self.layers} layers in float32; "
            f"largest change of a weight {self.largest_change:.4g} in {self.layer}"
        )
        if self.rounding_error:
            text += f"; up to {self.rounding_error:.2g} lost by rounding to the stored type"
        return text


def get_peft_model(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Put LoRA layers into ``model`` (in place) and freeze everything else.

    Raises:
        UserError: a name or pattern of the settings fits no module, or one that cannot take LoRA.
    """
    config = _completed(config, model)
    _check_plain(model)
    check_patterns(model, config)
    return PeftModel(model, config)


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
    return config, _attach(model, config)


def _attach(model: nn.Module, config: LoraConfig) -> set[str]:
    """Put LoRA layers into ``model``; the names of what is to be trained."""
    attach(model, config)
    names = {name for name, _ in model.named_parameters()}
    adapter = {n for n in names if is_lora_name(n) or ".modules_to_save." in f".{n}"}
    return adapter | bias_names(model, config.bias)


def _check_plain(model: nn.Module) -> None:
    """Raises: UserError: the model has an adapter already."""
    if isinstance(model, PeftModel) or any(isinstance(m, LoRALayer) for m in model.modules()):
        raise UserError(
            "the model has LoRA layers already; merge_and_unload() or unload() them first"
        )


class PeftModel(TunedModel):
    """A base model whose target layers are LoRA layers; called like the base model.

    Attributes:
        base_model: the model with the LoRA layers in it.
        peft_config: its `LoraConfig`, target_modules always given.
    """

    def __init__(self, model: nn.Module, config: LoraConfig):
        _check_plain(model)
        self._base_record = base_model.describe_base(model)
        self.peft_config = _completed(config, model)
        names = _attach(model, self.peft_config)
        # Jittor would draw the first values when they are first read, by whatever seed is set then.
        jt.sync([parameter for name, parameter in model.named_parameters() if name in names])
        self._unloaded = False
        super().__init__(model, names)
        self._bias_names = bias_names(model, self.peft_config.bias)
        # What unload() and disable_adapter() put back.
        self._other_biases = self._copy_biases()

    # --- parameters ---

    def lora_layers(self) -> dict[str, LoRALayer]:
        """The LoRA layers by module name."""
        return self._modules_of(LoRALayer)

    def _modules_of(self, kind: type) -> dict[str, Any]:
        modules = self.base_model.named_modules()
        return {name: module for name, module in modules if isinstance(module, kind)}

    def set_adapter_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """As `TunedModel.set_adapter_tensors`; merged layers stay merged, with the new change."""
        with self._unmerged():
            super().set_adapter_tensors(tensors)

    # --- on, off, merged ---

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model computes what the base model computes."""
        wrapped = [*self.lora_layers().values(), *self._modules_of(ModulesToSave).values()]
        with self._unmerged():
            self._swap_biases()
            for module in wrapped:
                module.adapter_enabled = False
            try:
                yield
            finally:
                self._swap_biases()
                for module in wrapped:
                    module.adapter_enabled = True

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        merged = [layer for layer in self.lora_layers().values() if layer.merged]
        for layer in merged:
            layer.unmerge()
        try:
            yield
        finally:
            for layer in merged:
                layer.merge()

    def _copy_biases(self) -> dict[str, jt.Var]:
        return {name: var.clone().stop_grad() for name, var in self._named(self._bias_names)}

    def _swap_biases(self) -> None:
        here = self._copy_biases()
        for name, var in self._named(self._bias_names):
            assign(var, self._other_biases[name])
        self._other_biases = here

    def merge_adapter(self) -> MergeReport:
        """Add the changes to the weights, in float32; `unmerge_adapter` takes them away again.

        Raises:
            UserError: a LoRA embedding is the output head as well, which merging would change.
        """
        self._check_loaded()
        self._check_untied()
        report = MergeReport(0, 0.0, "none", 0.0)
        for name, layer in self.lora_layers().items():
            if layer.merged or not layer.has_adapter:
                continue
            layer.unpack()
            before = layer.weight.float32()
            change = layer.variant.merged_weight(layer, before) - before
            largest = float(change.abs().max().item())
            layer.merge()
            lost = 0.0
            if layer.weight.dtype != "float32":
                lost = (layer.weight.float32() - before - change).abs().max().item()
            best = largest > report.largest_change
            report = MergeReport(
                report.layers + 1,
                largest if best else report.largest_change,
                name if best else report.layer,
                max(report.rounding_error, lost),
            )
        return report

    def unmerge_adapter(self) -> None:
        """Give all weights back as they were before `merge_adapter`."""
        for layer in self.lora_layers().values():
            layer.unmerge()

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

        This model is empty afterwards and cannot be merged again.

        Raises:
            UserError: it was unloaded before, or a LoRA embedding is the output head as well.
        """
        self._check_loaded()
        self._check_untied()
        # Counted and reported as one merge, also when some layers were merged before.
        self.unmerge_adapter()
        report = self.merge_adapter()
        if not quiet:
            print(report)
        return self._detach(keep_trained_modules=True)

    def unload(self) -> nn.Module:
        """The plain base model as it was before it got the adapter."""
        self._check_loaded()
        self.unmerge_adapter()
        self._swap_biases()
        return self._detach(keep_trained_modules=False)

    def _detach(self, keep_trained_modules: bool) -> nn.Module:
        detach(self.base_model, keep_trained_modules)
        self._unloaded = True
        self._adapter_names = self._trainable_names = self._bias_names = set()
        set_trainable(self.base_model, set())
        return self.base_model

    def _check_loaded(self) -> None:
        if self._unloaded:
            raise UserError(
                "the adapter was merged or unloaded already; load it again with "
                "PeftModel.from_pretrained"
            )

    def _check_untied(self) -> None:
        head = getattr(self.base_model, "output_embedding", None)
        tied = [
            name
            for name, layer in self._modules_of(Embedding).items()
            if layer.has_adapter and layer.weight is head
        ]
        tied += [name for name, module in self._modules_of(ModulesToSave).items() if module.tied]
        if tied:
            raise UserError(
                f"{tied[0]} is the output head as well, which the adapter leaves alone and merging "
                "would change; keep the adapter unmerged"
            )

    # --- files ---

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter as PEFT does, and what PEFT has no field for beside it.

        Raises:
            UserError: the folder cannot be written, or there is no adapter any more.
        """
        self._check_loaded()
        modules = dict(self.base_model.named_modules())
        tensors = {}
        for name, array in self.adapter_tensors().items():
            owner = modules[name.rpartition(".")[0]]
            if isinstance(owner, MergedLinear) and name.endswith("lora_B"):
                array = storage.block_matrix(array, owner.enable_lora, owner.r)
            tensors[storage.to_peft_key(name, owner)] = array
        layers = self.lora_layers()
        transposed = any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values())
        config = storage.peft_config(self.peft_config, layers)
        config = replace(config, fan_in_fan_out=transposed)
        notes = {"enable_lora": self.peft_config.enable_lora, "base_model": self._base_record}
        write_peft(folder, config.to_dict(), tensors, notes)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        is_trainable: bool = False,
        force: bool = False,
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
        files = read_peft(folder)
        config = LoraConfig.from_dict(
            files.config, source=str(Path(folder) / "adapter_config.json")
        )
        if files.notes.get("base_model") and not force:
            base_model.check_base(files.notes["base_model"], model, str(folder))
        elif not force:
            base_model.check_family(config.base_model_name_or_path, model, str(folder))
        config = _completed(config, model)
        tensors = storage.from_peft_keys(files.tensors, str(files.path))
        config, tensors = storage.without_head(config, tensors, model, str(files.path))
        config, tensors = storage.native_config(model, config, tensors, files.notes)
        storage.check_ranks(config, tensors, model, str(files.path))
        return cls._restored(model, config, tensors, str(files.path), is_trainable)

    def save_loralib(self, path: str | Path, nested: bool = True) -> float:
        """Write the adapter as a ``.pt`` file of loralib's ``lora_state_dict``.

        Args:
            nested: under the key ``model_state_dict``, as microsoft/LoRA's examples/NLG has it.

        Returns:
            The lora_alpha to load it with, which the file has no place for.

        Raises:
            UserError: the file cannot be written, or the adapter has what loralib lacks:
                modules_to_save, a variant other than plain LoRA, layers whose scalings ask for
                different lora_alpha.
        """
        self._check_loaded()
        if self.peft_config.modules_to_save:
            raise UserError(
                f"modules_to_save {self.peft_config.modules_to_save} have no place in a loralib "
                "file; keep the PEFT folder"
            )
        if not self.peft_config.lora_variant.is_plain:
            raise UserError(
                f"variant {self.peft_config.variant!r} has no place in a loralib file; keep the "
                "PEFT folder"
            )
        lora_alpha = loralib.loralib_alpha(self.lora_layers())
        write_torch(path, self.adapter_tensors(), "model_state_dict" if nested else None)
        return lora_alpha

    @classmethod
    def from_loralib(
        cls,
        model: nn.Module,
        path: str | Path,
        lora_alpha: float,
        enable_lora: Sequence[bool] | None = None,
        lora_dropout: float = 0.0,
        is_trainable: bool = False,
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
        return cls._restored(model, _completed(config, model), tensors, str(path), is_trainable)

    @classmethod
    def _restored(
        cls,
        model: nn.Module,
        config: LoraConfig,
        tensors: dict[str, np.ndarray],
        source: str,
        is_trainable: bool,
    ) -> PeftModel:
        """``model`` with the adapter of ``config`` and ``tensors``, or as it was."""
        peft_model = cls(model, config)
        try:
            peft_model._load(tensors, source)
        except BaseException:
            peft_model.unload()
            raise
        if not is_trainable:
            peft_model.freeze()
        return peft_model

    def _load(self, tensors: dict[str, np.ndarray], source: str) -> None:
        """Set the adapter from tensors by PEFT's names without its prefix and wrappers."""
        own = dict(self._named(self._adapter_names))
        modules = dict(self.base_model.named_modules())
        by_file_name = {}
        for name in own:
            key = storage.to_peft_key(name, modules[name.rpartition(".")[0]])
            by_file_name[storage.from_peft_key(key)] = name
        shapes = {key: tuple(own[name].shape) for key, name in by_file_name.items()}
        if tensors and not set(shapes) & set(tensors):
            raise UserError(
                f"{source} fits no module of the model: it has {next(iter(tensors))}, "
                f"the model {next(iter(shapes))}"
            )
        # PEFT writes the vocabulary beside the adapter when it was a target or was resized, and
        # leaves out the biases of "lora_only".
        current = dict(self.base_model.named_parameters())
        if has_tied_head(self.base_model):
            current["lm_head.weight"] = self.base_model.output_embedding
            if any(n.startswith("lm_head.") and n not in current for n in tensors):
                raise tied_head_error(self.base_model, f"{source} changes lm_head")
        base = {n: a for n, a in tensors.items() if n not in shapes and n in current}
        for name, array in base.items():
            base_model.check_same(name, array, current[name], source)
        complete = {n: a for n, a in tensors.items() if n not in base}
        for name, var in self._named(self._bias_names):
            if self.peft_config.bias == "lora_only" and name not in complete:
                complete[name] = var.float32().numpy()
        storage.check_tensors(source, shapes, complete)
        self.set_adapter_tensors({own: complete[key] for key, own in by_file_name.items()})


def _completed(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The settings with what depends on the model filled in."""
    if config.target_modules is None:
        config = replace(config, target_modules=default_targets(model))
    if config.base_model_name_or_path is None:
        config = replace(config, base_model_name_or_path=getattr(model, "name_or_path", None))
    return config
