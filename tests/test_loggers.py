from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest

from jlora.system.errors import UserError
from jlora.training.loggers import (
    Loggers,
    MetricsLogger,
    ProgressLogger,
    read_metrics,
    training_seconds,
    truncate_metrics,
)


def record(step, **values):
    return {"step": step, "loss": 4.0 / step, "lr": 1e-3, "tokens_per_s": 900.5, **values}


def test_records_are_on_disk_at_once_and_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    logger = MetricsLogger(path)
    written = [record(step, loss=math.pi / step) for step in (1, 2, 3)]
    for number, one in enumerate(written, start=1):
        logger.log(one)
        assert len(path.read_bytes().splitlines()) == number  # not only after close
    logger.close()
    assert read_metrics(path) == written


def test_numpy_values_and_values_outside_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = MetricsLogger(path)
    logger.log({"step": np.int64(1), "loss": np.float32(0.5), "lr": float("nan"), "x": math.inf})
    logger.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = path.read_text()
    expected = {"step": 1, "loss": 0.5, "lr": None, "x": None}
    assert json.loads(line, parse_constant=refuse) == expected
    assert read_metrics(path)[0]["loss"] == 0.5


def test_new_logger_starts_empty_and_resumed_one_continues_without_doubles(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = MetricsLogger(path)
    for step in range(1, 8):
        logger.log(record(step))
        if step % 2 == 0:
            logger.log({"step": step, "valid_loss": 1.0})
    logger.close()
    before = path.read_bytes().splitlines()

    resumed = MetricsLogger(path, resume_step=4)  # the last checkpoint was of step 4
    assert path.read_bytes().splitlines() == before[:6]  # 4 steps, 2 validations
    resumed.log(record(5))
    resumed.close()
    assert [one["step"] for one in read_metrics(path)] == [1, 2, 2, 3, 4, 4, 5]

    MetricsLogger(path).close()
    assert read_metrics(path) == []


def test_resume_without_a_file_starts_one(tmp_path):
    MetricsLogger(tmp_path / "metrics.jsonl", resume_step=9).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("tear", [b'{"step": 3, "lo', b'{"step": 3, "x": "\xc3', b"\0\0\0", b"{"])
def test_a_torn_last_line_is_dropped_and_never_glued_to_the_next(tmp_path, tear):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tear)
    assert [one["step"] for one in read_metrics(path)] == [1, 2]
    resumed = MetricsLogger(path, resume_step=2)
    resumed.log({"step": 3})
    resumed.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_complete_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    truncate_metrics(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"step": 2, "lo', "is not JSON"),
        (b'{"step": 2, "x": "\xff"}', "is not JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b'{"loss": 1.0}', "no whole number `step`"),
        (b'{"step": true}', "no whole number `step`"),
        (b'{"step": 2, "loss": "low"}', "no number in `loss`"),
    ],
)
def test_a_damaged_line_elsewhere_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(content)
    for read in (read_metrics, lambda p: truncate_metrics(p, 1)):
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert f"{path}:2: " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_missing_file_and_unwritable_folder_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        MetricsLogger(tmp_path / "file" / "metrics.jsonl")


def test_full_disk_is_a_user_error_and_leaves_no_half_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = MetricsLogger(path)
    logger.log({"step": 1})
    handle = logger._handle

    class FullDisk:
        def write(self, data):
            return handle.write(data[:5])

        def __getattr__(self, name):
            return getattr(handle, name)

    logger._handle = FullDisk()
    with pytest.raises(UserError, match="No space left"):
        Loggers([logger]).log({"step": 2})
    logger.close()
    assert path.read_bytes() == b'{"step": 1}\n'


class Recorder:
    def __init__(self, fail_at=None):
        self.steps, self.fail_at, self.closed = [], fail_at, 0

    def log(self, one):
        if one["step"] == self.fail_at:
            raise ConnectionError("the network\nis gone")
        self.steps.append(one["step"])

    def close(self):
        self.closed += 1


def test_a_failing_logger_warns_once_and_is_off(capsys):
    good, bad = Recorder(), Recorder(fail_at=2)
    with Loggers([bad, good]) as both:
        for step in range(1, 5):
            both.log({"step": step})
    assert good.steps == [1, 2, 3, 4] and good.closed == 1
    assert bad.steps == [1] and bad.closed == 0
    err = capsys.readouterr().err
    assert err.count("jlora: warning:") == 1 and len(err.splitlines()) == 1
    assert "Recorder" in err and "the network is gone" in err


def test_every_logger_is_closed_and_ctrl_c_passes(capsys):
    class Stuck(Recorder):
        def close(self):
            raise RuntimeError("stuck")

        def log(self, one):
            raise KeyboardInterrupt

    last = Recorder()
    both = Loggers([Stuck(), last])
    with pytest.raises(KeyboardInterrupt):
        both.log({"step": 1})
    both.close()
    assert last.closed == 1
    assert "stuck" in capsys.readouterr().err
    both.close()
    assert last.closed == 1  # closing twice is harmless


def test_progress_bar_shows_step_loss_speed_and_time_left():
    stream = io.StringIO()
    bar = ProgressLogger(total_steps=10, start_step=4, stream=stream)
    for step in range(5, 11):
        bar.log(record(step, loss=1.2345))
    bar.log({"step": 10, "valid_loss": 1.3})
    bar.close()
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("10/10 |") and "00:00 left" in last
    assert "loss=1.234" in last or "loss=1.235" in last
    assert "tok/s=900" in last or "tok/s=901" in last
    assert "valid=1.3000" in last
    # No terminal: a log file is not filled with moving bars.
    assert stream.getvalue().count("\r") <= 4


def test_training_seconds_adds_up_restarted_clocks():
    assert training_seconds([{"step": 1}]) is None
    assert training_seconds([{"seconds": 1.0}, {"valid_loss": 1}, {"seconds": 5.0}]) == 5.0
    assert training_seconds([{"seconds": 5.0}, {"seconds": 2.0}, {"seconds": 3.0}]) == 8.0
