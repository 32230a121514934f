"""Makes Jittor importable and quiet. The only place that sets environment variables.

    from jlora.runtime import jt

imports Jittor at that line; ``import jlora.runtime`` alone does not.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists() or Path("/dev/nvidia0").exists()


def _prepare_environment() -> None:
    defaults = {"FIX_TORCH_ERROR": "0", "log_silent": "1"}
    if shutil.which("nvcc") and not _has_gpu():
        defaults["nvcc_path"] = ""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _import_jittor():
    _prepare_environment()
    import jittor

    return jittor


def __getattr__(name: str):
    if name == "jt":
        module = _import_jittor()
        globals()["jt"] = module
        return module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
