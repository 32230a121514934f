"""Services that show training records: Weights & Biases, TensorBoard, SwanLab.

Each is an extra of jlora, imported at the first record. A package that is not installed is an error
before training starts; `Loggers` handles all later failures (a broken import, a refused key, a lost
network). Nothing is sent from the machine unless the service's own environment variable requests
it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from jlora.system.errors import UserError
from jlora.training.loggers.base import plain


class ServiceLogger(ABC):
    """Sends records to a service, which is opened at the first record.

    Args:
        run_name: name of the run.
        config: settings that the service shows with the run.
        folder: the run folder; the service keeps its files in it.
        start_step: steps done before a resume.

    Raises:
        UserError: the package is not installed.
    """

    #: The package, and the extra of jlora that installs it.
    package: ClassVar[str]

    def __init__(
        self, run_name: str, config: Mapping[str, Any], folder: str | Path, start_step: int = 0
    ) -> None:
        self.check_installed()
        self.run_name, self.config, self.folder = run_name, dict(config), Path(folder)
        self.start_step = start_step
        self._run: Any = None

    @classmethod
    def check_installed(cls) -> None:
        """Raises: UserError: the package is not installed."""
        if not _is_installed(cls.package):
            raise UserError(
                f"log: {cls.package} is not installed; run `pip install 'jlora[{cls.package}]'` "
                f"or leave {cls.package} out"
            )

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the finite numbers of ``record``."""
        values = {key: plain(value) for key, value in record.items() if key != "step"}
        values = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        with _ctrl_c_kept():
            if self._run is None:
                self._run = self._open()
            if values:
                self._send(values, int(record["step"]))

    def close(self) -> None:
        """Finish the run if it was opened."""
        if self._run is not None:
            with _ctrl_c_kept():
                self._finish()
            self._run = None

    @abstractmethod
    def _open(self) -> Any:
        """Import the package and start the run."""

    @abstractmethod
    def _send(self, values: dict[str, float], step: int) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class WandbLogger(ServiceLogger):
    """Weights & Biases, below ``folder/wandb``.

    The run is stored offline and can be sent with ``wandb sync``; WANDB_MODE and WANDB_PROJECT
    change that.
    """

    package = "wandb"

    def _open(self) -> Any:
        import wandb

        return wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "jlora",
            name=self.run_name,
            config=self.config,
            dir=str(self.folder),
            mode=os.environ.get("WANDB_MODE") or "offline",
        )

    def _send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def _finish(self) -> None:
        self._run.finish()


class TensorBoardLogger(ServiceLogger):
    """TensorBoard's event files in ``folder/tensorboard``, by its own writer (no TensorFlow).

    A resumed run continues the same curves: TensorBoard is told to discard what the interrupted run
    wrote after ``start_step``.
    """

    package = "tensorboard"

    def _open(self) -> Any:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        writer = EventFileWriter(str(self.folder / "tensorboard"), flush_secs=10)
        if self.start_step:
            started = SessionLog(status=SessionLog.START)
            writer.add_event(_event(self.start_step + 1, session_log=started))
        for key, value in self.config.items():
            # A line that is indented by four spaces is shown unchanged in TensorBoard's Markdown.
            text = "\n".join("    " + line for line in str(value).splitlines())
            writer.add_event(_event(self.start_step, summary=text_pb(key, text)))
        return writer

    def _send(self, values: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._run.add_event(_event(step, summary=Summary(value=scalars)))

    def _finish(self) -> None:
        self._run.close()


def _event(step: int, **content: Any) -> Any:
    """An event of TensorBoard, now."""
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), step=step, **content)


class SwanLabLogger(ServiceLogger):
    """SwanLab, below ``folder/swanlog``.

    The run is stored offline and can be sent with ``swanlab sync``; SWANLAB_MODE changes that.
    """

    package = "swanlab"

    def _open(self) -> Any:
        import swanlab

        # Old and new versions have different argument names.
        swanlab.init(
            project="jlora",
            experiment_name=self.run_name,
            config=self.config,
            logdir=str(self.folder / "swanlog"),
            mode=os.environ.get("SWANLAB_MODE") or "offline",
        )
        return swanlab

    def _send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def _finish(self) -> None:
        self._run.finish()


#: The names that a recipe's ``log`` may have.
LOGGERS: dict[str, type[ServiceLogger]] = {
    "wandb": WandbLogger,
    "tensorboard": TensorBoardLogger,
    "swanlab": SwanLabLogger,
}


def check_loggers(names: Sequence[str]) -> None:
    """Check these loggers' names and packages, before anything is loaded.

    Raises:
        UserError: there is no such logger, or its package is not installed.
    """
    for name in names:
        _kind(name).check_installed()


def make_logger(
    name: str,
    run_name: str,
    config: Mapping[str, Any],
    folder: str | Path,
    start_step: int = 0,
) -> ServiceLogger:
    """The logger called ``name`` in `LOGGERS`; other arguments as for `ServiceLogger`.

    Raises:
        UserError: as `check_loggers`.
    """
    return _kind(name)(run_name, config, folder, start_step)


def _kind(name: str) -> type[ServiceLogger]:
    if name not in LOGGERS:
        near = difflib.get_close_matches(name, LOGGERS, n=1) or LOGGERS
        raise UserError(f"log: no logger {name!r}; there is {', '.join(near)}")
    return LOGGERS[name]


@contextlib.contextmanager
def _ctrl_c_kept() -> Iterator[None]:
    """Keep training's SIGINT handler, which saves; SwanLab would replace it when it starts."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) != handler:
            with contextlib.suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGINT, handler)


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    # A folder of that name on Python's path, such as one with wandb's files, is not the package.
    return spec is not None and spec.origin is not None
