"""Injects faults into a small training run and checks that nothing is lost.

    python -m tests.faults --kills 300

One process imports Jittor and forks a child for each trial, which trains a tiny model in a folder
of its own and is killed, runs out of disk, may not write any more, or finds its files damaged.
Then another child resumes. What it leaves must be the uninterrupted run's, bit for bit.

The faults are put where they hurt by `Faults`, which stands between the child and the functions
that change files: their calls are counted, and the trial says at which one to strike, before it,
after it, or with half of the bytes written.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

STEPS = 12
DONE, REFUSED, BROKEN = 0, 2, 3  # exit codes of a child; a killed one has -9


# --- the training ---


def train_once(run: Path, on_step: Callable[[int], None] = lambda step: None) -> None:
    """Train the tiny model in ``run``, or resume the run in it, as `jlora run` does."""
    from jlora.adapters import LoraConfig, get_peft_model
    from jlora.data.batches import TokenExample
    from jlora.system.files import recover_directory
    from jlora.system.lock import lock_run
    from jlora.system.runtime import set_seed
    from jlora.training.adamw import OptimConfig
    from jlora.training.checkpoint import has_checkpoint
    from jlora.training.loop import TrainConfig, train
    from tests.tiny_models import tiny_gpt2

    class Watch:
        def log(self, record) -> None:
            on_step(record["step"])

        def close(self) -> None:
            pass

    with lock_run(run):
        set_seed(7)
        targets = LoraConfig(r=2, lora_alpha=8, lora_dropout=0.1, target_modules=["c_attn"])
        model = get_peft_model(tiny_gpt2(), targets)
        examples = [TokenExample([i % 20 + 1, i % 7 + 1, 3, 5, 5, 5], 3) for i in range(20)]
        config = TrainConfig(
            batch_size=2, steps=STEPS, log_every=1, valid_every=3, save_every=2,
            optim=OptimConfig(lr=1e-2, warmup_steps=2),
        )  # fmt: skip
        for name in ("adapter", "best"):
            recover_directory(run / name)
        resume = has_checkpoint(run)
        train(model, examples, examples[:4], config, run, lambda *_: [Watch()], resume)


def outcome(run: Path) -> dict[str, object]:
    """The results by which finished runs are compared: all tensors, the state, and all losses."""
    from jlora.training.checkpoint import newest, read_checkpoint
    from jlora.training.loggers import read_metrics

    progress, adapter, optimizer = read_checkpoint(newest(run))
    rows = read_metrics(run / "metrics.jsonl")
    return {
        "files": {
            f"{name}/{file.name}": file.read_bytes()
            for name in ("adapter", "best")
            for file in sorted((run / name).iterdir())
        },
        "tensors": {
            f"{kind} {name}": array.tobytes()
            for kind, tensors in (("adapter", adapter), ("optimizer", optimizer))
            for name, array in tensors.items()
        },
        "progress": (progress.step, progress.best_step, progress.best_valid_loss),
        "losses": [(r["step"], r.get("loss"), r.get("valid_loss"), r.get("lr")) for r in rows],
    }


def leftovers(run: Path) -> list[str]:
    """Names of files that a run should not leave behind."""
    known = {"metrics.jsonl", "checkpoint", "checkpoint.previous", "checkpoint.damaged", "adapter"}
    return sorted({path.name for path in run.iterdir()} - known - {"best"})


# --- the faults ---


class Faults:
    """Counts the calls that change files, and strikes at one of them.

    Args:
        at: number of the call, from 1; 0 strikes nowhere.
        how: "before" or "after" it, or "half": half of the bytes have been written.
        what: "kill", or the errno that it fails with from then on, such as ENOSPC.
    """

    def __init__(self, at: int = 0, how: str = "before", what: str | int = "kill"):
        self.at, self.how, self.what = at, how, what
        self.calls, self.names = 0, []

    def strike(self) -> None:
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        raise OSError(self.what, os.strerror(self.what))

    def call(self, name: str, function: Callable, half: Callable | None = None):
        """Call ``function``, or inject the fault; ``half`` does half of the call."""
        self.calls += 1
        self.names.append(name)
        if self.calls == self.at or (self.calls > self.at > 0 and self.what != "kill"):
            if half is not None and self.how == "half":
                half()
                self.strike()
            if self.how != "after" or self.what != "kill":
                self.strike()
            function()
            self.strike()
        return function()

    @contextlib.contextmanager
    def installed(self) -> Iterator[Faults]:
        """A context in which this process's file operations go through here."""
        import safetensors.numpy

        from jlora.training.loggers.metrics import MetricsLogger

        real = {name: getattr(os, name) for name in NAMES}
        real_text, real_save = Path.write_text, safetensors.numpy.save_file
        real_log = MetricsLogger.log

        def patched(name: str) -> Callable:
            if self.what == errno.ENOSPC and name in ("unlink", "rmdir"):  # a full disk lets these
                return real[name]
            return lambda *args, **kwargs: self.call(name, lambda: real[name](*args, **kwargs))

        def write_text(path, text, *args, **kwargs):
            def half():
                real_text(path, text[: len(text) // 2], *args, **kwargs)

            return self.call("write", lambda: real_text(path, text, *args, **kwargs), half)

        def save_file(tensors, path, *args, **kwargs):
            def half():
                real_save(tensors, path, *args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)

            return self.call("save", lambda: real_save(tensors, path, *args, **kwargs), half)

        def log(logger, record):
            if isinstance(self.what, int):
                logger._handle = FullFile(self, logger._handle)
                try:
                    return real_log(logger, record)
                finally:
                    logger._handle = logger._handle.raw

            def half():
                logger._handle.write(json.dumps(record).encode()[:20])

            return self.call("log", lambda: real_log(logger, record), half)

        for name in NAMES:
            setattr(os, name, patched(name))
        Path.write_text, safetensors.numpy.save_file, MetricsLogger.log = write_text, save_file, log
        try:
            yield self
        finally:
            for name in NAMES:
                setattr(os, name, real[name])
            Path.write_text, safetensors.numpy.save_file = real_text, real_save
            MetricsLogger.log = real_log


NAMES = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")


class FullFile:
    """A file on which a write may stop half-way, as on a disk that fills up."""

    def __init__(self, faults: Faults, raw):
        self.faults, self.raw = faults, raw

    def write(self, data: bytes) -> int:
        def half():
            self.raw.write(data[: len(data) // 2])

        return self.faults.call("log", lambda: self.raw.write(data), half)

    def __getattr__(self, name: str):
        return getattr(self.raw, name)


def damage(path: Path, generator: random.Random) -> str:
    """Damage a file in one of five ways; returns the name of the way."""
    data = bytearray(path.read_bytes())
    ways = ["truncated", "bit flipped", "emptied", "zeroed", "removed"]
    way = generator.choice(ways if data else ["removed"])
    if way == "truncated":
        del data[generator.randrange(len(data)) :]
    elif way == "bit flipped":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    elif way == "emptied":
        data.clear()
    elif way == "zeroed":
        start = generator.randrange(len(data))
        end = min(len(data), start + 512)
        if not any(data[start:end]):
            data[start] ^= 1
        else:
            data[start:end] = bytes(end - start)
    if way == "removed":
        path.unlink()
    else:
        path.write_bytes(data)
    return way


# --- children ---


class Child:
    """A forked process that trains; its words come through a pipe, which no full disk closes."""

    def __init__(self, run: Path, prepare: Callable[[], object] = lambda: None, **faults):
        sys.stdout.flush()
        sys.stderr.flush()
        self.pipe, said = os.pipe()
        self.said = b""
        self.pid = os.fork()
        if not self.pid:
            code = BROKEN
            try:  # whatever happens, this process must not go on with its parent's work
                os.dup2(said, 1)
                os.dup2(said, 2)
                code = self._work(run, prepare, faults)
            finally:
                os._exit(code)
        os.close(said)

    def _work(self, run: Path, prepare: Callable, faults: dict) -> int:
        from jlora.system.errors import UserError

        try:
            prepare()
            with Faults(**faults).installed():
                train_once(run)
        except UserError as error:
            os.write(2, f"jlora: error: {error}\n".encode())
            return REFUSED
        except BaseException:
            os.write(2, traceback.format_exc()[-30_000:].encode())
            return BROKEN
        return DONE

    def wait(self, cpu_seconds: float = 60, stop: bool = False) -> int | None:
        """The exit code, or -9 if the process is killed after that much processor time.

        With ``stop`` it is stopped then, not killed; None.
        """
        # The clock of its own processor time, so that a busy machine does not move the moment.
        clock = (~self.pid << 3) | 2
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.clock_gettime(clock) > cpu_seconds:
                os.kill(self.pid, signal.SIGSTOP if stop else signal.SIGKILL)
                if stop:
                    return None
                cpu_seconds = float("inf")
            time.sleep(0.0005)

    def words(self) -> str:
        """The output of the process after its end."""
        if self.pipe is not None:
            with open(self.pipe, "rb") as pipe:
                self.said = pipe.read()
            self.pipe = None
        return self.said.decode(errors="replace")

    def __del__(self):
        if self.pipe is not None:
            os.close(self.pipe)


class Lost(Exception):
    """A trial in which something was lost."""


class Trials:
    """Runs trials and keeps the tally.

    Args:
        folder: scratch.
        seed: of every choice.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.generator = folder, random.Random(seed)
        self.number, self.tally, self.losses = 0, Counter(), []
        # Here, not in a child, so that every child finds Jittor's operators loaded.
        train_once(folder / "whole")
        self.expected = outcome(folder / "whole")
        start = time.process_time()
        with Faults().installed() as faults:
            train_once(folder / "counted")
        self.seconds = time.process_time() - start
        self.calls = faults.names
        child = Child(folder / "child")
        if child.wait() != DONE:
            raise SystemExit(f"a forked run fails: {child.words()}")
        for name in ("counted", "child"):
            if outcome(folder / name) != self.expected:
                raise SystemExit("two uninterrupted runs differ, so nothing can be compared")

    def trial(self, kind: str, work: Callable[[Path], str]) -> None:
        """Do one trial in a new folder; ``work`` returns the result, or raises `Lost`."""
        self.number += 1
        run = self.folder / f"{self.number}"
        try:
            result = work(run)
        except Lost as error:
            result = "LOST"
            self.losses.append(f"trial {self.number}, {kind}: {error}")
        self.tally[kind, result] += 1
        if result != "LOST":
            shutil.rmtree(run, ignore_errors=True)

    def finish(self, run: Path) -> str:
        """Resume to the end; the results must equal those of the uninterrupted run."""
        child = Child(run)
        code = child.wait()
        if code != DONE:
            raise Lost(f"the resumed run ended with {code}: {child.words()}")
        found = outcome(run)
        for key, value in self.expected.items():
            if found[key] != value:
                raise Lost(f"other {key} than the uninterrupted run: {child.words()}")
        if leftovers(run):
            raise Lost(f"left behind: {leftovers(run)}")
        return child.words()

    # The trials.

    def kill_at(self, at: int, how: str, again: int = 0) -> None:
        """Kill the run at a call, and the resumed run ``again`` times at other calls."""

        def work(run: Path) -> str:
            child = Child(run, at=at, how=how)
            code = child.wait()
            if code not in (-9, DONE):  # "after" the last call there may be nothing left
                raise Lost(f"ended with {code}: {child.words()}")
            for _ in range(again):
                at_call = self.generator.randint(1, len(self.calls))
                child = Child(run, at=at_call, how=self.generator.choice(["before", "half"]))
                if child.wait() not in (-9, DONE):
                    raise Lost(f"the resumed one failed: {child.words()}")
            self.finish(run)
            return "same result"

        self.trial(f"killed in a write, {again + 1}x" if again else "killed in a write", work)

    def kill_later(self) -> None:
        """Kill the run at a random moment, from outside."""

        def work(run: Path) -> str:
            Child(run).wait(self.generator.uniform(0.0, 1.2 * self.seconds))
            self.finish(run)
            return "same result"

        self.trial("killed at any moment", work)

    def fail_at(self, at: int, how: str, what: int) -> None:
        """From one call on everything that writes fails; later writing works again."""

        def work(run: Path) -> str:
            child = Child(run, at=at, how=how, what=what)
            code = child.wait()
            if code not in (REFUSED, DONE):
                raise Lost(f"ended with {code}: {child.words()}")
            if code == REFUSED and os.strerror(what) not in child.words():
                raise Lost(f"does not say why: {child.words()}")
            self.finish(run)
            return "same result"

        self.trial(f"every write fails: {os.strerror(what)}", work)

    def small_disk(self, mount: Callable, kilobytes: int) -> None:
        """A disk of some kilobytes, which is then made larger."""

        def work(run: Path) -> str:
            with mount(run, kilobytes) as enlarge:
                child = Child(run)
                code = child.wait()
                full = "No space left on device"
                if code == REFUSED and full not in child.words() or code not in (DONE, REFUSED):
                    raise Lost(f"ended with {code}: {child.words()}")
                enlarge()
                self.finish(run)
            return "same result"

        self.trial("a tmpfs that is full", work)

    def take_permission(self) -> None:
        """The run's files become read-only during the run; later they can be written again."""

        def nobody() -> None:
            if os.geteuid() == 0:  # root may write anything
                os.setuid(65534)

        def permit(run: Path, folder: int, file: int) -> None:
            for path in [run, *run.rglob("*")]:
                with contextlib.suppress(FileNotFoundError):  # a temporary file
                    path.chmod(folder if path.is_dir() else file)

        def work(run: Path) -> str:
            run.mkdir()
            run.chmod(0o777)
            child = Child(run, prepare=nobody)
            code = child.wait(self.generator.uniform(0.1, 0.9) * self.seconds, stop=True)
            if code is None:
                permit(run, 0o555, 0o444)
                os.kill(child.pid, signal.SIGCONT)
                code = child.wait()
            if code not in (DONE, REFUSED) or code == REFUSED and "denied" not in child.words():
                raise Lost(f"ended with {code}: {child.words()}")
            permit(run, 0o777, 0o666)
            self.finish(run)
            return "same result"

        self.trial("made read-only", work)

    def size_limit(self, size: int) -> None:
        """No file may be longer than ``size`` bytes, as with a quota."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        def work(run: Path) -> str:
            child = Child(run, prepare=limit)
            code = child.wait()
            if code not in (DONE, REFUSED):
                raise Lost(f"ended with {code}: {child.words()}")
            self.finish(run)
            return "same result"

        self.trial("a limit on file sizes", work)

    def damage_one(self, both: bool = False) -> None:
        """Kill the run, damage a file of the newest checkpoint (or of both), and resume."""

        def work(run: Path) -> str:
            from jlora.training.checkpoint import newest, previous

            saves = [i + 1 for i, name in enumerate(self.calls) if name == "log"]
            late = self.generator.choice(saves[len(saves) // 2 :])
            Child(run, at=late).wait()
            kinds = []
            for folder in (newest(run), previous(run))[: 1 + both]:
                file = self.generator.choice(sorted(folder.iterdir()))
                kinds.append(damage(file, self.generator))
            names = [str(newest(run)), str(previous(run))]
            if both:
                child = Child(run)
                code = child.wait()
                if code != REFUSED or not all(name in child.words() for name in names):
                    raise Lost(f"ended with {code}: {child.words()}")
                return "refused, both named"
            words = self.finish(run)
            if not all(name in words for name in names):
                raise Lost(f"the damaged ({kinds[0]}) and the good one are not named: {words}")
            return "same result, both named"

        self.trial("both checkpoints damaged" if both else "newest checkpoint damaged", work)

    def damage_adapter(self) -> None:
        """Kill the run, damage the adapter that it wrote, and resume."""

        def work(run: Path) -> str:
            saves = [i + 1 for i, name in enumerate(self.calls) if name == "log"]
            Child(run, at=self.generator.choice(saves[len(saves) // 2 :])).wait()
            damage(self.generator.choice(sorted((run / "adapter").iterdir())), self.generator)
            self.finish(run)
            return "same result"

        self.trial("adapter/ damaged", work)


# --- small disks ---


@contextlib.contextmanager
def tmpfs(folder: Path, kilobytes: int) -> Iterator[Callable[[], None]]:
    """Mount a tmpfs of that size; yields a function that makes it large and writable.

    Raises:
        subprocess.CalledProcessError: it cannot be mounted here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={kilobytes}k"
    mount = ["mount", "-t", "tmpfs", "-o", options, "jlora-faults", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        larger = ["mount", "-o", "remount,rw,size=16m", str(folder)]
        yield lambda: subprocess.run(larger, check=True, capture_output=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    try:
        with tmpfs(folder / "probe", 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# --- the command ---


def run_trials(trials: Trials, kills: int, others: bool) -> None:
    """``kills`` kills, half of them during a write, and optionally all other faults."""
    choose = trials.generator
    calls = len(trials.calls)
    written = [i + 1 for i, name in enumerate(trials.calls) if name in ("write", "save", "log")]
    every = [(at, "before") for at in range(1, calls + 1)] + [(at, "half") for at in written]
    choose.shuffle(every)
    exact = kills * 2 // 3
    for number in range(exact):
        at, how = every[number % len(every)]
        trials.kill_at(at, how, again=1 if number % 10 == 9 else 0)
    for _ in range(kills - exact):
        trials.kill_later()
    if not others:
        return
    for number in range(kills // 3):
        what = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)[number % 4]
        trials.fail_at(choose.randint(1, calls), choose.choice(["before", "half"]), what)
    for _ in range(kills // 6):
        trials.damage_one()
        trials.size_limit(choose.randint(64, 6000))
    for _ in range(kills // 15):
        trials.damage_one(both=True)
        trials.damage_adapter()
        trials.take_permission()
    if can_mount(trials.folder):
        for _ in range(kills // 15):
            trials.small_disk(tmpfs, choose.randrange(8, 160, 4))
    else:
        print("no tmpfs can be mounted here: the trials with one are left out")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only-kills", action="store_true", help="leave the other faults out")
    options = parser.parse_args(arguments)
    # A process that is forked from one with OpenMP's threads would wait for them forever.
    os.environ["OMP_NUM_THREADS"] = "1"
    import jlora.training.loop  # noqa: F401  (imports Jittor, once for all children)

    np.seterr(all="ignore")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jlora-faults-") as folder:
        Path(folder).chmod(0o755)
        trials = Trials(Path(folder), options.seed)
        print(
            f"an uninterrupted run: {STEPS} steps, {trials.seconds:.2f} s of computing, "
            f"{len(trials.calls)} calls that change files",
            flush=True,
        )
        run_trials(trials, options.kills, not options.only_kills)
    print(f"{'fault':45} {'trials':>6}  what came of it")
    for (kind, result), count in sorted(trials.tally.items()):
        print(f"{kind:45} {count:6}  {result}")
    for loss in trials.losses:
        print(loss)
    total = sum(trials.tally.values())
    print(
        f"{total} trials in {time.monotonic() - start:.0f} s, seed {options.seed}: "
        f"{len(trials.losses)} lost"
    )
    return 1 if trials.losses else 0


if __name__ == "__main__":
    sys.exit(main())
