"""How a C++ operator gets into Jittor: one call of ``jt.code`` with our headers and flags."""

from __future__ import annotations

import functools
from pathlib import Path

from jlora.runtime import jt, onednn_paths

FOLDER = Path(__file__).resolve().parent

# Reassociation lets the compiler use vector registers for sums. -Ofast is not used: linking with
# it would flush denormal numbers to zero in the whole process.
FLAGS = (
    "-O3 -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math "
    "-freciprocal-math -ffp-contract=fast -fopenmp"
)


@functools.cache
def header(name: str) -> str:
    """The text of a header of this folder; our own ``#include "..."`` lines are put in place."""
    lines = []
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        if line.startswith('#include "'):
            lines.append(header(line.split('"')[1]))
        elif line != "#pragma once" and not line.lstrip().startswith("//"):
            lines.append(line)
    return "\n".join(lines)


@functools.cache
def _options(onednn: bool) -> str:
    flags = f"FLAGS: {FLAGS} "
    if onednn:
        include, library = onednn_paths()
        flags += f"-I{include} -L{library} -ldnnl -Wl,-rpath,{library} "
    return flags


def operator(shapes, dtypes, inputs, source: str, include: str, onednn=False, **data):
    """Add a C++ operator to Jittor's graph.

    Args:
        shapes: the output's shape, or a list of shapes for several outputs.
        dtypes: likewise.
        inputs: Vars, ``in0_p``, ``in1_p`` ... in the source.
        source: C++ statements; outputs are ``out0_p``, ``out1_p`` ...
        include: a header of this folder.
        onednn: link with Jittor's oneDNN.
        data: numbers the source reads as ``data["name"]``; changing them never recompiles.

    Returns:
        A Var, or a list of Vars for several outputs.
    """
    data = {key: float(value) for key, value in data.items()}
    result = jt.code(shapes, dtypes, inputs, cpu_header=header(include), cpu_src=source, data=data)
    for var in result if isinstance(result, (list, tuple)) else [result]:
        var.compile_options = {_options(onednn): 1}
    return result


class FusedFunction(jt.Function):
    """A ``jt.Function`` whose ``grad`` finds its arguments in ``self.inputs``.

    Inside ``execute`` Jittor hands over taped copies of the arguments. Whoever keeps one of those
    for the backward pass makes a cycle that is never freed (the tape holds the function, the
    function its own tape), half a gigabyte a training step. The arguments as given are safe.
    """

    def __call__(self, *args):
        self.inputs = args
        return super().__call__(*args)
