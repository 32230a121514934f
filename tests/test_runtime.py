"""Importing Jittor on machines where something is missing, half there or already in use.

Most tests run a child process, because Jittor can be imported only once in a process; where the
first compilation matters, a stand-in for Jittor takes its place and costs nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jlora.system import first_import, machine, runtime
from jlora.system.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
JITTOR_VARIABLES = (
    *("FIX_TORCH_ERROR", "cache_name", "use_cutlass", "OMP_NUM_THREADS", "use_mpi", "nvcc_path"),
    *("use_parallel_op_compiler", "log_silent", "python_config_path", "JLORA_VERBOSE", "cc_path"),
)


def run(script: str, *path: Path, **environment: str | None) -> subprocess.CompletedProcess:
    """Run Python code in a child with `path` before sys.path and a clean Jittor environment."""
    env = {name: value for name, value in os.environ.items() if name not in JITTOR_VARIABLES}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    for name, value in environment.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


IMPORT = """
    import sys
    from jlora.system.errors import UserError
    try:
        from jlora.system.runtime import jt
    except UserError as error:
        print(f"jlora: error: {error}", file=sys.stderr)
        sys.exit(2)
"""


@pytest.fixture
def stand_in(tmp_path: Path):
    """A folder with packages `jittor` and `jittor_utils` whose import runs the code given."""

    def make(first_import: str = "", every_import: str = "") -> Path:
        folder = tmp_path / "packages"
        cache = tmp_path / "cache"
        (folder / "jittor").mkdir(parents=True)
        (folder / "jittor_utils").mkdir()
        cache.mkdir()
        (folder / "jittor_utils" / "__init__.py").write_text(f"cache_path = {str(cache)!r}\n")
        (folder / "jittor" / "__init__.py").write_text(
            "import os, sys, time\n"
            "__version__ = 'stand-in'\n"
            "has_cuda = 0\n"
            "class flags: nvcc_path = 'none'; cc_type = python_path = jittor_path = ''\n"
            f"cache = {str(cache)!r}\n"
            f"core = cache + '/jittor_core.so'\n"
            f"{textwrap.dedent(every_import)}\n"
            "if not os.path.exists(core):\n"
            f"    pass\n{textwrap.indent(textwrap.dedent(first_import), '    ')}\n"
            "    open(core, 'w').close()\n"
        )
        return folder

    return make


# --- laziness -------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_jittor():
    result = run("import sys, jlora, jlora.system.runtime; print('jittor' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = runtime.nothing


# --- the real Jittor ------------------------------------------------------------------------


def test_jittor_is_quiet_and_leaves_the_process_as_it_was(tmp_path: Path):
    """A torch beside it stays out; Ctrl-C, killed children, HTTPS and recursion stay Python's."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    script = """
        import os, signal, ssl, subprocess, sys
        before = sys.getrecursionlimit(), ssl._create_default_https_context
        from jlora.system.runtime import jt
        assert (jt.ones((2, 3)) + 1).sum().item() == 12
        assert "torch" not in sys.modules
        assert before == (sys.getrecursionlimit(), ssl._create_default_https_context)
        child = subprocess.Popen(["sleep", "60"])
        child.kill()
        assert child.wait() == -signal.SIGKILL
        try:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("no KeyboardInterrupt")
        except KeyboardInterrupt:
            print("end")
    """
    result = run(script, tmp_path)
    assert (result.returncode, result.stdout) == (0, "end\n"), result.stderr
    assert "[i " not in result.stderr
    assert "Compiling" not in result.stdout


def test_seed_repeats_every_generator():
    import random

    import numpy as np

    from jlora.system.runtime import jt

    def draw():
        return jt.rand(4).numpy().tolist(), np.random.rand(), random.random()

    runtime.set_seed(7)
    first = draw()
    runtime.set_seed(7)
    assert draw() == first
    runtime.set_seed(8)
    assert draw() != first


@pytest.mark.parametrize("seed", [0, 110, 4_294_012_882, 2**32 - 1])
def test_seeds_that_numpy_takes_are_handed_on_as_they_are(seed):
    runtime.set_seed(seed)
    found = np.random.random(), random.random(), runtime.jt.rand(3).numpy().tolist()
    np.random.seed(seed)
    random.seed(seed)
    runtime.jt.set_seed(seed)
    assert found == (np.random.random(), random.random(), runtime.jt.rand(3).numpy().tolist())


def test_larger_seeds_differ():
    drawn = []
    for seed in (7, 2**32 + 7, 2**33 + 7, 2**63, 2**63 * 1_000_003 + 5):
        for _ in range(2):
            runtime.set_seed(seed)
            drawn.append((np.random.randint(2**31), random.random(), runtime.jt.rand(1).item()))
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 5


def test_onednn_has_headers_and_library():
    onednn = runtime.find_onednn()
    if onednn is not None:
        assert (onednn.include / "dnnl.hpp").is_file()
        assert onednn.library.is_file() and onednn.library.name.startswith("libdnnl")
        assert onednn.library.parent.parent in runtime.installed_onednn()


def test_onednn_is_unpacked_where_jittor_looks_for_it(tmp_path, monkeypatch):
    onednn = runtime.find_onednn()
    if onednn is None or sys.platform != "linux":
        pytest.skip("no oneDNN of jittor-offline's here")
    home = SimpleNamespace(home=lambda: str(tmp_path))
    monkeypatch.setenv("use_mkl", "0")
    first_import.unpack_onednn(home)
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("use_mkl")
    for _ in range(2):
        first_import.unpack_onednn(home)
        (unpacked,) = (tmp_path / ".cache" / "jittor" / "mkl").iterdir()
        assert unpacked.name == onednn.include.parent.name
        assert (unpacked / "lib" / "libmkldnn.so").is_file()


def test_gpu_that_is_not_there(monkeypatch):
    from jlora.system.runtime import jt

    if jt.has_cuda:
        pytest.skip("this machine has a GPU")
    assert runtime.use_gpu() is False
    assert runtime.use_gpu(False) is False
    with pytest.raises(UserError, match="no GPU to use: .*jlora doctor"):
        runtime.use_gpu(True)


# --- Jittor 2.0, which can stand in for torch ------------------------------------------------


AS_TORCH = "sys.modules['torch'] = sys.modules[__name__]"


@pytest.mark.parametrize(
    ("before", "every_import", "variables", "reason"),
    [
        ("", "", {"JITTOR_TORCH_SHIM": "1"}, "JITTOR_TORCH_SHIM=1"),
        ("", "", {"JITTOR_TORCH_PROJECT_ROOT": "/p"}, "JITTOR_TORCH_PROJECT_ROOT=/p"),
        ("import jittor", AS_TORCH, {}, "its module is loaded as torch"),
        ("", AS_TORCH, {}, "its module is loaded as torch"),  # by the text of the script
    ],
)
def test_jittor_as_torch_is_refused(stand_in, before, every_import, variables, reason):
    script = f"{before}\n{textwrap.dedent(IMPORT)}"
    result = run(script, stand_in(every_import=every_import), **variables)
    assert result.returncode == 2
    wanted = f"jlora: error: Jittor stands in for torch in this process ({reason}), where its"
    assert result.stderr.startswith(wanted) and result.stderr.count("\n") == 1, result.stderr


def test_a_torch_of_its_own_and_a_mode_that_is_off_are_no_hindrance(stand_in, tmp_path):
    (tmp_path / "torch.py").write_text("")
    script = f"import torch\n{textwrap.dedent(IMPORT)}print(jt.__version__)"
    result = run(script, stand_in(), tmp_path, JITTOR_TORCH_SHIM="0")
    assert result.stdout == "stand-in\n", result.stderr


# --- the environment variables --------------------------------------------------------------


def defaults(script_environment: dict[str, str | None] | None = None) -> dict[str, str]:
    result = run(
        "import json\nfrom jlora.system import runtime\n"
        "print(json.dumps(runtime.environment_defaults()))",
        **(script_environment or {}),
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_what_the_user_has_set_stays(stand_in):
    script = textwrap.dedent(IMPORT) + "import os\nprint(os.environ['use_mpi'], jt.__version__)"
    folder = stand_in()
    assert run(script, folder, use_mpi="1").stdout == "1 stand-in\n"
    assert run(script, folder).stdout == "0 stand-in\n"


def test_mpi_is_off_unless_mpirun_started_us():
    assert defaults()["use_mpi"] == "0"
    assert "use_mpi" not in defaults({"OMPI_COMM_WORLD_SIZE": "2"})


def test_verbose_shows_jittors_log():
    assert defaults()["log_silent"] == "1"
    assert "log_silent" not in defaults({"JLORA_VERBOSE": "1"})
    assert defaults({"JLORA_VERBOSE": "0"})["log_silent"] == "1"


def test_nvcc_without_a_gpu_is_a_cpu_build(tmp_path: Path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 12.2\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(machine, "gpu_problem", lambda: "no NVIDIA GPU")
    assert runtime.environment_defaults()["nvcc_path"] == ""


# --- the first compilation ------------------------------------------------------------------


def test_first_compilation_shows_the_time_and_only_once(stand_in):
    folder = stand_in("print('Compiling jittor_core(1/150)', flush=True); time.sleep(2)")
    first = run(IMPORT, folder)
    assert first.returncode == 0, first.stderr
    assert first.stdout == ""
    assert "jlora: compiling Jittor for this machine" in first.stderr
    assert "done after" in first.stderr
    second = run(IMPORT, folder)
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_jittor_that_asks_to_be_run_again_is_run_again(stand_in):
    """It does so with exit code 0 when it has renewed its helper library."""
    folder = stand_in(
        "if not os.path.exists(cache + '/renewed'):\n"
        "    open(cache + '/renewed', 'w').close()\n"
        "    sys.exit(0)"
    )
    result = run(IMPORT, folder)
    assert (result.returncode, result.stderr) == (0, "")


ON_A_GPU = """
    import os, pathlib, types
    from jlora.system import cuda_toolkit, machine
    machine.gpu_problem = lambda: None
    cuda_toolkit.find = lambda: types.SimpleNamespace(has_cudnn=False)
    cuda_toolkit.set_up = lambda toolkit, cache: pathlib.Path("/cuda/bin/nvcc")
    from jlora.system.runtime import jt
    print(repr(os.environ["nvcc_path"]))
