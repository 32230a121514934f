"""`LoraConfig`: PEFT's settings, read from and written to ``adapter_config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from jlora.errors import UserError

# Fields of PEFT's own that say nothing about what is computed once an adapter is trained.
_INERT_FIELDS = {
    "auto_mapping", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "peft_type",
}  # fmt: skip

# Initialisations that leave the base weights alone; "pissa", "olora", "corda" and "loftq" change
# them, so that their adapters are right only on the changed base.
_INITS = (True, False, "gaussian")
_INITS_OF_TRAINED = ("eva", "orthogonal")


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
        use_rslora: scale by ``lora_alpha / sqrt(r)`` (arXiv 2312.03732).
        layers_to_transform: only the layers with these numbers.
        layers_pattern: name of the list of layers, where it cannot be guessed.
        enable_lora: loralib's setting for fused layers: one flag for each of the equal blocks of
            outputs, ``[True, False, True]`` for query and value of GPT-2's ``c_attn``; each
            enabled block gets its own rank r. Layers that are not fused so stay plain.

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
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    enable_lora: list[bool] | None = None

    def __post_init__(self):
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
        if self.init_lora_weights not in (*_INITS, *_INITS_OF_TRAINED):
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
        if isinstance(self.modules_to_save, str):
            raise UserError("modules_to_save must be a list of names")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise UserError(
                "layers_to_transform needs target_modules as a list of names, "
                "not as a regular expression"
            )

    def scaling(self, r: int, alpha: float) -> float:
        """The factor of the change for a layer of rank ``r`` (PEFT's, with or without rslora)."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    @classmethod
    def from_dict(
        cls, settings: Mapping[str, Any], source: str = "the LoRA settings"
    ) -> LoraConfig:
        """Read the contents of an ``adapter_config.json``, as PEFT 0.4 to 0.21 write it.

        Fields that PEFT has and jlora lacks are passed over when they are off.

        Args:
            source: what to call the settings in an error, usually the file's path.

        Raises:
            UserError: a field asks for something that is not built here, or has a wrong value.
        """
        if settings.get("peft_type", "LORA") != "LORA":
            raise UserError(
                f"{source}: peft_type {settings['peft_type']!r} is not supported; "
                "jlora reads LORA adapters only"
            )
        known = {f.name: f for f in fields(cls)}
        values = {}
        for name, value in settings.items():
            if name not in known:
                if name not in _INERT_FIELDS and value:
                    raise UserError(
                        f"{source}: {name}={value!r} asks for something jlora lacks; "
                        "load this adapter with PEFT"
                    )
            elif value is not None or _default(known[name]) is None:
                values[name] = value
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What PEFT writes to ``adapter_config.json``.

        Fields that only younger versions of PEFT know are written only when they are used, so that
        older ones can read the file. ``enable_lora`` is none of PEFT's and left out.
        """
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "enable_lora"}
        for name in ("exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern"):
            if not settings[name]:
                del settings[name]
        settings.update(peft_type="LORA", inference_mode=True, auto_mapping=None, revision=None)
        return dict(sorted(settings.items()))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _default(f) -> Any:
    return f.default if f.default is not MISSING else f.default_factory()
