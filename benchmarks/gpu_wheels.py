"""``make gpu-wheels``: what jlora needs on a machine with a card and without a network, as wheels.

Such a machine has PyTorch's environment, with safetensors, tokenizers, psutil and the like; what it
lacks is Jittor, a NumPy below 2, and what jlora's recipes and readers take.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

#: Compiled ones and pure ones; Jittor itself comes as sources, of which a wheel is made here.
PACKAGES = (
    "numpy==1.26.4", "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "gguf",
    "astunparse", "pyyaml",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--python", default="3.12", help="version of that machine's Python")
    options.add_argument(
        "--onednn", action="store_true", help="with jittor-offline, 27 MB; else set use_mkl=0 there"
    )
    chosen = options.parse_args()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    chosen.folder.mkdir(parents=True, exist_ok=True)
    target = ["--python-version", chosen.python, "--implementation", "cp", "--only-binary=:all:"]
    target += [part for platform in PLATFORMS for part in ("--platform", platform)]
    download = [*pip, "download", "--quiet", "--no-deps", "-d", str(chosen.folder), *target]
    # pydantic wants one version of pydantic_core alone: that of this environment's pair.
    subprocess.run([*download, *map(pinned, PACKAGES)], check=True)
    sources = ["jittor==1.3.11.0", *(["jittor-offline"] if chosen.onednn else [])]
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "-w", str(chosen.folder)]
    subprocess.run([*wheel, *sources], check=True)
    size = sum(path.stat().st_size for path in chosen.folder.glob("*.whl"))
    print(f"{chosen.folder}: {size / 1e6:.0f} MB")


def pinned(package: str) -> str:
    import importlib.metadata

    if package.startswith("pydantic"):
        return f"{package}=={importlib.metadata.version(package)}"
    return package


if __name__ == "__main__":
    main()