"""


def test_cuda_that_does_not_work_falls_back_to_the_cpu_and_is_remembered(stand_in):
    folder = stand_in(every_import="if os.environ['nvcc_path']: raise OSError('libcudart.so: no')")
    first = run(ON_A_GPU, folder)
    assert first.stdout == "''\n", first.stderr
    assert "warning: Jittor does not work with CUDA here" in first.stderr
    assert "libcudart.so: no" in first.stderr
    second = run(ON_A_GPU, folder)
    assert (second.stdout, second.stderr) == ("''\n", "")


def test_a_build_without_cuda_does_not_hide_one_with_it(stand_in, tmp_path: Path):
    """It stands above it in the cache after an attempt with CUDA that failed."""
    folder = stand_in(
        every_import="""
        if os.environ['nvcc_path']:
            there = [os.path.exists(name) for name in (core, cache + '/cuda', cache + '/built')]
            if there != [there[2], True, there[2]]:  # a core that is not this build's
                raise OSError('no')
            open(cache + '/built', 'w').close()
        """
    )
    assert run(ON_A_GPU, folder).stdout == "''\n"
    assert (tmp_path / "cache" / "jittor_core.so").exists()
    (tmp_path / "cache" / "cuda").touch()  # now it works
    for stamp in (tmp_path / "cache").glob("jlora-*.json"):  # as `jlora doctor` says
        stamp.unlink()
    again = run(ON_A_GPU, folder)
    assert again.stdout == "'/cuda/bin/nvcc'\n", again.stderr


def test_sources_that_do_not_go_with_the_compiled_header_are_compiled_without(stand_in, tmp_path):
    folder = stand_in(every_import="if 'jlora-' in os.environ['cc_flags']: raise OSError('a.cc')")
    with open(folder / "jittor_utils" / "__init__.py", "a") as file:
        file.write("cc_type = 'g++'\n")
    script = """
        from jlora.system.runtime import jt
        import os
        print(os.environ["cc_flags"], os.environ["kernel_flags"])
    """
    for _ in range(2):  # and it is remembered
        done = run(script, folder, cc_flags=None, kernel_flags=None)
        assert (done.stdout, done.returncode) == (" -O1   -Ofast \n", 0), done.stderr
    assert (tmp_path / "cache" / "jlora-jittor.h").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_compilers_end_with_the_process(stand_in, tmp_path: Path, popen, sent):
    folder = stand_in(
        f"import subprocess\nchild = subprocess.Popen(['sleep', '100'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); time.sleep(100)"
    )
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "from jlora.system.runtime import jt"]
    process = popen(command, env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=60)
    compiler = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while compiler.exists() and compiler.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what is missing is one line ------------------------------------------------------------


def test_no_compiler(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    result = run(IMPORT, PATH=str(tmp_path / "empty"))
    assert result.returncode == 2
    assert result.stderr.startswith("jlora: error: no C++ compiler found")
    assert result.stderr.count("\n") == 1


def test_compiler_that_does_not_run(tmp_path: Path):
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'no licence' >&2; exit 1\n")
    broken.chmod(0o755)
    result = run(IMPORT, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert result.returncode == 2
    assert "does not run: no licence" in result.stderr


def test_cc_path_that_does_not_exist():
    result = run(IMPORT, cc_path="/nowhere/g++")
    assert result.returncode == 2
    assert "cc_path=/nowhere/g++" in result.stderr


@pytest.mark.parametrize("home", ["/dev/null/home", "/proc/nothing"])
def test_home_that_cannot_be_written(home: str):
    result = run(IMPORT, HOME=home)
    assert result.returncode == 2
    assert f"cannot write {home}" in result.stderr
    assert "set HOME" in result.stderr
    assert result.stderr.count("\n") == 1


def test_missing_headers(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("python_config_path", raising=False)
    monkeypatch.setattr(machine, "python_header", lambda: tmp_path / "Python.h")
    with pytest.raises(UserError, match="Python's headers are missing .*run `"):
        runtime.check_environment()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (
            "ImportError('/opt/conda/lib/libstdc++.so.6: version `GLIBCXX_3.4.30\\' not found')",
            "conda install",
        ),
        ("RuntimeError('Download File failed, url: https://example.org')", "jittor-offline"),
        ("OSError(28, 'No space left on device')", "free some space"),
        ("OSError('libcudart.so: cannot open shared object file')", "nvcc_path="),
        ("RuntimeError('x.cc:3:10: fatal error: Python.h: No such file')", "headers|python3-dev"),
        ("PermissionError(13, 'Permission denied')", "chmod 1777 /dev/shm"),
        ("PermissionError(13, 'Permission denied', '/a/file')", "/a/file.*; `jlora doctor`"),
        ("ValueError('something new')", "something new; `jlora doctor`"),
    ],
)
def test_failing_import_says_the_cause_and_the_way_out(stand_in, failure: str, expected: str):
    import re

    result = run(IMPORT, stand_in(every_import=f"raise {failure}"))
    assert result.returncode == 2
    assert result.stderr.startswith("jlora: error: Jittor cannot be imported: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(expected, result.stderr)


# --- the machine ----------------------------------------------------------------------------


def test_processors_respect_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(machine.cgroup, "processor_quota", lambda: None)
    monkeypatch.setattr(machine, "_physical_cores", lambda: 16)
    assert machine.processors() == 4
    monkeypatch.setattr(machine, "_physical_cores", lambda: 8)  # two threads a core
    assert machine.processors() == 2
    monkeypatch.setattr(machine.cgroup, "processor_quota", lambda: 1)
    assert machine.processors() == 1


def test_install_command_names_the_package_manager(monkeypatch):
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    which = {"dnf": "/usr/bin/dnf"}
    monkeypatch.setattr(machine.shutil, "which", lambda name, path=None: which.get(name))
    assert machine.install_command("compiler") == "sudo dnf install -y gcc-c++"
    which["apt-get"] = "/usr/bin/apt-get"
    assert "apt-get install -y g++" in machine.install_command("compiler")
    which.clear()
    assert machine.install_command("compiler") is None
