"""`Adapter`: one LoRA adapter of a model, on it or put aside."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jlora.adapters import base_model, storage
from jlora.adapters.attach import (
    ModulesToSave,
    TokenRows,
    attach,
    has_tied_head,
    set_modules,
    tied_head_error,
)
from jlora.adapters.config import LoraConfig
from jlora.formats.names import is_lora_name
from jlora.layers import LoRALayer, assign, bias_names
from jlora.system.errors import UserError
from jlora.system.runtime import jt, nn


class Adapter:
    """The settings and modules of an adapter, which stand in a model while it is on.

    At most one adapter is on a model, so the model is at every moment what it would be if it had
    never had another. All of them share the base's weights, packed or not: a module takes them when
    it is put in its place and lets go of them when it is taken out.

    Attributes:
        config: target_modules given.
        modules: LoRA layers and `ModulesToSave` by name.
        names: parameters that are trained and saved.
        bias_names: those of them that are biases of the base.
        is_trainable: whether it is trained when it is on.
    """

    def __init__(self, model: nn.Module, config: LoraConfig):
        """Make it and put it on ``model``, a plain one, in place.

        Raises:
            UserError: as `attach`; the model is unchanged then.
        """
        self.config = config
        self.modules = attach(model, config)
        self.names = adapter_names(model, config)
        self.bias_names = bias_names(model, config.bias)
        self.is_trainable = True
        # The base's biases while the adapter is on, and the adapter's while it is not.
        self._other_biases = self._copy_biases(model)

    @property
    def lora_layers(self) -> dict[str, LoRALayer]:
        return {name: m for name, m in self.modules.items() if isinstance(m, LoRALayer)}

    @property
    def token_rows(self) -> dict[str, TokenRows]:
        return {name: m for name, m in self.modules.items() if isinstance(m, TokenRows)}

    def set_enabled(self, model: nn.Module, enabled: bool) -> None:
        """Have the model, which it is on, compute with it or without it."""
        self._swap_biases(model)
        for module in self.modules.values():
            module.adapter_enabled = enabled

    def take_off(self, model: nn.Module) -> None:
        """Leave ``model`` the plain base model, with the packed weights that it has."""
        self._swap_biases(model)
        set_modules(model, {name: module.take_off() for name, module in self.modules.items()})

    def put_on(self, model: nn.Module) -> None:
        """Stand in ``model``, a plain one, again.

        Raises:
            UserError: a module is gone from the model; nothing is changed then.
        """
        places = dict(model.named_modules())
        gone = [name for name in self.modules if name not in places]
        if gone:
            raise UserError(
                f"the model no longer has {gone[0]}, which the adapter is on; load both again"
            )
        taken = []
        try:
            for name, module in self.modules.items():
                base = places[name]
                module.put_on(base)
                taken.append(module)
                for part in module.modules():
                    part.is_train = base.is_training()
        except BaseException:
            for module in taken:
                module.take_off()
            raise
        set_modules(model, self.modules)
        self._swap_biases(model)

    def parameter_count(self) -> int:
        """Of its own parameters, biases of the base not among them."""
        count = sum(module.rows.size for module in self.token_rows.values())
        for module in self.modules.values():
            for name, var in getattr(module, "modules_to_save", module).named_parameters():
                if is_lora_name(name) or type(module) is ModulesToSave:
                    count += int(np.prod(var.shape))
        return count

    def peft_form(self, model: nn.Module) -> tuple[LoraConfig, dict[str, np.ndarray]]:
        """Settings and tensors as PEFT has them, by its keys; ``model`` is plain, and stays so."""
        self.put_on(model)
        try:
            named = self._parameters(model, self.names)
            tensors = {name: var.float32().numpy() for name, var in named.items()}
            return storage.peft_form(model, self.config, tensors)
        finally:
            self.take_off(model)

    def _parameters(self, model: nn.Module, names: set[str]) -> dict[str, jt.Var]:
        return {name: var for name, var in model.named_parameters() if name in names}

    def _copy_biases(self, model: nn.Module) -> dict[str, jt.Var]:
        found = self._parameters(model, self.bias_names)
        return {name: var.clone().stop_grad() for name, var in found.items()}

    def _swap_biases(self, model: nn.Module) -> None:
        if not self.bias_names:
            return
        here = self._copy_biases(model)
        for name, var in self._parameters(model, self.bias_names).items():
            assign(var, self._other_biases[name])
        self._other_biases = here

    def load(self, model: nn.Module, tensors: Mapping[str, np.ndarray], source: str) -> None:
        """Set its parameters while it is on ``model``.

        Args:
            tensors: by PEFT's names, without its prefix and wrappers.
            source: the file, for errors.

        Raises:
            UserError: tensors are missing, fit no module, or are of another shape; or weights of
                the base came with them and are not this base's.
        """
        own = self._parameters(model, self.names)
        modules = dict(model.named_modules())
        by_file_name = {}
        for name in own:
            key = storage.to_peft_key(name, modules[name.rpartition(".")[0]])
            by_file_name[storage.from_peft_key(key)] = name
        shapes = {key: tuple(own[name].shape) for key, name in by_file_name.items()}
        rows = {storage.rows_name(name): m for name, m in self.token_rows.items()}
        shapes.update({name: module.rows.shape for name, module in rows.items()})
        if tensors and not set(shapes) & set(tensors):
            raise UserError(
                f"{source} fits no module of the model: it has {next(iter(tensors))}, "
                f"the model {next(iter(shapes))}"
            )
        # PEFT writes the vocabulary beside the adapter when it was a target or was resized, and
        # leaves out the biases of "lora_only".
        current = base_weights(model)
        if has_tied_head(model):
            current["lm_head.weight"] = model.output_embedding
            if any(n.startswith("lm_head.") and n not in current for n in tensors):
                raise tied_head_error(model, f"{source} changes lm_head")
        base = {n: a for n, a in tensors.items() if n not in shapes and n in current}
        for name, array in base.items():
            base_model.check_same(name, array, current[name], source)
        complete = {n: a for n, a in tensors.items() if n not in base}
        for name in self.bias_names:
            if self.config.bias == "lora_only" and name not in complete:
                complete[name] = own[name].float32().numpy()
        check_vocabulary(source, model, shapes, complete)
        storage.check_tensors(source, shapes, complete)
        for name, module in rows.items():
            module.set_rows(complete[name])
        for key, name in by_file_name.items():
            values = np.ascontiguousarray(complete[key])
            assign(own[name], jt.array(values).cast(own[name].dtype))


def check_vocabulary(
    source: str,
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Raises: UserError: an embedding or a head in the file is one of another vocabulary."""
    head = getattr(model, "output_embedding", None)
    words = None if head is None else head.shape[0]
    for name, shape in shapes.items():
        found = getattr(tensors.get(name), "shape", shape)
        differ = [pair for pair in zip(found, shape) if pair[0] != pair[1]]
        if len(found) == len(shape) and len(differ) == 1 and differ[0][1] == words:
            raise UserError(
                f"{source}: {name} is {tuple(found)} instead of {shape}: the base model of this "
                f"adapter has {differ[0][0]:,} words, and this one {words:,}; load it on that one "
                "(transformers' resize_token_embeddings and save_pretrained make it)"
            )


def adapter_names(model: nn.Module, config: LoraConfig) -> set[str]:
    """The parameters that the adapter on ``model`` trains and saves."""
    tables = [name for name, m in model.named_modules() if isinstance(m, TokenRows)]
    names = {name for name, _ in model.named_parameters()}
    names -= {f"{name}.modules_to_save.weight" for name in tables}
    own = {n for n in names if is_lora_name(n) or ".modules_to_save." in f".{n}"}
    return own | bias_names(model, config.bias)


def base_weights(model: nn.Module) -> dict:
    """The weights by name, those among them that an engine keeps in packed form alone."""
    weights = {f"{name}.weight": vars(m).get("weight") for name, m in model.named_modules()}
    packed = {n: w for n, w in weights.items() if w is not None and not isinstance(w, jt.Var)}
    return {**dict(model.named_parameters()), **packed}


def is_adapted(model: nn.Module) -> bool:
    """Whether an adapter is on the model."""
    return any(isinstance(module, (LoRALayer, ModulesToSave)) for module in model.modules())
