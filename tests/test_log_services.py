"""Weights & Biases, TensorBoard and SwanLab: stand-ins for all, the real ones where installed."""

from __future__ import annotations

import importlib.util
import math
import signal
import sys
import time
import types

import numpy as np
import pytest

from jlora.system.errors import UserError
from jlora.training.loggers import LOGGERS, Loggers, check_loggers, make_logger

SETTINGS = {"recipe": "model: m\nlora:\n  r: 4\n"}
RECORDS = (
    {"step": 5, "loss": np.float32(2.5), "lr": 1e-3},
    {"step": 6, "loss": math.nan, "lr": 5e-4, "note": "text"},
    {"step": 6, "valid_loss": 2.25},
)


class Recorder:
    """A logger that keeps what it gets."""

    def __init__(self):
        self.records, self.closed = [], 0

    def log(self, record):
        self.records.append(record)

    def close(self):
        self.closed += 1


class FakeService(types.ModuleType):
    """Stands in for wandb or swanlab: a module and its run in one, which fails where told to."""

    def __init__(self, name, failing=None, error=None):
        super().__init__(name)
        self.failing, self.error = failing, error
        self.started, self.logged, self.finished = [], [], 0

    def fail_at(self, place):
        if place == self.failing:
            raise self.error

    def init(self, **settings):
        self.fail_at("init")
        self.started.append(settings)
        return self

    def log(self, values, step):
        self.fail_at("log")
        self.logged.append((step, values))

    def finish(self):
        self.fail_at("finish")
        self.finished += 1


@pytest.fixture(autouse=True)
def no_service_variables(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "SWANLAB_MODE"):
        monkeypatch.delenv(name, raising=False)


def fake(monkeypatch, name, **settings):
    service = FakeService(name, **settings)
    monkeypatch.setitem(sys.modules, name, service)
    return service


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_service_starts_offline_with_the_first_record(monkeypatch, tmp_path, name):
    service = fake(monkeypatch, name)
    logger = make_logger(name, "my-run", SETTINGS, tmp_path)
    assert service.started == []
    for record in RECORDS:
        logger.log(record)
    logger.close()
    (started,) = service.started
    assert started["mode"] == "offline" and started["project"] == "jlora"
    assert started["config"] == SETTINGS and "my-run" in started.values()
    assert any(str(value).startswith(str(tmp_path)) for value in started.values())
    # Only finite numbers are sent.
    assert service.logged == [
        (5, {"loss": 2.5, "lr": 1e-3}), (6, {"lr": 5e-4}), (6, {"valid_loss": 2.25}),
    ]  # fmt: skip
    assert service.finished == 1
    logger.close()
    assert service.finished == 1


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_the_services_own_variables_are_heard(monkeypatch, tmp_path, name):
    service = fake(monkeypatch, name)
    monkeypatch.setenv(f"{name.upper()}_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    make_logger(name, "run", {}, tmp_path).log({"step": 1, "loss": 1.0})
    assert service.started[0]["mode"] == "online"
    assert service.started[0]["project"] == ("mine" if name == "wandb" else "jlora")


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
@pytest.mark.parametrize("place", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [ConnectionError("no network"), SystemExit(1)], ids=repr)
def test_a_service_that_fails_does_not_stop_training(
    monkeypatch, tmp_path, capsys, name, place, error
):
    fake(monkeypatch, name, failing=place, error=error)
    other = Recorder()
    with Loggers([make_logger(name, "run", {}, tmp_path), other]) as both:
        both.log({"step": 1, "loss": 1.0})
        both.log({"step": 2, "loss": 1.0})
    assert [record["step"] for record in other.records] == [1, 2] and other.closed == 1
    (line,) = capsys.readouterr().err.splitlines()  # once
    assert line.startswith("jlora: warning: ") and type(error).__name__ in line


@pytest.mark.parametrize("name", LOGGERS)
def test_a_package_that_is_there_but_broken_does_not_stop_training(
    monkeypatch, tmp_path, capsys, name
):
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise OSError('libmissing.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    other = Recorder()
    with Loggers([make_logger(name, "run", {}, tmp_path), other]) as both:
        both.log({"step": 1, "loss": 1.0})
    assert len(other.records) == 1
    assert "libmissing.so" in capsys.readouterr().err


@pytest.mark.parametrize("name", LOGGERS)
def test_an_absent_package_is_an_error_that_names_the_extra(monkeypatch, tmp_path, name):
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (lambda: check_loggers([name]), lambda: make_logger(name, "run", {}, tmp_path)):
        with pytest.raises(UserError, match=rf"pip install 'jlora\[{name}\]'"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_services_files_is_not_its_package(monkeypatch, tmp_path):
    """wandb leaves a folder `wandb` where it runs, which Python would import as a namespace."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="wandb is not installed"):
        check_loggers(["wandb"])


def test_an_unknown_logger_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="no logger 'tensorbord'; there is tensorboard$"):
        make_logger("tensorbord", "run", {}, tmp_path)


def test_ctrl_c_stays_with_training(monkeypatch, tmp_path):
    """SwanLab takes SIGINT when it starts and gives back, at its end, what it found."""
    service = fake(monkeypatch, "swanlab")
    monkeypatch.setattr(service, "init", lambda **settings: signal.signal(signal.SIGINT, ours[1]))
    monkeypatch.setattr(service, "finish", lambda: signal.signal(signal.SIGINT, ours[1]))
    ours = [lambda number, frame: None, lambda number, frame: None]
    before = signal.signal(signal.SIGINT, ours[0])
    try:
        logger = make_logger("swanlab", "run", {}, tmp_path)
        logger.log({"step": 1})
        assert signal.getsignal(signal.SIGINT) is ours[0]
        logger.close()
        assert signal.getsignal(signal.SIGINT) is ours[0]
    finally:
        signal.signal(signal.SIGINT, before)


# The real packages -------------------------------------------------------------------------------


def run_logger(name, folder, start_step=4, records=RECORDS):
    logger = make_logger(name, "my-run", SETTINGS, folder, start_step)
    for record in records:
        logger.log(record)
    logger.close()


def test_tensorboard_reads_its_files_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lost = ({"step": 4, "loss": 3.0}, {"step": 5, "loss": 99.0}, {"step": 9, "loss": 99.0})
    run_logger("tensorboard", tmp_path, 0, lost)  # killed after its last checkpoint, of step 4
    run_logger("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()

    def points(tag):
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert points("loss") == [(4, 3.0), (5, 2.5)]
    assert points("lr") == [(5, pytest.approx(1e-3)), (6, pytest.approx(5e-4))]
    assert points("valid_loss") == [(6, 2.25)]
    (text,) = events.Tensors("recipe")[-1].tensor_proto.string_val
    assert "  r: 4" in text.decode()


def test_wandb_writes_an_offline_run(tmp_path):
    pytest.importorskip("wandb")
    run_logger("wandb", tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(200):  # wandb's own process writes on for a moment
        if b"valid_loss" in run.read_bytes():
            break
        time.sleep(0.1)
    assert b"valid_loss" in run.read_bytes()


def test_swanlab_writes_an_offline_run(tmp_path):
    pytest.importorskip("swanlab")
    before = signal.getsignal(signal.SIGINT)
    run_logger("swanlab", tmp_path)
    assert signal.getsignal(signal.SIGINT) == before
    files = [path for path in (tmp_path / "swanlog").rglob("*") if path.is_file()]
    assert any(b"valid_loss" in path.read_bytes() for path in files)
