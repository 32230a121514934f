"""A CUDA toolkit in the form that Jittor can use, put together from what the machine has.

Jittor 1.3 wants `bin/nvcc`, `include` and `lib64` side by side, with the names that CUDA 11 and 12
have, and knows CUDA up to 12. So it is given a folder of links: to an installed toolkit, or to
NVIDIA's packages from PyPI (`nvidia-cuda-nvcc`, `nvidia-cublas`, ...), whose libraries have a
number in their names and stand in a folder each. Its `nvcc` is a script that calls the
real one with flags that it knows, and a few headers put back what CUDA 13 has taken away.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jlora.system.files import make_folder

#: Without these Jittor cannot be compiled for CUDA.
HEADERS = ("cuda_runtime.h", "cublas_v2.h", "curand.h")
LIBRARIES = ("libcudart", "libcublas", "libcublasLt", "libcurand")
#: What is installed from PyPI where there is no toolkit, each with ``nvidia-`` before it.
PACKAGES = (
    "cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl", "cublas", "curand",
)  # fmt: skip

# CUDA 13's own headers need C++17; PTX lets a program run on a card newer than Jittor knows.
_NVCC = """#!/bin/bash
arguments=()
for argument in "$@"; do
    case $argument in
    -std=c++14) argument=-std=c++17 ;;
    -arch=compute_*) arguments+=("-code=compute_${{argument#-arch=compute_}}") ;;
    esac
    arguments+=("$argument")
done
exec {nvcc} -I{include} -L{lib64} -cudadevrt none "${{arguments[@]}}"
"""
_CUDA_RUNTIME = """#pragma once
#include "{header}"
#if defined(__cplusplus) && CUDART_VERSION >= 13000
// Jittor reads two fields of the properties that CUDA 13 has no more.
struct jlora_device_properties : cudaDeviceProp {{ int computeMode, clockRate; }};
static inline cudaError_t jlora_get_device_properties(jlora_device_properties* to, int device) {{
    cudaError_t error = cudaGetDeviceProperties(static_cast<cudaDeviceProp*>(to), device);
    if (!error) error = cudaDeviceGetAttribute(&to->computeMode, cudaDevAttrComputeMode, device);
    if (!error) error = cudaDeviceGetAttribute(&to->clockRate, cudaDevAttrClockRate, device);
    return error;
}}
#define cudaDeviceProp jlora_device_properties
#define cudaGetDeviceProperties jlora_get_device_properties
#endif
"""
# CUDA 13 has replaced these names of its library cub, which Jittor's softmax and argmax use.
_CUB = """#pragma once
#include "{header}"
#if CUDART_VERSION >= 13000
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>
namespace cub {{
struct Max {{
    template <typename T>
    __host__ __device__ T operator()(const T& a, const T& b) const {{ return a < b ? b : a; }}
}};
template <typename T, typename Offset = ptrdiff_t>
using CountingInputIterator = thrust::counting_iterator<T>;
template <typename T, typename Change, typename Iterator, typename Offset = ptrdiff_t>
using TransformInputIterator = thrust::transform_iterator<Change, Iterator, T>;
}}  // namespace cub
#endif
"""
# Of NVIDIA's image library Jittor reads only these numbers, and PyPI's packages lack its header.
_NPP = """#pragma once
#define NPP_MIN_32U 0u
#define NPP_MAX_32U 4294967295u
#define NPP_MIN_32S (-2147483647 - 1)
#define NPP_MAX_32S 2147483647
#define NPP_MIN_64U 0ull
#define NPP_MAX_64U 18446744073709551615ull
#define NPP_MIN_64S (-9223372036854775807ll - 1)
#define NPP_MAX_64S 9223372036854775807ll
"""


@dataclass(frozen=True)
class Toolkit:
    """Where the parts of a CUDA toolkit are.

    Attributes:
        nvcc: the compiler.
        includes, libraries: folders, the first with a file wins.
    """

    nvcc: Path
    includes: tuple[Path, ...]
    libraries: tuple[Path, ...]

    def header(self, name: str) -> Path | None:
        return next((f / name for f in self.includes if (f / name).is_file()), None)

    def library(self, name: str) -> Path | None:
        """``libNAME.so``, or the same with a number behind it."""
        for folder in self.libraries:
            found = [folder / f"{name}.so", *sorted(folder.glob(f"{name}.so.[0-9]*"))]
            for path in found:
                if path.is_file():
                    return path
        return None

    @property
    def missing(self) -> list[str]:
        """What Jittor needs and is not there."""
        headers = [name for name in HEADERS if self.header(name) is None]
        return headers + [f"{name}.so" for name in LIBRARIES if self.library(name) is None]

    @property
    def has_cudnn(self) -> bool:
        """Whether there is a cuDNN that Jittor knows; version 9 breaks its import (jittor#666)."""
        version = self.header("cudnn_version.h")
        if version is None or self.library("libcudnn_ops_infer") is None:
            return False
        return re.search(r"#define CUDNN_MAJOR\s+[78]\b", version.read_text()) is not None


def find() -> Toolkit | None:
    """The toolkit of this machine, with an nvcc at least; None where there is no nvcc."""
    for nvcc in _compilers():
        homes = [Path(nvcc).resolve().parent.parent, *_wheels(), Path("/usr/local/cuda")]
        target = f"targets/{platform.machine()}-linux"
        includes = [h / part for h in homes for part in ("include", f"{target}/include")]
        libraries = [h / part for h in homes for part in ("lib64", f"{target}/lib", "lib")]
        # Where distributions have their own package of CUDA.
        includes.append(Path("/usr/include"))
        libraries.append(Path(f"/usr/lib/{platform.machine()}-linux-gnu"))
        return Toolkit(Path(nvcc), _there(includes), _there(libraries))
    return None


def _compilers() -> Iterator[str]:
    candidates = [
        os.environ.get("nvcc_path"),
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
        "/usr/bin/nvcc",
        "/opt/cuda/bin/nvcc",
        *(str(folder / "bin" / "nvcc") for folder in _wheels()),
    ]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK) and Path(candidate).is_file():
            yield candidate


