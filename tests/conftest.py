from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import traceback
from pathlib import Path

import pytest
from hypothesis import settings

# The same cases on each run, so that no test fails by chance; `--hypothesis-profile=default` draws
# new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# A shell that starts the tests in the background lets them ignore Ctrl-C, and the processes that
# they start inherit that; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Let go of what a failed test had open.

    Its traceback would keep files, pipes and processes alive until some later test, which would
    then fail with their ResourceWarning; now it is an error of the test that left them open.
    """
    yield
    if call.excinfo is not None and not item.config.option.usepdb:
        for frame, _ in traceback.walk_tb(call.excinfo.tb):
            with contextlib.suppress(RuntimeError):  # still running: pytest's own
                frame.clear()
                _ = frame.f_locals  # a copy of them, which pytest has made, is cleared by this


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(condition, reason): see needs.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        condition, reason = mark.args
        if not condition():
            pytest.skip(reason)


# The first worker compiles the library of operators, the second meanwhile what does not need it.
# Then come tests without operators: whoever is done with them first compiles those.
FIRST = ["test_structs", "test_gpu", "test_metrics", "test_runtime"]


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        starts = (i for i, start in enumerate(FIRST) if item.path.name.startswith(start))
        return next(starts, len(FIRST))

    items.sort(key=place)


@pytest.fixture
def popen():
    """`subprocess.Popen`; the process and its pipes end with the test, whatever happens."""
    with contextlib.ExitStack() as started:

        def start(*arguments, **options) -> subprocess.Popen:
            process = started.enter_context(subprocess.Popen(*arguments, **options))
            started.callback(process.kill)  # called before the pipes are closed
            return process

        yield start


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of development data: $JLORA_DATA or ../shared/data; tests skip without it."""
    candidates = [Path(__file__).resolve().parents[2] / "shared" / "data"]
    if os.environ.get("JLORA_DATA"):
        candidates.insert(0, Path(os.environ["JLORA_DATA"]))
    for folder in candidates:
        if (folder / "e2e" / "test.txt").is_file():
            return folder
    pytest.skip("development data not found: set JLORA_DATA or put it in ../shared/data")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a tiny GPT-2; not to be changed."""
    import tiny

    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_run(tiny_model, tmp_path_factory) -> Path:
    """Run folder of a few steps of `jlora finetune` on the built-in corpus; not to be changed."""
    from jlora.cli import main

    run = tmp_path_factory.mktemp("tiny_run") / "run"
    code = main(
        f"finetune --model {tiny_model} --task restaurants --rank 2 --target-modules c_attn "
        "--lr 1e-2 --batch-size 4 --steps 6 --precision plain --set data.train_limit=40 "
        f"--set data.valid_stride=50 --set train.valid_every=3 --out {run}".split()
    )
    assert code == 0
    return run
