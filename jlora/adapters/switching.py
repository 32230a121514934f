"""`SwitchableModel`: a base model and its adapters, one of them on it."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jlora.adapters import base_model
from jlora.adapters.adapter import Adapter, is_adapted
from jlora.adapters.config import LoraConfig
from jlora.adapters.merging import unmerge_layers
from jlora.adapters.tuned import TunedModel
from jlora.layers import LoRALayer, set_trainable
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn

log = logging.getLogger("jlora.adapters")


@dataclass(frozen=True)
class ModelStatus:
    """What `get_model_status` tells, by the names of PEFT's ``TunerModelStatus``.

    Attributes:
        base_model_type: the class of the base model.
        peft_types: "LORA" for each adapter.
        trainable_params, total_params: of the base and all adapters.
        num_adapter_layers: places in the model that have an adapter.
        enabled: False inside `disable_adapter`.
        active_adapters: the name of the one that is on.
        merged_adapters: it again, if it is merged.
        requires_grad: for each adapter, whether it is trained when it is on.
        available_adapters: all of them.
        devices: where their parameters are, "cpu" or "cuda".
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def check_plain(model: nn.Module) -> None:
    """Raises: UserError: the model has an adapter already."""
    if isinstance(model, SwitchableModel) or is_adapted(model):
        raise UserError(
            "the model has LoRA layers already; add_adapter() or load_adapter() give a PeftModel "
            "another adapter, merge_and_unload() or unload() take them off"
        )


