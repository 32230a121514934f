"""The names that users import."""

from __future__ import annotations

import importlib
import subprocess
import sys

import jlora


def test_every_public_name_is_there():
    for name in jlora.__all__:
        assert getattr(jlora, name) is not None
    assert set(dir(jlora)) == set(jlora.__all__)


def test_runtime_has_its_short_name():
    from jlora.runtime import jt, nn

    from jlora.system import runtime

    assert jt is runtime.jt and nn is jt.nn
    assert importlib.import_module("jlora.runtime").set_seed is runtime.set_seed


def test_importing_jlora_imports_neither_jittor_nor_numpy():
    code = "import sys, jlora, jlora.runtime; print({'jittor', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_importing_jittor_leaves_no_process_behind():
    code = (
        "from jlora.runtime import jt; import psutil, jittor_utils; "
        "print(psutil.Process().children(recursive=True), jittor_utils.pool_size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] 0\n"