def _wheels() -> list[Path]:
    """The folders of NVIDIA's packages from PyPI: ``nvidia/cu13``, before that one a library."""
    found = []
    for entry in sys.path:
        found += sorted((Path(entry or ".") / "nvidia").glob("*/"))
    return found


def _there(folders: list[Path]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def set_up(toolkit: Toolkit, cache: Path) -> Path:
    """Make the folder of links, unless it is there, and return its nvcc.

    Args:
        toolkit: nothing of it may be `missing`.
        cache: the folder in which to make it.
    """
    text = repr(toolkit) + _NVCC + _CUDA_RUNTIME + _CUB + _NPP
    home = cache / f"cuda-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    nvcc = home / "bin" / "nvcc"
    if nvcc.is_file():
        return nvcc
    make_folder(cache)
    made = Path(tempfile.mkdtemp(prefix=".cuda-", dir=cache))
    try:
        for folder in ("bin", "include", "lib64"):
            make_folder(made / folder)
        for include in toolkit.includes:
            _link_all(include, made / "include")
        for libraries in toolkit.libraries:
            _link_libraries(libraries, made / "lib64")
        header = made / "include" / "cuda_runtime.h"
        real = header.resolve()
        header.unlink()
        header.write_text(_CUDA_RUNTIME.format(header=real))
        cub = toolkit.header("cccl/cub/cub.cuh")
        if cub is not None:  # since CUDA 13; before, cub stands with the other headers
            make_folder(made / "include" / "cub")
            _link_all(cub.parent, made / "include" / "cub")
            (made / "include" / "cub" / "cub.cuh").unlink()
            (made / "include" / "cub" / "cub.cuh").write_text(_CUB.format(header=cub))
        if toolkit.header("npp.h") is None:
            (made / "include" / "npp.h").write_text(_NPP)
        script = made / "bin" / "nvcc"
        paths = {
            "nvcc": toolkit.nvcc.resolve(),
            "include": home / "include",
            "lib64": home / "lib64",
        }
        script.write_text(_NVCC.format(**paths))
        script.chmod(0o755)
        made.rename(home)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        if not nvcc.is_file():  # else another process was first
            raise
    return nvcc


def _link_all(source: Path, target: Path) -> None:
    if source == Path("/usr/include"):  # only CUDA's
        names = [
            p
            for pattern in ("cu*", "crt", "*_types.h", "*_functions.h", "nv*")
            for p in source.glob(pattern)
        ]
    else:
        names = list(source.iterdir())
    for path in names:
        link = target / path.name
        if not link.is_symlink():
            link.symlink_to(path)


def _link_libraries(source: Path, target: Path) -> None:
    """Link CUDA's libraries, by their own names and by those that a linker looks for."""
    for path in sorted([*source.glob("libcu*.so*"), *source.glob("libnv*.so*")]):
        for name in (path.name, path.name.partition(".so")[0] + ".so"):
            link = target / name
            if not link.is_symlink():
                link.symlink_to(path)
