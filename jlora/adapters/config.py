"""`LoraConfig`: PEFT's settings, read from and written to ``adapter_config.json``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from jlora.layers import VARIANTS, LoraVariant, find_variant
from jlora.system.errors import UserError

# Fields of PEFT's own that say nothing about what a trained adapter computes, whatever they hold:
# where the file comes from, how the adapter's tensors were first filled, and what is read only
# beside another field, which is refused where it is on.
_INERT_FIELDS = {
    "auto_mapping", "inference_mode", "peft_type", "peft_version", "revision", "runtime_config",
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",  # of init_lora_weights
    "megatron_core", "qalora_group_size",  # of megatron_config and use_qalora
    "merge_weights",  # of PEFT 0.2: whether eval() merges
}  # fmt: skip
# Fields that change what an adapter computes, by which PEFT can make a plain model of it.
_LACKING_FIELDS = {
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config",
    "layer_replication", "megatron_config", "monteclora_config", "target_parameters",
    "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip

# The peft_type of variants that PEFT does not have.
_OWN_TYPE = "JLORA"

# PEFT's switches for variants.
_VARIANT_FIELDS = ("use_rslora", "use_dora", "lora_bias")

_INITS = (True, False, "gaussian")
# How an adapter was filled before it was trained does not matter once it is loaded. These leave the
# base weights as they are when PEFT loads an adapter; the others ("pissa", "pissa_niter_4",
# "olora", "corda", "loftq") take something out of them again, and the adapter is right only so.
_INITS_OF_TRAINED = ("eva", "orthogonal", "mica", "lora_ga")

# What ensure_weight_tying could be about: embeddings and heads by the names that models here have.
_TIED = {"wte", "embed_tokens", "lm_head"}


@dataclass
class LoraConfig:
    """Which layers get LoRA, and how (PEFT's names and defaults).

    Args:
        r: rank.
        lora_alpha: the change is scaled by ``lora_alpha / r``.
        lora_dropout: dropout on the input of the LoRA branch.
        target_modules: names (``"c_attn"`` stands for every module whose name is or ends with
            it), a regular expression for the whole name, or ``"all-linear"`` (all linear layers
            but the output head). None takes the model family's usual choice.
        exclude_modules: names or a regular expression of modules to leave out.
        fan_in_fan_out: kept for PEFT's sake; the layer's own type decides.
        bias: "none", "all" or "lora_only": which biases are trained too.
        modules_to_save: names of modules that are trained in full and saved with the adapter.
        init_lora_weights: True: A uniform, B zero; "gaussian": A normal with deviation 1/r, B
            zero; False: both random.
        rank_pattern, alpha_pattern: name pattern -> r or lora_alpha of the modules it fits.
        use_rslora, use_dora: scale by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732); train the
            length of each output's weights apart from their direction (arXiv 2402.09353). PEFT's
            way to say ``variant="rslora"``, "dora", and "rsdora" for both.
        lora_bias: B has a bias too; ``variant="lora_bias"``.
        layers_to_transform: only the layers with these numbers.
        layers_pattern: name of the list of layers, where it cannot be guessed.
        enable_lora: loralib's setting for fused layers: one flag for each of the equal blocks of
            outputs, ``[True, False, True]`` for query and value of GPT-2's ``c_attn``; each
            enabled block gets its own rank r. Layers that are not fused so stay plain.
        trainable_token_indices: tokens with rows of their own in the embedding, or module name ->
            tokens; read in adapters that PEFT trained.
        variant: which variant of LoRA, a key of `jlora.layers.VARIANTS`; None: "lora".

    Raises:
        UserError: a value that cannot be.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    enable_lora: list[bool] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    variant: str | None = None

    def __post_init__(self):
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise UserError(f"{name} must map names to numbers, not {getattr(self, name)!r}")
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise UserError(f"{name} must be a whole number above 0, not {rank!r}")
        alphas = {"lora_alpha": self.lora_alpha}
        alphas.update({f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()})
        for name, alpha in alphas.items():
            if not _is_number(alpha) or not math.isfinite(alpha):
                raise UserError(f"{name} must be a number, not {alpha!r}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout!r}"
            )
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f'bias must be "none", "all" or "lora_only", not {self.bias!r}')
        if self.init_lora_weights not in _INITS:
            raise UserError(
                f"init_lora_weights {self.init_lora_weights!r} is not supported; "
                'use True, False or "gaussian"'
            )
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value))
            elif value is not None and not isinstance(value, (list, str)):
                raise UserError(f"{name} must be a list of names, not {value!r}")
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        if isinstance(self.modules_to_save, str):
            raise UserError("modules_to_save must be a list of names")
        for name, kind, what in (
            ("target_modules", str, "names"),
            ("exclude_modules", str, "names"),
            ("modules_to_save", str, "names"),
            ("layers_pattern", str, "names"),
            ("layers_to_transform", int, "whole numbers"),
            ("enable_lora", bool, "true and false"),
        ):
            value = getattr(self, name)
            if value is None or (isinstance(value, kind) and name != "enable_lora"):
                continue
            if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
                raise UserError(f"{name} must be a list of {what}, not {value!r}")
        _check_tokens(self.trainable_token_indices)
        on = [name for name in _VARIANT_FIELDS if getattr(self, name)]
        if self.variant is not None and not set(on) <= set(find_variant(self.variant).peft_fields):
            raise UserError(
                f"{on[0]} and variant={self.variant!r} exclude each other; leave out one"
            )
        if self.lora_bias and len(on) > 1:
            raise UserError(f"lora_bias goes with plain LoRA alone, and not with {on[0]}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError(
                "layers_to_transform needs target_modules as a list of names, "
                "not as a regular expression"
            )

    @property
    def lora_variant(self) -> LoraVariant:
        """The variant that the settings ask for."""
        return find_variant(self.variant_name)

    @property
    def variant_name(self) -> str:
        """Its key in `VARIANTS`."""
        if self.variant is not None:
            return self.variant
        if self.use_dora:
            return "rsdora" if self.use_rslora else "dora"
        return "rslora" if self.use_rslora else "lora_bias" if self.lora_bias else "lora"

    def scaling(self, r: int, alpha: float) -> float:
        """The factor of the change for a layer of rank ``r``."""
        return self.lora_variant.scaling(r, alpha)

    @classmethod
    def from_dict(
        cls, settings: Mapping[str, Any], source: str = "the LoRA settings"
    ) -> LoraConfig:
        """Read the contents of an ``adapter_config.json``, as PEFT 0.4 to 0.21 write it.

        Fields that PEFT has and jlora lacks are passed over when they are off, or when they say
        nothing about a trained adapter. `init_lora_weights` comes back as a choice that jlora has.

        Args:
            source: what to call the settings in an error, usually the file's path.

        Raises:
            UserError: a field asks for something that is not built here, or has a wrong value.
        """
        if settings.get("peft_type", "LORA") not in ("LORA", _OWN_TYPE):
            raise UserError(
                f"{source}: peft_type {settings['peft_type']!r} is not supported; "
                "jlora reads LORA adapters only"
            )
        known = {f.name: f for f in fields(cls)}
        values = {}
        by_field = {v.peft_fields[0]: n for n, v in VARIANTS.items() if len(v.peft_fields) == 1}
        for name, value in settings.items():
            if name in known:
                if value is not None or _default(known[name]) is None:
                    values[name] = value
            elif name in by_field:
                if value:
                    values["variant"] = by_field[name]
            elif name == "ensure_weight_tying" and not _can_tie(settings):
                continue
            elif value and name not in _INERT_FIELDS:
                raise UserError(f"{source}: {name}={value!r} {_why_not(name, known)}")
        if isinstance(values.get("init_lora_weights"), str):
            values["init_lora_weights"] = _init_of_trained(values["init_lora_weights"], source)
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What PEFT writes to ``adapter_config.json``.

        Fields that only younger versions of PEFT know are written only when they are used, so that
        older ones can read the file. ``enable_lora`` is none of PEFT's and left out. A variant that
        PEFT lacks is written with a ``peft_type`` that PEFT refuses.
        """
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "enable_lora"}
        on = self.lora_variant.peft_fields
        settings.update(dict.fromkeys(on, True))
        own = not on and self.lora_variant is not VARIANTS["lora"]
        settings["peft_type"] = _OWN_TYPE if own else "LORA"
        if not own:
            del settings["variant"]
        younger = (*_VARIANT_FIELDS, "trainable_token_indices")
        for name in (*younger, "exclude_modules", "rank_pattern", "alpha_pattern"):
            if not settings[name]:
                del settings[name]
        settings.update(inference_mode=True, auto_mapping=None, revision=None)
        return dict(sorted(settings.items()))


def _why_not(name: str, known: Mapping[str, Any]) -> str:
    """What is wrong with a field that is on and that `LoraConfig` does not have."""
    if name in _LACKING_FIELDS:
        return (
            "asks for something jlora lacks; "
            "merge this adapter into its model with PEFT and load the result"
        )
    near = difflib.get_close_matches(name, known, 1, 0.5)
    nearest = f" (nearest: {near[0]})" if near else ""
    return (
        f"is no setting of LoRA in PEFT up to 0.21{nearest}, and PEFT would pass over it; "
        "correct or remove it, or upgrade jlora if a newer PEFT wrote it"
    )


def _init_of_trained(init: str, source: str) -> bool | str:
    """The `init_lora_weights` of a trained adapter -> one that jlora has."""
    if init.lower() == "gaussian":
        return "gaussian"
    if init.lower() not in _INITS_OF_TRAINED:
        raise UserError(
            f"{source}: init_lora_weights={init!r} changes the base weights, which jlora does not; "
            "make a plain adapter of it with PEFT (path_initial_model_for_weight_conversion of "
            "save_pretrained), or merge it there and load the result"
        )
    return True


def _can_tie(settings: Mapping[str, Any]) -> bool:
    """Whether an embedding or a head may be among what an adapter changes."""
    targets = settings.get("target_modules")
    if settings.get("modules_to_save"):
        return True
    if isinstance(targets, str):
        return targets.lower() != "all-linear"
    names = targets if isinstance(targets, list) else []
    return any(isinstance(name, str) and name.rpartition(".")[2] in _TIED for name in names)


def _check_tokens(tokens: Any) -> None:
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens or []]
    if not all(
        isinstance(each, list) and all(type(i) is int and i >= 0 for i in each) for each in lists
    ):
        raise UserError(
            f"trainable_token_indices must be a list of tokens, or lists by module, not {tokens!r}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _default(f) -> Any:
    return f.default if f.default is not MISSING else f.default_factory()
