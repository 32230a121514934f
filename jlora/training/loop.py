"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapters import TunedModel
from jlora.data.batches import Batch, BatchOrder, TokenExample, collate, shares, stream
from jlora.kernels.elementwise import rows_from
from jlora.models.attention import Stream
from jlora.system.distributed import World, world
from jlora.system.errors import UserError
from jlora.system.runtime import jt, release_memory, set_seed
from jlora.system.settings import check_least
from jlora.training.adamw import AdamW, OptimConfig, groups, learning_rate
from jlora.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from jlora.training.loggers import Loggers, MetricsLogger


@dataclass
class TrainConfig:
    """Settings of a training run; one step is one update of the adapter."""

    batch_size: int = 8  # of all processes together
    grad_accumulation: int = 1  # batches a step
    steps: int | None = None  # None: as many as `epochs` takes
    epochs: float = 5.0
    label_smoothing: float = 0.0
    max_length: int = 512  # most input tokens of an example
    group_by_length: bool = True  # rows of like length in a batch: little padding
    shuffle: bool = True
    seed: int = 110
    log_every: int = 10
    valid_every: int = 100  # steps; 0: only at the end
    valid_batch_size: int = 16
    save_every: int = 100
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        """Raises UserError for a value that makes no sense."""
        check_least(self, 1, "batch_size", "grad_accumulation", "max_length", "log_every",
                    "save_every", "valid_batch_size")  # fmt: skip
        check_least(self, 0, "seed", "valid_every")
        if self.steps is not None:
            check_least(self, 1, "steps")
        elif not 0 < self.epochs < math.inf:
            raise UserError(f"epochs must be above 0, not {self.epochs}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"label_smoothing must be at least 0 and below 1, not {self.label_smoothing}"
            )


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    progress: Progress
    total_steps: int
    interrupted: bool


def target_losses(model, batch: Batch, label_smoothing: float = 0.0) -> jt.Var:
    """Losses of the targets that count, (N,) float32, in the order of the batch's rows.

    The head is applied at those positions alone.
    """
    where = np.flatnonzero(batch.mask)
    targets = jt.array(batch.targets.reshape(-1)[where])
    boundaries = Stream(batch.lengths) if batch.is_stream else None
    hidden = model.hidden_states(jt.array(batch.input_ids), boundaries)  # (B, T, C)
    picked = hidden.reshape(-1, hidden.shape[-1])[jt.array(where.astype(np.int32))]  # (N, C)
    return model.target_losses(picked, targets, label_smoothing)


#: What `train` minimises: (model, batch, label smoothing) -> losses of the targets, (N,) float32.
Loss = Callable[[Any, Batch, float], jt.Var]


def batch_loss(
    model,
    batch: Batch,
    label_smoothing: float = 0.0,
    targets: int | None = None,
    loss: Loss = target_losses,
) -> jt.Var:
    """Mean loss over the targets that count, a scalar Var.

    The small constant in the denominator is microsoft/LoRA's.

    Args:
        targets: how many to divide by where the batch is one process's share; None: its own.
    """
    with rows_from(batch.first_row):
        losses = loss(model, batch, label_smoothing)
    return losses.sum() / ((targets or losses.shape[0]) + 1e-4)


def make_batch(model, examples: Sequence[TokenExample], share: slice = slice(None)) -> Batch:
    """A stream where the model reads those at no extra cost, so that nothing is padded.

    Args:
        share: which of the examples the batch is to have.
    """
    mine, before = examples[share], examples[: share.start or 0]
    if model.reads_streams:
        return stream(mine, sum(example.input_length for example in before))
    longest = max(example.input_length for example in examples)
    return collate(mine, pad_id=0, length=longest, first_row=len(before) * longest)


