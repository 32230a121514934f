"""What the sides run in: environments and their versions, and the instructions they may use."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.sides import PYTHON, last_line

#: The packages of an environment whose versions a page names.
PACKAGES = {
    "jlora": ("jlora", "jittor"),
    "peft": ("peft", "transformers", "torch", "bitsandbytes"),
    "mlx": ("mlx-lm", "mlx", "mkl"),
    "jittor2": ("jittor", "peft", "transformers"),
    "ctranslate2": ("ctranslate2",),
    "openvino": ("openvino-genai", "openvino", "optimum-intel"),
    "llamacpp": ("xllamacpp",),
    "llamacpp-native": ("node-llama-cpp",),
}
#: torch returns its large temporaries to the system at every step and gets their pages back by page
#: faults, which are slow in a virtual machine. With these settings glibc's malloc keeps them.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
#: What holds a side to AVX2 and FMA, as most laptops have them: jlora and Jittor compile for such a
#: processor, libraries that choose by the processor are told, and glibc's own functions too.
AVX2 = {
    "JLORA_ARCH": "x86-64-v3",
    "DNNL_MAX_CPU_ISA": "AVX2",  # oneDNN in Jittor, CTranslate2
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # in torch, OpenVINO
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own loops, and those it compiles
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "CT2_FORCE_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD",
}
ISA = {"native": {}, "avx2": AVX2}


def missing(environment: str) -> str | None:
    """Why an environment cannot be used; None if it can."""
    python = PYTHON[environment]
    if environment == "jlora" or (python.parents[1] / ".installed").exists():
        return None
    log = python.parents[1] / "install.log"
    if not log.is_file():
        return f"{python.parents[1].name} is not there; `make bench` makes it"
    errors = [line for line in log.read_text(errors="replace").split("\n") if "ERROR" in line]
    return "could not be installed: " + (errors[0].strip()[:300] if errors else last_line(log))


def versions(environment: str) -> dict[str, str]:
    """Package -> version, of those of `PACKAGES` that are installed."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "found = ((d.metadata['Name'].lower().replace('_', '-'), d.version)"
        " for d in m.distributions())\n"
        "print(json.dumps({n: v for n, v in found if n in sys.argv[1:]}))"
    )
    modules = PYTHON[environment].parents[1] / "node_modules"
    if modules.is_dir():
        files = {name: modules / name / "package.json" for name in PACKAGES[environment]}
        return {name: json.loads(file.read_text())["version"] for name, file in files.items()}
    command = [str(PYTHON[environment]), "-c", code, *PACKAGES[environment]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return json.loads(done.stdout)


def mkl(folder: Path = PYTHON["mlx"].parents[1]) -> Path | None:
    """The BLAS for mlx-lm in its environment: that of its own wheel, netlib's, is slow."""
    return next((folder / "lib").glob("libmkl_rt.so*"), None)