class SwitchableModel(TunedModel):
    """A base model with adapters, of which at most one is on; `PeftModel` is the class to use.

    The others are put aside (see `Adapter`), so that the model, and all that trains it, is at every
    moment as if it had the one alone.

    Args:
        model: the base model; changed in place.

    Attributes:
        active_adapter: the name of the adapter that is on; None: the model is the plain base.
    """

    def __init__(self, model: nn.Module):
        check_plain(model)
        self._base_record = base_model.describe_base(model)
        self._adapters: dict[str, Adapter] = {}
        self.active_adapter: str | None = None
        self._unloaded = self._disabled = False
        super().__init__(model, set())

    @property
    def available_adapters(self) -> list[str]:
        """Their names, in the order in which they came."""
        return list(self._adapters)

    def adapter(self, adapter_name: str) -> Adapter:
        """The settings and layers of an adapter, on the model or put aside.

        Raises:
            UserError: there is no such adapter.
        """
        return self._find(adapter_name)

    @property
    def peft_config(self) -> LoraConfig | None:
        """The settings of the adapter that is on, target_modules always given."""
        return self._current.config if self._current else None

    @property
    def _current(self) -> Adapter | None:
        return None if self.active_adapter is None else self._adapters[self.active_adapter]

    def get_model_status(self) -> ModelStatus:
        """Which adapters there are, which is on, and what is trained."""
        trainable, total = self.get_nb_trainable_parameters()
        aside = [a for name, a in self._adapters.items() if name != self.active_adapter]
        active = [] if self.active_adapter is None else [self.active_adapter]
        device = "cuda" if jt.flags.use_cuda else "cpu"
        return ModelStatus(
            base_model_type=type(self.base_model).__name__,
            adapter_model_type="LoraModel",
            peft_types=dict.fromkeys(self._adapters, "LORA"),
            trainable_params=trainable,
            total_params=total + sum(adapter.parameter_count() for adapter in aside),
            num_adapter_layers=len({n for a in self._adapters.values() for n in a.modules}),
            enabled=not self._disabled,
            active_adapters=active,
            merged_adapters=active if self._merged_layers() else [],
            requires_grad={name: a.is_trainable for name, a in self._adapters.items()},
            available_adapters=sorted(self._adapters),
            devices={name: [device] for name in self._adapters},
        )

    def set_adapter(self, adapter_name: str | None) -> None:
        """Put an adapter on in place of the one that is on; a merged one is unmerged before.

        It is trained if it came by `add_adapter`, or with ``is_trainable``; call `engine.prepare`
        again before. What was computed from the model before, such as a cache of keys and values
        or a decoder, belongs to the adapter before.

        Args:
            adapter_name: None: no adapter, the plain base model.

        Raises:
            UserError: there is no such adapter, this is inside `disable_adapter`, or the one that
                is on cannot be unmerged. Nothing is changed then, whatever the error was.
        """
        if adapter_name is not None:
            self._find(adapter_name)
        self._check_enabled("set_adapter")
        before, merged = self.active_adapter, self._merged_layers()
        unmerge_layers(merged)
        try:
            self._switch(adapter_name)
        except BaseException:
            for layer in merged:
                layer.merge()
            raise
        if merged:
            log.warning("%s was merged and is unmerged to set another adapter", before)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it is on, the first of the others is put on, or none.

        Raises:
            UserError: there is no such adapter, or this is inside `disable_adapter`.
        """
        self._find(adapter_name)
        self._check_enabled("delete_adapter")
        if adapter_name == self.active_adapter:
            others = [name for name in self._adapters if name != adapter_name]
            self.set_adapter(others[0] if others else None)
            log.warning("%s was on; now it is %s", adapter_name, self.active_adapter or "none")
        del self._adapters[adapter_name]
        self._forget_plans()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model computes what the base model computes."""
        if self._disabled or self._current is None:
            yield
            return
        with self._unmerged():
            self._current.set_enabled(self.base_model, False)
            self._disabled = True
            try:
                yield
            finally:
                self._disabled = False
                self._current.set_enabled(self.base_model, True)

    @contextlib.contextmanager
    def _unmerged(self) -> Iterator[None]:
        merged = self._merged_layers()
        unmerge_layers(merged)
        try:
            yield
        finally:
            for layer in merged:
                layer.merge()

    def unmerge_adapter(self) -> None:
        """Give all weights back as they were before `merge_adapter`.

        Raises:
            UserError: other weights were loaded into a merged layer, and its variant cannot take
                the change from those; all layers stay merged then.
        """
        unmerge_layers(self.lora_layers().values())

    def _merged_layers(self) -> list[LoRALayer]:
        return [layer for layer in self.lora_layers().values() if layer.merged]

    def lora_layers(self) -> dict[str, LoRALayer]:
        """The LoRA layers of the adapter that is on, by module name."""
        return self._current.lora_layers if self._current else {}

    def set_adapter_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """As `TunedModel.set_adapter_tensors`; merged layers stay merged, with the new change."""
        with self._unmerged():
            super().set_adapter_tensors(tensors)

    def freeze(self) -> None:
        """As `TunedModel.freeze`."""
        if self._current:
            self._current.is_trainable = False
        self._set_names()
        super().freeze()

    def _find(self, adapter_name: str) -> Adapter:
        self._check_loaded()
        if adapter_name not in self._adapters:
            near = difflib.get_close_matches(str(adapter_name), self._adapters, 1)
            known = f"nearest: {near[0]}" if near else f"there are {', '.join(self._adapters)}"
            raise UserError(
                f"no adapter is called {adapter_name!r}; "
                f"{known if self._adapters else 'none is loaded'}"
            )
        return self._adapters[adapter_name]

    def _check_new(self, adapter_name: str) -> None:
        self._check_loaded()
        self._check_enabled("another adapter")
        if not isinstance(adapter_name, str) or not adapter_name:
            raise UserError(f"an adapter's name is a text, not {adapter_name!r}")
        if adapter_name in self._adapters:
            raise UserError(
                f"there is an adapter called {adapter_name!r} already; take another name, or "
                "hotswap_adapter() or delete_adapter() it"
            )

    def _check_enabled(self, what: str) -> None:
        if self._disabled:
            raise UserError(f"{what} inside disable_adapter(); leave its block first")

    def _forget_plans(self) -> None:
        """Have fused blocks let go of what they keep of adapters, so that one gone is freed."""
        for module in self.base_model.modules():
            vars(module).pop("_plans", None)

    def _switch(self, adapter_name: str | None) -> None:
        """Take the unmerged adapter off and put another one on, or leave all as it is."""
        before = self._current
        if before:
            before.take_off(self.base_model)
        try:
            if adapter_name is not None:
                self._adapters[adapter_name].put_on(self.base_model)
        except BaseException:
            if before:
                before.put_on(self.base_model)
            raise
        self.active_adapter = adapter_name
        self._set_names()

    def _set_names(self) -> None:
        """Let the base class, and Jittor, know which parameters are whose now."""
        self._adapter_names = self._current.names if self._current else set()
        trains = self._current is not None and self._current.is_trainable
        before, self._trainable_names = self._trainable_names, set()
        if trains:
            self._trainable_names = self._adapter_names
        set_trainable(self.base_model, self._trainable_names)
        if self._trainable_names - before:
            # What an engine noted at `prepare`: that nothing below a block is trained.
            for module in self.base_model.modules():
                vars(module).pop("_bottom", None)
        for layer in self.lora_layers().values():
            layer.is_frozen = not trains

    @contextlib.contextmanager
    def _plain(self) -> Iterator[None]:
        """Inside the block ``base_model`` is the plain base model."""
        active = self.active_adapter
        with self._unmerged():
            self._switch(None)
            try:
                yield
            finally:
                self._switch(active)

    def _made(
        self,
        config: LoraConfig,
        tensors: Mapping[str, np.ndarray] | None = None,
        source: str = "",
        is_trainable: bool = True,
    ) -> Adapter:
        """An adapter, put aside; with ``tensors`` instead of first values."""
        with self._plain():
            adapter = Adapter(self.base_model, config)
            adapter.is_trainable = is_trainable
            try:
                if tensors is not None:
                    adapter.load(self.base_model, tensors, source)
                # Jittor would draw the first values when they are first read, by whatever seed is
                # set then.
                named = self.base_model.named_parameters()
                jt.sync([var for name, var in named if name in adapter.names])
            finally:
                adapter.take_off(self.base_model)
        return adapter

    def _check_loaded(self) -> None:
        if self._unloaded:
            raise UserError(
                "the adapter was merged or unloaded already; load it again with "
                "PeftModel.from_pretrained"
            )