def validation_loss(
    model, examples: Sequence[TokenExample], batch_size: int, loss: Loss = target_losses
) -> float:
    """Mean loss over all target tokens of ``examples``, without dropout and label smoothing.

    Of several processes each computes some of the batches; the result is the same.
    """
    model.eval()
    # The longest first: what Jittor keeps of freed memory serves smaller arrays, never larger ones.
    rows = sorted(range(len(examples)), key=lambda row: -examples[row].input_length)
    starts, sums = range(0, len(rows), batch_size), []
    with jt.no_grad():
        for start in world().mine(starts):
            batch = make_batch(model, [examples[row] for row in rows[start : start + batch_size]])
            losses = loss(model, batch, 0.0)
            sums.append((losses.sum().item(), losses.shape[0]))
    totals, counts = zip(*world().interleave(sums))
    return sum(totals) / sum(counts)


def train(
    model: TunedModel,
    examples: Sequence[TokenExample],
    valid_examples: Sequence[TokenExample],
    config: TrainConfig,
    run: Path,
    make_loggers: Callable[[int, int], list] = lambda total, start: [],
    resume: bool = False,
    loss: Loss = target_losses,
    order: BatchOrder | None = None,
) -> TrainResult:
    """Train the adapter of ``model``, or whatever else of it is to be trained.

    The run folder gets ``metrics.jsonl``, ``checkpoint/`` and the one before,
    ``checkpoint.previous/``, ``adapter/`` (the last one) and, when there are validation examples,
    ``best/``. The first Ctrl-C ends the step, saves and returns; the second stops at once.

    Of several processes (`jlora.system.distributed`) each takes some examples of every batch, and
    the sums are what one process has; the first alone writes.

    Args:
        examples: what to learn from.
        valid_examples: may be empty.
        run: folder of the run.
        make_loggers: gives more loggers for (total steps, first step); metrics.jsonl is always
            written.
        resume: go on from the newest good checkpoint.
        loss: what to minimise.
        order: which examples each batch has; anything with a `BatchOrder`'s ``batch(number)`` and
            ``per_epoch``. None: as ``config`` says.

    Raises:
        UserError: a setting makes no sense, nothing is trainable, the loss is not a number, the
            adapter does not move or is not finite, or the checkpoint does not fit.
    """
    here = world()
    if not examples:
        raise UserError("no training examples; check the data file")
    named = model.trainable_parameters()
    if not named:
        raise UserError("nothing is trainable: the adapter has no parameters (is r above 0?)")
    parameters = [parameter for _, parameter in named]
    optimizer = AdamW(parameters, config.optim, groups(model, config.optim))
    if order is None:
        order = BatchOrder(
            [example.input_length for example in examples],
            config.batch_size,
            config.seed,
            group_by_length=config.group_by_length,
            shuffle=config.shuffle,
        )
    accumulate = config.grad_accumulation
    batches = (config.steps or 0) * accumulate or math.ceil(config.epochs * order.per_epoch)
    total = math.ceil(batches / accumulate)
    by_batch = config.optim.schedule_unit == "batch"
    warmup_updates = math.ceil(config.optim.warmup_steps / (accumulate if by_batch else 1))

    progress = Progress(fingerprint=fingerprint(config, examples, named))
    if resume:
        saved, tensors, optimizer_state = here.first(lambda: load_checkpoint(run))
        if saved.fingerprint != progress.fingerprint:
            raise UserError(
                f"{run}: the checkpoint belongs to other settings, data or adapter shapes; resume "
                "with the ones the run was started with, or start a new run folder"
            )
        progress = saved
        model.set_adapter_tensors(tensors)
        optimizer.load_state(optimizer_state)
    elif departed(model, here):  # each has drawn its own
        model.set_adapter_tensors(here.first(model.adapter_tensors))
    if resume and here.is_first:
        # The last run may have written a newer one, or none, before it died.
        model.save_pretrained(run / "adapter")

    loggers = Loggers([])
    if here.is_first:
        metrics = MetricsLogger(run / "metrics.jsonl", progress.step if resume else None)
        loggers = Loggers([metrics, *make_loggers(total, progress.step)])

    # For the case that the numbers run away: the adapter of the newest step with a finite loss or,
    # where copies of it are too large, the learning rate of the update to take back.
    good = lr = None
    largest = 0  # numbers of the largest batch since memory was last given back
    stopped = False
    stop = StopRequest()
    with loggers, stop:
        while progress.step < total and not stopped:
            started = time.monotonic()
            step = progress.step
            # Dropout's random numbers are a function of the seed and the step, nothing else.
            set_seed(config.seed * 1_000_003 + step)
            model.train()
            mean_loss, gradients = 0.0, None
            tokens: float = 0
            for micro in range(step * accumulate, (step + 1) * accumulate):
                rows = [examples[row] for row in order.batch(micro)]
                share = shares([example.input_length for example in rows], here.size)[here.rank]
                if not rows[share]:
                    # The random numbers are drawn as everywhere, by a graph that is never run.
                    batch_loss(model, make_batch(model, rows[:1]), loss=loss)
                    continue
                batch = make_batch(model, rows, share)
                if batch.input_ids.size > largest:
                    # What Jittor keeps of smaller batches is no use to a larger one, and would
                    # stand beside it. It comes to this a few times between two checkpoints.
                    largest = batch.input_ids.size
                    release_memory()
                targets = sum(example.target_count for example in rows)
                batch_mean = batch_loss(model, batch, config.label_smoothing, targets, loss)
                batch_mean = batch_mean / accumulate
                new = optimizer.arrays(jt.grad(batch_mean, parameters))
                if gradients is None:
                    gradients = new
                else:
                    for sum_so_far, array in zip(gradients, new):
                        sum_so_far += array
                mean_loss += batch_mean.item()
                del batch_mean, new  # with them goes the graph, and what it holds
                tokens += int(batch.lengths.sum())
            if gradients is None:  # fewer examples than processes
                gradients = [np.zeros(parameter.shape, "f") for parameter in parameters]
            mean_loss, tokens = here.total([mean_loss, tokens])
            here.sum_arrays(gradients)
            if not math.isfinite(mean_loss):
                found = f"the loss is {mean_loss} at step {step + 1}"
                raise diverged(found, model, optimizer, good, lr, run)
            # A finite loss shows that these are good; what the update makes of them, the next.
            if not optimizer.large:
                good = model.adapter_tensors()
            lr = learning_rate(config.optim, step, batches if by_batch else total, accumulate)
            optimizer.step(gradients, lr)
            del gradients

            progress.step += 1
            elapsed = time.monotonic() - started
            progress.seconds += elapsed
            if progress.step == warmup_updates + 3:
                check_adapter_moves(model)
            if progress.step % config.log_every == 0 or progress.step in (1, total):
                loggers.log(
                    {
                        "step": progress.step,
                        "loss": mean_loss,
                        "lr": lr,
                        "tokens_per_s": round(tokens / elapsed, 1),
                        "seconds": round(progress.seconds, 3),
                    }
                )

            last, stopped = progress.step == total, stop.agree()
            validates = bool(valid_examples) and (last or is_due(progress.step, config.valid_every))
            saves = last or stopped or is_due(progress.step, config.save_every)
            if (validates or saves) and not all_finite(parameters):
                found = f"the adapter holds numbers that are not finite after step {progress.step}"
                raise diverged(found, model, optimizer, good, lr, run)
            if validates:
                release_memory()  # batches of validation and of training have other sizes
                largest = 0
                valid_loss = validation_loss(model, valid_examples, config.valid_batch_size, loss)
                loggers.log({"step": progress.step, "valid_loss": valid_loss})
                if progress.improves(valid_loss):
                    progress.best_valid_loss, progress.best_step = valid_loss, progress.step
                    if here.is_first:
                        model.save_pretrained(run / "best")
            if saves:
                largest = 0
                check_same_adapter(model, here)
                if here.is_first:
                    model.save_pretrained(run / "adapter")
                    save_checkpoint(run, progress, model.adapter_tensors(), optimizer.state())
    model.eval()
    return TrainResult(progress, total, interrupted=progress.step < total)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, or never (0), happens after this one."""
    return every > 0 and step % every == 0


def all_finite(parameters: Sequence[jt.Var]) -> bool:
    """Whether no parameter holds NaN or infinity."""
    return all(bool(np.isfinite(parameter.data).all()) for parameter in parameters)


def diverged(
    found: str,
    model: TunedModel,
    optimizer: AdamW,
    good: dict[str, np.ndarray] | None,
    lr: float | None,
    run: Path,
) -> UserError:
    """The error that ends a run whose numbers ran away; the last good adapter is written before.

    Args:
        found: what was found, and at which step.
        good: the last good adapter's tensors, None where there is none or they are too large.
        lr: learning rate of the last update, None before the first; a large adapter's is undone.
    """
    kept = "no adapter was good yet"
    if good is not None:
        model.set_adapter_tensors(good)
    if good is not None or (optimizer.large and lr is not None and optimizer.undo(lr)):
        if world().is_first:
            model.save_pretrained(run / "adapter")
        kept = f"the last good adapter is in {run / 'adapter'}"
    return UserError(
        f"{found}; {kept}. Lower the learning rate (train.optim.lr) or clip the gradient "
        "(train.optim.max_grad_norm=1), and start a new run"
    )


def check_adapter_moves(model: TunedModel) -> None:
    """After a few updates every lora_B that is still zero has got no gradient.

    Raises:
        UserError: all of them are zero: the run would train nothing.
    """
    tensors = model.adapter_tensors()
    ups = {name: value for name, value in tensors.items() if name.endswith("lora_B")}
    if ups and not any(value.any() for value in ups.values()):
        raise UserError(
            f"all {len(ups)} lora_B are still zero after the first steps: no gradient reaches the "
            "adapter. Check that the learning rate is above 0 and that nothing freezes it"
        )


def departed(model: TunedModel, here: World) -> list[int]:
    """The processes whose adapters are not that of process 0."""
    if here.size == 1:
        return []
    digest = hashlib.sha256()
    for value in model.adapter_tensors().values():
        digest.update(np.ascontiguousarray(value).data)
    digests = here.gather(digest.hexdigest())
    return [rank for rank, each in enumerate(digests) if each != digests[0]]


def check_same_adapter(model: TunedModel, here: World) -> None:
    """Check that all processes hold the same numbers, as they do after equal sums of gradients.

    Raises:
        UserError: they do not.
    """
    others = ", ".join(map(str, departed(model, here)))
    if others:
        raise UserError(
            f"the adapters of processes {others} are no longer that of process 0: their "
            "machines compute differently; use machines with one kind of processor"
        )


def fingerprint(config: TrainConfig, examples: Sequence[TokenExample], named) -> str:
    """Hash of all that decides the course of a run: settings, data and trainable shapes."""
    settings = asdict(config)
    for name in ("log_every", "save_every", "valid_every", "valid_batch_size"):
        del settings[name]  # these only look at the run
    # Settings that came later count where they are used, so that older runs go on.
    optim, defaults = settings["optim"], asdict(OptimConfig())
    for name in ("min_lr_ratio", "loraplus_lr_ratio", "loraplus_lr_embedding"):
        if optim[name] == defaults[name]:
            del optim[name]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for example in examples:
        spans = [edge for span in example.spans for edge in span]
        ids = [example.prompt_length, *spans, *example.ids]
        digest.update(np.asarray(ids, np.int32).tobytes())
    for name, parameter in named:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    return digest.hexdigest()


class StopRequest:
    """Notes the first Ctrl-C, SIGTERM or SIGUSR1 for the loop; a second Ctrl-C stops at once.

    SIGUSR1 is what mpirun passes on, and what batch systems can send before the time is up.
    """

    def __enter__(self) -> StopRequest:
        self.requested = False
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                self._before[number] = signal.signal(number, self._note)
                # Jittor takes a lock that a signal has interrupted for one that failed.
                signal.siginterrupt(number, False)
            except ValueError:  # not in the main thread: signals are not ours
                break
        return self

    def agree(self) -> bool:
        """Whether any process of the run was asked; every process must ask, and gets one answer."""
        return world().total([self.requested])[0] > 0

    def _note(self, number, frame) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *exc_info) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
